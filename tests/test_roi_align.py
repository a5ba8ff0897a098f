"""RoIAlign and the older average operator: loops over samples, results of the references, and symmetries.

The kernel runs here step by step, with a check for races; on a GPU `pytest -m gpu` runs it as it is.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import oracles
import pytest
from fidelity import compare
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax.sharding import Mesh, PartitionSpec
from oracles import arrays

from fasterrcnn_jax.ops import roi_alignment, roi_alignment_on_cpu
from fasterrcnn_jax.ops.roi_alignment import roi_align, roi_align_average

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN_FOLDER = Path(__file__).parent / "golden"
GOLDEN = np.load(GOLDEN_FOLDER / "roi_align.npz")
GOLDEN_AVERAGE = np.load(GOLDEN_FOLDER / "roi_align_average.npz")
STRIDE = 8
GRID = dict(stride=STRIDE, output_size=3)
OPTIONS = GRID | dict(sampling_ratio=2, aligned=True)


def align_on_one_map(features, boxes, *, stride, **options):
    return roi_align((features,), boxes, jnp.zeros(len(boxes), jnp.int32), strides=(stride,), **options)


STATIC = ("stride", "output_size", "sampling_ratio", "aligned")
jitted = jax.jit(align_on_one_map, static_argnames=STATIC)
align = functools.partial(jitted, **OPTIONS)
adaptive = functools.partial(jitted, **(OPTIONS | dict(sampling_ratio=0)))
average = functools.partial(jax.jit(roi_align_average, static_argnames=("stride", "output_size")), **GRID)
# Properties that each operator must have.
OPERATORS = pytest.mark.parametrize("operator", [align, adaptive, average], ids=["align", "adaptive", "average"])

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


def loop_over_samples(features, boxes, *, stride, **options):
    return oracles.roi_align([features], boxes, [0] * len(boxes), strides=(stride,), **options)


IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("mosaic", marks=pytest.mark.mosaic_kernel)], indirect=True
)


@pytest.fixture
def implementation(request, monkeypatch):
    if request.param == "mosaic":
        mosaic.interpret(monkeypatch)
    return request.param


# Two images on two levels; the kernel works on 128 channels at a time.
SIZES, STRIDES = ((9, 13), (5, 7)), (8, 16)
PYRAMID = tuple(
    np.random.default_rng(level).normal(size=(2, *size, 128)).astype(np.float32) for level, size in enumerate(SIZES)
)
PYRAMID_BOXES = np.float32(
    [
        [
            [9, 5, 41, 37],  # inside
            [-2, -3, 113, 81],  # the whole map and more
            [-20, -9, 13, 21],  # partly outside, near corner
            [61, 50, 117, 90],  # partly outside, far corner, on the finer level
            [41, 37, 9, 5],  # inverted
            [np.nan, 3, 30, 40],
        ],
        [
            [61, 50, 117, 90],  # the same on the coarser level
            [20.375, 20.375, 20.375, 20.375],  # a point
            [3, 11, 50, 11],  # no height
            [140, 0, 190, 30],  # wholly outside
            [13.5, 17.25, 14, 17.5],  # smaller than a cell
            [7, 3, 60, np.inf],
        ],
    ]
) + np.float32(0.125)  # no sample is on the edge of the counted range, where rounding would decide
PYRAMID_LEVELS = np.int32([[0, 1, 0, 0, 0, 1], [1, 0, 1, 0, 0, 0]])
PYRAMID_BOXES[1, 5, 3] = np.inf


@pytest.fixture
def blocks(monkeypatch):
    """Notes which loops over blocks are traced, and sets how many regions of 3 x 3 x 128 a block has."""
    caches, traced = (roi_alignment._forward, roi_alignment._backward), set()
    of_the_library = roi_alignment_on_cpu._over_blocks

    def noted(grid, maps, channels, visit, total):
        traced.add(visit.__name__)
        return of_the_library(grid, maps, channels, visit, total)

    def of_size(regions):
        monkeypatch.setattr(roi_alignment_on_cpu, "BLOCK_BYTES", regions * 4 * 9 * 128)
        return traced

    monkeypatch.setattr(roi_alignment_on_cpu, "_over_blocks", noted)
    for cached in caches:
        cached.cache_clear()
    yield of_size
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("block", [1, 4, 12])
def test_on_a_cpu_blocks_of_any_size_give_the_same_features_and_gradient(block, sampling_ratio, blocks):
    """One region in a block, blocks that a level or an image ends inside, and one block for all regions of an image."""
    traced = blocks(block)
    options = dict(strides=STRIDES, output_size=3, sampling_ratio=sampling_ratio)
    align = jax.vmap(functools.partial(roi_align, **options, implementation="xla"))
    cotangent = np.random.default_rng(5).normal(size=(2, 6, 3, 3, 128)).astype(np.float32)
    pooled, gradients = pull_back_over_levels(align, PYRAMID, PYRAMID_BOXES, PYRAMID_LEVELS, cotangent)
    assert traced == {"pool", "add_block"}
    for image in range(2):
        boxes, levels = PYRAMID_BOXES[image], PYRAMID_LEVELS[image]
        expected = oracles.roi_align([level[image] for level in PYRAMID], boxes, levels, aligned=True, **options)
        np.testing.assert_allclose(pooled[image], expected, atol=1e-5)
        expected = oracles.roi_align_gradient(cotangent[image], SIZES, boxes, levels, aligned=True, **options)
        for gradient, of_level in zip(gradients, expected):
            np.testing.assert_allclose(gradient[image], of_level, atol=1e-4)


@pytest.mark.parametrize(
    ("maps", "sampling_ratio", "in_blocks"),
    [
        (((40, 50), (20, 25)), 2, True),
        (((10, 10), (5, 5)), 2, False),  # fewer cells than 30 regions have bins
        (((40, 50),), 2, False),
        (((40, 50),), 0, True),
    ],
)
def test_the_forward_pass_of_a_cpu_is_in_blocks_where_that_takes_less_time(maps, sampling_ratio, in_blocks, blocks):
    traced = blocks(4)
    features = tuple(np.zeros((*cells, 8), np.float32) for cells in maps)
    options = dict(strides=(4, 8)[: len(maps)], output_size=3, sampling_ratio=sampling_ratio, implementation="xla")
    jax.eval_shape(functools.partial(roi_align, **options), features, np.zeros((30, 4), np.float32))
    assert bool(traced) == in_blocks


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
def test_roi_align_equals_the_loop_over_samples(sampling_ratio, aligned):
    options = GRID | dict(sampling_ratio=sampling_ratio, aligned=aligned)
    expected = loop_over_samples(FEATURES, BOXES, **options)
    np.testing.assert_allclose(jitted(FEATURES, BOXES, **options), expected, atol=1e-5)


@pytest.mark.parametrize("sampling_ratio, aligned", [(2, True), (0, True), (0, False)])
@given(arrays(np.int32, (len(BOXES), 4), elements=st.integers(-30, 90)))
def test_roi_align_of_any_box_equals_the_loop_over_samples(sampling_ratio, aligned, boxes):
    """Odd eighths never put a sample on the edge of the map, where rounding would decide."""
    boxes = (boxes + 0.375).astype(np.float32)
    options = GRID | dict(sampling_ratio=sampling_ratio, aligned=aligned)
    np.testing.assert_allclose(
        jitted(FEATURES, boxes, **options), loop_over_samples(FEATURES, boxes, **options), atol=1e-4
    )


def test_a_bin_of_whole_cells_takes_one_adaptive_sample_per_cell():
    """A quotient that is rounded up would give one sample more."""
    features = np.random.default_rng(4).normal(size=(45, 45, 1)).astype(np.float32)
    corner = 3.0 * STRIDE
    boxes = np.float32([[corner, corner] + [corner + 7 * cells * STRIDE] * 2 for cells in range(1, 7)])
    options = dict(stride=STRIDE, output_size=7, sampling_ratio=0, aligned=True)
    expected = loop_over_samples(features, boxes, **options)
    np.testing.assert_allclose(jitted(features, boxes, **options), expected, atol=1e-5)


@pytest.mark.parametrize("aligned, zero", [(True, True), (False, False)])
def test_adaptive_samples_of_a_point_are_none_unless_its_sides_count_as_a_cell(aligned, zero):
    point = np.repeat(np.float32([[20, 20, 20, 20]]), len(BOXES), axis=0)
    pooled = jitted(FEATURES, point, **GRID, sampling_ratio=0, aligned=aligned)
    assert (not np.any(pooled)) == zero


def pool_and_gradient(operator, features, rois, cotangent):
    """Returns the result of an operator for each roi (image, box), and the gradient of the features."""

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
        functools.partial(align_on_one_map, **options),
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
    np.testing.assert_allclose(average(FEATURES, BOXES), oracles.roi_align_average(FEATURES, BOXES, **GRID), atol=1e-5)


@given(arrays(np.int32, (len(BOXES), 4), elements=st.integers(-30, 90)))
def test_the_average_of_any_box_equals_the_loop_over_samples(boxes):
    boxes = (boxes + 0.375).astype(np.float32)
    np.testing.assert_allclose(average(FEATURES, boxes), oracles.roi_align_average(FEATURES, boxes, **GRID), atol=1e-4)


def test_the_average_extrapolates_in_the_last_cell():
    """A map whose values are its x coordinates gives the x of the samples, also beyond the last cell."""
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
    """The average operator adds a cell to each side, so boxes end one cell before the map."""
    low, high = np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])
    boxes = np.concatenate([low, high + 0.5], axis=1).astype(np.float32)
    pooled = operator(np.full_like(FEATURES, 2.5), boxes)
    np.testing.assert_allclose(pooled, np.full(pooled.shape, 2.5), rtol=1e-5)


def test_roi_align_of_a_ramp_is_the_position_of_the_bin():
    """A map whose values are x in network pixels gives the x of the centres of the bins; the same holds for y."""
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
    features = np.stack([FEATURES, np.full_like(FEATURES, np.nan)])
    # The boxes of the other image take many more adaptive samples.
    pooled = jax.vmap(operator)(features, np.stack([BOXES, 20 * BOXES]))
    np.testing.assert_allclose(pooled[0], operator(FEATURES, BOXES), atol=1e-5)


def test_the_average_of_low_precision_features_is_float32():
    pooled = average(FEATURES.astype(jnp.bfloat16), BOXES)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, average(FEATURES, BOXES), atol=0.05)


@pytest.mark.parametrize(
    "operator, options, message",
    [
        (align, dict(output_size=0), "output_size must be at least 1, got 0"),
        (align, dict(sampling_ratio=-1), "sampling_ratio must be at least 0, got -1"),
        (average, dict(output_size=0), "output_size must be at least 1, got 0"),
    ],
)
def test_sizes_and_ratios_out_of_range_are_an_error(operator, options, message):
    with pytest.raises(ValueError, match=message):
        operator(FEATURES, BOXES, **options)


def test_the_average_of_a_single_row_is_an_error():
    with pytest.raises(ValueError, match="at least 2 x 2 cells, got 1 x 7"):
        average(FEATURES[:1], BOXES)


@functools.partial(jax.jit, static_argnums=0)
def pull_back_over_levels(align, features, boxes, levels, cotangent):
    """Returns the result of `align` for every region, and the gradient of the features."""
    pooled, pull_back = jax.vjp(lambda features: align(features, boxes, levels), features)
    return pooled, *pull_back(cotangent)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "sampling_ratio, aligned, dtype, channels",
    [
        (2, True, jnp.float32, 128),
        (1, False, jnp.float32, 128),
        (0, False, jnp.float32, 96),
        (3, False, jnp.bfloat16, 128),
        (0, True, jnp.bfloat16, 128),
    ],
)
def test_every_implementation_and_its_gradient_equal_the_loop_over_samples(
    implementation, sampling_ratio, aligned, dtype, channels
):
    """bfloat16 results are the float32 sums rounded once. The kernel adds channels of zeros to 96."""
    options = dict(strides=STRIDES, output_size=3, sampling_ratio=sampling_ratio, aligned=aligned)
    features = tuple(level[..., :channels].astype(dtype) for level in PYRAMID)
    cotangent = np.random.default_rng(5).normal(size=(2, 6, 3, 3, channels)).astype(dtype)
    align = jax.vmap(functools.partial(roi_align, **options, implementation=implementation))
    pooled, gradients = pull_back_over_levels(align, features, PYRAMID_BOXES, PYRAMID_LEVELS, cotangent)
    rtol = 2.0**-8 if dtype == jnp.bfloat16 else 0.0
    for image, (boxes, levels) in enumerate(zip(PYRAMID_BOXES, PYRAMID_LEVELS)):
        expected = oracles.roi_align([level[image] for level in features], boxes, levels, **options)
        assert pooled.dtype == dtype and np.any(expected)
        np.testing.assert_allclose(np.float64(pooled[image]), expected, rtol=rtol, atol=1e-5)
        expected = oracles.roi_align_gradient(cotangent[image], SIZES, boxes, levels, **options)
        for gradient, of_level in zip(gradients, expected):
            assert gradient.dtype == dtype and np.any(of_level)
            np.testing.assert_allclose(np.float64(gradient[image]), of_level, rtol=rtol, atol=1e-4)


@IMPLEMENTATIONS
@pytest.mark.parametrize("output_size, channels", [(1, 384), (6, 128)])
def test_many_cells_in_a_bin_and_many_bins_in_a_cell(implementation, output_size, channels):
    """Both numbers are larger than what the kernel loads at once; 384 channels are three blocks."""
    features = np.random.default_rng(6).normal(size=(7, 10, channels)).astype(np.float32)
    boxes = np.float32([[0.125, 0.375, 9.625, 6.5], [2.125, 3.375, 4.625, 4.5]])
    options = dict(strides=(1,), output_size=output_size, sampling_ratio=0, aligned=True)
    align = functools.partial(roi_align, **options, implementation=implementation)
    cotangent = np.random.default_rng(7).normal(size=(2, output_size, output_size, channels)).astype(np.float32)
    levels = np.zeros(2, np.int32)
    pooled, (gradient,) = pull_back_over_levels(align, (features,), boxes, levels, cotangent)
    expected = oracles.roi_align([features], boxes, levels, **options)
    np.testing.assert_allclose(pooled, expected, atol=1e-5)
    (expected,) = oracles.roi_align_gradient(cotangent, [(7, 10)], boxes, levels, **options)
    np.testing.assert_allclose(gradient, expected, atol=1e-4)


# Boxes of one cell, with one sample at its centre.
CELL = dict(strides=(1,), output_size=1, sampling_ratio=1, aligned=True)


@IMPLEMENTATIONS
def test_gradients_of_bfloat16_features_are_summed_in_float32(implementation):
    """256 + 1 is 256 in bfloat16: a bfloat16 sum would lose every 1."""
    features = np.zeros((3, 4, 128), jnp.bfloat16)
    boxes, levels = np.tile(np.float32([[2, 1, 3, 2]]), (9, 1)), np.zeros(9, np.int32)
    cotangent = np.concatenate([np.full((1, 1, 1, 128), 256.0), np.ones((8, 1, 1, 128))]).astype(jnp.bfloat16)
    align = functools.partial(roi_align, **CELL, implementation=implementation)
    _, (gradient,) = pull_back_over_levels(align, (features,), boxes, levels, cotangent)
    expected = np.zeros((3, 4, 128))
    expected[1, 2] = 264.0
    np.testing.assert_array_equal(np.float64(gradient), expected)


@IMPLEMENTATIONS
def test_gradients_are_summed_in_the_order_of_the_regions(implementation):
    """In float32 a 1 added before 1e8 is lost, and a 1 added after -1e8 is not. 300 regions are three blocks."""
    boxes = np.full((300, 4), -9, np.float32)
    cotangent = np.zeros((300, 1, 1, 128), np.float32)
    for cell, regions in enumerate([(4, 130, 290), (7, 8, 9), (140, 141, 299)]):
        boxes[list(regions)] = [cell, 0, cell + 1, 1]
        cotangent[list(regions), 0, 0] = [[1.0], [1e8], [-1e8]]
        cotangent[list(regions), 0, 0, 64:] = [[1e8], [-1e8], [1.0]]
    align = functools.partial(roi_align, **CELL, implementation=implementation)
    features, levels = np.zeros((1, 3, 128), np.float32), np.zeros(300, np.int32)
    _, (gradient,) = pull_back_over_levels(align, (features,), boxes, levels, cotangent)
    np.testing.assert_array_equal(gradient[..., :64], np.zeros((1, 3, 64)))
    np.testing.assert_array_equal(gradient[..., 64:], np.ones((1, 3, 64)))


@IMPLEMENTATIONS
def test_mapped_twice_over_boxes_alone_it_equals_the_loop(implementation):
    """No axis maps the features; the inner axis maps the levels."""
    options = dict(strides=STRIDES, output_size=2, sampling_ratio=0, aligned=False)
    features = tuple(level[0] for level in PYRAMID)
    boxes = np.stack([PYRAMID_BOXES[:, :2], PYRAMID_BOXES[:, 2:4]])
    levels = np.int32([[0, 1], [1, 0]])
    align = functools.partial(roi_align, **options, implementation=implementation)
    mapped = jax.vmap(jax.vmap(align, in_axes=(None, 0, 0)), in_axes=(None, 0, None))
    cotangent = np.random.default_rng(8).normal(size=(2, 2, 2, 2, 2, 128)).astype(np.float32)
    pooled, gradients = pull_back_over_levels(mapped, features, boxes, levels, cotangent)
    alone = functools.partial(roi_align, **options, implementation="xla")
    totals = [0.0, 0.0]
    for i, j in np.ndindex(2, 2):
        expected, of_levels = pull_back_over_levels(alone, features, boxes[i, j], levels[j], cotangent[i, j])
        np.testing.assert_allclose(pooled[i, j], expected, atol=1e-5)
        totals = [total + np.asarray(gradient) for total, gradient in zip(totals, of_levels)]
    for gradient, total in zip(gradients, totals):
        np.testing.assert_allclose(gradient, total, atol=1e-4)


@IMPLEMENTATIONS
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_no_regions_give_no_features_and_no_gradient(implementation, sampling_ratio):
    """Without regions there is no launch: plain JAX runs unless the kernel is named."""
    options = dict(strides=STRIDES, output_size=2, sampling_ratio=sampling_ratio, aligned=False)
    features = tuple(level[0] for level in PYRAMID)
    boxes, levels, cotangent = np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros((0, 2, 2, 128), np.float32)
    align = functools.partial(roi_align, **options)
    pooled, gradients = pull_back_over_levels(align, features, boxes, levels, cotangent)
    assert pooled.shape == cotangent.shape and not any(map(np.any, gradients))


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_a_program_for_any_number_of_regions_is_exported(sampling_ratio):
    """It equals the program for this number, on a CPU too, where a known number of regions decides the blocks."""
    options = dict(strides=STRIDES, output_size=2, sampling_ratio=sampling_ratio, implementation="xla")
    align, features = jax.jit(functools.partial(roi_align, **options)), tuple(level[0] for level in PYRAMID)
    count = export.symbolic_shape("r")[0]
    shapes = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), features),
        jax.ShapeDtypeStruct((count, 4), jnp.float32),
        jax.ShapeDtypeStruct((count,), jnp.int32),
    )
    program = export.export(align)(*shapes)
    found = program.call(features, PYRAMID_BOXES[0], PYRAMID_LEVELS[0])
    expected = align(features, PYRAMID_BOXES[0], PYRAMID_LEVELS[0])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def grad_over_images(features, boxes, levels, **options):
    """Returns the gradient of a sum of squares over images."""
    align = jax.vmap(functools.partial(roi_align, **options))
    return jax.grad(lambda features: (align(features, boxes, levels) ** 2).sum())(features)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("over_devices", ["pmap", "shard_map"])
def test_devices_share_the_images_of_a_batch(over_devices, sampling_ratio):
    options = dict(strides=STRIDES, output_size=3, sampling_ratio=sampling_ratio, aligned=False)
    arguments = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), (PYRAMID, PYRAMID_BOXES, PYRAMID_LEVELS))
    run = functools.partial(grad_over_images, **options)
    if over_devices == "pmap":
        shared = jax.pmap(run, devices=jax.devices()[:2])
        found = shared(*jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), arguments))
        found = jax.tree.map(lambda x: np.asarray(x).reshape(4, *x.shape[2:]), found)
    else:
        spec = PartitionSpec("images")
        mesh = Mesh(np.array(jax.devices()[:2]), ("images",))
        shared = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        found = jax.jit(shared)(*arguments)
    for gradient, alone in zip(found, jax.jit(run)(*arguments)):
        np.testing.assert_array_equal(gradient, alone)


def test_the_plain_form_is_exported_for_cpu_and_cuda():
    options = dict(strides=STRIDES, output_size=3, sampling_ratio=0, aligned=False, implementation="xla")
    run, arguments = jax.jit(functools.partial(grad_over_images, **options)), (PYRAMID, PYRAMID_BOXES, PYRAMID_LEVELS)
    exported = jax.export.export(run, platforms=("cpu", "cuda"))(*arguments)
    for gradient, directly in zip(exported.call(*arguments), run(*arguments)):
        np.testing.assert_array_equal(gradient, directly)


def lowered(channels, dtype=jnp.float32, implementation=None, images=3):
    """Returns the CUDA program of the features and their gradient over images and levels."""
    options = dict(strides=(4, 8, 16), output_size=7, sampling_ratio=2, aligned=False, implementation=implementation)

    def features_and_gradient(features, boxes, levels):
        align = jax.vmap(functools.partial(roi_align, **options))
        pooled, pull_back = jax.vjp(lambda features: align(features, boxes, levels), features)
        return pooled, pull_back(pooled)

    array = jax.ShapeDtypeStruct
    features = tuple(array((images, size, size + 1, channels), dtype) for size in (32, 16, 8))
    boxes, levels = array((images, 130, 4), jnp.float32), array((images, 130), jnp.int32)
    return mosaic.lowered_for_cuda(features_and_gradient, features, boxes, levels)


@pytest.mark.mosaic_kernel
@pytest.mark.parametrize("channels, dtype", [(96, jnp.float32), (128, jnp.bfloat16), (1024, jnp.bfloat16)])
def test_images_and_levels_are_one_launch_forward_and_one_backward(monkeypatch, channels, dtype):
    mosaic.pretend(monkeypatch)
    program = lowered(channels, dtype)
    assert program.count("@mosaic_gpu") == 2
    assert program.count("roi_align_forward") and program.count("roi_align_backward")
    assert "scatter" not in program


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("mosaic", marks=[pytest.mark.mosaic_kernel, pytest.mark.slow])]
)
def test_a_level_outside_the_pyramid_is_the_nearest_one(monkeypatch, implementation):
    if implementation == "mosaic":
        mosaic.interpret(monkeypatch)
    maps, boxes = tuple(jnp.full((3, 3, 1), value) for value in (1.0, 2.0)), jnp.tile(jnp.float32([0, 0, 2, 2]), (4, 1))
    options = dict(strides=(1, 2), output_size=1, sampling_ratio=1, implementation=implementation)
    pooled = roi_align(maps, boxes, jnp.int32([0, 1, 2, -1]), **options)
    np.testing.assert_array_equal(pooled[:, 0, 0, 0], [1, 2, 2, 1])


@pytest.mark.mosaic_kernel
def test_unsupported_features_are_refused_by_the_kernel_and_run_in_plain_jax(monkeypatch):
    mosaic.pretend(monkeypatch)
    with pytest.raises(NotImplementedError, match="roi_align was asked for, but .* these features are float16"):
        lowered(128, jnp.float16, "mosaic")
    assert "mosaic_gpu" not in lowered(128, jnp.float16)
    assert "mosaic_gpu" not in lowered(128, jnp.float32, "xla")


def test_the_named_kernel_is_refused_where_it_cannot_run(monkeypatch):
    mosaic.pretend(monkeypatch, "cpu", (0, 0))
    with pytest.raises(NotImplementedError, match="roi_align was asked for, but it needs a CUDA device"):
        lowered(128, implementation="mosaic")


@pytest.mark.parametrize(
    "features, strides, message",
    [
        ([np.zeros((4, 4, 2), np.float32)] * 2, (8,), "need one stride per map, got 1 for 2"),
        (
            [np.zeros((4, 4, 2), np.float32), np.zeros((2, 2, 2), jnp.bfloat16)],
            (8, 16),
            "one type, got bfloat16 and float32",
        ),
    ],
)
def test_maps_that_do_not_fit_together_are_an_error(features, strides, message):
    features, boxes, levels = tuple(map(jnp.asarray, features)), jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match=message):
        roi_align(features, boxes, levels, strides=strides, output_size=2, sampling_ratio=2, aligned=True)


PRODUCTION = {
    "fpn": (((200, 336), (100, 168), (50, 84), (25, 42)), (4, 8, 16, 32), 256, 512, 7, 2),
    "c4": (((50, 84),), (16,), 1024, 128, 14, 2),
    "c4 adaptive": (((50, 84),), (16,), 1024, 128, 14, 0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", PRODUCTION)
def test_on_a_gpu_the_kernel_equals_the_plain_form_and_itself_bit_by_bit(name, dtype):
    maps, strides, channels, regions, output_size, sampling_ratio = PRODUCTION[name]
    generator = np.random.default_rng(9)
    sides = np.exp(generator.uniform(np.log(16), np.log(700), (8, regions, 2)))
    centres = generator.uniform(0, [1344, 800], (8, regions, 2))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=-1).clip(0, [1344, 800, 1344, 800])
    levels = np.digitize(np.sqrt(sides.prod(axis=-1)), [112, 224, 448][: len(maps) - 1]).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), len(maps) + 1)
    features = tuple(jax.random.normal(key, (8, *size, channels), dtype) for key, size in zip(keys, maps))
    cotangent = jax.random.normal(keys[-1], (8, regions, output_size, output_size, channels), dtype)
    options = dict(strides=strides, output_size=output_size, sampling_ratio=sampling_ratio, aligned=False)

    def run(implementation):
        align = jax.vmap(functools.partial(roi_align, **options, implementation=implementation))
        pooled, gradients = pull_back_over_levels(align, features, np.float32(boxes), levels, cotangent)
        return jax.tree.map(np.asarray, (pooled, *gradients))

    kernel, again, plain = run("mosaic"), run("mosaic"), run("xla")
    # Both round a float32 sum once; two sums may be on different sides of a rounding border.
    rtol = 2.0**-7 if dtype == jnp.bfloat16 else 1e-5
    for found, second, expected in zip(kernel, again, plain):
        np.testing.assert_array_equal(found, second)
        np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=rtol, atol=1e-4)
