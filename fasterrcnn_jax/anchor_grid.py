"""The anchors of a model on a canvas: of one feature map, or of every level of a pyramid one after the other."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fasterrcnn_jax.anchors import cell_anchors, cell_corners, grid_anchors
from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.errors import InputError

# Network pixels per cell of P2 to P6. Lin et al. 2017 (arXiv:1612.03144), section 4.1.
PYRAMID_STRIDES = (4, 8, 16, 32, 64)


class AnchorGrid(NamedTuple):
    """Constants of a program. Levels from fine to coarse; in each rows, columns, anchors of a cell."""

    anchors: Float[np.ndarray, "a 4"]
    corners: Float[np.ndarray, "a 2"]  # (x, y), near corner of the anchor's feature cell in network pixels
    level_sizes: tuple[int, ...]  # anchors of each level
    per_cell: int


def strides_of(config: ModelConfig) -> tuple[int, ...]:
    """Returns network pixels per cell of each level that carries anchors."""
    return (config.backbone.stride,) if config.fpn is None else PYRAMID_STRIDES


def anchors_of(config: ModelConfig, grids: tuple[tuple[int, int], ...]) -> AnchorGrid:
    """Returns the anchors of feature maps with `grids` rows and columns, fine to coarse."""
    rpn, strides = config.rpn, strides_of(config)
    canvas = [cells * strides[0] for cells in grids[0]]
    anchors, corners = [], []
    for grid_hw, stride in zip(grids, strides, strict=True):
        cells = cell_anchors(
            rpn.anchor_base * stride / strides[0], rpn.anchor_scales, rpn.anchor_ratios, rounding=rpn.anchor_rounding
        )
        apart = (stride, stride)
        if rpn.anchor_stride == "canvas":
            apart = (canvas[0] // grid_hw[0], canvas[1] // grid_hw[1])
        anchors.append(grid_anchors(cells, grid_hw, apart, centre=rpn.anchor_centre))
        corners.append(np.repeat(cell_corners(grid_hw, (stride, stride)), len(cells), axis=0))
    sizes = tuple(len(level) for level in anchors)
    return AnchorGrid(np.concatenate(anchors), np.concatenate(corners), sizes, len(cells))


def anchors_on_picture(
    grid: AnchorGrid, image_hw: Float[Array, "b 2"], config: ModelConfig
) -> Bool[Array, "b a"]:
    """True where the anchor's cell holds picture: without padding the others would hardly exist.

    True for all where the configuration lets anchors in the padding take part.
    """
    if config.rpn.anchors_in_padding:
        return jnp.ones((len(image_hw), len(grid.anchors)), bool)
    return (jnp.asarray(grid.corners)[None] < image_hw[:, None, ::-1]).all(axis=-1)


def check_border(grid: AnchorGrid, canvas: tuple[int, int], allowed_border: float | None) -> None:
    """Raises InputError where even a picture that fills the canvas has no anchor to train the RPN on."""
    if allowed_border is None:
        return
    anchors = grid.anchors
    sides = anchors[:, 2:] - anchors[:, :2]
    reach = np.concatenate([-anchors[:, :2], anchors[:, 2:] - np.float32(canvas[::-1])], axis=1)
    if (reach > allowed_border).any(axis=1).all():
        raise InputError(
            f"every anchor reaches more than model.rpn.allowed_border = {allowed_border} pixels over the border "
            f"of a {canvas[0]} x {canvas[1]} canvas: the smallest is {sides.prod(axis=1).min() ** 0.5:.0f} pixels "
            "square; smaller model.rpn.anchor_scales, or None for the border, give the RPN something to learn"
        )
