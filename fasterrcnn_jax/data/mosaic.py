"""Mosaics: four training images on one canvas (Bochkovskiy et al. 2020, arXiv:2004.10934, section 3.4).

The objects appear smaller, cut, and beside objects of other images. The canvas is that of one of the four images. The
ranges below are our own: with them AP rose on the small sets of docs/training.md.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from fasterrcnn_jax.config import ImageConfig
from fasterrcnn_jax.data.augment import place_boxes
from fasterrcnn_jax.data.transforms import Placement, network_size

# The point where the four images meet, in parts of the canvas.
CENTRE = (0.35, 0.65)
# The factor of an image's own network size.
SCALE = (0.5, 1.0)
# An object is kept if this part of its area is visible.
VISIBLE = 0.3


class Part(NamedTuple):
    """The part of a canvas that one image gets: rows and columns, each (first, end)."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


def draw_parts(canvas: tuple[int, int], rng: np.random.Generator) -> tuple[Part, Part, Part, Part]:
    """Returns the four parts of a canvas, which meet at a random point."""
    height, width = canvas
    y, x = (round(side * rng.uniform(*CENTRE)) for side in canvas)
    up, down, left, right = (0, y), (y, height), (0, x), (x, width)
    return Part(up, left), Part(up, right), Part(down, left), Part(down, right)


def draw_placement_in(part: Part, image_hw: tuple[int, int], image: ImageConfig, rng: np.random.Generator) -> Placement:
    """Returns the placement of an image in its part: a random size, and cropped at a random place if it is larger."""
    factor = rng.uniform(*SCALE)
    height, width = (max(1, round(side * factor)) for side in network_size(image_hw, image))
    y, x = (int(rng.integers(max(side - limit, 0) + 1)) for side, limit in zip((height, width), part.size, strict=True))
    return Placement((height, width), (y, x))


def place_boxes_in(
    boxes: Float[np.ndarray, "n 4"], image_hw: tuple[int, int], part: Part, placement: Placement
) -> tuple[Float[np.ndarray, "n 4"], Bool[np.ndarray, "n"]]:
    """Returns the boxes in pixels of the canvas, clipped to the part, and a mask of those that are visible enough."""
    placed, large = place_boxes(boxes, image_hw, part.size, placement)
    sides = (boxes[:, 2:] - boxes[:, :2]) * placement.scale(image_hw)[::-1]
    visible = (placed[:, 2:] - placed[:, :2]).prod(1) >= VISIBLE * sides.prod(1)
    origin = np.array([part.columns[0], part.rows[0]] * 2, np.float32)
    return placed + origin, large & visible
