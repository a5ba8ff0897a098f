"""Builds records from objects whose corners are in continuous pixels, for the readers of YOLO, LabelMe and csv."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasterrcnn_jax.data.faults import Found
from fasterrcnn_jax.data.records import ImageRecord, box_areas
from fasterrcnn_jax.errors import InputError, quoted

CLIPPED = "Boxes reaching outside their image were clipped"
EMPTY = "Boxes without a width or height were dropped"

# No image is wider. The limit also keeps the squares of coordinates finite.
MAX_COORDINATE = 1e12

MAX_NAME = 255

# Words for yes, no, and a value that the writer did not know, in small letters.
_YES, _NO = ("1", "true", "yes", "y", "t"), ("0", "-1", "false", "no", "n", "f")
_UNKNOWN = ("", "none", "null", "nan", "n/a", "na", "unknown", "unspecified", "undefined", "?")


class Object(NamedTuple):
    box: tuple[float, float, float, float]  # xyxy; it overlaps or touches the image
    label: int
    where: str  # file, field and value, for notes


def check_inside(box: Sequence[float], image_hw: tuple[int, int], where: str) -> None:
    """Raises InputError if the corners are not in order or the box lies outside the image."""
    x1, y1, x2, y2 = box
    for low, high, side, name in ((x1, x2, image_hw[1], "x"), (y1, y2, image_hw[0], "y")):
        if high < low:
            raise InputError(f"{where}: the smaller {name} {low:g} is greater than the larger {name} {high:g}")
        if low > side or high < 0:
            raise InputError(f"{where}: {name} {low:g} to {high:g} is outside the image ({side} pixels)")


def record_of(
    name: str,
    path: Path,
    frame: tuple[tuple[int, int], bool],
    objects: list[Object],
    found: Found,
    *,
    slack: float = 0.0,
) -> ImageRecord:
    """Returns the record of an image; boxes are clipped to it, and empty boxes are dropped.

    Args:
      name: id of the record.
      frame: the (height, width) that the boxes refer to, and whether it is that of the upright image.
      slack: rounding error of the coordinates, as a fraction of the image; it does not count as clipping.
    """
    image_hw, upright = frame
    size = np.array([*image_hw[::-1]] * 2, np.float64)
    boxes = np.array([o.box for o in objects], np.float64).reshape(-1, 4)
    inside = np.clip(boxes, 0, size)
    clipped = np.any(abs(inside - boxes) > slack * size, axis=1)
    inside = inside.astype(np.float32)
    kept = np.all(inside[:, 2:] > inside[:, :2], axis=1)
    for row in np.flatnonzero(np.logical_or(clipped, np.logical_not(kept))):
        found[CLIPPED if kept[row] else EMPTY].append(objects[row].where)
    inside, labels = inside[kept], np.array([o.label for o in objects], np.int32)[kept]
    none = np.zeros(len(inside), bool)
    arrays = inside, labels, none, none.copy(), box_areas(inside)
    return ImageRecord(name, path, image_hw, *arrays, upright=upright)


def is_unknown(value: object) -> bool:
    """Returns whether a value stands for none: null, an empty text or list, NaN, or a word such as unknown."""
    if isinstance(value, str):
        return value.strip().lower() in _UNKNOWN
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def flag(value: object) -> bool | None:
    """Returns the meaning of a flag, which is no where its writer did not know it; None: it is no flag."""
    text = str(value).strip().lower()
    with contextlib.suppress(ValueError):
        text = f"{float(text):g}"
    return True if text in _YES else False if text in _NO or is_unknown(text) else None


def number(text: str, field: str) -> float:
    """Returns the number that a text gives.

    Raises:
      InputError: the text is not a finite number below 1e12.
    """
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{field}: must be a number, got {quoted(text)}") from None
    if not math.isfinite(value) or abs(value) >= MAX_COORDINATE:
        raise InputError(f"{field}: must be a finite number below 1e12, got {quoted(text)}")
    return value
