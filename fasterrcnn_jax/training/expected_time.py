"""Estimates how long a training will take, from its first steps."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from fasterrcnn_jax.config import ImageConfig
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.data.transforms import canvases_of
from fasterrcnn_jax.inference.drawing import shown_positions

# The estimate is made after this many steps.
FIRST_STEPS = 10
# Seconds of detection per image over seconds of training per image: the forward pass is about a third of a step.
DETECTION = 0.4
# Seconds to compile detection on one canvas over seconds to compile a training step.
DETECTION_COMPILATION = 0.6
# Seconds to write a small checkpoint, and bytes per second of a large one: two CPU cores, with the digests.
CHECKPOINT, CHECKPOINT_RATE = 0.3, 60e6


class TimedStep(NamedTuple):
    canvas: tuple[int, int]  # size of its images; the first step on a canvas compiles the network
    seconds: float


class Evaluations(NamedTuple):
    """The evaluations of a training."""

    number: int
    images: int  # in each of them
    canvases: frozenset[tuple[int, int]]  # of these images
    shown: int = 0  # images whose proposals are computed once more, to be drawn

    @classmethod
    def of(cls, dataset: Dataset, image: ImageConfig, *, steps: int, every: int) -> "Evaluations":
        """Returns the evaluations on a data set after every `every` steps, or after the last step if `every` is 0."""
        number, shown = math.ceil(steps / every) if every else 1, len(shown_positions(dataset))
        return cls(number, len(dataset.records), canvases_of(dataset, image), shown)


def expected_seconds(
    timed: Sequence[TimedStep],
    *,
    steps: int,
    batch_size: int,
    canvases: frozenset[tuple[int, int]],
    evaluations: Sequence[Evaluations],
    checkpoints: int = 0,
    checkpoint_bytes: int = 0,
) -> float:
    """Returns the expected seconds after the timed steps.

    Args:
      timed: the first steps of this start.
      steps: number of steps that are left.
      canvases: canvases of the training images.
      evaluations: detections in sets of images that are left; `canvases` of each: those that are not compiled yet.
      checkpoints: number of checkpoints that are left.
      checkpoint_bytes: size of each.
    """
    first, later = {}, []
    for step in timed:
        if step.canvas in first:
            later.append(step.seconds)
        else:
            first[step.canvas] = step.seconds
    typical = statistics.median(later or first.values())
    compilation = max(0.0, statistics.mean(first.values()) - typical)

    def in_batches(images: int) -> int:
        # The last batch is filled up.
        return math.ceil(images / batch_size) * batch_size

    images = sum(of.number * (in_batches(of.images) + in_batches(of.shown)) for of in evaluations)
    # Detection is compiled once for each canvas.
    new = frozenset().union(*(detected.canvases for detected in evaluations if detected.number))
    return (
        steps * typical
        + compilation * len(canvases - set(first))
        + typical / batch_size * DETECTION * images
        + compilation * DETECTION_COMPILATION * len(new)
        + checkpoints * (CHECKPOINT + checkpoint_bytes / CHECKPOINT_RATE)
    )


def in_words(seconds: float) -> str:
    """Returns a duration such as 45 s, 6 min 10 s, 12 min or 3 h 20 min."""
    if seconds < 89.5:
        return f"{seconds:.0f} s"
    if seconds < 595:
        tens = round(seconds / 10) * 10
        return f"{tens // 60} min {tens % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
