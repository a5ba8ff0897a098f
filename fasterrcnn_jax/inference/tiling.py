"""Detection in parts of an image: overlapping windows, for small objects in large images.

Slicing aided hyper inference (Akyon, Altinuc and Temizel 2022, arXiv:2202.06934), section 3: the detector sees each
window at its full input size, and the image as a whole for objects that no window holds; NMS within each class runs
over all detections. Before it, a box that a window cuts is left out where a better box of its class covers it, because
NMS keeps a part of an object that overlaps the whole too little.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from fasterrcnn_jax.data.records import ImageDetections
from fasterrcnn_jax.inference.augmentation import concatenated, suppressed
from fasterrcnn_jax.kernels.choice import Implementation

# With --tile, images may have so many pixels (width times height), for example 20,000 x 20,000. One takes about seven
# bytes per pixel while it is decoded: 2.8 GB.
TILED_MAX_PIXELS = 400_000_000

# A box that comes this near to a border of its window inside the image, as a share of the window's side, may be cut.
NEAR = 0.02
# A cut box is left out where a better box of its class covers this share of its area.
COVERED = 0.7
# The best detections of all windows that are compared with each other, which takes time by the square of their number.
MOST_DETECTIONS = 16_384

logger = logging.getLogger(__name__)


class Window(NamedTuple):
    """A part of an image, in pixels: [y, y + height) x [x, x + width)."""

    y: int
    x: int
    height: int
    width: int


def windows_of(image_hw: tuple[int, int], tile: int | None, overlap: float) -> tuple[Window, ...]:
    """Returns the parts of an image to detect in: the whole image and, where it is larger than a window, all windows.

    The windows cover the image. Two neighbours share at least `overlap` of a side; the last window of a row or column
    ends with the image.

    Args:
      tile: side of a window in pixels; None: no windows.
      overlap: 0 up to, but not including, 1.
    """
    whole = Window(0, 0, *image_hw)
    if tile is None or max(image_hw) <= tile:
        return (whole,)
    rows, columns = (_starts(length, tile, overlap) for length in image_hw)
    height, width = (min(tile, length) for length in image_hw)
    return (whole, *(Window(y, x, height, width) for y in rows for x in columns))


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    if length <= tile:
        return [0]
    step = max(1, int(tile * (1.0 - overlap)))
    return [*range(0, length - tile, step), length - tile]


def joined(
    found: Sequence[ImageDetections],
    windows: Sequence[Window],
    nms_threshold: float,
    *,
    implementation: Implementation = None,
) -> ImageDetections:
    """Returns the detections of an image after NMS within each class over all windows, in pixels of the image.

    Before NMS, a box that a window cuts is left out where a better box of its class covers most of it.
    `postprocess.max_detections` applies to each window but not to the image, because a large image holds more objects:
    up to `MOST_DETECTIONS` before NMS. If there are more, a warning says so.

    Args:
      found: detections in each window, in pixels of the window.
      windows: of `windows_of`, the whole image first.
    """
    if len(windows) == 1:
        return found[0]
    moved = [
        of._replace(boxes=of.boxes + np.asarray([window.x, window.y] * 2, np.float32))
        for of, window in zip(found, windows, strict=True)
    ]
    cut = [is_cut(of.boxes, window, windows[0]) for of, window in zip(found, windows, strict=True)]
    together, cut = concatenated(moved), np.concatenate(cut)
    if len(together.scores) > MOST_DETECTIONS:
        _, _, height, width = windows[0]
        logger.warning(
            "an image of %d x %d pixels (height x width) has %d detections in %d windows; the %d best are used",
            height, width, len(together.scores), len(windows), MOST_DETECTIONS,
        )  # fmt: skip
    best = np.argsort(-together.scores, kind="stable")[:MOST_DETECTIONS]
    together = _without_parts(_chosen(together, best), cut[best])
    # Rounded up, so that images with similar numbers of detections share one compiled program.
    room = 1 << max(6, (len(together.scores) - 1).bit_length())
    return suppressed(together, room, room, nms_threshold, implementation=implementation)


def is_cut(boxes: Float[np.ndarray, "n 4"], window: Window, whole: Window) -> Bool[np.ndarray, "n"]:
    """Returns whether each box comes near to a border of its window that is no border of the image.

    Args:
      boxes: in pixels of the window.
      whole: the image.
    """
    _, _, height, width = window
    sides = np.array([window.x, window.y, whole.width - window.x - width, whole.height - window.y - height])
    gaps = np.stack([boxes[:, 0], boxes[:, 1], width - boxes[:, 2], height - boxes[:, 3]], axis=1)
    near = (sides > 0) & (gaps <= NEAR * np.array([width, height, width, height]))
    return np.asarray(near.any(axis=1))


def _without_parts(found: ImageDetections, cut: Bool[np.ndarray, "n"]) -> ImageDetections:
    """Returns the detections, which come best first, without the cut ones that a better one of their class covers."""
    left_out = np.zeros(len(cut), bool)
    for label in np.unique(found.labels):
        rows = np.flatnonzero(found.labels == label)
        boxes = found.boxes[rows]
        for place in np.flatnonzero(cut[rows]):
            left_out[rows[place]] = _covered(boxes[place], boxes[:place]).max(initial=0) >= COVERED
    return _chosen(found, np.flatnonzero(~left_out))


def _covered(box: Float[np.ndarray, "4"], others: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n"]:
    """Returns the share of the box's area that each other box covers."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return np.prod(np.maximum(sides, 0), axis=1) / max(np.prod(box[2:] - box[:2]), np.float32(1e-9))


def _chosen(found: ImageDetections, rows: Int[np.ndarray, "n"]) -> ImageDetections:
    return ImageDetections(*(values[rows] for values in found))
