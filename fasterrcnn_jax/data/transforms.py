"""From a decoded picture to a place on a canvas, in NumPy, on the host.

The resize is bilinear in float without antialias, half-pixel centres: what the reference code bases do.
"""

import math

import numpy as np
from jaxtyping import Float, UInt8

from fasterrcnn_jax.config import ImageConfig


def network_size(image_hw: tuple[int, int], config: ImageConfig) -> tuple[int, int]:
    """Returns (height, width) after resizing: short side to `short_side`, long at most `long_side`."""
    scale = min(config.short_side / min(image_hw), config.long_side / max(image_hw))
    whole = round if config.size_rounding == "nearest" else math.floor
    height, width = (max(1, whole(side * scale)) for side in image_hw)
    return height, width


def canvas_for(image_hw: tuple[int, int], config: ImageConfig) -> tuple[int, int]:
    """Returns the smallest canvas that holds the resized picture."""
    return smallest_canvas(network_size(image_hw, config), config)


def smallest_canvas(size: tuple[int, int], config: ImageConfig) -> tuple[int, int]:
    """Returns the first canvas of least area that holds `size` network pixels.

    Raises:
      ValueError: none does; a single resized picture always fits.
    """
    fitting = [canvas for canvas in config.canvases if canvas[0] >= size[0] and canvas[1] >= size[1]]
    if not fitting:
        raise ValueError(f"no canvas of {config.canvases} holds {size[0]} x {size[1]} pixels")
    return min(fitting, key=lambda canvas: canvas[0] * canvas[1])


def resize_bilinear(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]
) -> Float[np.ndarray, "h2 w2 3"]:
    """Returns the float32 picture at `size`; borders repeat."""
    for axis in (0, 1):
        length = image.shape[axis]
        if length == size[axis]:
            continue
        points = (np.arange(size[axis], dtype=np.float32) + 0.5) * (length / size[axis]) - 0.5
        points = np.clip(points, 0.0, length - 1.0)
        low = points.astype(np.int64)
        high = np.minimum(low + 1, length - 1)
        shape = [1, 1, 1]
        shape[axis] = -1
        weight = (points - low).astype(np.float32).reshape(shape)
        image = np.take(image, low, axis) * (1.0 - weight) + np.take(image, high, axis) * weight
    return image.astype(np.float32)


def to_canvas(
    image: UInt8[np.ndarray, "h w 3"], canvas: tuple[int, int], config: ImageConfig
) -> tuple[Float[np.ndarray, "H W 3"], Float[np.ndarray, "2"], Float[np.ndarray, "2"]]:
    """Returns the normalised canvas (zero beyond the picture), the picture's size on it, and the scale.

    Channels are in `config.channel_order`, and so are mean and std. Size is (height, width) in network
    pixels, scale (y, x) in network pixels per original pixel; the two axes differ by rounding.
    """
    size = network_size(image.shape[:2], config)
    pixels = np.zeros((*canvas, 3), np.float32)
    mean, std = np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)
    if config.channel_order == "bgr":
        image = image[..., ::-1]
    pixels[: size[0], : size[1]] = (resize_bilinear(image, size) - mean) / std
    scale = np.asarray(size, np.float32) / np.asarray(image.shape[:2], np.float32)
    return pixels, np.asarray(size, np.float32), scale


def scale_boxes(
    boxes: Float[np.ndarray, "n 4"], scale: Float[np.ndarray, "2"]
) -> Float[np.ndarray, "n 4"]:
    """Returns boxes times (y, x) `scale`."""
    return boxes * np.tile(scale[::-1], 2).astype(np.float32)


def flip_boxes(boxes: Float[np.ndarray, "n 4"], width: int) -> Float[np.ndarray, "n 4"]:
    """Returns the boxes of the picture mirrored left to right."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
