"""Anchors: the boxes that the RPN scores and refines. Ren et al. 2015 (arXiv:1506.01497), section 3.1.1."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fasterrcnn_jax.config import ModelConfig, RpnConfig
from fasterrcnn_jax.config.checks import fitted
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.ops.inputs import require_positive_strides


def cell_anchors(
    base: float = 16.0,
    scales: tuple[float, ...] = (8.0, 16.0, 32.0),
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
    *,
    rounding: Literal["base", "half", "none"] = "none",
) -> Float[np.ndarray, "c 4"]:
    """Returns the anchors of one cell, centred on the origin; the ratio varies slowest.

    The defaults are the nine anchors of the paper. Anchors are constants, so they are NumPy arrays in float32.

    Examples:
      >>> cell_anchors(16, (2.0,), (1.0, 4.0))
      array([[-16., -16.,  16.,  16.],
             [ -8., -32.,   8.,  32.]], dtype=float32)

    Args:
      base: side of the square that `scales` multiply, in pixels of the network input.
      scales: square roots of the anchors' areas, in multiples of `base`.
      ratios: height / width.
      rounding: which lengths are rounded to whole pixels, halves to even. `base`: the sides of each ratio's
        box before it is scaled (py-faster-rcnn). `half`: half of the scaled sides (torchvision). `none`: no length.
    """
    ratio = np.asarray(ratios, np.float64)[:, None]
    scale = np.asarray(scales, np.float64)
    if rounding == "base":
        widths = np.round(np.sqrt(base * base / ratio))
        heights = np.round(widths * ratio) * scale
        widths = widths * scale
    else:
        heights, widths = np.sqrt(ratio) * base * scale, base * scale / np.sqrt(ratio)
    half_heights, half_widths = 0.5 * heights.ravel(), 0.5 * widths.ravel()
    if rounding == "half":
        half_heights, half_widths = np.round(half_heights), np.round(half_widths)
    return np.stack([-half_widths, -half_heights, half_widths, half_heights], axis=1).astype(np.float32)


def cell_corners(grid_hw: tuple[int, int], stride_hw: tuple[float, float]) -> Float[np.ndarray, "hw 2"]:
    """Returns the top-left corners (x, y) of the feature cells in network pixels, row by row."""
    y, x = (np.arange(size, dtype=np.float32) * stride for size, stride in zip(grid_hw, stride_hw, strict=True))
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def grid_anchors(
    cells: Float[np.ndarray, "c 4"],
    grid_hw: tuple[int, int],
    stride_hw: tuple[float, float] | float,
    *,
    centre: Literal["cell", "corner"] = "cell",
) -> Float[np.ndarray, "hwc 4"]:
    """Returns the cell anchors at every feature cell, ordered by row, then column, then anchor of the cell.

    Examples:
      >>> grid_anchors(cell_anchors(16, (1.0,), (1.0,)), (1, 2), 16)
      array([[ 0.,  0., 16., 16.],
             [16.,  0., 32., 16.]], dtype=float32)

    Args:
      cells: the anchors of one cell, centred on the origin, as from `cell_anchors`.
      grid_hw: (rows, columns) of the feature map.
      stride_hw: network pixels per cell: one number, or (y, x).
      centre: where in a cell the anchors are centred: in its middle or on its top-left corner.
    """
    stride_hw = stride_hw if isinstance(stride_hw, tuple) else (stride_hw, stride_hw)
    require_positive_strides(stride_hw)
    centres = cell_corners(grid_hw, stride_hw)
    if centre == "cell":
        centres = centres + np.float32(0.5) * np.asarray(stride_hw[::-1], np.float32)
    return (np.tile(centres, 2)[:, None, :] + cells[None, :, :]).reshape(-1, 4)


# Network pixels per cell of P2 to P6. Lin et al. 2017 (arXiv:1612.03144), section 4.1.
PYRAMID_STRIDES = (4, 8, 16, 32, 64)


class AnchorGrid(NamedTuple):
    """The anchors of all levels, as constants of a program.

    They are ordered by level, from fine to coarse, then by row, by column and by anchor of the cell.
    """

    anchors: Float[np.ndarray, "a 4"]
    corners: Float[np.ndarray, "a 2"]  # (x, y), top-left corner of the anchor's feature cell in network pixels
    level_sizes: tuple[int, ...]  # number of anchors on each level
    per_cell: int  # number of anchors of one cell


def strides_of(config: ModelConfig) -> tuple[int, ...]:
    """Returns the stride, in network pixels per cell, of each level that has anchors."""
    return (config.backbone.stride,) if config.fpn is None else PYRAMID_STRIDES


def anchors_per_cell(rpn: RpnConfig) -> int:
    """Returns the number of anchors of one feature cell; it is the same on all levels, which share the head."""
    scales = fitted(rpn.anchor_scales, "model.rpn.anchor_scales") if rpn.anchor_sizes is None else rpn.anchor_sizes[0]
    return len(scales) * len(rpn.anchor_ratios)


def level_cells(config: ModelConfig, level: int) -> Float[np.ndarray, "c 4"]:
    """Returns the anchors of one cell of a level, centred on the origin; the ratio varies slowest.

    Args:
      level: counted from the finest, which is 0.
    """
    rpn, strides = config.rpn, strides_of(config)
    if rpn.anchor_sizes is None:
        base, scales = rpn.anchor_base * strides[level] / strides[0], rpn.anchor_scales
    else:
        base, scales = 1.0, rpn.anchor_sizes[level]
    return cell_anchors(
        base, fitted(scales, "model.rpn.anchor_scales"), rpn.anchor_ratios, rounding=rpn.anchor_rounding
    )


def anchors_of(config: ModelConfig, grids: tuple[tuple[int, int], ...]) -> AnchorGrid:
    """Returns the anchors of feature maps with the (rows, columns) in `grids`, fine to coarse."""
    rpn, strides = config.rpn, strides_of(config)
    canvas = [cells * strides[0] for cells in grids[0]]
    anchors, corners = [], []
    for level, (grid_hw, stride) in enumerate(zip(grids, strides, strict=True)):
        cells = level_cells(config, level)
        apart = (stride, stride)
        if rpn.anchor_stride == "canvas":
            apart = (canvas[0] // grid_hw[0], canvas[1] // grid_hw[1])
        anchors.append(grid_anchors(cells, grid_hw, apart, centre=rpn.anchor_centre))
        corners.append(np.repeat(cell_corners(grid_hw, (stride, stride)), len(cells), axis=0))
    sizes = tuple(len(level) for level in anchors)
    return AnchorGrid(np.concatenate(anchors), np.concatenate(corners), sizes, anchors_per_cell(rpn))


def anchors_on_image(grid: AnchorGrid, image_hw: Float[Array, "b 2"], config: ModelConfig) -> Bool[Array, "b a"]:
    """Returns which anchors have a cell that contains image content.

    Cells in the padding exist only because of the canvas. Returns True for all anchors if `rpn.anchors_in_padding`
    is set.
    """
    if config.rpn.anchors_in_padding:
        return jnp.ones((image_hw.shape[0], len(grid.anchors)), bool)
    return (jnp.asarray(grid.corners)[None] < image_hw[:, None, ::-1]).all(axis=-1)


def check_border(grid: AnchorGrid, canvas: tuple[int, int], allowed_border: float | None) -> None:
    """Raises InputError if no anchor can train the RPN, even in an image that fills the canvas."""
    if allowed_border is None:
        return
    anchors = grid.anchors
    sides = anchors[:, 2:] - anchors[:, :2]
    reach = np.concatenate([-anchors[:, :2], anchors[:, 2:] - np.asarray(canvas[::-1], np.float32)], axis=1)
    if (reach > allowed_border).any(axis=1).all():
        raise InputError(
            f"every anchor reaches more than model.rpn.allowed_border = {allowed_border} pixels over the border "
            f"of a {canvas[0]} x {canvas[1]} canvas; the smallest anchor is {sides.prod(axis=1).min() ** 0.5:.0f} "
            "pixels square: reduce model.rpn.anchor_scales (or anchor_sizes), or set model.rpn.allowed_border to None"
        )
