"""RoIAlign: the loop over samples, torchvision's numbers, and its symmetries."""

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

from fasterrcnn_jax.roi_align import roi_align

GOLDEN = np.load(Path(__file__).parent / "golden" / "roi_align.npz")
STRIDE = 8
OPTIONS = dict(stride=STRIDE, output_size=3, sampling_ratio=2)

jitted = functools.partial(jax.jit, static_argnames=("stride", "output_size", "sampling_ratio"))(roi_align)
align = functools.partial(jitted, **OPTIONS)

FEATURES = np.random.default_rng(0).normal(size=(6, 7, 3)).astype(np.float32)
height, width = FEATURES.shape[0] * STRIDE, FEATURES.shape[1] * STRIDE
BOXES = np.float32(
    [
        [9, 5, 41, 37],  # inside
        [0, 0, width, height],  # the whole map
        [-20, -9, 13, 21],  # partly outside, near corner
        [39, 33, width + 30, height + 12],  # partly outside, far corner
        [width + 20, 0, width + 60, 30],  # wholly outside
        [-90, -90, -40, -30],
        [0, 0, 0, 0],  # padding
        [20, 20, 20, 20],  # a point
        [11, 3, 11, 40],  # no width
        [13.5, 17.25, 14.0, 17.5],  # smaller than a cell
    ]
)


@pytest.mark.parametrize("sampling_ratio", [1, 2, 3])
def test_roi_align_equals_the_loop_over_samples(sampling_ratio):
    options = OPTIONS | dict(sampling_ratio=sampling_ratio)
    expected = oracles.roi_align(FEATURES, BOXES, **options)
    np.testing.assert_allclose(jitted(FEATURES, BOXES, **options), expected, atol=1e-5)


@given(arrays(np.int32, (len(BOXES), 4), elements=st.integers(-30, 90)))
def test_roi_align_of_any_box_equals_the_loop_over_samples(boxes):
    """Odd eighths never put a sample on the edge, where rounding would decide."""
    boxes = (boxes + 0.375).astype(np.float32)
    np.testing.assert_allclose(
        align(FEATURES, boxes), oracles.roi_align(FEATURES, boxes, **OPTIONS), atol=1e-4
    )


@pytest.mark.parametrize("stride", [4, 16])
def test_roi_align_and_its_gradient_equal_torchvision(stride):
    rois, cotangent = GOLDEN[f"rois_s{stride}"], GOLDEN[f"cotangent_s{stride}"]

    @jax.jit
    def run(features):
        pool = functools.partial(roi_align, stride=stride, output_size=7, sampling_ratio=2)
        per_image = jax.vmap(pool, in_axes=(0, None))(features, jnp.asarray(rois[:, 1:]))
        return per_image[rois[:, 0].astype(np.int32), np.arange(len(rois))]

    pooled, pull_back = jax.vjp(run, jnp.asarray(GOLDEN["features"]))
    np.testing.assert_allclose(pooled, GOLDEN[f"pooled_s{stride}"], atol=2e-5)
    (gradient,) = pull_back(jnp.asarray(cotangent))
    np.testing.assert_allclose(gradient, GOLDEN[f"gradient_s{stride}"], atol=1e-4)


def test_roi_align_is_linear_in_the_features():
    others = np.random.default_rng(1).normal(size=FEATURES.shape).astype(np.float32)
    together = align(2 * FEATURES - 3 * others, BOXES)
    apart = 2 * np.asarray(align(FEATURES, BOXES)) - 3 * np.asarray(align(others, BOXES))
    np.testing.assert_allclose(together, apart, atol=1e-4)


def test_roi_align_of_a_constant_is_the_constant_inside_the_map():
    boxes = np.concatenate([BOXES[:2], BOXES[6:], BOXES[:4]])
    boxes[-4:] = boxes[-4:].clip(0, [width, height, width, height])
    pooled = align(np.full_like(FEATURES, 2.5), boxes)
    np.testing.assert_allclose(pooled, np.full(pooled.shape, 2.5), rtol=1e-5)


def test_roi_align_of_a_ramp_is_the_position_of_the_bin():
    """The map whose value is its own x in network pixels gives the x of the bins' centres, likewise y."""
    y, x = (np.mgrid[0:6, 0:7] + 0.5) * STRIDE
    ramp = np.stack([x, y, 0 * x], axis=-1).astype(np.float32)
    x1, y1, x2, y2 = 10.0, 7.0, 40.0, 31.0
    (pooled,) = align(ramp, np.float32([[x1, y1, x2, y2]] * len(BOXES)))[:1]
    centres = (np.arange(3) + 0.5) / 3
    np.testing.assert_allclose(pooled[..., 0], np.tile(x1 + (x2 - x1) * centres, (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(pooled[..., 1].T, np.tile(y1 + (y2 - y1) * centres, (3, 1)), rtol=1e-5)


@pytest.mark.parametrize("rows, columns", [(1, 0), (0, 2), (1, 1)])
def test_roi_align_moves_with_the_features(rows, columns):
    shifted = np.roll(FEATURES, (rows, columns), axis=(0, 1))
    inside = np.repeat(np.float32([[9, 5, 33, 29]]), len(BOXES), axis=0)
    moved = inside + STRIDE * np.float32([columns, rows, columns, rows])
    np.testing.assert_allclose(align(shifted, moved), align(FEATURES, inside), atol=1e-5)


def test_gradient_is_the_adjoint_of_the_operator():
    """<align(f), c> = <f, gradient(c)> for every f, c: exact for a linear operator."""
    generator = np.random.default_rng(2)
    pooled, pull_back = jax.vjp(lambda f: align(f, BOXES), jnp.asarray(FEATURES))
    for _ in range(3):
        cotangent = generator.normal(size=pooled.shape).astype(np.float32)
        (gradient,) = pull_back(jnp.asarray(cotangent))
        left = np.sum(np.float64(pooled) * cotangent)
        assert np.sum(np.float64(gradient) * FEATURES) == pytest.approx(left, abs=1e-3)


def test_gradient_of_the_features_equals_finite_differences():
    cotangent = np.random.default_rng(3).normal(size=(len(BOXES), 3, 3, 3)).astype(np.float32)
    objective = jax.jit(lambda f: (align(f, BOXES) * cotangent).sum())
    gradient = jax.grad(objective)(jnp.asarray(FEATURES))
    for cell in [(0, 0, 0), (2, 3, 1), (5, 6, 2), (0, 6, 1)]:
        step = np.zeros_like(FEATURES)
        step[cell] = 0.5  # linear: any step is exact
        difference = objective(FEATURES + step) - objective(FEATURES - step)
        assert float(difference) == pytest.approx(float(gradient[cell]), abs=1e-3)


def test_no_gradient_reaches_the_boxes():
    gradient = jax.grad(lambda boxes: align(FEATURES, boxes).sum())(jnp.asarray(BOXES))
    np.testing.assert_array_equal(gradient, np.zeros_like(BOXES))


def test_one_image_of_a_batch_ignores_the_others():
    features = np.stack([FEATURES, np.full_like(FEATURES, 1e9)])
    pooled = jax.vmap(align)(features, np.stack([BOXES, BOXES]))
    np.testing.assert_allclose(pooled[0], align(FEATURES, BOXES), atol=1e-5)


def test_low_precision_features_are_pooled_in_float32():
    pooled = align(FEATURES.astype(jnp.bfloat16), BOXES)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, align(FEATURES, BOXES), atol=0.05)


@pytest.mark.parametrize("options", [dict(output_size=0), dict(sampling_ratio=0)])
def test_nothing_to_sample_is_an_error(options):
    with pytest.raises(ValueError, match="at least 1"):
        jitted(FEATURES, BOXES, **(OPTIONS | options))
