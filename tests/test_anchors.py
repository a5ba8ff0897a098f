"""Shapes, places and order of the anchors."""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasterrcnn_jax.anchors import cell_anchors, cell_centres, grid_anchors
from fasterrcnn_jax.config import BackboneConfig, ModelConfig, ProposalConfig, RpnConfig
from fasterrcnn_jax.models.detector import anchors_of
from fasterrcnn_jax.models.heads import RpnHead
from fasterrcnn_jax.proposals import propose

GOLDEN = np.load(Path(__file__).parent / "golden" / "geometry.npz")

sizes_and_ratios = st.tuples(
    st.lists(st.floats(8, 512), min_size=1, max_size=4).map(tuple),
    st.lists(st.floats(0.2, 5), min_size=1, max_size=4).map(tuple),
)


@given(sizes_and_ratios)
def test_cell_anchors_have_their_area_ratio_and_centre_in_order(sizes_and_ratios):
    sizes, ratios = sizes_and_ratios
    cells = cell_anchors(sizes, ratios)
    assert cells.dtype == np.float32
    expected = [(ratio, size) for ratio in ratios for size in sizes]
    for (x1, y1, x2, y2), (ratio, size) in zip(cells.astype(np.float64), expected, strict=True):
        assert (x2 - x1) * (y2 - y1) == pytest.approx(size**2, rel=1e-5)
        assert (y2 - y1) / (x2 - x1) == pytest.approx(ratio, rel=1e-5)
        assert x1 == -x2 and y1 == -y2


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([8, 16]))
def test_grid_anchors_go_by_row_column_and_cell_anchor(rows, columns, stride):
    cells = cell_anchors((16.0, 32.0), (0.5, 2.0))
    anchors = iter(grid_anchors(cells, (rows, columns), stride))
    for row in range(rows):
        for column in range(columns):
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            for cell in cells:
                np.testing.assert_allclose(next(anchors), cell + np.float32([x, y, x, y]), atol=1e-4)
    assert next(anchors, None) is None


def test_centres_are_those_of_the_anchors():
    config = ModelConfig(rpn=RpnConfig(anchor_sizes=(32, 64)), backbone=BackboneConfig(stride=8))
    anchors, centres = anchors_of(config, (3, 5))
    np.testing.assert_allclose((anchors[:, :2] + anchors[:, 2:]) / 2, centres, atol=1e-4)
    assert cell_centres((3, 5), 8)[7].tolist() == [20, 12]  # second row, third column


def test_anchors_equal_chenyuntcs():
    cells = cell_anchors((128, 256, 512), (0.5, 1, 2))
    np.testing.assert_allclose(cells + 8, GOLDEN["cells"], rtol=1e-5, atol=1e-4)
    grid = grid_anchors(cells, (38, 50), 16)
    np.testing.assert_allclose(grid[::97], GOLDEN["grid_every_97"], rtol=1e-5, atol=1e-4)


def test_rounded_anchors_equal_torchvisions():
    cells = np.round(cell_anchors((32, 64, 128), (0.5, 1, 2)))
    np.testing.assert_array_equal(cells, GOLDEN["rounded_cells"])


def test_rpn_channels_go_in_the_order_of_the_anchors():
    """One anchor of one cell fires and moves; the box that comes out is its own, moved its own way."""
    config = ModelConfig(
        backbone=BackboneConfig(depth=18, width=8, stride=16),
        rpn=RpnConfig(anchor_sizes=(16, 32), anchor_ratios=(0.5, 2.0), channels=1),
    )
    head = RpnHead(config, rng=np.random.default_rng(0))
    head.conv.kernel[...] = jnp.zeros((3, 3, 32, 1)).at[1, 1, 0, 0].set(1.0)
    grid_hw, stride = (4, 6), 16
    anchors, _ = anchors_of(config, grid_hw)

    @jax.jit
    def best_box(head, features):
        objectness, deltas = head(features)
        found = propose(
            objectness[0],
            deltas[0],
            jnp.asarray(anchors),
            jnp.ones(len(anchors), bool),
            jnp.array([100.0, 100.0]),
            config=ProposalConfig(pre_nms_top_n=1, post_nms_top_n=1, min_size=1),
        )
        return found.boxes[0]

    row, column = 2, 3
    features = jnp.zeros((1, *grid_hw, 32)).at[0, row, column, 0].set(1.0)
    shapes = [(ratio, size) for ratio in (0.5, 2.0) for size in (16, 32)]
    for channel, (ratio, size) in enumerate(shapes):
        head.objectness.kernel[...] = jnp.zeros((1, 1, 1, 4)).at[0, 0, 0, channel].set(9.0)
        for coordinate, shift in enumerate(((0.1, 0), (0, 0.1))):
            head.deltas.kernel[...] = (
                jnp.zeros((1, 1, 1, 16)).at[0, 0, 0, 4 * channel + coordinate].set(0.1)
            )
            height, width = size * ratio**0.5, size / ratio**0.5
            x = (column + 0.5) * stride + shift[0] * width
            y = (row + 0.5) * stride + shift[1] * height
            expected = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            np.testing.assert_allclose(best_box(head, features), expected, atol=1e-3)


def test_grid_checksum_of_the_golden_file_is_the_reference_grid():
    """Guards the golden numbers themselves: the whole grid, rebuilt from its first cell."""
    cells = GOLDEN["cells"][:, [1, 0, 3, 2]]
    y, x = np.mgrid[0:38, 0:50] * 16
    shifts = np.stack([y, x, y, x], axis=-1).reshape(-1, 1, 4)
    grid = (cells[None] + shifts).reshape(-1, 4).astype(np.float32)
    assert zlib.crc32(grid.tobytes()) == GOLDEN["grid_yxyx_crc32"]
