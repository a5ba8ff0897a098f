"""Crops of very long or very tall training images, so that they fill their canvas.

The case analysis is that of faster-rcnn.pytorch's loader (lib/roi_data_layer/roibatchLoader.py), in continuous
coordinates. It crops after the resize and we before: the sides here are pixels of the stored image, and a
cropped image is enlarged as one of its own size would be.

Only one axis is ever cut: the one that is more than `aspect` times as long as the other.
"""

import numpy as np
from jaxtyping import Bool, Float, UInt8

from fasterrcnn_jax.data.records import large_enough

# (y, x) of its first pixel, (height, width).
Window = tuple[tuple[int, int], tuple[int, int]]


def cropped_hw(image_hw: tuple[int, int], aspect: float) -> tuple[int, int]:
    """Returns (height, width) after cropping; follows from the size alone, so that it can be planned."""
    longest = int(min(image_hw) * aspect)
    return min(image_hw[0], longest), min(image_hw[1], longest)


def crop_window(
    image_hw: tuple[int, int], boxes: Float[np.ndarray, "n 4"], *, aspect: float, rng: np.random.Generator
) -> Window:
    """Returns the part of a training image that is kept, of the size `cropped_hw`.

    All boxes stay inside where they fit into the window together. Where they do not, none may stay: the window of
    the reference, too, may lie in a gap between them.

    Args:
      rng: drawn from only where the place of the window is open.
    """
    size = cropped_hw(image_hw, aspect)
    start = [0, 0]
    for axis in (0, 1):
        if size[axis] < image_hw[axis]:
            low, high = boxes[:, 1 - axis], boxes[:, 3 - axis]
            start[axis] = crop_start(low, high, image_hw[axis], size[axis], rng)
    return (start[0], start[1]), size


def crop_pixels(pixels: UInt8[np.ndarray, "h w 3"], window: Window) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Returns the pixels inside the window."""
    (top, left), (height, width) = window
    return pixels[top : top + height, left : left + width]


def crop_boxes(
    boxes: Float[np.ndarray, "n 4"], window: Window
) -> tuple[Float[np.ndarray, "n 4"], Bool[np.ndarray, "n"]]:
    """Returns the boxes in pixels of the window, clipped to it, and which are still two pixels wide and high."""
    origin, limit = (np.array([*corner[::-1]] * 2, np.float32) for corner in window)
    boxes = np.clip(boxes - origin, np.float32(0), limit)
    return boxes, large_enough(boxes)


def crop_start(
    low: Float[np.ndarray, "n"],
    high: Float[np.ndarray, "n"],
    length: int,
    kept: int,
    rng: np.random.Generator,
) -> int:
    """Returns the first of `kept` pixels out of `length`, along one axis.

    Args:
      low, high: the edges of the boxes along this axis.
    """
    if not len(low):
        return int(rng.integers(0, length - kept + 1))
    first, last = int(np.floor(low.min())), int(np.ceil(high.max()))
    if first == 0:
        return 0
    if last - first < kept:
        # Anywhere that holds all boxes.
        earliest, end = max(last - kept, 0), min(first, length - kept)
    else:
        # From the first box on, over at most half of what does not fit.
        earliest, end = first, first + (last - first - kept) // 2
    return earliest if earliest == end else int(rng.integers(earliest, end))
