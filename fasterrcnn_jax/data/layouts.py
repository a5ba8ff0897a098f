"""Describes a recognised layout of labelled images. Each reader module has a function `recognise` that returns one.

`sources.recognise` asks the readers one after another; `sources.with_layout` resolves `data.layout` "auto".
"""

import os
from pathlib import Path
from typing import NamedTuple

from fasterrcnn_jax.config import DataConfig

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class Layout(NamedTuple):
    """The layout of a folder of labelled images."""

    name: str  # for messages, for example "PASCAL VOC with XML files beside the images"
    why: str  # one clause: the files that were seen
    data: DataConfig  # root, layout, the fields of the layout and the class names
    splits: tuple[str, ...]  # in the order train, valid or val, test, others
    notes: tuple[str, ...] = ()  # sentences


def in_order(splits: set[str]) -> tuple[str, ...]:
    """Returns the names of splits in the order train, valid or val, test, others."""
    first = ("train", "valid", "val", "validation", "test")
    return (*(name for name in first if name in splits), *sorted(splits.difference(first)))


def names_below(folder: Path) -> tuple[str, ...]:
    """Returns the sorted paths of all files below `folder`, relative to it and with /.

    Hidden files and folders are left out, and so are linked folders.
    """
    names = []
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        below = Path(path).relative_to(folder)
        names += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return tuple(sorted(names))
