"""Crops very wide or very tall training images, so that they fill their canvas.

The cases are those of faster-rcnn.pytorch's loader (lib/roi_data_layer/roibatchLoader.py), in continuous coordinates.
That loader crops after the resize; this module crops before it. The sides here are pixels of the original image, and
the crop is then resized like any image of its size.

Only one axis is cropped: the one that is more than `aspect` times as long as the other.
"""

import numpy as np
from jaxtyping import Bool, Float, UInt8

from fasterrcnn_jax.data.records import large_enough

# (y, x) of the window's first pixel, and its (height, width).
Window = tuple[tuple[int, int], tuple[int, int]]


def cropped_hw(image_hw: tuple[int, int], aspect: float) -> tuple[int, int]:
    """Returns (height, width) after cropping; it depends only on the image size, so batches can be planned with it."""
    longest = int(min(image_hw) * aspect)
    return min(image_hw[0], longest), min(image_hw[1], longest)


def crop_window(
    image_hw: tuple[int, int], boxes: Float[np.ndarray, "n 4"], *, aspect: float, rng: np.random.Generator
) -> Window:
    """Returns the window of a training image that is kept; its size is `cropped_hw`.

    If all boxes fit into the window together, the window contains all of them. Otherwise it can contain none: the
    window can be in a gap between boxes, as in the reference.

    Args:
      image_hw: (height, width) of the image.
      boxes: its boxes in pixels of the image.
      aspect: largest ratio of the longer to the shorter side.
      rng: used only if the place of the window is not determined.
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
    """Returns the boxes in pixels of the window, clipped to it, and a mask of the large enough boxes."""
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
      low, high: lower and upper edges of the boxes along this axis.
      length: length of the image along this axis.
      kept: length of the window along this axis.
      rng: used only if the start is not determined.
    """
    if not len(low):
        return int(rng.integers(0, length - kept + 1))
    first, last = int(np.floor(low.min())), int(np.ceil(high.max()))
    if first == 0:
        return 0
    if last - first < kept:
        # Any start whose window contains all boxes.
        earliest, end = max(last - kept, 0), min(first, length - kept)
    else:
        # From the first box on, up to half of the length that does not fit.
        earliest, end = first, first + (last - first - kept) // 2
    return earliest if earliest == end else int(rng.integers(earliest, end))
