"""Resizes decoded images and draws them onto canvases, with NumPy on the host.

The resize is bilinear in float with half-pixel centres and without antialiasing, as in the reference code bases.
For uint8 canvases the result of the same resize is rounded.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from fasterrcnn_jax.config import ImageConfig
from fasterrcnn_jax.config.checks import fitted
from fasterrcnn_jax.data import fast_input
from fasterrcnn_jax.data.fast_input import MOST_PIXELS
from fasterrcnn_jax.data.records import Dataset


def network_size(image_hw: tuple[int, int], config: ImageConfig) -> tuple[int, int]:
    """Returns (height, width) after resizing the short side to `short_side`, with the long side at most `long_side`."""
    short, long = min(image_hw), max(image_hw)
    by_short = config.short_side * long <= config.long_side * short
    side, of = (config.short_side, short) if by_short else (config.long_side, long)
    # One division of whole numbers, so that `ops.resizing` finds the same size on the device: with a rounded scale, a
    # side could come out one pixel short.
    whole = round if config.size_rounding == "nearest" else math.floor
    height, width = (max(1, whole(length * side / of)) for length in image_hw)
    return height, width


def canvas_for(image_hw: tuple[int, int], config: ImageConfig) -> tuple[int, int]:
    """Returns the smallest canvas that fits the resized image."""
    return smallest_canvas(network_size(image_hw, config), config)


def canvases_of(dataset: Dataset, config: ImageConfig) -> frozenset[tuple[int, int]]:
    """Returns the canvases that the images of a data set need."""
    return frozenset(canvas_for(size, config) for size in {record.image_hw for record in dataset.records})


def smallest_canvas(size: tuple[int, int], config: ImageConfig) -> tuple[int, int]:
    """Returns the first canvas with the smallest area that fits `size` network pixels.

    Raises:
      ValueError: `size` fits no canvas; a single resized image always fits.
    """
    canvases = fitted(config.canvases, "model.image.canvases")
    fitting = [canvas for canvas in canvases if canvas[0] >= size[0] and canvas[1] >= size[1]]
    if not fitting:
        raise ValueError(f"no canvas of {canvases} fits {size[0]} x {size[1]} pixels (height x width)")
    return min(fitting, key=lambda canvas: canvas[0] * canvas[1])


def resize_bilinear(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> Float[np.ndarray, "h2 w2 3"]:
    """Returns the float32 image resized to `size`; border pixels are repeated outwards."""
    resized = np.empty((*size, 3), np.float32)
    for rows, block in _resized(image, Placement(size), size, channels=(0, 1, 2)):
        resized[rows] = block
    return resized


class Placement(NamedTuple):
    """Placement of an image on its canvas: resized to `size`, then drawn from `origin` on, as far as it fits."""

    size: tuple[int, int]  # (height, width) that the image is resized to
    origin: tuple[int, int] = (0, 0)  # (y, x) of the canvas's first pixel in the resized image

    def shown(self, canvas: tuple[int, int]) -> tuple[int, int]:
        """Returns the (height, width) of the part that is on the canvas."""
        height, width = (min(self.size[axis] - self.origin[axis], canvas[axis]) for axis in (0, 1))
        return height, width

    def scale(self, image_hw: tuple[int, int]) -> Float[np.ndarray, "2"]:
        """Returns the network pixels per image pixel, (y, x); the two axes differ by rounding."""
        return np.asarray(self.size, np.float32) / np.asarray(image_hw, np.float32)


class Colours(NamedTuple):
    """A change of RGB colours in 0..255: `matrix @ colour + shift`, cut to the range."""

    matrix: Float[np.ndarray, "3 3"]
    shift: float

    def change(
        self, image: Float[np.ndarray, "h w 3"], channels: tuple[int, int, int] = (0, 1, 2)
    ) -> Float[np.ndarray, "h w 3"]:
        """Returns the image with changed colours; `channels` has the position in RGB of each channel."""
        matrix = self.matrix[np.ix_(channels, channels)].astype(np.float32)
        changed = image.reshape(-1, 3) @ matrix.T + np.float32(self.shift)
        return np.clip(changed, 0.0, 255.0, out=changed).reshape(image.shape)


def draw(
    pixels: Float[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W 3"],
    image: UInt8[np.ndarray, "h w 3"],
    config: ImageConfig,
    placement: Placement,
    *,
    colours: Colours | None = None,
    fast: bool = False,
) -> None:
    """Draws an image onto the empty canvas `pixels`, in `config.channel_order`, the order of mean and std.

    A float32 canvas gets normalised values; a uint8 canvas gets rounded values, which the network normalises.

    Args:
      colours: change of the colours; it is made after the resize, when there are usually far fewer pixels.
      fast: resize with OpenCV.
    """
    channels = (2, 1, 0) if config.channel_order == "bgr" else (0, 1, 2)
    mean, std = np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)
    height, width = placement.shown(pixels.shape[:2])
    # Repeated to the length of an image row, because NumPy is slow on a last axis of three elements.
    mean, std = np.tile(mean, width), np.tile(std, width)
    # Pixels and channels as one axis, for the same reason; a view, so that the values are written into the canvas.
    assert pixels.flags.c_contiguous, "a canvas is contiguous"
    lines = pixels.reshape(len(pixels), -1)
    resize = _resized_by_opencv if fast and image.shape[0] * image.shape[1] <= MOST_PIXELS else _resized
    for rows, block in resize(image, placement, (height, width), channels):
        if colours is not None:
            block = colours.change(block, channels)
        values = block.reshape(len(block), -1)
        shown = lines[rows, : 3 * width]
        if pixels.dtype == np.uint8:
            shown[...] = np.rint(values, out=values)
        else:
            values -= mean
            np.divide(values, std, out=shown)


# Rows per block: few enough to stay in the processor's cache from one operation to the next.
_ROWS = 32


def _resized(
    image: UInt8[np.ndarray, "h w 3"],
    placement: Placement,
    shown: tuple[int, int],
    channels: tuple[int, int, int],
) -> Iterator[tuple[slice, Float[np.ndarray, "n w2 3"]]]:
    """Yields (rows, block) for blocks of rows of the shown part of the resized image."""
    height, width = image.shape[:2]
    top, bottom, down = _samples(height, placement.size[0], placement.origin[0], shown[0])
    left, right, across = _samples(width, placement.size[1], placement.origin[1], shown[1])
    # Pixels and channels are one axis, because NumPy is slow on a last axis of three elements.
    left, right = ((3 * points[:, None] + np.asarray(channels)).ravel() for points in (left, right))
    across, down = np.repeat(across, 3), down[:, None]
    source = image.reshape(height, -1)
    for start in range(0, shown[0], _ROWS):
        rows = slice(start, min(start + _ROWS, shown[0]))
        # Only the rows of a block are converted, because an image can have 100 million pixels.
        lines = _blend(source[top[rows]].astype(np.float32), source[bottom[rows]].astype(np.float32), down[rows])
        yield rows, _blend(lines.take(left, 1), lines.take(right, 1), across).reshape(-1, shown[1], 3)


def _resized_by_opencv(
    image: UInt8[np.ndarray, "h w 3"],
    placement: Placement,
    shown: tuple[int, int],
    channels: tuple[int, int, int],
) -> Iterator[tuple[slice, Float[np.ndarray, "n w2 3"]]]:
    """Yields the same as `_resized`, in the same blocks."""
    (top, left), (height, width) = placement.origin, shown
    resized = fast_input.resized(image, placement.size, reverse=channels == (2, 1, 0))
    whole = resized[top : top + height, left : left + width]
    for start in range(0, height, _ROWS):
        rows = slice(start, min(start + _ROWS, height))
        # The caller computes in the block. It is a copy where only a part of a row is shown.
        yield rows, np.ascontiguousarray(whole[rows])


def _samples(
    length: int, size: int, first: int, count: int
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Returns, for `count` of `size` output pixels from `first` on, both source pixels and the weight of the second."""
    points = (np.arange(first, first + count, dtype=np.float32) + 0.5) * (length / size) - 0.5
    points = np.clip(points, 0.0, length - 1.0)
    low = points.astype(np.int64)
    return low, np.minimum(low + 1, length - 1), (points - low).astype(np.float32)


def _blend(
    first: Float[np.ndarray, "n m"],
    second: Float[np.ndarray, "n m"],
    weight: Float[np.ndarray, "m"] | Float[np.ndarray, "n 1"],
) -> Float[np.ndarray, "n m"]:
    """Returns the weighted mean in the memory of `first`; overwrites `second`."""
    first *= 1.0 - weight
    second *= weight
    first += second
    return first


def to_canvas(
    image: UInt8[np.ndarray, "h w 3"], canvas: tuple[int, int], config: ImageConfig
) -> tuple[Float[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W 3"], Float[np.ndarray, "2"], Float[np.ndarray, "2"]]:
    """Returns the canvas with the image drawn by `draw` and zeros elsewhere, the image's size on it, and the scale.

    The size is (height, width) in network pixels; the scale is (y, x) in network pixels per original pixel.
    """
    placement = Placement(network_size(image.shape[:2], config))
    pixels = np.zeros((*canvas, 3), config.pixel_dtype)
    draw(pixels, image, config, placement)
    return pixels, np.asarray(placement.size, np.float32), placement.scale(image.shape[:2])


def scale_boxes(boxes: Float[np.ndarray, "n 4"], scale: Float[np.ndarray, "2"]) -> Float[np.ndarray, "n 4"]:
    """Returns the boxes multiplied by the (y, x) `scale`."""
    return boxes * np.tile(scale[::-1], 2).astype(np.float32)


def flip_boxes(boxes: Float[np.ndarray, "n 4"], width: int) -> Float[np.ndarray, "n 4"]:
    """Returns the boxes of the image mirrored left to right."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)


def flip_pixels(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the image mirrored left to right, as a copy: later operations are slow on a reversed view."""
    return image.take(np.arange(image.shape[1])[::-1], 1)
