"""Detection in parts of an image: overlapping windows, for small objects in large images.

Slicing aided hyper inference (Akyon, Altinuc and Temizel 2022, arXiv:2202.06934), section 3: the detector sees each
window at its full input size, and the image as a whole for objects that no window holds; NMS within each class runs
over all detections.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.data.records import ImageDetections
from fasterrcnn_jax.inference.augmentation import concatenated, suppressed
from fasterrcnn_jax.kernels.choice import Implementation

# With --tile, images may have so many pixels (width times height), for example 20,000 x 20,000. One takes about seven
# bytes per pixel while it is decoded: 2.8 GB.
TILED_MAX_PIXELS = 400_000_000


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
    config: ModelConfig,
    *,
    implementation: Implementation = None,
) -> ImageDetections:
    """Returns the detections of an image after NMS within each class over all windows, in pixels of the image.

    `postprocess.nms_threshold` applies, and `postprocess.max_detections` to each window but not to the image, because
    a large image holds more objects.

    Args:
      found: detections in each window, in pixels of the window.
    """
    if len(windows) == 1:
        return found[0]
    moved = [
        of._replace(boxes=of.boxes + np.asarray([window.x, window.y] * 2, np.float32))
        for of, window in zip(found, windows, strict=True)
    ]
    together = concatenated(moved)
    # Rounded up, so that images with similar numbers of detections share one compiled program.
    room = 1 << max(6, (len(together.scores) - 1).bit_length())
    return suppressed(together, room, room, config, implementation=implementation)
