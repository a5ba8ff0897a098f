"""Holds the detections and the objects of all images in flat arrays: one row per box, with its image.

Shapes: D detections and G objects of all images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fasterrcnn_jax.data.records import Dataset, ImageDetections


class FlatDetections(NamedTuple):
    """The detections of all images, in the order of the images and in the order given within an image."""

    image: np.ndarray  # [D] int64: position of the image
    # [D] int64: position among the detections of the image
    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride] - a tuple's index, which nobody calls
    label: np.ndarray  # [D] int64, 1..K
    box: np.ndarray  # [D, 4] float32
    score: np.ndarray  # [D] float32

    def rows(self, chosen: np.ndarray) -> "FlatDetections":
        """Returns the rows at the positions, or with True, in `chosen`."""
        return FlatDetections(*(column[chosen] for column in self))


class FlatObjects(NamedTuple):
    """The objects of all images, in the order of the records."""

    image: np.ndarray  # [G] int64: position of the record
    # [G] int64: position among the objects of the record
    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride] - a tuple's index, which nobody calls
    label: np.ndarray  # [G] int64, 1..K
    box: np.ndarray  # [G, 4] float32
    area: np.ndarray  # [G] float64
    difficult: np.ndarray  # [G] bool
    crowd: np.ndarray  # [G] bool


def flat_detections(detections: Sequence[ImageDetections]) -> FlatDetections:
    """Returns the detections of all images in flat arrays."""
    return FlatDetections(
        *_places([len(of.scores) for of in detections]),
        label=_joined([of.labels for of in detections], np.int64),
        box=_joined([of.boxes for of in detections], np.float32, (4,)),
        score=_joined([of.scores for of in detections], np.float32),
    )


def flat_objects(dataset: Dataset) -> FlatObjects:
    """Returns the objects of all records in flat arrays."""
    records = dataset.records
    return FlatObjects(
        *_places([len(record.boxes) for record in records]),
        label=_joined([record.labels for record in records], np.int64),
        box=_joined([record.boxes for record in records], np.float32, (4,)),
        area=_joined([record.area for record in records], np.float64),
        difficult=_joined([record.difficult for record in records], bool),
        crowd=_joined([record.crowd for record in records], bool),
    )


def rank_in_group(groups: np.ndarray) -> np.ndarray:
    """Returns, for each entry of `groups` [N], how many earlier entries are equal: [N] int64."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    lengths = np.diff(np.append(starts, len(groups)))
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = np.arange(len(groups)) - np.repeat(starts, lengths)
    return ranks


def _places(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the image of each row, and its position within the image."""
    counts = np.array(lengths, np.int64)
    image = np.repeat(np.arange(len(counts)), counts)
    return image, np.arange(len(image)) - np.repeat(np.cumsum(counts) - counts, counts)


def _joined(parts: list[np.ndarray], dtype: type, tail: tuple[int, ...] = ()) -> np.ndarray:
    columns = [np.asarray(part, dtype).reshape(-1, *tail) for part in parts]
    return np.concatenate([np.zeros((0, *tail), dtype), *columns])
