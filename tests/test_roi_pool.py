"""RoI pooling: the loop over cells, results of torchvision, and the gradient of equal cells.

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
from oracles import arrays

from fasterrcnn_jax.ops.roi_pooling import LARGEST_BOX, roi_pool

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN_FOLDER = Path(__file__).parent / "golden"
GOLDEN = np.load(GOLDEN_FOLDER / "roi_pool.npz")
INPUTS = np.load(GOLDEN_FOLDER / "roi_align.npz")
STRIDE = 8
GRID = dict(stride=STRIDE, output_size=3)

jitted = jax.jit(roi_pool, static_argnames=("stride", "output_size", "quantisation", "implementation"))
rounded = functools.partial(jitted, **GRID, quantisation="rounded")
OPERATORS = pytest.mark.parametrize("quantisation", ["rounded", "floor"])
IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("mosaic", marks=pytest.mark.mosaic_kernel)], indirect=True
)

# Few values: many cells of a bin are equal, and every sum of cotangents below is exact.
FEATURES = np.random.default_rng(0).integers(-2, 3, size=(9, 11, 3)).astype(np.float32)
height, width = FEATURES.shape[0] * STRIDE, FEATURES.shape[1] * STRIDE
BOXES = np.float32(
    [
        [9, 5, 61, 47],  # inside
        [0, 0, width - 1, height - 1],  # the whole map
        [0, 0, width, height],  # a cell more
        [-20, -9, 13, 21],  # partly outside, near corner
        [39, 33, width + 30, height + 12],  # partly outside, far corner
        [width + 20, 0, width + 60, 30],  # wholly outside
        [-90, -90, -40, -30],
        [0, 0, 0, 0],  # padding
        [20, 20, 20, 20],  # a point: corners on halves
        [12, -12, 44, 36],  # corners on halves
        [41, 37, 9, 5],  # inverted
        [-3 * STRIDE * LARGEST_BOX, 0, 2 * STRIDE * LARGEST_BOX, 40],  # larger than the table
    ]
)


# The kernel works on 128 channels at a time: the three above, and other channels on every row of threads.
WIDE = np.concatenate(
    [FEATURES, np.random.default_rng(4).integers(-9, 10, size=(9, 11, 125)).astype(np.float32)], axis=-1
)


@pytest.fixture
def implementation(request, monkeypatch):
    if request.param == "mosaic":
        mosaic.interpret(monkeypatch)
    return request.param


def pool_and_gradient(operator, boxes, cotangent, features=FEATURES):
    pooled, pull_back = jax.vjp(lambda f: operator(f, jnp.asarray(boxes)), jnp.asarray(features))
    return pooled, pull_back(jnp.asarray(cotangent, pooled.dtype))[0]


@OPERATORS
@given(arrays(np.int32, (len(BOXES), 4), elements=st.integers(-30, 120)))
def test_roi_pool_of_any_box_and_its_gradient_equal_the_loop_over_cells(quantisation, boxes):
    boxes, options = boxes.astype(np.float32), GRID | dict(quantisation=quantisation)
    compare_with_loop(boxes, options)


@pytest.mark.parametrize("output_size", [1, 3, 7])
@OPERATORS
def test_roi_pool_and_its_gradient_equal_the_loop_over_cells(quantisation, output_size):
    compare_with_loop(BOXES, dict(stride=STRIDE, output_size=output_size, quantisation=quantisation))


def compare_with_loop(boxes, options):
    size = options["output_size"]
    cotangent = np.random.default_rng(1).integers(-9, 10, (len(boxes), size, size, 3)).astype(np.float32)
    expected, places = oracles.roi_pool(FEATURES, boxes, **options)
    pooled, gradient = pool_and_gradient(functools.partial(jitted, **options), boxes, cotangent)
    np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_array_equal(gradient, oracles.roi_pool_gradient(places, cotangent, FEATURES.shape))


@pytest.mark.parametrize("stride", [4, 16])
def test_roi_pool_and_its_gradient_equal_torchvision(stride):
    rois = INPUTS[f"rois_s{stride}"]

    @jax.jit
    def run(features):
        pool = functools.partial(roi_pool, stride=stride, output_size=7, quantisation="rounded")
        per_image = jax.vmap(pool, in_axes=(0, None))(features, jnp.asarray(rois[:, 1:]))
        return per_image[rois[:, 0].astype(np.int32), np.arange(len(rois))]

    pooled, pull_back = jax.vjp(run, jnp.asarray(INPUTS["features"]))
    compare("RoI features", "torchvision", f"RoIPool, stride {stride}", pooled, GOLDEN[f"pooled_s{stride}"])
    (gradient,) = pull_back(jnp.asarray(INPUTS[f"cotangent_s{stride}"]))
    theirs = GOLDEN[f"gradient_s{stride}"]
    compare("RoI features", "torchvision", f"RoIPool, stride {stride}: gradient", gradient, theirs, atol=1e-5)


def test_corners_on_halves_are_rounded_as_in_torchvision():
    rois = GOLDEN["half_rois"]
    pool = functools.partial(jitted, stride=16, output_size=3, quantisation="rounded")
    pooled = [pool(INPUTS["features"][int(image)], np.float32([box]))[0] for image, *box in rois]
    compare("RoI features", "torchvision", "RoIPool of corners on halves", pooled, GOLDEN["half_pooled"])


@pytest.mark.parametrize("output_size", [7, 13])
def test_bins_are_those_of_a_float32_quotient(output_size):
    """In torchvision a box of 31 cells in 7 bins ends one cell late; with exact fractions it would not."""
    sizes = np.arange(1, 301)
    x = np.arange(305, dtype=np.float32)
    features = np.stack([-x, x], axis=-1)[None]  # the largest are the first and the last cell of a bin
    boxes = np.zeros((300, 4), np.float32)
    boxes[:, 2] = sizes - 1
    pooled = np.asarray(jitted(features, boxes, stride=1, output_size=output_size, quantisation="rounded"))
    quotients = sizes.astype(np.float32)[:, None] / np.float32(output_size)
    bins = np.arange(output_size + 1, dtype=np.float32)
    ends = np.ceil(bins[1:] * quotients)
    assert np.any(ends[:, -1] != sizes)
    np.testing.assert_array_equal(-pooled[:, 0, :, 0], np.floor(bins[:-1] * quotients))
    np.testing.assert_array_equal(pooled[:, 0, :, 1] + 1, ends)


def test_the_two_quantisations_differ_where_a_corner_is_past_the_middle_of_a_cell():
    x = np.arange(8, dtype=np.float32)[None, :, None]
    box = np.float32([[13, 0, 29, 0]])  # 1.625 to 3.625 cells
    pooled = {
        how: np.asarray(jitted(x, box, stride=8, output_size=3, quantisation=how))[0, 0, :, 0]
        for how in ("rounded", "floor")
    }
    np.testing.assert_array_equal(pooled["rounded"], [2, 3, 4])
    np.testing.assert_array_equal(pooled["floor"], [1, 2, 3])


@OPERATORS
def test_of_equal_cells_the_first_in_row_major_order_gets_the_gradient(quantisation):
    """Row 1 has the maximum at column 4, row 2 at column 0: the row decides before the column."""
    features = np.zeros((4, 6, 1), np.float32)
    features[1, 4] = features[1, 5] = features[2, 0] = 5.0
    box = np.float32([[0, 0, 5, 3]])
    options = dict(stride=1, output_size=1, quantisation=quantisation)
    gradient = jax.grad(lambda f: jitted(f, box, **options).sum())(jnp.asarray(features))
    expected = np.zeros_like(features)
    expected[1, 4] = 1.0
    np.testing.assert_array_equal(gradient, expected)


@OPERATORS
def test_empty_bins_are_zero_and_give_no_gradient(quantisation):
    outside = BOXES[[5, 6]]
    pool = functools.partial(jitted, **GRID, quantisation=quantisation)
    pooled, gradient = pool_and_gradient(pool, outside, np.ones((2, 3, 3, 3), np.float32))
    np.testing.assert_array_equal(pooled, np.zeros((2, 3, 3, 3)))
    np.testing.assert_array_equal(gradient, np.zeros_like(FEATURES))


@given(st.integers(-1, 2), st.integers(-1, 3))
def test_roi_pool_moves_with_the_features(rows, columns):
    shifted = np.roll(FEATURES, (rows, columns), axis=(0, 1))
    inside = np.repeat(np.float32([[9, 9, 53, 45]]), len(BOXES), axis=0)
    moved = inside + STRIDE * np.float32([columns, rows, columns, rows])
    np.testing.assert_array_equal(rounded(shifted, moved), rounded(FEATURES, inside))


def test_gradient_of_the_features_equals_finite_differences():
    """There are no ties, and a cell changes by less than the gap to the others, so the maximum stays the same cell."""
    cells = np.random.default_rng(2).permutation(FEATURES.size).reshape(FEATURES.shape).astype(np.float32)
    cotangent = np.random.default_rng(3).integers(-9, 10, (len(BOXES), 3, 3, 3)).astype(np.float32)
    objective = jax.jit(lambda f: (rounded(f, BOXES) * cotangent).sum())
    gradient = jax.grad(objective)(jnp.asarray(cells))
    largest = np.argwhere(gradient)[::5]
    for cell in [*map(tuple, largest), (0, 0, 0), (2, 3, 1)]:
        step = np.zeros_like(cells)
        step[cell] = 0.25
        difference = 2 * (objective(cells + step) - objective(cells - step))
        assert float(difference) == float(gradient[cell])


def test_no_gradient_reaches_the_boxes():
    gradient = jax.grad(lambda boxes: rounded(FEATURES, boxes).sum())(jnp.asarray(BOXES))
    np.testing.assert_array_equal(gradient, np.zeros_like(BOXES))


def test_one_image_of_a_batch_ignores_the_others():
    features = np.stack([FEATURES, np.full_like(FEATURES, 1e9)])
    pooled = jax.vmap(rounded)(features, np.stack([BOXES, BOXES + 3]))
    np.testing.assert_array_equal(pooled[0], rounded(FEATURES, BOXES))


@IMPLEMENTATIONS
@OPERATORS
@pytest.mark.parametrize("channels", [128, 100])
def test_every_implementation_and_its_gradient_equal_the_loop_over_cells(implementation, quantisation, channels):
    """The kernel adds channels of zeros to 100."""
    options, features = GRID | dict(quantisation=quantisation), WIDE[..., :channels]
    expected, places = oracles.roi_pool(features, BOXES, **options)
    cotangent = np.random.default_rng(1).integers(-9, 10, expected.shape).astype(np.float32)
    pool = functools.partial(roi_pool, **options, implementation=implementation)
    pooled, gradient = pool_and_gradient(pool, BOXES, cotangent, features)
    np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_array_equal(gradient, oracles.roi_pool_gradient(places, cotangent, features.shape))
    np.testing.assert_array_equal(pool(jnp.asarray(features), jnp.asarray(BOXES)), expected)


@IMPLEMENTATIONS
def test_nan_is_never_a_maximum_and_a_bin_without_a_number_gives_no_gradient(implementation):
    """As in torchvision, such a bin gives the lowest float32."""
    features = np.zeros((2, 3, 128), np.float32)
    features[0, 0] = features[1, 0] = features[1, 2] = np.nan
    features[0, 2] = 4.0
    boxes = np.float32([[0, 0, 2, 1], [0, 0, 0, 1]])
    options = dict(stride=1, output_size=1, quantisation="rounded", implementation=implementation)
    pool = functools.partial(roi_pool, **options)
    pooled, gradient = pool_and_gradient(pool, boxes, np.ones((2, 1, 1, 128), np.float32), features)
    np.testing.assert_array_equal(pooled[0], np.full((1, 1, 128), 4.0))
    np.testing.assert_array_equal(pooled[1], np.full((1, 1, 128), np.finfo(np.float32).min))
    expected = np.zeros_like(features)
    expected[0, 2] = 1.0
    np.testing.assert_array_equal(gradient, expected)


@IMPLEMENTATIONS
def test_pooled_features_keep_their_type_and_gradients_are_summed_in_float32(implementation):
    """256 + 1 is 256 in bfloat16: a bfloat16 sum would lose every 1."""
    features = np.zeros((3, 4, 128), np.float32)
    features[1, 2] = 1.0
    boxes = np.tile(np.float32([[0, 0, 3, 2]]), (9, 1))
    cotangent = np.concatenate([np.full((1, 1, 1, 128), 256.0), np.ones((8, 1, 1, 128))])
    options = dict(stride=1, output_size=1, quantisation="floor", implementation=implementation)
    pool = functools.partial(roi_pool, **options)
    pooled, gradient = pool_and_gradient(pool, boxes, cotangent, features.astype(jnp.bfloat16))
    assert pooled.dtype == gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pooled.astype(np.float32), np.ones((9, 1, 1, 128)))
    np.testing.assert_array_equal(gradient.astype(np.float32), 264 * features)


@IMPLEMENTATIONS
def test_mapped_twice_each_image_ignores_the_others(implementation):
    """384 channels: the kernel takes them in three blocks."""
    features = np.random.default_rng(6).integers(-9, 10, (2, 5, 6, 384)).astype(np.float32)
    boxes = np.stack([BOXES[:3], BOXES[1:4]])[:, None]
    options = GRID | dict(quantisation="floor", implementation=implementation)
    pool = jax.vmap(jax.vmap(functools.partial(roi_pool, **options)))
    cotangent = np.arange(2 * 3 * 3 * 3 * 384, dtype=np.float32).reshape(2, 1, 3, 3, 3, 384)
    pooled, gradient = pool_and_gradient(pool, boxes, cotangent, features[:, None])
    for image in range(2):
        alone = functools.partial(jitted, **(options | dict(implementation="xla")))
        expected = pool_and_gradient(alone, boxes[image, 0], cotangent[image, 0], features[image])
        np.testing.assert_array_equal(pooled[image, 0], expected[0])
        np.testing.assert_array_equal(gradient[image, 0], expected[1])


@pytest.mark.mosaic_kernel
def test_a_batch_is_one_launch_each_way_without_a_scatter(monkeypatch):
    mosaic.pretend(monkeypatch)
    pool = jax.vmap(jax.vmap(functools.partial(roi_pool, stride=16, output_size=7, quantisation="rounded")))
    features = jax.ShapeDtypeStruct((2, 4, 38, 63, 512), jnp.bfloat16)
    boxes = jax.ShapeDtypeStruct((2, 4, 128, 4), jnp.float32)

    def gradient(features, boxes):
        return jax.grad(lambda f: pool(f, boxes).astype(jnp.float32).sum())(features)

    forward, backward = (mosaic.lowered_for_cuda(f, features, boxes) for f in (pool, gradient))
    for program, results in (
        (forward, ["8x128x7x7x512xbf16"]),
        (backward, ["8x128x7x7x512xi32", "8x38x63x512xbf16"]),
    ):
        launches = [line for line in program.splitlines() if "mosaic_gpu_v2" in line]
        assert len(launches) == len(results)
        for launch, result in zip(launches, results):
            assert f"tensor<{result}>" in launch.split("->")[-1]
    assert "stablehlo.while" not in backward
    assert "scatter" not in forward + backward


@pytest.mark.mosaic_kernel
def test_without_a_gradient_no_places_are_written(monkeypatch):
    mosaic.pretend(monkeypatch)
    boxes = jax.ShapeDtypeStruct((5, 4), jnp.float32)
    features = jax.ShapeDtypeStruct((8, 9, 128), jnp.float32)
    pool = functools.partial(roi_pool, stride=16, output_size=6, quantisation="floor")
    assert "5x6x6x128xi32" not in mosaic.lowered_for_cuda(pool, features, boxes)
    gradient = jax.grad(lambda f, boxes: pool(f, boxes).sum())
    assert "5x6x6x128xi32" in mosaic.lowered_for_cuda(gradient, features, boxes)


@pytest.mark.parametrize(
    ("features", "regions", "reason"),
    [
        (jnp.zeros((4, 4, 128), jnp.float16), 2, "float32 and bfloat16 features and these features are float16"),
        (jnp.zeros((4, 4, 128)), 0, "at least one region and there is none"),
    ],
)
def test_unsupported_inputs_are_refused_by_the_kernel_and_run_in_plain_jax(features, regions, reason, monkeypatch):
    mosaic.pretend(monkeypatch)
    boxes = jnp.zeros((regions, 4))
    options = dict(stride=1, output_size=2, quantisation="rounded")
    with pytest.raises(NotImplementedError, match=reason):
        roi_pool(features, boxes, **options, implementation="mosaic")
    pooled = roi_pool(features, boxes, **options)
    assert pooled.dtype == features.dtype
    np.testing.assert_array_equal(pooled, np.zeros((regions, 2, 2, features.shape[2])))


@pytest.mark.gpu
@OPERATORS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_a_gpu_the_kernel_equals_plain_jax_and_repeats_its_bits(dtype, quantisation):
    """At full size. Cotangents are whole numbers, so their float32 sums are exact in any order before rounding."""
    generator = np.random.default_rng(5)
    features = jnp.asarray(generator.standard_normal((8, 38, 63, 512)), dtype)
    corners = generator.uniform(-40, 1040, (8, 128, 2, 2)).astype(np.float32)
    boxes = np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=-1)
    cotangent = jnp.asarray(generator.integers(-9, 10, (8, 128, 7, 7, 512)), dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, features, boxes, cotangent):
        options = dict(stride=16, output_size=7, quantisation=quantisation, implementation=implementation)
        pool = jax.vmap(functools.partial(roi_pool, **options))
        pooled, pull_back = jax.vjp(lambda f: pool(f, boxes), features)
        return pooled, pull_back(cotangent)[0]

    first, second = (run("mosaic", features, boxes, cotangent) for _ in range(2))
    plain = run("xla", features, boxes, cotangent)
    for ours, again, expected in zip(first, second, plain):
        np.testing.assert_array_equal(ours, again)
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("output_size", [3, 7])
def test_no_array_of_the_program_grows_with_regions_and_map_together(output_size):
    """Apart from the result; an array of [regions, bins, map] values would take gigabytes at full size."""
    boxes = jnp.zeros((500, 4))
    options = dict(stride=16, output_size=output_size, quantisation="rounded")
    features = jnp.zeros((38, 63, 8))
    cotangent = jnp.zeros((500, output_size, output_size, 8))

    def gradient(features, cotangent):
        return jax.vjp(lambda f: roi_pool(f, boxes, **options), features)[1](cotangent)

    memory = jax.jit(gradient).lower(features, cotangent).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * features.nbytes + 2 * cotangent.nbytes


def test_an_invalid_option_is_an_error():
    """Enforced type annotations may raise a TypeError first."""
    with pytest.raises(ValueError, match="output_size must be at least 1, got 0"):
        rounded(FEATURES, BOXES, output_size=0)
    with pytest.raises((ValueError, TypeError), match="nearest"):
        rounded(FEATURES, BOXES, quantisation="nearest")
