"""`end_to_end.py --cpu`: ours and torchvision's in one process, in turns, with the load of the machine.

    python benchmarks/end_to_end.py --cpu [--out FILE.json] [--only WORD ...] [--rounds 7] [--alone SIDE] [--tiny]

Whole detectors: detection and training step of ResNet-50-FPN on 600 x 800 pixels, batch 1; the detector of
configs/finetune.py against torchvision's `FasterRCNN` on the same backbone in the same sizes, and against
torchvision's detector for small devices (MobileNetV3). Operations: NMS on boxes spread evenly, on boxes around objects
as a trained RPN has them, and per class; RoIAlign. float32, random weights. `predict` starts from uint8 pixels and
includes resize and normalisation on both sides; the other whole cases start from a preprocessed batch.

Both sides run in each round. A ratio is torchvision's time by ours; reported are the median over the rounds, the
smallest and the largest. Figures of a machine on which other programs run say little, so the report has the load before
and after each case. `--alone ours` or `--alone torchvision` runs one side of one case and reports the peak memory of
the process. Compare the reports of two runs.
"""

import argparse
import functools
import gc
import os
import resource
import statistics
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import end_to_end
import jax
import measure
import numpy as np
import operations
from end_to_end import Case
from isolated import one_line
from operations import Operation

from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.config.text import load_config
from fasterrcnn_jax.inference.prediction import predict
from fasterrcnn_jax.models.detector import create_detector

FINETUNE = Path(__file__).resolve().parents[1] / "configs" / "finetune.py"
CLASSES = 90
SIDES = (240, 320)  # of an image after the resize, in the detectors of configs/finetune.py
OURS, THEIRS = "ours", "torchvision"
# A whole call takes long enough to be timed alone.
WHOLE = measure.Effort(rounds=7, seconds=0.0, calls=2)
OPERATION = measure.Effort(rounds=7, seconds=0.05, calls=50)


def finetune_model(*, tiny: bool) -> ModelConfig:
    """Returns the model of configs/finetune.py, for images of 240 x 320 pixels."""
    model = load_config(FINETUNE).model
    short, long = (48, 64) if tiny else SIDES
    canvas = (-(-short // 32) * 32, -(-long // 32) * 32)
    canvases = (canvas, canvas[::-1])
    model = replace(model, image=replace(model.image, short_side=short, long_side=long, canvases=canvases))
    if not tiny:
        return model
    return replace(
        model,
        backbone=replace(model.backbone, width=16),
        train_proposals=replace(model.train_proposals, pre_nms_top_n=64, post_nms_top_n=32),
        test_proposals=replace(model.test_proposals, pre_nms_top_n=32, post_nms_top_n=16),
        roi_sampling=replace(model.roi_sampling, rois_per_image=16),
    )


# A builder returns the sides of a case, prepared. The figures are milliseconds of a call.


def whole(wanted: Collection[str], case: Case, *, tiny: bool, mobilenet: bool = False) -> dict[str, measure.Side]:
    """Returns the wanted sides of a case that starts from a preprocessed batch; torchvision's first."""
    rng = np.random.default_rng(0)
    batches = [end_to_end.draw_batch(rng, case) for _ in range(end_to_end.INPUT_SETS)]
    config = finetune_model(tiny=tiny) if case.family == "finetune" else None
    sides = {}
    if THEIRS in wanted and measure.peer()[0]:
        options: dict[str, Any] = dict(compiled=False, tiny=tiny, config=config)
        if mobilenet:
            import torchvision_detectors as theirs

            options["build"] = functools.partial(theirs.mobilenet, CLASSES, case.image_hw)
        sides[THEIRS] = end_to_end.prepare_torchvision(case, batches, **options).side
    if OURS in wanted:
        sides[OURS] = end_to_end.prepare_ours(case, batches, "xla", tiny=tiny, config=config).side
    return sides


def prediction(wanted: Collection[str], *, tiny: bool, mobilenet: bool) -> dict[str, measure.Side]:
    """Returns the wanted sides of the way from an image of uint8 pixels to boxes in its pixels."""
    config = finetune_model(tiny=tiny)
    image_hw = (96, 128) if tiny else (480, 640)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (*image_hw, 3), dtype=np.uint8) for _ in range(end_to_end.INPUT_SETS)]
    names = tuple(f"class {i}" for i in range(1, CLASSES + 1))
    sides = {}
    if THEIRS in wanted and measure.peer()[0]:
        import torchvision_detectors as theirs

        torch, sizes = theirs.torch, (config.image.short_side, config.image.long_side)
        if mobilenet:
            their_model = theirs.mobilenet(CLASSES, sizes).eval()
        else:
            their_model = theirs.create(config, CLASSES).eval()
            their_model.transform.min_size, their_model.transform.max_size = (sizes[0],), sizes[1]

        def detect(image):
            with torch.inference_mode():
                return their_model([torch.from_numpy(image).permute(2, 0, 1).float() / 255])[0]

        sides[THEIRS] = measure.Side([functools.partial(detect, image) for image in images], measure.torch_wait)
    if OURS in wanted:
        model = create_detector(config, names, seed=0)
        # A `Prediction` is in NumPy, so nothing is waited for.
        sides[OURS] = measure.Side([functools.partial(predict, model, image) for image in images], lambda _: None)
    return sides


def operation(
    wanted: Collection[str], build: Callable[[], Operation]
) -> tuple[dict[str, measure.Side], float | None, float]:
    """Returns the wanted sides of an operation, how far the results are apart, and how far they may be."""
    case = build()
    rng = np.random.default_rng(0)
    inputs = [case.draw(rng) for _ in range(2)]
    builders, waits = {}, {OURS: measure.block, THEIRS: measure.torch_wait}
    torch, torchvision = measure.peer()
    if THEIRS in wanted and torch:
        sides = case.theirs(torch, torchvision)
        builders[THEIRS] = next(build for name, build in sides.items() if "eager" in name)
    if OURS in wanted:
        builders[OURS] = case.ours("xla")
    calls = {side: [build(*arrays) for arrays in inputs] for side, build in builders.items()}
    apart = case.difference(calls[OURS][0](), calls[THEIRS][0]()) if len(calls) == 2 else None
    return {side: measure.Side(calls[side], waits[side]) for side in calls}, apart, case.limit


def cases(*, tiny: bool) -> dict[str, tuple[float | None, Callable[[Collection[str]], Any]]]:
    """Returns (goal, builder of the wanted sides) by name. A goal is how many times as fast as torchvision ours should
    be.
    """
    large, small = ((60, 90), (48, 64)) if tiny else ((600, 800), SIDES)
    batch = 2 if tiny else 4
    listed: dict[str, tuple[float | None, Callable[[Collection[str]], Any]]] = {}
    for task, goal in (("detection", 1 / 0.6), ("training", 1 / 0.9)):
        case = Case("resnet50_fpn", large, 1, "float32", task)
        listed[str(case)] = goal, functools.partial(whole, case=case, tiny=tiny)
    case = Case("finetune", small, batch, "float32", "training")
    listed[str(case)] = 1.2, functools.partial(whole, case=case, tiny=tiny)
    listed[f"{case}, MobileNetV3-Large-320-FPN beside it"] = (
        None,
        functools.partial(whole, case=case, tiny=tiny, mobilenet=True),
    )
    listed["finetune 480x640 pixels, predict"] = 1.2, functools.partial(prediction, tiny=tiny, mobilenet=False)
    listed["finetune 480x640 pixels, predict, MobileNetV3-Large-320-FPN beside it"] = (
        None,
        functools.partial(prediction, tiny=tiny, mobilenet=True),
    )
    one, align = functools.partial, functools.partial(operations.regions_case, operator="align", dtype="float32")
    nms = one(operations.nms_case, tiny=tiny, batch=1, goal=None)
    fpn, c4 = (maps._replace(batch=1) for maps in (operations.fpn_maps(tiny), operations.c4_maps(tiny)))
    for name, goal, build in (
        ("nms 12000 to 2000, even boxes", 10.0, one(nms, boxes=operations.even_boxes)),
        ("nms 12000 to 2000, boxes on objects", 2.0, one(nms, boxes=operations.boxes_on_objects)),
        (
            "nms per class, 90 x 1000, one in 20 passes",
            2.0,
            one(operations.class_nms_case, tiny=tiny, batch=1, passing=0.049),
        ),
        ("roi_align 512, C=256, pyramid, forward", 1 / 0.15, one(align, maps=fpn, backward=False, goal=None)),
        ("roi_align 512, C=256, pyramid, backward", 1 / 0.15, one(align, maps=fpn, backward=True, goal=None)),
        ("roi_align 128, C=1024, 14x14, forward", 1 / 0.25, one(align, maps=c4, backward=False, goal=None)),
        ("roi_align 128, C=1024, 14x14, backward", 1 / 0.3, one(align, maps=c4, backward=True, goal=None)),
    ):
        listed[name] = goal, functools.partial(operation, build=build)
    return listed


def measured(
    goal: float | None,
    build: Callable[[Collection[str]], Any],
    effort: measure.Effort | None,
    *,
    wanted: Collection[str] = (OURS, THEIRS),
    tiny: bool,
) -> dict:
    """Returns the figures of one case."""
    before = os.getloadavg()[0]
    built = build(wanted)
    sides, apart, limit = built if isinstance(built, tuple) else (built, None, 0.0)
    default = OPERATION if isinstance(built, tuple) else WHOLE
    effort = measure.QUICK if tiny else default._replace(rounds=effort.rounds) if effort else default
    runs: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(effort.rounds):
        # One round at a time, so that the ratio of each is known.
        times, failed = measure.interleaved(sides, effort._replace(rounds=1), lambda _: None)
        if failed:
            raise RuntimeError(str(failed))
        for side, found in times.items():
            runs[side].append(found.ms)
    ratios = [theirs / ours for ours, theirs in zip(runs.get(OURS, []), runs.get(THEIRS, []), strict=False)]
    return {
        "times_ms": {
            side: {"ms": statistics.median(ms), "fastest_ms": min(ms), "slowest_ms": max(ms)}
            for side, ms in runs.items()
        },
        "times_as_fast": statistics.median(ratios) if ratios else None,
        "times_as_fast_from_to": [min(ratios), max(ratios)] if ratios else None,
        "goal": goal,
        "load": [before, os.getloadavg()[0]],
        "difference": apart,
        "agrees": None if apart is None else apart <= limit,
        # The largest memory of the process so far; Linux counts it in KiB.
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 if len(wanted) == 1 else None,
    }


def row(name: str, result: dict) -> tuple:
    """Returns the cells of a case in the table."""
    if "error" in result:
        return (name, result["error"], *[None] * 6)
    times, spread = result["times_ms"], result["times_as_fast_from_to"]
    both = [f"{times[side]['ms']:.4g}" if side in times else None for side in (OURS, THEIRS)]
    ratio = spread and f"{result['times_as_fast']:.2f} ({spread[0]:.2f} to {spread[1]:.2f})"
    goal = result["goal"] and f"{result['goal']:.2f}"
    load = "{:.1f} to {:.1f}".format(*result["load"])
    return name, *both, ratio, goal, load, {True: "yes", False: "NO", None: None}[result["agrees"]]


def main(argv: list[str] | None = None) -> int:
    """Runs the selected cases; the exit status is 1 if one fails or differs from torchvision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="what chooses this part")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "cpu.json", help="file for the JSON report")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="only cases with every WORD in their name"
    )
    parser.add_argument("--rounds", type=int, help="rounds of every case, in which the sides take turns")
    parser.add_argument("--alone", choices=(OURS, THEIRS), help="run one side, and report the memory of the process")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes for a quick test; the times mean nothing")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # before anything asks for a device
    listed = cases(tiny=arguments.tiny)
    chosen = {name: case for name, case in listed.items() if all(word in name for word in arguments.only)}
    if " ".join(arguments.only) in listed:  # a whole name can be part of another one
        chosen = {name: listed[name] for name in [" ".join(arguments.only)]}
    if not chosen:
        parser.error(f"no case has all of {arguments.only} in its name; there are: {', '.join(listed)}")
    if arguments.alone and len(chosen) > 1:
        parser.error(f"--alone takes one case: name it with --only; {len(chosen)} were named")
    if arguments.alone == THEIRS and not measure.peer()[0]:
        parser.error("torchvision is not installed")
    effort = WHOLE._replace(rounds=arguments.rounds) if arguments.rounds else None
    wanted = (arguments.alone,) if arguments.alone else (OURS, THEIRS)
    results, environment = {}, measure.environment() | {"cores": len(os.sched_getaffinity(0))}
    for name, (goal, build) in chosen.items():
        try:
            results[name] = measured(goal, build, effort, wanted=wanted, tiny=arguments.tiny)
        except Exception as error:
            results[name] = {"error": one_line(error)}
        print("  ".join(str(cell) for cell in row(name, results[name]) if cell is not None), flush=True)
        if peak := results[name].get("peak_memory_mb"):
            print(f"the process held at most {peak:,.0f} MB", flush=True)
        measure.write_report(arguments.out, {"tiny": arguments.tiny, **environment, "cases": results})
        # The sides of a case hold models and compiled programs.
        gc.collect()
        jax.clear_caches()
    print()
    header = ("case", "ours, ms", "torchvision, ms", "times as fast", "goal", "load", "agrees")
    measure.print_table(header, [row(name, result)[: len(header)] for name, result in results.items()])
    return 1 if any("error" in result or result["agrees"] is False for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
