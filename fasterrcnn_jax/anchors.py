"""Anchors: the boxes that the RPN scores and bends. Ren et al. 2015 (arXiv:1506.01497), section 3.1.1."""

import numpy as np
from jaxtyping import Float


def cell_anchors(sizes: tuple[float, ...], ratios: tuple[float, ...]) -> Float[np.ndarray, "c 4"]:
    """Returns the anchors of one cell, centred on the origin, ratios varying slowest.

    Args:
      sizes: square roots of the areas, in pixels of the network input.
      ratios: height / width.
    """
    roots = np.sqrt(np.asarray(ratios, np.float64))[:, None]
    half_heights = (0.5 * np.asarray(sizes, np.float64) * roots).ravel()
    half_widths = (0.5 * np.asarray(sizes, np.float64) / roots).ravel()
    return np.stack([-half_widths, -half_heights, half_widths, half_heights], axis=1).astype(np.float32)


def cell_centres(grid_hw: tuple[int, int], stride: int) -> Float[np.ndarray, "hw 2"]:
    """Returns the (x, y) centres of the feature cells in network pixels, row by row."""
    y = (np.arange(grid_hw[0], dtype=np.float32) + 0.5) * stride
    x = (np.arange(grid_hw[1], dtype=np.float32) + 0.5) * stride
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def grid_anchors(
    cells: Float[np.ndarray, "c 4"], grid_hw: tuple[int, int], stride: int
) -> Float[np.ndarray, "hwc 4"]:
    """Returns the cell anchors moved to every cell's centre: rows, then columns, then anchors of a cell."""
    centres = np.tile(cell_centres(grid_hw, stride), 2)
    return (centres[:, None, :] + cells[None, :, :]).reshape(-1, 4)
