"""Times whole detectors, ours and torchvision's: from a preprocessed batch to boxes, and a training step.

    python benchmarks/end_to_end.py [--out FILE.json] [--minutes 8] [--goals | --others] [--only WORD ...]
        [--skip WORD ...] [--tiny] [--no_compile]
    python benchmarks/end_to_end.py --cpu [--out FILE.json] [--only WORD ...] [--rounds 7] [--tiny]   # on_cpu.py

ResNet-50-FPN and ResNet-101-C4, 800 x 1333 and 600 x 1000 pixels, batches of 8 and 1, bfloat16 and float32. Both sides
of a case run in one process and take turns: ours (with the GPU kernels where they can run, and in plain JAX), and
torchvision's as it is and with torch.compile and channels_last; in bfloat16 cases torchvision runs under autocast and
our model has `compute_dtype="bfloat16"`; weights are float32 on both sides. Random weights and images, 90 classes.

Each case runs in its own process, so that its peak memory can be measured. The report also lists cases that failed or
were not reached in time. The cases with goals come first.
"""

import functools
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np
import suite
from fasterrcnn_jax.kernels import choice
from isolated import one_line

from fasterrcnn_jax.config import ModelConfig, TrainConfig
from fasterrcnn_jax.config.families import resnet_c4, resnet_fpn
from fasterrcnn_jax.models.detector import create_detector
from fasterrcnn_jax.models.faster_rcnn import detect
from fasterrcnn_jax.processes import AXIS, replicate
from fasterrcnn_jax.structures import Batch, GroundTruth
from fasterrcnn_jax.training.optimizer import create_optimizer
from fasterrcnn_jax.training.step import (
    create_state,
    data_parallel,
    make_train_step,
)

INPUT_SETS = 2
BOXES = 10  # ground truth in an image
# Times as many images per second as torchvision, on an H200: ResNet-50-FPN, 800 x 1333, batch 8, bfloat16.
GOALS = {"detection": 2.5, "training": 2.0}
# Rounds that both sides share; a run of some calls where a call is short.
EFFORT = measure.Effort(rounds=5, seconds=0.3, calls=20)


class Case(NamedTuple):
    family: str
    image_hw: tuple[int, int]
    batch: int
    dtype: str
    task: str

    def __str__(self) -> str:
        size = "x".join(map(str, self.image_hw))
        return f"{self.family} {size} batch {self.batch} {self.dtype} {self.task}"


def cases(*, tiny: bool) -> dict[str, Case]:
    """Returns the cases by name, the most important first."""
    sizes = ((60, 90),) if tiny else ((800, 1333), (600, 1000))
    batches = (2,) if tiny else (8, 1)
    combined = itertools.product(("resnet50_fpn", "resnet101_c4"), sizes, batches, ("bfloat16", "float32"), GOALS)
    listed = [Case(*values) for values in combined]
    # By how far a case is from the first: a run that is cut short has seen something of everything.
    first = listed[0]
    listed.sort(key=lambda case: sum(a != b for a, b in zip(case[:4], first[:4], strict=True)))
    return {str(case): case for case in listed}


def goals(*, tiny: bool) -> dict[str, float | None]:
    """Returns the goal of each case; the tiny stand-in of a case with a goal has it too."""
    listed = cases(tiny=tiny)
    first = next(iter(listed.values()))
    return {name: GOALS[case.task] if case[:4] == first[:4] else None for name, case in listed.items()}


def model_config(case: Case, *, tiny: bool) -> ModelConfig:
    config = resnet_fpn(50) if case.family == "resnet50_fpn" else resnet_c4(101)
    if tiny:
        # Too thin to tell anything; torchvision's ResNet cannot be as thin.
        config = replace(
            config,
            backbone=replace(config.backbone, name="resnet18", width=8),
            rpn=replace(config.rpn, allowed_border=None),
            train_proposals=replace(config.train_proposals, pre_nms_top_n=64, post_nms_top_n=32),
            test_proposals=replace(config.test_proposals, pre_nms_top_n=32, post_nms_top_n=16),
            roi_sampling=replace(config.roi_sampling, rois_per_image=16),
            box_head=replace(config.box_head, channels=32),
        )
    return replace(config, compute_dtype=case.dtype)


def draw_batch(rng: np.random.Generator, case: Case) -> Batch:
    """Returns images of noise, drawn on the device, in the corner of a canvas that is a multiple of 32, and boxes."""
    (height, width), count = case.image_hw, case.batch
    canvas = (-(-height // 32) * 32, -(-width // 32) * 32)
    noise = jax.random.normal(jax.random.key(int(rng.integers(2**31))), (count, height, width, 3))
    images = jnp.pad(noise, ((0, 0), (0, canvas[0] - height), (0, canvas[1] - width), (0, 0)))
    centre = rng.uniform(0.2, 0.8, (count, BOXES, 2)) * (width, height)
    half = rng.uniform(0.05, 0.2, (count, BOXES, 2)) * height
    labels = rng.integers(1, 91, (count, BOXES)).astype(np.int32)
    boxes = np.concatenate([centre - half, centre + half], axis=-1).astype(np.float32)
    image_hw = np.tile(np.float32([height, width]), (count, 1))
    ground_truth = GroundTruth(boxes, labels, np.ones(labels.shape, bool))
    index = np.arange(count, dtype=np.int32)
    return Batch(images, image_hw, np.ones((count, 2), np.float32), index, np.ones(count, bool), ground_truth)


class Prepared(NamedTuple):
    """One side of a case, compiled."""

    side: measure.Side
    compile_seconds: float
    peak_bytes: int | None
    kernels_compiled: int | str | None
    loss: float | None


def prepare_ours(
    case: Case,
    batches: list[Batch],
    implementation: choice.Implementation,
    *,
    tiny: bool,
    config: ModelConfig | None = None,
) -> Prepared:
    config = config or model_config(case, tiny=tiny)
    model = create_detector(config, tuple(f"class {i}" for i in range(1, 91)), seed=0)
    device = jax.local_devices()[0]
    before = (device.memory_stats() or {}).get("bytes_in_use", 0)
    on_device = jax.device_put(batches, device)
    kernels = loss = None
    start = time.perf_counter()
    if case.task == "detection":
        jitted = jax.jit(functools.partial(detect, implementation=implementation))
        arguments = [(model, batch.images, batch.image_hw, batch.scale) for batch in on_device]
        compiled = jitted.lower(*arguments[0]).compile()
        seconds = time.perf_counter() - start
        kernels = _said(measure.compiled_kernels, compiled.as_text())
        calls = [functools.partial(compiled, *each) for each in arguments]
        measure.block(calls[0]())
    else:
        # As train.py does, on one device.
        config = TrainConfig(steps=1000, batch_size=case.batch, learning_rate=1e-5, clip_norm=10.0)
        optimizer = create_optimizer(config)
        graphdef, state = create_state(model, optimizer, seed=0)
        step = make_train_step(graphdef, optimizer, axis_name=AXIS, implementation=implementation)
        mapped = data_parallel(step, devices=[device])
        holder = [replicate(state, devices=[device])]

        def train(batch):
            holder[0], metrics = mapped(holder[0], batch)
            return metrics

        calls = [functools.partial(train, batch) for batch in on_device]
        metrics = jax.block_until_ready(calls[0]())
        again = time.perf_counter()
        measure.block(calls[-1]())
        seconds = (again - start) - (time.perf_counter() - again)
        loss = float(sum(metrics[:4]))
    statistics = device.memory_stats()
    peak = statistics and statistics["peak_bytes_in_use"] - before
    return Prepared(measure.Side(calls, measure.block), seconds, peak, kernels, loss)


def prepare_torchvision(
    case: Case,
    batches: list[Batch],
    *,
    compiled: bool,
    tiny: bool,
    config: ModelConfig | None = None,
    build: Callable[[], Any] | None = None,
) -> Prepared:
    """Prepares the detector that `build` returns; without it, torchvision's with the parts of `config` or the case."""
    import torchvision_detectors as theirs

    torch, device = theirs.torch, measure.torch_device()
    cuda = torch.cuda if measure.on_gpu() else None
    before = cuda.memory_allocated() if cuda else 0
    if cuda:
        cuda.reset_peak_memory_stats()
    torch.backends.cudnn.benchmark = True  # one shape, so the fastest algorithm is found once
    model = build() if build else theirs.create(config or model_config(case, tiny=tiny), 90)
    model.train(case.task == "training")
    layout = torch.channels_last if compiled else torch.contiguous_format
    if compiled:
        theirs.compile_parts(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-5, momentum=0.9, weight_decay=5e-4)
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=case.dtype == "bfloat16")
    sizes = [case.image_hw] * case.batch

    def inputs(batch):
        images = measure.to_torch(batch.images).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        boxes, labels = (measure.to_torch(x) for x in batch.ground_truth[:2])
        return images, [{"boxes": b, "labels": n.long()} for b, n in zip(boxes, labels, strict=True)]

    def detect(images, _):
        with torch.inference_mode(), autocast():
            return theirs.forward(model, images, sizes)

    def train(images, targets):
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = sum(theirs.forward(model, images, sizes, targets).values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        return loss.detach()

    run = detect if case.task == "detection" else train
    calls = [functools.partial(run, *inputs(batch)) for batch in batches]
    start = time.perf_counter()
    result = calls[0]()
    measure.torch_wait()
    again = time.perf_counter()
    calls[-1]()
    measure.torch_wait()
    seconds = (again - start) - (time.perf_counter() - again)
    peak = cuda and cuda.max_memory_allocated() - before
    loss = float(result) if case.task == "training" else None
    return Prepared(measure.Side(calls, measure.torch_wait), seconds, peak, None, loss)


def measure_case(
    name: str,
    without: set[str],
    turn: Callable[[str], None],
    keep: Callable[[dict], None],
    *,
    tiny: bool,
    compiled: bool,
) -> dict:
    """Returns the figures of one case; calls `keep` with those so far."""
    case = cases(tiny=tiny)[name]
    rng = np.random.default_rng(0)
    batches = [draw_batch(rng, case) for _ in range(INPUT_SETS)]
    preparations: dict[str, Callable[[], Prepared]] = {}
    prepare = functools.partial(prepare_ours, case, batches, tiny=tiny)
    with_kernels = choice.unsupported_here() is None
    if with_kernels:
        preparations["ours, kernels"] = functools.partial(prepare, "mosaic")
    plain = functools.partial(prepare, "xla")
    if not with_kernels:
        preparations["ours, plain JAX"] = plain
    if measure.peer()[0]:
        prepare = functools.partial(prepare_torchvision, case, batches, tiny=tiny)
        preparations["torchvision eager"] = functools.partial(prepare, compiled=False)
        if compiled:
            preparations["torchvision compiled, channels_last"] = functools.partial(prepare, compiled=True)
    # No goal needs it beside the kernels.
    preparations.setdefault("ours, plain JAX", plain)

    prepared, early, failed = {}, {}, {}

    def figures(times: dict, failed_later: dict) -> dict:
        sides = {side: _of_side(case, prepared[side], found) for side, found in (early | times).items()}
        return {"sides": sides, "goal": goals(tiny=tiny)[name], **_ratio(sides), "failed": failed | failed_later}

    for side, prepare in preparations.items():
        if side in without:
            continue
        turn(side)
        try:
            prepared[side] = prepare()
            early |= measure.interleaved({side: prepared[side].side}, measure.FIRST, turn)[0]
            keep(figures({}, {}))
        except Exception as error:
            failed[side] = one_line(error)
            measure.require_device()
    sides = {name: side.side for name, side in prepared.items()}
    effort = measure.QUICK if tiny else EFFORT
    times, failed_later = measure.interleaved(sides, effort, turn, lambda times: keep(figures(times, {})))
    early.clear()
    result = figures(times, failed_later)
    for side, found in result["sides"].items():
        turn(side)
        found["kernels_launched"] = _said(
            measure.profiled_kernels, prepared[side].side.calls[0], prepared[side].side.wait
        )
    return result


def _of_side(case: Case, prepared: Prepared, times: measure.Times) -> dict:
    return {
        **times._asdict(),
        "images_per_second": 1e3 * case.batch / times.ms,
        "compile_seconds": prepared.compile_seconds,
        "peak_bytes": prepared.peak_bytes,
        "kernels_compiled": prepared.kernels_compiled,
        "first_loss": prepared.loss,
        "finite": prepared.loss is None or math.isfinite(prepared.loss),
    }


def _said(count: Callable[..., int | None], *arguments: Any) -> int | str | None:
    """Returns a count, or why there is none: no time is lost because something cannot be counted."""
    try:
        return count(*arguments)
    except Exception as error:
        return one_line(error)


def _ratio(figures: dict) -> dict:
    def fastest(start):
        rates = {side: found["images_per_second"] for side, found in figures.items() if side.startswith(start)}
        return max(rates, key=rates.get, default=None)

    ours, theirs = fastest("ours"), fastest("torchvision")
    both = ours and theirs
    ratio = figures[ours]["images_per_second"] / figures[theirs]["images_per_second"] if both else None
    return {"best": ours, "fastest_of_torchvision": theirs, "times_as_fast": ratio}


def _cells(result: dict) -> tuple:
    def figures(side):
        if side is None:
            return None, None, None
        found = result["sides"][side]
        peak = found["peak_bytes"]
        return side, f"{found['images_per_second']:.2f}", None if peak is None else f"{peak / 2**30:.2f}"

    ratio = result["times_as_fast"]
    sides = *figures(result["best"]), *figures(result["fastest_of_torchvision"])
    return *sides, None if ratio is None else f"{ratio:.2f}", result["goal"]


SUITE = suite.Suite(
    script=__file__,
    description=__doc__,
    report="e2e.json",
    goals=lambda tiny: goals(tiny=tiny),
    measure_case=measure_case,
    environment=lambda _: measure.environment(),
    header=("ours", "img/s", "GiB", "torchvision", "img/s", "GiB", "ratio", "goal"),
    cells=_cells,
    silence=240.0,
    each_alone=True,
)

if __name__ == "__main__":
    if "--cpu" in sys.argv:
        import on_cpu

        sys.exit(on_cpu.main())
    sys.exit(suite.run(SUITE))
