"""What training sees of a data set: which objects, which images, and the mirrored ones.

Nothing is left out in silence: each step says in one sentence how many it took out, and the first image.
"""

import logging

import numpy as np

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data.records import Dataset, ImageRecord, large_enough
from fasterrcnn_jax.errors import InputError

logger = logging.getLogger(__name__)


def prepare_training_set(dataset: Dataset, data: DataConfig) -> Dataset:
    """Returns the images to train on with the objects to train on; its notes also say what was left out.

    With `data.flip` "double" the mirrored copies follow all the others: that of image `index` of N is
    image `index + N`, and has the same id.

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
    logger.info("%s: %d images to train on, flip %s", dataset.name, len(records), data.flip)
    return dataset._replace(records=tuple(records), notes=(*dataset.notes, *notes))


_EMPTY = "Images without an object to train on were left out (data.keep_empty keeps them)"


def _unwanted(data: DataConfig) -> list:
    """Returns pairs of a sentence and a function from a record to the objects [N] that it is about."""
    steps = [
        ("Crowds are not trained on", lambda record: record.crowd),
        ("Objects under two pixels are not trained on", lambda record: ~large_enough(record.boxes)),
        (
            f"Objects beyond data.max_boxes = {data.max_boxes} of their image are not trained on",
            lambda record: np.arange(len(record.boxes)) >= data.max_boxes,
        ),
    ]
    if not data.use_difficult:
        steps.insert(0, ("Difficult objects are not trained on", lambda record: record.difficult))
    return steps


def _note(name: str, text: str, records, counts: list[int]) -> list[str]:
    """Logs one sentence and returns it, or nothing where nothing is left out."""
    if not any(counts):
        return []
    first = next(record.id for record, count in zip(records, counts, strict=True) if count)
    sentence = f"{name}: {text}: {sum(counts)}, the first in image {first}."
    logger.warning("%s", sentence)
    return [sentence]


def _with_objects(record: ImageRecord, kept: np.ndarray) -> ImageRecord:
    names = ("boxes", "labels", "difficult", "crowd", "area")
    return record._replace(**{name: getattr(record, name)[kept] for name in names})
