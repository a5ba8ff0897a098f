"""Anchors: the boxes that the RPN scores and bends. Ren et al. 2015 (arXiv:1506.01497), section 3.1.1."""

from typing import Literal

import numpy as np
from jaxtyping import Float


def cell_anchors(
    base: float,
    scales: tuple[float, ...],
    ratios: tuple[float, ...],
    *,
    rounding: Literal["base", "half", "none"],
) -> Float[np.ndarray, "c 4"]:
    """Returns the anchors of one cell, centred on the origin, ratios varying slowest.

    Args:
      base: side of the square that `scales` multiply, in pixels of the network input.
      scales: square roots of the anchors' areas, in `base`.
      ratios: height / width.
      rounding: what becomes whole pixels, halves to even: `base` the sides of the box of each ratio before
        it is scaled (py-faster-rcnn), `half` half of the scaled sides (torchvision), `none` nothing.
    """
    ratios = np.asarray(ratios, np.float64)[:, None]
    scales = np.asarray(scales, np.float64)
    if rounding == "base":
        widths = np.round(np.sqrt(base * base / ratios))
        heights = np.round(widths * ratios) * scales
        widths = widths * scales
    else:
        heights, widths = np.sqrt(ratios) * base * scales, base * scales / np.sqrt(ratios)
    half_heights, half_widths = 0.5 * heights.ravel(), 0.5 * widths.ravel()
    if rounding == "half":
        half_heights, half_widths = np.round(half_heights), np.round(half_widths)
    return np.stack([-half_widths, -half_heights, half_widths, half_heights], axis=1).astype(np.float32)


def cell_corners(grid_hw: tuple[int, int], stride_hw: tuple[int, int]) -> Float[np.ndarray, "hw 2"]:
    """Returns the (x, y) near corners of the feature cells in network pixels, row by row."""
    y, x = (np.arange(size, dtype=np.float32) * stride for size, stride in zip(grid_hw, stride_hw, strict=True))
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def grid_anchors(
    cells: Float[np.ndarray, "c 4"],
    grid_hw: tuple[int, int],
    stride_hw: tuple[int, int],
    *,
    centre: Literal["cell", "corner"] = "cell",
) -> Float[np.ndarray, "hwc 4"]:
    """Returns the cell anchors moved to every feature cell: rows, then columns, then anchors of a cell.

    Args:
      stride_hw: network pixels per cell.
      centre: where in a cell the anchors are centred, in its middle or on its near corner.
    """
    centres = cell_corners(grid_hw, stride_hw)
    if centre == "cell":
        centres = centres + np.float32(0.5) * np.asarray(stride_hw[::-1], np.float32)
    return (np.tile(centres, 2)[:, None, :] + cells[None, :, :]).reshape(-1, 4)
