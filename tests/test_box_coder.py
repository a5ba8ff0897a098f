"""Encoding of boxes as deltas and decoding."""

import functools

import jax
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import arrays

from fasterrcnn_jax.ops.box_coder import decode, encode
from fasterrcnn_jax.structures import MAX_LOG_SCALE

UNIT = dict(means=(0.0, 0.0, 0.0, 0.0), stds=(1.0, 1.0, 1.0, 1.0))
HEAD = dict(means=(0.0, 0.0, 0.0, 0.0), stds=(0.1, 0.1, 0.2, 0.2))
UNEVEN = dict(means=(0.1, -0.2, 0.3, -0.4), stds=(1.0, 0.5, 0.3, 0.25))  # differ, to show exchanged ones

jitted_encode = functools.partial(jax.jit, static_argnames=("means", "stds"))(encode)
jitted_decode = functools.partial(jax.jit, static_argnames=("means", "stds", "max_log_scale", "far_corner_offset"))(
    decode
)


def boxes(n):
    """Returns boxes with sides from 1 to 60 pixels, so that no ratio of two sides reaches the limit of log scales."""
    corner = arrays(np.float32, (n, 2), elements=st.floats(-50, 50, width=32))
    side = arrays(np.float32, (n, 2), elements=st.floats(1, 60, width=32))
    return st.tuples(corner, side).map(lambda cs: np.concatenate([cs[0], cs[0] + cs[1]], axis=1))


@given(boxes(6), boxes(6), st.sampled_from([UNIT, HEAD, UNEVEN]), st.sampled_from([MAX_LOG_SCALE, None]))
def test_decode_inverts_encode(targets, anchors, norm, max_log_scale):
    deltas = jitted_encode(targets, anchors, **norm)
    decoded = jitted_decode(deltas, anchors, **norm, max_log_scale=max_log_scale)
    np.testing.assert_allclose(decoded, targets, atol=2e-3)


@given(boxes(6), boxes(6), st.sampled_from([UNIT, UNEVEN]))
def test_encode_equals_the_formulas(targets, anchors, norm):
    expected = [oracles.encode(*pair, **norm) for pair in zip(targets, anchors, strict=True)]
    found = jitted_encode(targets, anchors, **norm)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("max_log_scale", [MAX_LOG_SCALE, 1.0, None])
@pytest.mark.parametrize("far_corner_offset", [0, 1])
@given(boxes(6), arrays(np.float32, (6, 4), elements=st.floats(-8, 8, width=32)))
def test_decode_equals_the_formulas(max_log_scale, far_corner_offset, anchors, deltas):
    options = UNEVEN | dict(max_log_scale=max_log_scale, far_corner_offset=far_corner_offset)
    expected = [oracles.decode(*pair, **options) for pair in zip(deltas, anchors, strict=True)]
    found = jitted_decode(deltas, anchors, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@given(boxes(6))
def test_zero_deltas_are_the_anchor_itself(anchors):
    decoded = jitted_decode(np.zeros((6, 4), np.float32), anchors, **UNIT)
    np.testing.assert_allclose(decoded, anchors, atol=1e-4)
    np.testing.assert_array_equal(jitted_encode(anchors, anchors, **UNIT), np.zeros((6, 4)))


@pytest.mark.parametrize("norm", [UNIT, HEAD, UNEVEN])
def test_log_scale_is_cut_after_the_normalisation_is_taken_out(norm):
    anchor = np.array([[0, 0, 16, 16]] * 3, np.float32)
    scale = np.array([[MAX_LOG_SCALE], [MAX_LOG_SCALE + 0.1], [1e4]], np.float32)
    deltas = np.concatenate([0 * scale, 0 * scale, scale, 0 * scale], axis=1)
    deltas = (deltas - np.float32(norm["means"])) / np.float32(norm["stds"])
    decoded = np.asarray(jitted_decode(deltas, anchor, **norm))
    np.testing.assert_allclose(decoded[:, 2] - decoded[:, 0], 1000.0, rtol=1e-5)
    np.testing.assert_allclose(decoded[:, 3] - decoded[:, 1], 16.0, rtol=1e-5)


def test_very_negative_log_scale_gives_an_empty_finite_box():
    decoded = jitted_decode(np.float32([[0, 0, -1e4, -1e4]]), np.float32([[0, 0, 16, 16]]), **UNIT)
    np.testing.assert_array_equal(decoded, [[8, 8, 8, 8]])


def test_without_a_limit_large_log_scales_are_not_cut_and_may_overflow():
    """The Caffe implementations decode without a limit; 4.5 is above the usual limit of log(1000 / 16)."""
    deltas, anchor = np.float32([[0, 0, 4.5, 0], [0, 0, 100, 0]]), np.float32([[0, 0, 16, 16]] * 2)
    decoded = np.asarray(jitted_decode(deltas, anchor, max_log_scale=None))
    assert decoded[0, 2] - decoded[0, 0] == pytest.approx(16 * np.exp(4.5), rel=1e-5)
    assert np.isinf(decoded[1, [0, 2]]).all() and decoded[1, [1, 3]].tolist() == [0, 16]


@pytest.mark.parametrize("offset", [0, 1])
def test_far_corner_offset_moves_far_corners_only(offset):
    deltas, anchor = np.zeros((1, 4), np.float32), np.float32([[2, 3, 12, 23]])
    decoded = jitted_decode(deltas, anchor, far_corner_offset=offset)
    np.testing.assert_array_equal(decoded, [[2, 3, 12 + offset, 23 + offset]])
