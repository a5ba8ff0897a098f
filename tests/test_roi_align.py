"""RoIAlign and its older average: the loops over samples, the references' numbers, and symmetries."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from fidelity import compare
from hypothesis import given
from hypothesis import strategies as st
from oracles import arrays

from fasterrcnn_jax.roi_align import roi_align, roi_align_average

GOLDEN_FOLDER = Path(__file__).parent / "golden"
GOLDEN = np.load(GOLDEN_FOLDER / "roi_align.npz")
GOLDEN_AVERAGE = np.load(GOLDEN_FOLDER / "roi_align_average.npz")
STRIDE = 8
GRID = dict(stride=STRIDE, output_size=3)
OPTIONS = GRID | dict(sampling_ratio=2, aligned=True)

STATIC = ("stride", "output_size", "sampling_ratio", "aligned")
jitted = functools.partial(jax.jit, static_argnames=STATIC)(roi_align)
align = functools.partial(jitted, **OPTIONS)
adaptive = functools.partial(jitted, **(OPTIONS | dict(sampling_ratio=0)))
average = functools.partial(jax.jit(roi_align_average, static_argnames=("stride", "output_size")), **GRID)
# What must hold for each of them.
OPERATORS = pytest.mark.parametrize(
    "operator", [align, adaptive, average], ids=["align", "adaptive", "average"]
)

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
        [41, 37, 9, 5],  # inverted
    ]
)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
def test_roi_align_equals_the_loop_over_samples(sampling_ratio, aligned):
    options = GRID | dict(sampling_ratio=sampling_ratio, aligned=aligned)
    expected = oracles.roi_align(FEATURES, BOXES, **options)
    np.testing.assert_allclose(jitted(FEATURES, BOXES, **options), expected, atol=1e-5)


@pytest.mark.parametrize("sampling_ratio, aligned", [(2, True), (0, True), (0, False)])
@given(arrays(np.int32, (len(BOXES), 4), elements=st.integers(-30, 90)))
def test_roi_align_of_any_box_equals_the_loop_over_samples(sampling_ratio, aligned, boxes):
    """Odd eighths never put a sample on the edge, where rounding would decide."""
    boxes = (boxes + 0.375).astype(np.float32)
    options = GRID | dict(sampling_ratio=sampling_ratio, aligned=aligned)
    np.testing.assert_allclose(
        jitted(FEATURES, boxes, **options), oracles.roi_align(FEATURES, boxes, **options), atol=1e-4
    )


def test_a_bin_of_whole_cells_takes_one_adaptive_sample_per_cell():
    """Not one more, which a quotient rounded up would give."""
    features = np.random.default_rng(4).normal(size=(45, 45, 1)).astype(np.float32)
    corner = 3.0 * STRIDE
    boxes = np.float32([[corner, corner] + [corner + 7 * cells * STRIDE] * 2 for cells in range(1, 7)])
    options = dict(stride=STRIDE, output_size=7, sampling_ratio=0, aligned=True)
    expected = oracles.roi_align(features, boxes, **options)
    np.testing.assert_allclose(jitted(features, boxes, **options), expected, atol=1e-5)


@pytest.mark.parametrize("aligned, zero", [(True, True), (False, False)])
def test_adaptive_samples_of_a_point_are_none_unless_its_sides_count_as_a_cell(aligned, zero):
    point = np.repeat(np.float32([[20, 20, 20, 20]]), len(BOXES), axis=0)
    pooled = jitted(FEATURES, point, **GRID, sampling_ratio=0, aligned=aligned)
    assert (not np.any(pooled)) == zero


def pool_and_gradient(operator, features, rois, cotangent):
    """Returns what an operator makes of each roi (image, box), and the gradient of the features."""

    @jax.jit
    def run(features):
        per_image = jax.vmap(operator, in_axes=(0, None))(features, jnp.asarray(rois[:, 1:]))
        return per_image[rois[:, 0].astype(np.int32), np.arange(len(rois))]

    pooled, pull_back = jax.vjp(run, jnp.asarray(features))
    (gradient,) = pull_back(jnp.asarray(cotangent))
    return pooled, gradient


@pytest.mark.parametrize("sampling_ratio", [2, 0])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("stride", [4, 16])
def test_roi_align_and_its_gradient_equal_torchvision(stride, aligned, sampling_ratio):
    options = dict(stride=stride, output_size=7, sampling_ratio=sampling_ratio, aligned=aligned)
    pooled, gradient = pool_and_gradient(
        functools.partial(roi_align, **options),
        GOLDEN["features"],
        GOLDEN[f"rois_s{stride}"],
        GOLDEN[f"cotangent_s{stride}"],
    )
    case = f"s{stride}_aligned{aligned:d}_ratio{sampling_ratio}"
    named = f"RoIAlign, stride {stride}, aligned {aligned}, sampling ratio {sampling_ratio}"
    compare("RoI features", "torchvision", named, pooled, GOLDEN[f"pooled_{case}"], atol=2e-5)
    compare("RoI features", "torchvision", f"{named}: gradient", gradient, GOLDEN[f"gradient_{case}"], atol=1e-4)


def test_the_average_and_its_gradient_equal_faster_rcnn_pytorch():
    pooled, gradient = pool_and_gradient(
        functools.partial(roi_align_average, stride=16, output_size=7),
        GOLDEN_AVERAGE["features"],
        GOLDEN_AVERAGE["rois"],
        GOLDEN_AVERAGE["cotangent"],
    )
    named = "8 x 8 samples averaged (master branch)"
    compare("RoI features", "faster-rcnn.pytorch", named, pooled, GOLDEN_AVERAGE["pooled"], atol=2e-5)
    compare(
        "RoI features", "faster-rcnn.pytorch", f"{named}: gradient", gradient, GOLDEN_AVERAGE["gradient"], atol=1e-4
    )


def test_the_average_equals_the_loop_over_samples():
    np.testing.assert_allclose(
        average(FEATURES, BOXES), oracles.roi_align_average(FEATURES, BOXES, **GRID), atol=1e-5
    )


@given(arrays(np.int32, (len(BOXES), 4), elements=st.integers(-30, 90)))
def test_the_average_of_any_box_equals_the_loop_over_samples(boxes):
    boxes = (boxes + 0.375).astype(np.float32)
    np.testing.assert_allclose(
        average(FEATURES, boxes), oracles.roi_align_average(FEATURES, boxes, **GRID), atol=1e-4
    )


def test_the_average_extrapolates_in_the_last_cell():
    """The map whose value is its own x gives the samples' x there too, beyond the last cell's."""
    ramp = np.tile(np.float32([[[0], [1], [2], [3], [4], [5], [6]]]), (6, 1, 1))
    x = 5 + np.arange(4) * (1.75 / 3)  # cells; the last is 6.75
    boxes = np.repeat(np.float32([[5 * STRIDE, 8, 5.75 * STRIDE, 24]]), len(BOXES), axis=0)
    expected = np.tile((x[:-1] + x[1:]) / 2, (3, 1))
    np.testing.assert_allclose(average(ramp, boxes)[0, ..., 0], expected, rtol=1e-5)


@given(
    arrays(np.int32, FEATURES.shape, elements=st.integers(-9, 9)),
    arrays(np.int32, (len(BOXES), 4), elements=st.integers(-30, 90)),
)
@OPERATORS
def test_roi_align_of_any_box_is_linear_in_the_features(operator, others, boxes):
    boxes, others = boxes.astype(np.float32), others.astype(np.float32)
    together = operator(2 * FEATURES - 3 * others, boxes)
    apart = 2 * np.asarray(operator(FEATURES, boxes)) - 3 * np.asarray(operator(others, boxes))
    np.testing.assert_allclose(together, apart, atol=1e-3)


def test_roi_align_of_a_constant_is_the_constant_inside_the_map():
    boxes = BOXES.clip(0, [width, height, width, height])
    pooled = align(np.full_like(FEATURES, 2.5), boxes)
    np.testing.assert_allclose(pooled, np.full(pooled.shape, 2.5), rtol=1e-5)


@given(arrays(np.int32, (len(BOXES), 4), elements=st.integers(0, 39)))
@OPERATORS
def test_a_constant_stays_itself_in_any_box_inside_the_map(operator, corners):
    """The average adds a cell to each side, so boxes end one before the map does."""
    low, high = np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])
    boxes = np.concatenate([low, high + 0.5], axis=1).astype(np.float32)
    pooled = operator(np.full_like(FEATURES, 2.5), boxes)
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
@OPERATORS
def test_roi_align_moves_with_the_features(operator, rows, columns):
    shifted = np.roll(FEATURES, (rows, columns), axis=(0, 1))
    inside = np.repeat(np.float32([[9, 5, 22, 15]]), len(BOXES), axis=0)
    moved = inside + STRIDE * np.float32([columns, rows, columns, rows])
    np.testing.assert_allclose(operator(shifted, moved), operator(FEATURES, inside), atol=1e-5)


@OPERATORS
def test_gradient_is_the_adjoint_of_the_operator(operator):
    """<align(f), c> = <f, gradient(c)> for every f, c: exact for a linear operator."""
    generator = np.random.default_rng(2)
    pooled, pull_back = jax.vjp(lambda f: operator(f, BOXES), jnp.asarray(FEATURES))
    for _ in range(3):
        cotangent = generator.normal(size=pooled.shape).astype(np.float32)
        (gradient,) = pull_back(jnp.asarray(cotangent))
        left = np.sum(np.float64(pooled) * cotangent)
        assert np.sum(np.float64(gradient) * FEATURES) == pytest.approx(left, abs=1e-3)


@OPERATORS
def test_gradient_of_the_features_equals_finite_differences(operator):
    cotangent = np.random.default_rng(3).normal(size=(len(BOXES), 3, 3, 3)).astype(np.float32)
    objective = jax.jit(lambda f: (operator(f, BOXES) * cotangent).sum())
    gradient = jax.grad(objective)(jnp.asarray(FEATURES))
    for cell in [(0, 0, 0), (2, 3, 1), (5, 6, 2), (0, 6, 1)]:
        step = np.zeros_like(FEATURES)
        step[cell] = 0.5  # linear: any step is exact
        difference = objective(FEATURES + step) - objective(FEATURES - step)
        assert float(difference) == pytest.approx(float(gradient[cell]), abs=1e-3)


@OPERATORS
def test_no_gradient_reaches_the_boxes(operator):
    gradient = jax.grad(lambda boxes: operator(FEATURES, boxes).sum())(jnp.asarray(BOXES))
    np.testing.assert_array_equal(gradient, np.zeros_like(BOXES))


@OPERATORS
def test_one_image_of_a_batch_ignores_the_others(operator):
    features = np.stack([FEATURES, np.full_like(FEATURES, 1e9)])
    # The other image's boxes want many more adaptive samples.
    pooled = jax.vmap(operator)(features, np.stack([BOXES, 20 * BOXES]))
    np.testing.assert_allclose(pooled[0], operator(FEATURES, BOXES), atol=1e-5)


@OPERATORS
def test_low_precision_features_are_pooled_in_float32(operator):
    pooled = operator(FEATURES.astype(jnp.bfloat16), BOXES)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, operator(FEATURES, BOXES), atol=0.05)


@pytest.mark.parametrize(
    "operator, options, message",
    [
        (align, dict(output_size=0), "output_size must be at least 1, got 0"),
        (align, dict(sampling_ratio=-1), "sampling_ratio must be at least 0, got -1"),
        (average, dict(output_size=0), "output_size must be at least 1, got 0"),
    ],
)
def test_nothing_to_sample_is_an_error(operator, options, message):
    with pytest.raises(ValueError, match=message):
        operator(FEATURES, BOXES, **options)


def test_the_average_of_a_single_row_is_an_error():
    with pytest.raises(ValueError, match="at least 2 x 2 cells, got 1 x 7"):
        average(FEATURES[:1], BOXES)
