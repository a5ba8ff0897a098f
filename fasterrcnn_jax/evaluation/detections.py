"""Checks detections for all metrics, counts the objects to find, and averages over classes."""

import math
from collections.abc import Sequence

import numpy as np

from fasterrcnn_jax.data.records import Dataset, ImageDetections


def check_detections(detections: Sequence[ImageDetections], dataset: Dataset) -> None:
    """Raises ValueError, with the image, if `detections` do not fit `dataset`."""
    if len(detections) != len(dataset.records):
        raise ValueError(
            f"{dataset.name} has {len(dataset.records)} images, but detections has {len(detections)} entries"
        )
    class_count = len(dataset.class_names)
    for found, record in zip(detections, dataset.records, strict=True):
        boxes, scores, labels = (np.asarray(field) for field in found)
        count = len(scores)
        if boxes.shape != (count, 4) or scores.shape != (count,) or labels.shape != (count,):
            raise ValueError(
                f"image {record.id}: boxes, scores and labels must be [D, 4], [D] and [D], "
                f"got {boxes.shape}, {scores.shape} and {labels.shape}"
            )
        # A NaN score has no place in the ranking, and a NaN box could match any object.
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(f"image {record.id}: boxes and scores must be finite")
        if count and not (labels.dtype.kind in "iu" and labels.min() >= 1 and labels.max() <= class_count):
            raise ValueError(
                f"image {record.id}: labels must be integers in 1..{class_count}, "
                f"got {labels.min()}..{labels.max()} ({labels.dtype})"
            )


def object_counts(dataset: Dataset) -> np.ndarray:
    """Returns the number of objects to find per class, without difficult objects and crowds: [K] int64."""
    counts = np.zeros(len(dataset.class_names) + 1, np.int64)
    for record in dataset.records:
        np.add.at(counts, record.labels[~(record.difficult | record.crowd)], 1)
    return counts[1:]


def mean_over_classes(values: np.ndarray) -> float:
    """Returns the mean of the `values` [K] that are not NaN; NaN, without a warning, if all are NaN."""
    defined = np.asarray(values)[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan
