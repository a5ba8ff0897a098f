"""Prints the share of each stage of the detector in a detection or a training step, forward and backward.

    python benchmarks/stages.py [--out FILE.json] [--only WORD ...] [--config FILE] [--calls 3] [--tiny]

XLA runs many small operations, and each of them carries the name of the part of the program that it comes from
(`jax.named_scope`). The profiler of JAX times the operations of some calls; this script adds their times by stage. An
operation that XLA has fused from two stages counts for one of them. Loops are left out, because their operations are
timed by themselves. The cases are those of `end_to_end.py`, or one of a configuration file.
"""

import argparse
import collections
import functools
import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import end_to_end
import jax
import measure
import numpy as np
from end_to_end import Case
from jax.sharding import Mesh, PartitionSpec

from fasterrcnn_jax.config import TrainConfig
from fasterrcnn_jax.config.text import load_config
from fasterrcnn_jax.models.detector import create_detector
from fasterrcnn_jax.models.faster_rcnn import detect
from fasterrcnn_jax.processes import AXIS
from fasterrcnn_jax.training.optimizer import create_optimizer
from fasterrcnn_jax.training.step import create_state, make_train_step

# The scopes of the library, inner ones before those around them.
STAGES = (
    *("top_k", "nms", "backbone", "fpn", "rpn_head", "anchor_targets", "proposals", "rpn_losses", "roi_targets"),
    *("roi_features", "box_head", "box_losses", "postprocess", "optimizer"),
)
OTHER = "other"


def stage_of(name: str) -> tuple[str, str]:
    """Returns the stage of an operation by its name in the program, and the pass it belongs to."""
    words = set(re.findall(r"\w+", name))
    stage = next((stage for stage in STAGES if stage in words), OTHER)
    return stage, "backward" if "transpose" in words and stage != OTHER else "forward"


def names_of(program: str) -> dict[str, str]:
    """Returns the names, in the program, of the operations that XLA has made of it; loops are left out."""
    found = {}
    for operation, kind, rest in re.findall(r"%?([\w.-]+) = (?:\(.*?\)|\S+) ([a-z][\w-]*)\((.*)", program):
        name = re.search(r'op_name="([^"]*)"', rest)
        if kind not in ("while", "conditional", "call"):
            found[operation] = name[1] if name else ""
    return found


def milliseconds(events: Iterable[dict], names: dict[str, str], calls: int) -> dict[tuple[str, str], float]:
    """Returns the time of one call by stage and pass, from the events of a trace."""
    total = collections.Counter()
    for event in events:
        operation = event.get("args", {}).get("hlo_op")
        if event.get("ph") == "X" and operation in names:
            total[stage_of(names[operation])] += event["dur"] / 1e3 / calls
    return dict(total)


def profiled(call: Callable[[], Any], program: str, calls: int) -> dict[tuple[str, str], float]:
    """Returns the milliseconds of processor time of one call by stage and pass."""
    measure.block(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                measure.block(call())
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    return milliseconds(events, names_of(program), calls)


def program_of(case: Case, *, tiny: bool, config: Any) -> tuple[Callable[[], Any], str]:
    """Returns a call of a compiled detection or training step, and its optimised program."""
    config = config or end_to_end.model_config(case, tiny=tiny)
    batch = end_to_end.draw_batch(np.random.default_rng(0), case)
    model = create_detector(config, tuple(f"class {i}" for i in range(1, 91)), seed=0)
    if case.task == "detection":
        arguments = (model, batch.images, batch.image_hw, batch.scale)
        compiled = jax.jit(detect).lower(*arguments).compile()
        return functools.partial(compiled, *arguments), compiled.as_text()
    optimizer = create_optimizer(TrainConfig(steps=1000, batch_size=case.batch, learning_rate=1e-5, clip_norm=10.0))
    graphdef, state = create_state(model, optimizer, seed=0)
    one, split = PartitionSpec(), PartitionSpec(AXIS)
    step = jax.shard_map(
        make_train_step(graphdef, optimizer, axis_name=AXIS),
        mesh=Mesh(np.array(jax.local_devices()[:1]), (AXIS,)),
        in_specs=(one, split),
        out_specs=one,
        check_vma=False,
    )
    compiled = jax.jit(step).lower(state, batch).compile()
    return functools.partial(compiled, state, batch), compiled.as_text()


def rows_of(times: dict[tuple[str, str], float]) -> list[tuple[str, str, str, str]]:
    """Returns a row for each stage, the largest first, and one for the whole."""
    whole = sum(times.values())
    stages = sorted({stage for stage, _ in times}, key=lambda stage: -_both(times, stage))
    rows = [
        (
            stage,
            *(f"{times.get((stage, of_pass), 0.0):.1f}" for of_pass in ("forward", "backward")),
            f"{100 * _both(times, stage) / whole:.1f} %",
        )
        for stage in stages
    ]
    both = [sum(time for (_, named), time in times.items() if named == of_pass) for of_pass in ("forward", "backward")]
    return [*rows, ("all", *(f"{time:.1f}" for time in both), "100 %")]


def _both(times: dict[tuple[str, str], float], stage: str) -> float:
    return sum(time for (named, _), time in times.items() if named == stage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "stages.json", help="file for the JSON report")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="only cases with every WORD in their name"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the model of this file, on 4 images of 240 x 320")
    parser.add_argument("--calls", type=int, default=3, help="calls that are timed")
    parser.add_argument("--tiny", action="store_true", help="thin models and small images: tests this script")
    arguments = parser.parse_args()
    config, listed = None, end_to_end.cases(tiny=arguments.tiny)
    if arguments.config:
        image_hw = (60, 90) if arguments.tiny else (240, 320)
        config = load_config(arguments.config).model
        side = max(image_hw)
        image = replace(config.image, canvases=((side, side),), short_side=side, long_side=side, pixel_dtype="float32")
        config = replace(config, image=image)
        cases = [Case(arguments.config.stem, image_hw, 4, "float32", task) for task in ("detection", "training")]
        listed = {str(case): case for case in cases}
    found = {}
    for name, case in listed.items():
        if all(word in name for word in arguments.only):
            call, program = program_of(case, tiny=arguments.tiny, config=config)
            times = profiled(call, program, arguments.calls)
            print(f"\n{name}: milliseconds of one call\n")
            measure.print_table(("stage", "forward", "backward", "share"), rows_of(times))
            found[name] = {f"{stage} {of_pass}": time for (stage, of_pass), time in times.items()}
    measure.write_report(arguments.out, {"environment": measure.environment(), "milliseconds": found})


if __name__ == "__main__":
    main()
