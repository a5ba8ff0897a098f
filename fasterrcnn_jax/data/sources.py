"""Opens the labelled images that a configuration names."""

import logging

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.data.shapes import make_shapes
from fasterrcnn_jax.data.voc import class_names_in, read_voc
from fasterrcnn_jax.errors import InputError

logger = logging.getLogger(__name__)


def open_split(data: DataConfig, split: str) -> Dataset:
    """Returns the records of ImageSets/Main/`split`.txt; draws the embedded data set first if asked to.

    Raises:
      InputError: no class names are given, or the folder holds a fault.
    """
    if data.shapes is not None:
        shapes = data.shapes
        make_shapes(data.root, seed=shapes.seed, num_train=shapes.num_train, num_test=shapes.num_test)
    if not data.class_names:
        found = ", ".join(class_names_in(data.root, split)) if data.root.is_dir() else "no such folder"
        raise InputError(f"data.class_names is empty; the objects in {data.root} are named: {found}")
    dataset = read_voc(data.root, split, data.class_names)
    logger.info("%s: %d images", dataset.name, len(dataset.records))
    for note in dataset.notes:
        logger.warning("%s", note)
    return dataset
