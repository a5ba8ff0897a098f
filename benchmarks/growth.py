"""Measures how time and memory grow with the work, and fits an exponent to each: 1 is linear.

    python benchmarks/growth.py [--only WORD ...] [--out FILE.json] [--tiny]

One quantity grows at a time: the area of the images, the batch, the proposals, the classes, the ground-truth boxes.
The detector is a ResNet-18-FPN with random weights. Detection and a training step are timed, the fastest of three
calls. The memory is what the compiler plans for the program beside its inputs and results. A row of `check` compares
the boxes of one image with each other. The exponent is the slope of a line through the logarithms of the last three
points: the first ones have costs that do not grow.
"""

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import measure  # first: it makes the checkout importable
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fasterrcnn_jax.config import ModelConfig, TrainConfig, families
from fasterrcnn_jax.models.detector import create_detector
from fasterrcnn_jax.models.faster_rcnn import detect
from fasterrcnn_jax.processes import AXIS
from fasterrcnn_jax.structures import Batch, GroundTruth
from fasterrcnn_jax.training.optimizer import create_optimizer
from fasterrcnn_jax.training.step import create_state, make_train_step


class Size(NamedTuple):
    """The work of one point."""

    side: int = 256  # of the square canvas, in pixels
    batch: int = 1
    proposals: int = 256
    classes: int = 20
    boxes: int = 16  # slots for ground truth in each image; all are used


GROWING: dict[str, Sequence[int]] = {
    "side": (128, 256, 384, 512),
    "batch": (1, 2, 4, 8),
    "proposals": (64, 256, 1024, 2048),
    "classes": (20, 80, 320, 1203),
    "boxes": (1, 16, 128, 512, 2000),
}
TINY: dict[str, Sequence[int]] = {"side": (64, 96), "classes": (2, 4)}
CHECKED = (100, 1_000, 4_000, 16_000)  # boxes of an image


class Point(NamedTuple):
    value: int
    seconds: float
    bytes: int


def configuration(size: Size) -> ModelConfig:
    """Returns the detector of a point; as many boxes are given to the head in training as in detection."""
    config = families.resnet_fpn(18)
    per_level = max(256, size.proposals)
    return replace(
        config,
        image=replace(config.image, short_side=size.side, long_side=size.side, canvases=((size.side, size.side),)),
        backbone=replace(config.backbone, width=16),
        train_proposals=replace(config.train_proposals, pre_nms_top_n=per_level, post_nms_top_n=size.proposals),
        test_proposals=replace(config.test_proposals, pre_nms_top_n=per_level, post_nms_top_n=size.proposals),
        roi_sampling=replace(config.roi_sampling, rois_per_image=size.proposals),
    )


def batch_of(size: Size) -> Batch:
    """Returns random images with random boxes."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0.0, 0.7 * size.side, (size.batch, size.boxes, 2))
    sides = rng.uniform(0.05 * size.side, 0.3 * size.side, corners.shape)
    ground_truth = GroundTruth(
        np.concatenate([corners, corners + sides], axis=-1).astype(np.float32),
        rng.integers(1, size.classes + 1, (size.batch, size.boxes)).astype(np.int32),
        np.ones((size.batch, size.boxes), bool),
    )
    return Batch(
        images=rng.standard_normal((size.batch, size.side, size.side, 3), np.float32),
        image_hw=np.full((size.batch, 2), size.side, np.float32),
        scale=np.ones((size.batch, 2), np.float32),
        image_index=np.arange(size.batch, dtype=np.int32),
        image_valid=np.ones(size.batch, bool),
        ground_truth=ground_truth,
    )


def programs(size: Size) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Yields (name, function, arguments) of detection and of the training step."""
    names = tuple(f"class{number}" for number in range(1, size.classes + 1))
    model = create_detector(configuration(size), names, seed=0)
    batch = batch_of(size)
    yield "detection", detect, (model, batch.images, batch.image_hw, batch.scale)
    optimizer = create_optimizer(TrainConfig(steps=1, batch_size=size.batch, learning_rate=1e-3))
    graphdef, state = create_state(model, optimizer, seed=0)
    step = jax.shard_map(
        make_train_step(graphdef, optimizer, axis_name=AXIS),
        mesh=Mesh(np.array(jax.devices()[:1]), (AXIS,)),
        in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    yield "training step", step, (state, batch)


def point(value: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Point:
    """Returns the fastest of three calls and the memory that the compiler plans."""
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    return Point(value, min(seconds), compiled.memory_analysis().temp_size_in_bytes)


def checked(values: Sequence[int]) -> list[Point]:
    """Returns the cost of comparing the boxes of one image, as `fasterrcnn-jax check` does."""
    from fasterrcnn_jax.data.check import coinciding
    from fasterrcnn_jax.data.records import ImageRecord, box_areas

    points = []
    for value in values:
        rng = np.random.default_rng(0)
        corners = rng.uniform(0.0, 4000.0, (value, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(5.0, 60.0, (value, 2))], axis=1).astype(np.float32)
        flags = np.zeros(value, bool)
        record = ImageRecord(
            "0", Path("0"), (4096, 4096), boxes, np.ones(value, np.int32), flags, flags, box_areas(boxes)
        )
        tracemalloc.start()
        start = time.perf_counter()
        list(coinciding(record))
        points.append(Point(value, time.perf_counter() - start, tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
    return points


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """Returns the slope of the line through the logarithms of the last three points."""
    return float(np.polyfit(np.log(values[-3:]), np.log(costs[-3:]), 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help=f"of {', '.join(GROWING)}, check")
    parser.add_argument("--tiny", action="store_true", help="sizes that tell nothing, to try the script")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "growth.json")
    arguments = parser.parse_args()
    chosen, found = arguments.only, {}
    for name, values in (TINY if arguments.tiny else GROWING).items():
        if chosen and name not in chosen:
            continue
        for value in values:
            for program, function, inputs in programs(Size()._replace(**{name: value})):
                found.setdefault((program, name), []).append(point(value, function, inputs))
                print(f"{program}, {name} {value}: {found[program, name][-1]}", file=sys.stderr, flush=True)
    if not chosen or "check" in chosen:
        found["check", "boxes"] = checked(CHECKED[:2] if arguments.tiny else CHECKED)
    rows, report = [], []
    for (program, name), points in found.items():
        # The cost is compared with the area, which is what grows.
        values = [value**2 if name == "side" else value for value in (point.value for point in points)]
        of_time, of_memory = (
            exponent(values, [point.seconds for point in points]),
            exponent(values, [point.bytes for point in points]),
        )
        shown = " ".join(
            f"{point.value}: {1e3 * point.seconds:.0f} ms, {point.bytes / 1e6:.0f} MB;" for point in points
        )
        label = "area of the image, by its side" if name == "side" else name
        rows.append([program, label, shown, f"{of_time:.2f}", f"{of_memory:.2f}"])
        report.append(
            {
                "program": program,
                "grows": label,
                "points": [point._asdict() for point in points],
                "exponent_of_time": of_time,
                "exponent_of_memory": of_memory,
            }
        )
    measure.print_table(("program", "grows", "points", "exponent of time", "of memory"), rows)
    measure.write_report(arguments.out, {**measure.environment(), "growth": report})
    return 0


if __name__ == "__main__":
    sys.exit(main())
