"""Augments training images: random size, random crop to the canvas, random colours."""

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float

from fasterrcnn_jax.config import AugmentConfig, ImageConfig
from fasterrcnn_jax.data.records import large_enough
from fasterrcnn_jax.data.transforms import Colours, Placement, network_size, scale_boxes

# Liu et al. 2016 (arXiv:1512.02325), with the ranges of their code: grey levels, factors, factors, degrees.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18.0

# From RGB to luma and two colour axes (NTSC's YIQ): a hue change rotates the colour plane, saturation scales it.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


def draw_placement(
    image_hw: tuple[int, int],
    canvas: tuple[int, int],
    image: ImageConfig,
    augment: AugmentConfig,
    rng: np.random.Generator,
) -> Placement:
    """Returns the placement of an image on its canvas, with a random size as `augment` says.

    An image larger than the canvas is cropped to it at a random place. A smaller image starts at the canvas's
    first pixel, and the rest of the canvas is padding.
    """
    if augment.short_sides:
        image = replace(image, short_side=int(rng.choice(augment.short_sides)))
    height, width = network_size(image_hw, image)
    if augment.scale_jitter is not None:
        factor = rng.uniform(*augment.scale_jitter)
        height, width = (max(1, round(side * factor)) for side in (height, width))
    y, x = (int(rng.integers(max(side - limit, 0) + 1)) for side, limit in zip((height, width), canvas, strict=True))
    return Placement((height, width), (y, x))


def place_boxes(
    boxes: Float[np.ndarray, "n 4"], image_hw: tuple[int, int], canvas: tuple[int, int], placement: Placement
) -> tuple[Float[np.ndarray, "n 4"], Bool[np.ndarray, "n"]]:
    """Returns the boxes in network pixels, clipped to the canvas, and a mask of the large enough ones."""
    height, width = placement.shown(canvas)
    origin = np.array([*placement.origin[::-1]] * 2, np.float32)
    boxes = scale_boxes(boxes, placement.scale(image_hw)) - origin
    boxes = np.clip(boxes, np.float32(0), np.array([width, height] * 2, np.float32))
    return boxes, large_enough(boxes)


def draw_colours(rng: np.random.Generator) -> Colours:
    """Returns a random change of brightness, contrast, saturation and hue.

    All changes are one affine map of the colours. SSD changes hue and saturation in HSV and clips after each step; here
    both changes keep the luma, and grey stays grey.
    """
    drawn = rng.random(4) < 0.5
    brightness = rng.uniform(-BRIGHTNESS, BRIGHTNESS) if drawn[0] else 0.0
    contrast = rng.uniform(*CONTRAST) if drawn[1] else 1.0
    saturation = rng.uniform(*SATURATION) if drawn[2] else 1.0
    angle = math.radians(rng.uniform(-HUE, HUE)) if drawn[3] else 0.0
    return colours_of(brightness, contrast, saturation, angle)


def colours_of(brightness: float, contrast: float, saturation: float, angle: float) -> Colours:
    """Returns the change that adds `brightness` and multiplies by `contrast`, and changes saturation and hue.

    Args:
      saturation: factor of the distance from grey.
      angle: rotation of the hue in radians.
    """
    turn = saturation * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    in_yiq = np.eye(3)
    in_yiq[1:, 1:] = turn
    return Colours(contrast * np.linalg.inv(_TO_YIQ) @ in_yiq @ _TO_YIQ, contrast * brightness)
