"""RoIAlign: a fixed grid of features for every region. He et al. 2017 (arXiv:1703.06870), section 3.

Shapes: n images (all mapped axes folded into one), r regions, s bins along a side, c channels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Real

from fasterrcnn_jax.kernels import choice
from fasterrcnn_jax.kernels import roi_align as kernel
from fasterrcnn_jax.kernels.batching import fold_mapped_axes
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.kernels.roi_align import SampleGrid
from fasterrcnn_jax.ops import roi_alignment_on_cpu
from fasterrcnn_jax.ops.bilinear_samples import over_samples
from fasterrcnn_jax.ops.boxes import area
from fasterrcnn_jax.ops.inputs import (
    AnyArray,
    box_array,
    feature_map,
    require_positive_strides,
    two_sides,
    whole_numbers,
)

# Number of regions of one image that are computed at once. Between the two products each region holds a row of the
# whole map per bin: 1.8 MB for 7 bins and rows of 63 cells x 1024 channels.
REGIONS_AT_ONCE = 128


def roi_align(
    features: Real[AnyArray, "_ _ c"] | Sequence[Real[AnyArray, "_ _ c"]],
    boxes: Real[AnyArray, "r 4"],
    levels: Int[AnyArray, " r"] | None = None,
    *,
    strides: float | Sequence[float] = 1,
    output_size: int | tuple[int, int],
    sampling_ratio: int = 0,
    aligned: bool = True,
    implementation: Implementation = None,
) -> Float[Array, "r oh ow c"]:
    """Returns `output_size` x `output_size` features per box, in the type of `features`; sums are float32.

    Samples more than one cell outside the map, or with coordinates that are not finite, count as zero; the other
    samples are clamped to the map, as in torchvision and detectron2. No gradient reaches `boxes`. The gradient of
    the features is summed in float32. It has the same bits in every run on a CPU and with the kernel; on a GPU with
    "xla" the order of the summation changes from run to run. Forward-mode derivatives (`jax.jvp`) are not defined.

    `jax.vmap` maps it over a batch of images. Under `jax.jit`, all options are static.

    Examples:
      >>> image = np.arange(16.0).reshape(4, 4, 1)
      >>> roi_align(image, np.array([[0, 0, 4, 4]]), output_size=2)[0, :, :, 0]
      Array([[ 2.5,  4.5],
             [10.5, 12.5]], dtype=float32)

    Args:
      features: one map [height, width, channels], or a tuple of maps: the levels of a pyramid, fine to coarse.
        Integers, such as the pixels of an image, become float32.
      boxes: in network pixels. In plain JAX with `sampling_ratio` 0 the work grows with the longest side of a
        box: clip the boxes first.
      levels: the index into `features` of every box. None: 0 for one map; in a pyramid the level that fits the size of
        the box, as `assign_levels` says, with strides that are powers of two, each twice the one before.
        A level outside the pyramid counts as the nearest one.
      strides: network pixels per cell of every level, or of the one map; torchvision's `spatial_scale` is 1 / stride.
      output_size: cells along a side, or (rows, columns).
      sampling_ratio: samples per bin and axis. 0 (torchvision's -1): the number of cells that a bin spans, rounded up,
        for each box separately; a box with a side that is not positive has no samples, and its features are zeros.
      aligned: True: the centre of cell (j, k) of a map is at ((k + 0.5) * stride, (j + 0.5) * stride) network
        pixels. False, torchvision's default: it is at (k * stride, j * stride), and the sides of a box count as at
        least one cell; this is the operator before detectron2 shifted it by half a cell.
    Raises:
      TypeError: an array is of another type; boxes of 16 bits are refused.
      ValueError: `output_size` or a stride is not positive, `sampling_ratio` is negative, the numbers of strides and
        maps differ, the maps have different types, an array has another shape, or the levels cannot be found from
        the strides.
      NotImplementedError: the named implementation cannot run.
    """
    rows, columns = two_sides(output_size)
    if sampling_ratio < 0:
        raise ValueError(f"sampling_ratio must be at least 0, got {sampling_ratio}; 0 is adaptive")
    listed = features if isinstance(features, (tuple, list)) else (features,)
    maps = [feature_map(level) for level in listed]
    steps = tuple(strides) if isinstance(strides, Sequence) else (strides,)
    require_positive_strides(steps)
    if not maps or len(maps) != len(steps):
        raise ValueError(f"need one stride per map, got {len(steps)} for {len(maps)}")
    dtypes = sorted({level.dtype.name for level in maps})
    if len(dtypes) > 1:
        raise ValueError(f"the maps must have one type, got {' and '.join(dtypes)}")
    boxes = box_array(boxes, one_list=True)
    if levels is not None:
        # Plain JAX would count negative ones from the end, and the kernel would write nothing.
        levels = jnp.clip(whole_numbers(levels, "levels", boxes.shape[0]), 0, len(maps) - 1)
    elif len(maps) > 1:
        lowest = _first_level(steps)
        levels = assign_levels(boxes, lowest=lowest, highest=lowest + len(maps) - 1) - lowest
    levels = whole_numbers(levels, "levels", boxes.shape[0])
    unsupported = choice.unsupported_features(maps[0].dtype)
    if boxes.shape[0] == 0:
        unsupported = "it takes at least one region and there is none"
    chosen = choice.choose("roi_align", implementation, unsupported=unsupported, check=_kernel_differs)
    grid = _sample_grid(boxes, levels, steps, (rows, columns), sampling_ratio, aligned)
    pooled: Array = _pool(tuple(maps), grid, sampling_ratio, chosen)
    return pooled if rows == columns else pooled[:, :rows, :columns]


def _kernel_differs() -> str | None:
    """Returns how the kernel's results differ from those of plain JAX on two small maps; gradient included."""
    rng = np.random.default_rng(0)
    maps = tuple(rng.standard_normal((side, side, 8), np.float32) for side in (8, 4))
    corners = rng.uniform(-4.0, 24.0, (6, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + rng.uniform(2.0, 20.0, (6, 2)).astype(np.float32)], axis=1)
    levels, cotangent = np.array([0, 1, 0, 1, 0, 1]), rng.standard_normal((6, 2, 2, 8), np.float32)

    def results(implementation: Implementation) -> list[Array]:
        def pool(maps: tuple[Array, ...]) -> Array:
            options: dict[str, Any] = dict(strides=(4, 8), output_size=2, sampling_ratio=2)
            return roi_align(maps, boxes, levels, **options, implementation=implementation)

        pooled, pull = jax.vjp(pool, jax.tree.map(jnp.asarray, maps))
        return jax.tree.leaves((pooled, pull(jnp.asarray(cotangent))))

    differences = zip(results("mosaic"), results("xla"), strict=True)
    # Not <=: NaN differs.
    if not all(float(jnp.abs(kernel - plain).max()) < 1e-4 for kernel, plain in differences):
        return "the features or the gradient of the kernel differ from those of plain JAX"
    return None


# A region as large as an ImageNet crop is taken from conv4_x, the map that a single-map detector uses for all regions.
CANONICAL_SIZE, CANONICAL_LEVEL = 224.0, 4


# Prevents a box at an exact level boundary from getting one level too low in float32; torchvision's value.
EPSILON = 1e-6


def assign_levels(boxes: Real[AnyArray, "*b 4"], *, lowest: int, highest: int) -> Int[Array, "*b"]:
    """Returns `floor(4 + log2(sqrt(area) / 224))`, clipped to `lowest`..`highest`; `lowest` for empty boxes.

    Level k has a stride of 2^k network pixels. Lin et al. 2017 (arXiv:1612.03144), eq. 1.

    Examples:
      >>> assign_levels(np.array([[0, 0, 224, 224], [0, 0, 20, 20]]), lowest=2, highest=5)
      Array([4, 2], dtype=int32)

    Raises:
      TypeError: the boxes are of a type that `fasterrcnn_jax.ops` does not take.
      ValueError: `highest` is below `lowest`.
    """
    if highest < lowest:
        raise ValueError(f"need lowest <= highest, got {lowest} and {highest}")
    levels = jnp.floor(CANONICAL_LEVEL + jnp.log2(jnp.sqrt(jnp.maximum(area(boxes), 0.0)) / CANONICAL_SIZE) + EPSILON)
    # Clipped as integers: NaN becomes some integer, and clipping turns this integer into an existing level.
    return jnp.clip(levels.astype(jnp.int32), lowest, highest)


def _first_level(strides: tuple[float, ...]) -> int:
    first = round(math.log2(max(strides[0], 1)))
    if strides != tuple(2 ** (first + level) for level in range(len(strides))):
        raise ValueError(
            "the level of a box follows from its size only if the strides are powers of two from 1 up, each twice the "
            f"one before; got {strides}: give levels"
        )
    return first


def roi_align_average(
    features: Float[Array, "h w c"],
    boxes: Float[Array, "r 4"],
    *,
    stride: int,
    output_size: int,
) -> Float[Array, "r s s c"]:
    """Returns `output_size` x `output_size` features per box, in float32: each the mean of 2 x 2 samples.

    This is the operator of faster-rcnn.pytorch's first branch. It takes one bilinear sample at each of the
    (`output_size` + 1)^2 corners of the bins; bins with a common corner share its sample. Cell (j, k) is at
    (k * stride, j * stride), and the corners of boxes are inclusive in *cells*: a side is x2 - x1 + 1 cells long.
    Samples outside [0, h) x [0, w) are zero; samples beyond the last cell are extrapolated from the last two cells.
    No gradient reaches `boxes`.

    Args:
      boxes: in network pixels, with inclusive corners.
    Raises:
      ValueError: `output_size` is not positive, or `features` has fewer than two cells along a side.
    """
    two_sides(output_size)
    height, width, _ = features.shape
    if min(height, width) < 2:
        raise ValueError(f"roi_align_average needs a map of at least 2 x 2 cells, got {height} x {width}")
    boxes = lax.stop_gradient(boxes) / stride
    sides = jnp.maximum(boxes[:, 2:] - boxes[:, :2] + 1.0, 0.0)

    def weights(start: Array, side: Array, size: int) -> Array:
        corners = jnp.arange(output_size + 1, dtype=jnp.float32)[None]
        points = start[:, None] + corners * (side / output_size)[:, None]
        base = jnp.minimum(jnp.floor(points), size - 2.0)
        part = (points - base)[..., None]
        cells = jnp.arange(size, dtype=jnp.float32)[None, None] - base[..., None]
        at_corners = jnp.where(cells == 0.0, 1.0 - part, 0.0) + jnp.where(cells == 1.0, part, 0.0)
        inside = (points >= 0.0) & (points < size)
        at_corners = jnp.where(inside[..., None], at_corners, 0.0)
        return (at_corners[:, :-1] + at_corners[:, 1:]) / 2.0

    return contract(
        features,
        weights(boxes[:, 1], sides[:, 1], height),
        weights(boxes[:, 0], sides[:, 0], width),
    )


def contract(
    features: Float[Array, "h w c"],
    weights_y: Float[Array, "r p h"],
    weights_x: Float[Array, "r q w"],
) -> Float[Array, "r p q c"]:
    """Returns sums over all cells of the map in float32; the weight of a cell is `weights_y` times `weights_x`."""
    # Interpolation weights must not be rounded to TF32.
    precision = lax.Precision.HIGHEST
    features = features.astype(jnp.float32)

    def contract_one(weights: tuple[Array, Array]) -> Array:
        weights_y, weights_x = weights
        rows = jnp.einsum("pj,jkc->pkc", weights_y, features, precision=precision)
        return jnp.einsum("qk,pkc->pqc", weights_x, rows, precision=precision)

    return lax.map(contract_one, (weights_y, weights_x), batch_size=REGIONS_AT_ONCE)


def linear_weights(points: Float[Array, "r p"], size: int) -> Float[Array, "r p {size}"]:
    """Returns the weight of each of `size` cells in linear interpolation at the points; 0 for cells outside."""
    cells = jnp.arange(size, dtype=jnp.float32)[None, None]
    return jnp.maximum(1.0 - jnp.abs(points[..., None] - cells), 0.0)


def _sample_grid(
    boxes: Float[Array, "r 4"],
    levels: Int[Array, " r"],
    strides: tuple[float, ...],
    output_hw: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> SampleGrid:
    """Returns where the samples are, with as many bins along both axes as along the longer side of the output.

    The maps have the same number of bins along both axes in the kernel too. Bins behind the last one of the shorter
    side are computed and thrown away.
    """
    rows, columns = output_hw
    bins = max(rows, columns)
    corners = boxes / jnp.array(strides, jnp.float32)[levels][:, None] - (0.5 if aligned else 0.0)
    starts, sides = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        sides = jnp.maximum(sides, 1.0)
    along = bins if rows == columns else jnp.array([columns, rows], jnp.float32)[None]
    bin_sides = sides / along
    if sampling_ratio:
        samples = jnp.full_like(sides, sampling_ratio)
    else:
        samples = jnp.ceil(bin_sides)
        # XLA divides by multiplying by the reciprocal, so the quotient of a whole multiple may be slightly too large.
        samples = jnp.where((samples - 1.0) * along >= sides, samples - 1.0, samples)
        samples = jnp.where((samples > 0.0) & (samples < jnp.inf), samples, 0.0)
    bin_starts = starts[..., None] + jnp.arange(bins, dtype=jnp.float32)[None, None] * bin_sides[..., None]
    return SampleGrid(levels.astype(jnp.int32), bin_starts, bin_sides / jnp.maximum(samples, 1.0), samples)


# The grid, and an empty array for each map.
Residuals = tuple[SampleGrid, list[Float[Array, "_ _ 0"]]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _pool(
    features: tuple[Float[Array, "_ _ c"], ...], grid: SampleGrid, sampling_ratio: int, implementation: Implementation
) -> Float[Array, "r s s c"]:
    return _forward(sampling_ratio, implementation, sampling_ratio > 0)(_lead(features), _lead(grid))[0]


def _pool_forward(
    features: tuple[Float[Array, "_ _ c"], ...], grid: SampleGrid, sampling_ratio: int, implementation: Implementation
) -> tuple[Float[Array, "r s s c"], Residuals]:
    # On a CPU an unrolled loop is computed once more inside the transposition for the next layer's gradient: this took
    # 100 of 440 ms of processor time in a training step of configs/shapes.py.
    unroll = sampling_ratio > 0 and choice.device()[0] != "cpu"
    pooled = _forward(sampling_ratio, implementation, unroll)(_lead(features), _lead(grid))[0]
    # Empty arrays carry the static sizes of the maps to the backward pass.
    return pooled, (grid, [level[..., :0] for level in features])


def _pool_backward(
    sampling_ratio: int, implementation: Implementation, residuals: Residuals, cotangent: Float[Array, "r s s c"]
) -> tuple[tuple[Float[Array, "_ _ c"], ...], None]:
    grid, empty = residuals
    backward = _backward(tuple((level.shape[0], level.shape[1]) for level in empty), sampling_ratio, implementation)
    # None: the grid gets no gradient, so the boxes do not get one either.
    return tuple(gradient[0] for gradient in backward(cotangent[None], _lead(grid))), None


_pool.defvjp(_pool_forward, _pool_backward)


def _lead(arrays: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[None], arrays)


@functools.cache
def _forward(sampling_ratio: int, implementation: Implementation, unroll: bool) -> Callable:
    if implementation == "mosaic":
        return fold_mapped_axes(functools.partial(kernel.forward, sampling_ratio=sampling_ratio))
    at_once = functools.partial(_forward_by_taking, sampling_ratio=sampling_ratio, unroll=unroll)
    in_blocks = functools.partial(roi_alignment_on_cpu.forward, sampling_ratio=sampling_ratio)

    def forward(features: tuple[Float[Array, "n _ _ c"], ...], grid: SampleGrid) -> Float[Array, "n r s s c"]:
        _, regions, _, bins = grid.bin_start.shape
        # With a fixed number of samples, one map, or levels with fewer cells than the regions have bins, the loop over
        # blocks takes longer than it saves.
        cells = sum(level.shape[1] * level.shape[2] for level in features) if len(features) > 1 else 0
        known = isinstance(regions, int)  # and no symbol of an exported program
        if sampling_ratio and (not known or cells <= regions * bins**2):
            return at_once(features, grid)
        return lax.platform_dependent(features, grid, cpu=in_blocks, default=at_once)

    return fold_mapped_axes(forward)


@functools.cache
def _backward(maps: tuple[tuple[int, int], ...], sampling_ratio: int, implementation: Implementation) -> Callable:
    options: dict[str, Any] = dict(maps=maps, sampling_ratio=sampling_ratio)
    if implementation == "mosaic":
        return fold_mapped_axes(functools.partial(kernel.backward, **options))
    at_once, in_blocks = (
        functools.partial(one, **options) for one in (_backward_by_adding, roi_alignment_on_cpu.backward)
    )
    return fold_mapped_axes(functools.partial(lax.platform_dependent, cpu=in_blocks, default=at_once))


def _forward_by_taking(
    features: tuple[Float[Array, "n _ _ c"], ...], grid: SampleGrid, *, sampling_ratio: int, unroll: bool
) -> Float[Array, "n r s s c"]:
    cells = jnp.concatenate([level.reshape(level.shape[0], -1, level.shape[3]) for level in features], axis=1)
    cells = cells.reshape(-1, cells.shape[2])

    def add(corners, pooled):
        for index, weight in corners:
            pooled += weight[..., None] * cells[index].astype(jnp.float32)
        return pooled

    problems, regions, _, bins = grid.bin_start.shape
    pooled = jnp.zeros((problems, regions, bins, bins, cells.shape[1]))
    maps = [(level.shape[1], level.shape[2]) for level in features]
    # If the number of samples is static, the unrolled loop becomes one kernel on a GPU.
    pooled = over_samples(grid, maps, sampling_ratio, add, pooled, unroll=unroll)
    return pooled.astype(cells.dtype)


def _backward_by_adding(
    cotangent: Float[Array, "n r s s c"],
    grid: SampleGrid,
    *,
    maps: tuple[tuple[int, int], ...],
    sampling_ratio: int,
) -> tuple[Float[Array, "n _ _ c"], ...]:
    problems, *_, channels = cotangent.shape
    dtype, cotangent = cotangent.dtype, cotangent.astype(jnp.float32)

    def add_one(gradient, corner):
        index, weight = corner
        return gradient.at[index].add(weight[..., None] * cotangent), None

    # The loop holds only one product with the cotangent at a time.
    def add(corners, gradient):
        return lax.scan(add_one, gradient, jax.tree.map(lambda *x: jnp.stack(x), *corners))[0]

    ends = np.cumsum([height * width for height, width in maps])
    gradient = jnp.zeros((problems * ends[-1], channels))
    gradient = over_samples(grid, maps, sampling_ratio, add, gradient).astype(dtype)
    levels = jnp.split(gradient.reshape(problems, -1, channels), ends[:-1], axis=1)
    return tuple(level.reshape(problems, *cells, channels) for level, cells in zip(levels, maps, strict=True))
