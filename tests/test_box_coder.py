"""Boxes to deltas and back."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import arrays

from fasterrcnn_jax.box_coder import MAX_LOG_SCALE, decode, encode
from fasterrcnn_jax.boxes import clip, min_side

GOLDEN = np.load(Path(__file__).parent / "golden" / "geometry.npz")
UNIT = (1.0, 1.0, 1.0, 1.0)
HEAD = (10.0, 10.0, 5.0, 5.0)
UNEVEN = (1.0, 2.0, 3.0, 4.0)  # shows an exchanged coordinate

jitted_encode = functools.partial(jax.jit, static_argnames="weights")(encode)
jitted_decode = functools.partial(jax.jit, static_argnames="weights")(decode)


def boxes(n):
    """Sides from 1 to 60 pixels: within the clamp of each other."""
    corner = arrays(np.float32, (n, 2), elements=st.floats(-50, 50, width=32))
    side = arrays(np.float32, (n, 2), elements=st.floats(1, 60, width=32))
    return st.tuples(corner, side).map(lambda cs: np.concatenate([cs[0], cs[0] + cs[1]], axis=1))


@given(boxes(6), boxes(6), st.sampled_from([UNIT, UNEVEN]))
def test_decode_inverts_encode(targets, anchors, weights):
    deltas = jitted_encode(targets, anchors, weights=weights)
    np.testing.assert_allclose(jitted_decode(deltas, anchors, weights=weights), targets, atol=2e-3)


@given(boxes(6), boxes(6), st.sampled_from([UNIT, UNEVEN]))
def test_encode_equals_the_formulas(targets, anchors, weights):
    expected = [oracles.encode(*pair, weights) for pair in zip(targets, anchors, strict=True)]
    found = jitted_encode(targets, anchors, weights=weights)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@given(boxes(6), arrays(np.float32, (6, 4), elements=st.floats(-8, 8, width=32)))
def test_decode_equals_the_formulas(anchors, deltas):
    expected = [oracles.decode(*pair, UNEVEN) for pair in zip(deltas, anchors, strict=True)]
    found = jitted_decode(deltas, anchors, weights=UNEVEN)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@given(boxes(6))
def test_zero_deltas_are_the_anchor_itself(anchors):
    decoded = jitted_decode(np.zeros((6, 4), np.float32), anchors, weights=UNIT)
    np.testing.assert_allclose(decoded, anchors, atol=1e-4)
    np.testing.assert_array_equal(jitted_encode(anchors, anchors, weights=UNIT), np.zeros((6, 4)))


@pytest.mark.parametrize("weights", [UNIT, HEAD])
def test_log_scale_is_cut_after_dividing_by_the_weights(weights):
    anchor = np.array([[0, 0, 16, 16]] * 3, np.float32)
    scale = np.array([[MAX_LOG_SCALE], [MAX_LOG_SCALE + 0.1], [1e4]], np.float32)
    deltas = np.concatenate([0 * scale, 0 * scale, scale, 0 * scale], axis=1) * np.float32(weights)
    decoded = np.asarray(jitted_decode(deltas, anchor, weights=weights))
    np.testing.assert_allclose(decoded[:, 2] - decoded[:, 0], 1000.0, rtol=1e-5)
    np.testing.assert_allclose(decoded[:, 3] - decoded[:, 1], 16.0, rtol=1e-5)


def test_very_negative_log_scale_gives_an_empty_finite_box():
    decoded = jitted_decode(np.float32([[0, 0, -1e4, -1e4]]), np.float32([[0, 0, 16, 16]]), weights=UNIT)
    np.testing.assert_array_equal(decoded, [[8, 8, 8, 8]])


@pytest.mark.parametrize("name, weights", [("1111", UNIT), ("10_10_5_5", HEAD)])
def test_coder_equals_torchvision(name, weights):
    anchors = GOLDEN["anchors"]
    deltas = jitted_encode(GOLDEN["boxes"], anchors, weights=weights)
    np.testing.assert_allclose(deltas, GOLDEN[f"encode_{name}"], rtol=1e-4, atol=1e-5)
    deltas = GOLDEN["deltas"] * np.float32(weights)
    decoded = jitted_decode(deltas, anchors[:, :, None, :], weights=weights)
    np.testing.assert_allclose(decoded, GOLDEN[f"decode_{name}"], rtol=1e-5, atol=2e-3)


def test_clip_and_size_filter_equal_torchvision():
    clipped = clip(jnp.asarray(GOLDEN["decode_1111"][0]), jnp.array([600.0, 800.0]))
    np.testing.assert_array_equal(clipped, GOLDEN["decode_clipped"])
    kept = np.flatnonzero(np.asarray(min_side(clipped)).ravel() >= 16)
    np.testing.assert_array_equal(kept, GOLDEN["keep_small_16"])
