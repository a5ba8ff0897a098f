"""Crop and pool: the loop over samples, the geometry, and the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import arrays

from fasterrcnn_jax.config import RoiFeaturesConfig
from fasterrcnn_jax.ops.roi_cropping import roi_crop
from fasterrcnn_jax.ops.roi_operators import roi_features

STRIDE = 8
OPTIONS = dict(stride=STRIDE, output_size=3)
crop = functools.partial(jax.jit(roi_crop, static_argnames=("stride", "output_size")), **OPTIONS)

FEATURES = np.random.default_rng(0).normal(size=(6, 7, 3)).astype(np.float32)
height, width = FEATURES.shape[0] * STRIDE, FEATURES.shape[1] * STRIDE
BOXES = np.float32(
    [
        [9, 5, 41, 37],  # inside
        [0, 0, width, height],  # the whole map
        [-20, -9, 13, 21],  # partly outside, near corner
        [39, 33, width + 30, height + 12],  # partly outside, far corner
        [width + 20, 0, width + 60, 30],  # wholly outside
        [0, 0, 0, 0],  # padding
        [20, 20, 20, 20],  # a point
        [41, 37, 9, 5],  # inverted
    ]
)


def test_roi_crop_equals_the_loop_over_samples():
    np.testing.assert_allclose(crop(FEATURES, BOXES), oracles.roi_crop(FEATURES, BOXES, **OPTIONS), atol=1e-5)


@given(arrays(np.float32, (len(BOXES), 4), elements=st.floats(-30, 90, width=32)))
def test_roi_crop_of_any_box_equals_the_loop_over_samples(boxes):
    np.testing.assert_allclose(crop(FEATURES, boxes), oracles.roi_crop(FEATURES, boxes, **OPTIONS), atol=1e-4)


def test_roi_crop_of_a_ramp_is_the_position_of_the_farther_sample():
    """Six samples go from border to border of the box; each output cell keeps the larger of its two samples."""
    y, x = np.mgrid[0:6, 0:7] * float(STRIDE)
    ramp = np.stack([x, y, -x], axis=-1).astype(np.float32)
    x1, y1, x2, y2 = 10.0, 7.0, 40.0, 31.0
    pooled = crop(ramp, np.float32([[x1, y1, x2, y2]] * len(BOXES)))[0]
    farther, nearer = np.float32([1, 3, 5]) / 5, np.float32([0, 2, 4]) / 5
    np.testing.assert_allclose(pooled[..., 0], np.tile(x1 + (x2 - x1) * farther, (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(pooled[..., 1].T, np.tile(y1 + (y2 - y1) * farther, (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(pooled[..., 2], np.tile(-x1 - (x2 - x1) * nearer, (3, 1)), rtol=1e-5)


def test_without_max_pooling_each_cell_is_one_sample():
    """Three samples go from border to border of the box; on a ramp their values are their positions."""
    y, x = np.mgrid[0:6, 0:7] * float(STRIDE)
    ramp = np.stack([x, y], axis=-1).astype(np.float32)
    x1, y1, x2, y2 = 10.0, 7.0, 40.0, 31.0
    samples = roi_crop(jnp.asarray(ramp), jnp.float32([[x1, y1, x2, y2]]), **OPTIONS, max_pool=False)[0]
    places = np.float32([0, 0.5, 1])
    np.testing.assert_allclose(samples[..., 0], np.tile(x1 + (x2 - x1) * places, (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(samples[..., 1].T, np.tile(y1 + (y2 - y1) * places, (3, 1)), rtol=1e-5)


def test_the_maximum_of_twice_as_many_samples_is_the_pooled_crop():
    twice = roi_crop(jnp.asarray(FEATURES), jnp.asarray(BOXES), stride=STRIDE, output_size=6, max_pool=False)
    pooled = np.asarray(twice).reshape(len(BOXES), 3, 2, 3, 2, -1).max(axis=(2, 4))
    np.testing.assert_allclose(crop(FEATURES, BOXES), pooled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("max_pool", [True, False])
def test_the_configuration_says_whether_the_crop_is_pooled(max_pool):
    config = RoiFeaturesConfig(operator="crop", output_size=3, crop_max_pool=max_pool)
    features, boxes = jnp.asarray(FEATURES), jnp.asarray(BOXES)
    found = roi_features((features,), boxes, strides=(STRIDE,), far_corner_offset=0, config=config)
    np.testing.assert_array_equal(found, roi_crop(features, boxes, **OPTIONS, max_pool=max_pool))


def test_cells_outside_the_map_are_zero():
    """Half a cell outside the map a constant gives half its value; a whole cell outside it gives 0."""
    x = np.float32([-1.5, -1.0, -0.5, 0.0, 6.0, 6.5, 7.0]) * STRIDE
    boxes = np.stack([x, np.full(7, 16), x, np.full(7, 16)], axis=1).astype(np.float32)
    pooled = crop(np.full_like(FEATURES, 2.0), boxes)
    np.testing.assert_allclose(pooled[:, 1, 1, 0], [0, 0, 1, 2, 2, 1, 0], atol=1e-6)


@given(st.integers(-1, 1), st.integers(-1, 2))
def test_roi_crop_moves_with_the_features(rows, columns):
    shifted = np.roll(FEATURES, (rows, columns), axis=(0, 1))
    inside = np.repeat(np.float32([[9, 9, 31, 29]]), len(BOXES), axis=0)
    moved = inside + STRIDE * np.float32([columns, rows, columns, rows])
    np.testing.assert_allclose(crop(shifted, moved), crop(FEATURES, inside), atol=1e-5)


def test_gradient_of_the_features_equals_finite_differences():
    cotangent = np.random.default_rng(3).normal(size=(len(BOXES), 3, 3, 3)).astype(np.float32)
    objective = jax.jit(lambda f: (crop(f, BOXES) * cotangent).sum())
    gradient = jax.grad(objective)(jnp.asarray(FEATURES))
    for cell in [(0, 0, 0), (2, 3, 1), (5, 6, 2), (0, 6, 1)]:
        step = np.zeros_like(FEATURES)
        step[cell] = 1e-3  # too small to make another sample the largest
        difference = (objective(FEATURES + step) - objective(FEATURES - step)) / 2e-3
        assert float(difference) == pytest.approx(float(gradient[cell]), abs=1e-2)


def test_of_equal_samples_the_first_in_row_major_order_gets_the_gradient():
    """On a constant map all samples are equal: only samples 0, 2 and 4 of each axis get a gradient."""
    boxes = np.float32([[8, 8, 48, 48]])  # samples on the cells 1, 2, ..., 6
    features = np.ones((8, 8, 1), np.float32)
    gradient = jax.grad(lambda f: crop(f, boxes).sum())(jnp.asarray(features))
    expected = np.zeros((8, 8, 1))
    expected[1:7:2, 1:7:2] = 1
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_no_gradient_reaches_the_boxes():
    gradient = jax.grad(lambda boxes: crop(FEATURES, boxes).sum())(jnp.asarray(BOXES))
    np.testing.assert_array_equal(gradient, np.zeros_like(BOXES))


def test_one_image_of_a_batch_ignores_the_others():
    features = np.stack([FEATURES, np.full_like(FEATURES, 1e9)])
    pooled = jax.vmap(crop)(features, np.stack([BOXES, BOXES + 3]))
    np.testing.assert_allclose(pooled[0], crop(FEATURES, BOXES), atol=1e-5)


def test_low_precision_features_are_cropped_in_float32():
    pooled = crop(FEATURES.astype(jnp.bfloat16), BOXES)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, crop(FEATURES, BOXES), atol=0.05)


def test_an_output_size_of_0_is_an_error():
    with pytest.raises(ValueError, match="output_size must be at least 1, got 0"):
        crop(FEATURES, BOXES, output_size=0)
