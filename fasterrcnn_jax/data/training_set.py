"""Selects the objects and images of a data set to train on, and adds mirrored images.

Nothing is removed silently: each step logs one sentence with the number of removed objects or images and the first
image.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data.records import Dataset, ImageRecord, large_enough
from fasterrcnn_jax.errors import InputError

logger = logging.getLogger(__name__)


def prepare_training_set(dataset: Dataset, data: DataConfig) -> Dataset:
    """Returns the data set with only the images and objects to train on; its notes also count what was removed.

    With `data.flip` "double", the mirrored copies follow the N original images: the copy of image `index` is
    image `index + N` and has the same id.

    Raises:
      InputError: no object is left.
    """
    records, notes = dataset.records, []
    for text, unwanted in _unwanted(data):
        marks = [unwanted(record) for record in records]
        notes += _note(dataset.name, text, records, [int(mark.sum()) for mark in marks])
        records = [_with_objects(record, ~mark) for record, mark in zip(records, marks, strict=True)]
    if not any(len(record.boxes) for record in records):
        raise InputError(f"{dataset.name}: no image has an object to train on")
    if not data.keep_empty:
        notes += _note(dataset.name, _EMPTY, records, [int(not len(record.boxes)) for record in records])
        records = [record for record in records if len(record.boxes)]
    if data.flip == "double":
        records = [*records, *(record._replace(flipped=True) for record in records)]
    logger.info("%s: %d images to train on; %s", dataset.name, len(records), ", ".join(_changes(data)))
    return dataset._replace(records=tuple(records), notes=(*dataset.notes, *notes))


def _changes(data: DataConfig) -> list[str]:
    """Returns how the images are changed before training, and how they are read if not in the usual way."""
    augment = data.augment
    changes = [f"flip {data.flip}"]
    if data.crop_aspect is not None:
        changes.append(f"crop_aspect {data.crop_aspect:g}")
    if augment.short_sides:
        changes.append(f"short_sides {', '.join(map(str, augment.short_sides))}")
    if augment.scale_jitter is not None:
        changes.append("scale_jitter {:g} to {:g}".format(*augment.scale_jitter))
    if augment.photometric:
        changes.append("photometric distortion")
    if data.fast:
        changes.append("read by simplejpeg and OpenCV (data.fast)")
    return changes


_EMPTY = "Images without an object to train on were left out (data.keep_empty keeps them)"


def _unwanted(data: DataConfig) -> list[tuple[str, Callable[[ImageRecord], np.ndarray]]]:
    """Returns pairs of a sentence and a function from a record to a mask [N] of the objects to remove."""
    steps = [
        ("Crowds are not trained on", lambda record: record.crowd),
        ("Objects under two pixels are not trained on", lambda record: ~large_enough(record.boxes)),
        (
            f"Objects beyond the first data.max_boxes = {data.max_boxes} of an image are not trained on",
            lambda record: np.arange(len(record.boxes)) >= data.max_boxes,
        ),
    ]
    if not data.use_difficult:
        steps.insert(0, ("Difficult objects are not trained on", lambda record: record.difficult))
    return steps


def _note(name: str, text: str, records: Sequence[ImageRecord], counts: list[int]) -> list[str]:
    """Logs one sentence and returns it in a list; returns an empty list if nothing is removed."""
    if not any(counts):
        return []
    first = next(record.id for record, count in zip(records, counts, strict=True) if count)
    sentence = f"{name}: {text}: {sum(counts)}, the first in image {first}."
    logger.warning("%s", sentence)
    return [sentence]


def _with_objects(record: ImageRecord, kept: np.ndarray) -> ImageRecord:
    names = ("boxes", "labels", "difficult", "crowd", "area")
    return record._replace(**{name: getattr(record, name)[kept] for name in names})
