"""Shapes, places and order of the anchors."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasterrcnn_jax.config import (
    BackboneConfig,
    BoxCoderConfig,
    FpnConfig,
    ImageConfig,
    ModelConfig,
    ProposalConfig,
    RpnConfig,
)
from fasterrcnn_jax.models.heads import RpnHead
from fasterrcnn_jax.ops.anchors import (
    anchors_of,
    cell_anchors,
    cell_corners,
    grid_anchors,
)
from fasterrcnn_jax.ops.proposals import propose

bases_scales_and_ratios = st.tuples(
    st.sampled_from([1.0, 10.0, 16.0]),
    st.lists(st.floats(1, 32), min_size=1, max_size=4).map(tuple),
    st.lists(st.floats(0.2, 5), min_size=1, max_size=4).map(tuple),
)


@given(bases_scales_and_ratios)
def test_unrounded_cell_anchors_have_their_area_ratio_and_centre_in_order(bases_scales_and_ratios):
    base, scales, ratios = bases_scales_and_ratios
    cells = cell_anchors(base, scales, ratios, rounding="none")
    assert cells.dtype == np.float32
    expected = [(ratio, base * scale) for ratio in ratios for scale in scales]
    for (x1, y1, x2, y2), (ratio, size) in zip(cells.astype(np.float64), expected, strict=True):
        assert (x2 - x1) * (y2 - y1) == pytest.approx(size**2, rel=1e-5)
        assert (y2 - y1) / (x2 - x1) == pytest.approx(ratio, rel=1e-5)
        assert x1 == -x2 and y1 == -y2


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([8, 16]))
def test_grid_anchors_go_by_row_column_and_cell_anchor(rows, columns, stride):
    cells = cell_anchors(16.0, (1.0, 2.0), (0.5, 2.0), rounding="none")
    anchors = iter(grid_anchors(cells, (rows, columns), (stride, stride)))
    for row in range(rows):
        for column in range(columns):
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            for cell in cells:
                np.testing.assert_allclose(next(anchors), cell + np.float32([x, y, x, y]), atol=1e-4)
    assert next(anchors, None) is None


@pytest.mark.parametrize("centre, offset", [("cell", 4), ("corner", 0)])
def test_anchors_are_centred_on_cells_or_their_corners(centre, offset):
    rpn = RpnConfig(anchor_scales=(2, 4), anchor_centre=centre)
    grid = anchors_of(ModelConfig(rpn=rpn, backbone=BackboneConfig(stride=8)), ((3, 5),))
    centres = (grid.anchors[:, :2] + grid.anchors[:, 2:]) / 2
    np.testing.assert_allclose(centres, grid.corners + offset, atol=1e-4)
    assert cell_corners((3, 5), (8, 8))[7].tolist() == [16, 8]  # second row, third column
    assert (grid.level_sizes, grid.per_cell) == ((90,), 6)


FPN = dict(fpn=FpnConfig(), image=ImageConfig(short_side=64, long_side=96, canvases=((64, 96), (96, 64))))
PYRAMID = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))


@pytest.mark.parametrize("apart, last", [("level", (64, 64)), ("canvas", (16, 24))])
def test_a_pyramid_has_anchors_twice_as_large_on_every_level(apart, last):
    rpn = RpnConfig(anchor_base=32.0, anchor_scales=(1.0,), anchor_centre="corner", anchor_stride=apart)
    grid = anchors_of(ModelConfig(rpn=rpn, **FPN), PYRAMID)
    assert grid.level_sizes == tuple(3 * rows * columns for rows, columns in PYRAMID) and grid.per_cell == 3
    sides = np.sqrt((grid.anchors[:, 2:] - grid.anchors[:, :2]).prod(axis=1))
    levels = np.repeat([32, 64, 128, 256, 512], grid.level_sizes)
    np.testing.assert_allclose(sides, levels, rtol=0.03)  # ratios are rounded
    firsts = np.cumsum([0, *grid.level_sizes[:-1]])
    np.testing.assert_array_equal(grid.anchors[firsts, :2], -grid.anchors[firsts, 2:])
    # Two rows and columns on P6, so that neighbouring anchors have a distance.
    assert grid_strides(ModelConfig(rpn=rpn, **FPN), (*PYRAMID[:4], (2, 2))) == [(4, 4), last]


def test_sizes_per_level_need_not_double():
    """The sides come from the formula of torchvision's generator, whose halves are rounded to even."""
    sizes = ((20.0, 24.0), (33.0, 50.0), (60.0, 75.0), (140.0, 200.0), (210.0, 400.0))
    rpn = RpnConfig(anchor_sizes=sizes, anchor_ratios=(0.5, 2.0), anchor_rounding="half", anchor_centre="corner")
    grid = anchors_of(ModelConfig(rpn=rpn, **FPN), PYRAMID)
    assert grid.level_sizes == tuple(4 * rows * columns for rows, columns in PYRAMID) and grid.per_cell == 4
    firsts = np.cumsum([0, *grid.level_sizes[:-1]])
    for first, of_level in zip(firsts, sizes, strict=True):
        halves = [
            (round(size / ratio**0.5 / 2), round(size * ratio**0.5 / 2)) for ratio in (0.5, 2.0) for size in of_level
        ]
        expected = [(-width, -height, width, height) for width, height in halves]
        np.testing.assert_array_equal(grid.anchors[first : first + 4], expected)


def test_sizes_that_double_are_the_anchors_of_base_and_scales():
    shared = dict(anchor_rounding="half", anchor_centre="corner")
    by_scale = RpnConfig(anchor_base=32.0, anchor_scales=(1.0,), **shared)
    by_size = RpnConfig(anchor_sizes=((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)), **shared)
    found, expected = (anchors_of(ModelConfig(rpn=rpn, **FPN), PYRAMID) for rpn in (by_size, by_scale))
    np.testing.assert_array_equal(found.anchors, expected.anchors)


def test_the_rpn_has_outputs_for_the_sizes_of_a_level():
    rpn = RpnConfig(anchor_sizes=((32.0, 64.0),), anchor_ratios=(1.0,), anchor_rounding="none", channels=1)
    head = RpnHead(ModelConfig(rpn=rpn), 8, rng=np.random.default_rng(0))
    objectness, _ = head((jnp.zeros((1, 3, 4, 8)),))
    assert objectness.shape == (1, 3 * 4 * 2) and len(anchors_of(ModelConfig(rpn=rpn), ((3, 4),)).anchors) == 24


def grid_strides(config, grids):
    """Returns (y, x) pixels between the anchors of neighbouring cells on the first and the last level."""
    grid = anchors_of(config, grids)
    found = []
    for level in (0, len(grids) - 1):
        start = sum(grid.level_sizes[:level])
        anchors = grid.anchors[start : start + grid.level_sizes[level] : grid.per_cell].reshape(*grids[level], 4)
        found.append((float(anchors[1, 0, 1] - anchors[0, 0, 1]), float(anchors[0, 1, 0] - anchors[0, 0, 0])))
    return found


@pytest.mark.parametrize("rounding", ["base", "half", "none"])
@given(bases_scales_and_ratios)
def test_cell_anchors_equal_the_loop(rounding, bases_scales_and_ratios):
    cells = cell_anchors(*bases_scales_and_ratios, rounding=rounding)
    expected = oracles.cell_anchors(*bases_scales_and_ratios, rounding=rounding)
    np.testing.assert_allclose(cells, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "rounding, width, height",
    [
        ("base", 2 * 23.0, 2 * 12.0),  # sqrt(512) = 22.63, half of 23 is 11.5, to even 12
        ("half", 2 * 23.0, 2 * 11.0),  # 22.63 and 11.31 again, each half a side
        ("none", 2 * 512**0.5, 512**0.5),
    ],
)
def test_rounding_decides_which_lengths_are_whole_pixels(rounding, width, height):
    cell = cell_anchors(16.0, (2.0,), (0.5,), rounding=rounding)
    np.testing.assert_allclose(cell, [[-width / 2, -height / 2, width / 2, height / 2]], rtol=1e-6)


def test_the_detectors_anchors_are_rounded_as_its_configuration_says():
    for rounding in ("base", "half", "none"):
        shapes = dict(anchor_base=10.0, anchor_scales=(3.0,), anchor_ratios=(0.5,))
        rpn = RpnConfig(**shapes, anchor_rounding=rounding)
        grid = anchors_of(ModelConfig(rpn=rpn), ((1, 1),))
        np.testing.assert_array_equal(grid.anchors - 8, cell_anchors(10.0, (3.0,), (0.5,), rounding=rounding))


def test_rpn_channels_go_in_the_order_of_the_anchors():
    """One anchor of one cell gets a high score and deltas; the proposal is this anchor, moved by these deltas."""
    config = ModelConfig(
        rpn=RpnConfig(anchor_scales=(1, 2), anchor_ratios=(0.5, 2.0), anchor_rounding="none", channels=1)
    )
    head = RpnHead(config, 32, rng=np.random.default_rng(0))
    head.convs[0].kernel[...] = jnp.zeros((3, 3, 32, 1)).at[1, 1, 0, 0].set(1.0)
    grid_hw, stride = (4, 6), 16
    anchors = anchors_of(config, (grid_hw,)).anchors

    @jax.jit
    def best_box(head, features):
        objectness, deltas = head((features,))
        found = propose(
            objectness[0],
            deltas[0],
            jnp.asarray(anchors),
            jnp.ones(len(anchors), bool),
            jnp.array([100.0, 100.0]),
            jnp.ones(2),
            config=ProposalConfig(pre_nms_top_n=1, post_nms_top_n=1, min_size=1),
            coder=BoxCoderConfig(),
        )
        return found.boxes[0]

    row, column = 2, 3
    features = jnp.zeros((1, *grid_hw, 32)).at[0, row, column, 0].set(1.0)
    shapes = [(ratio, size) for ratio in (0.5, 2.0) for size in (16, 32)]
    for channel, (ratio, size) in enumerate(shapes):
        head.objectness.kernel[...] = jnp.zeros((1, 1, 1, 4)).at[0, 0, 0, channel].set(9.0)
        for coordinate, shift in enumerate(((0.1, 0), (0, 0.1))):
            head.deltas.kernel[...] = jnp.zeros((1, 1, 1, 16)).at[0, 0, 0, 4 * channel + coordinate].set(0.1)
            height, width = size * ratio**0.5, size / ratio**0.5
            x = (column + 0.5) * stride + shift[0] * width
            y = (row + 0.5) * stride + shift[1] * height
            expected = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            np.testing.assert_allclose(best_box(head, features), expected, atol=1e-3)
