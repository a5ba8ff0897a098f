"""RoI pooling: takes the maxima of a fixed grid of bins in every region. Girshick 2015 (arXiv:1504.08083), section 2.1.

A bin is a range of rows times a range of columns. Plain JAX finds its maximum along one axis and then along the
other; the kernel visits its cells one by one. The gradient goes to the first maximum in row-major order, as in the
loops of the reference. It is gathered by comparing cell by cell, because a scatter-add would make the sum depend on
the order of the additions.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Real

from fasterrcnn_jax.kernels import choice
from fasterrcnn_jax.kernels import roi_pool as kernel
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.ops.inputs import AnyArray, box_array, feature_map, require_positive_strides, two_sides


def roi_pool(
    features: Real[AnyArray, "h w c"],
    boxes: Real[AnyArray, "r 4"],
    *,
    stride: float = 1,
    output_size: int | tuple[int, int],
    quantisation: Literal["rounded", "floor"] = "rounded",
    implementation: Implementation = None,
) -> Float[Array, "r oh ow c"]:
    """Returns the maxima of `output_size` x `output_size` bins per box, in the type of `features`; 0 in empty bins.

    A box covers whole cells, including its last one. Counted from the first cell of the box, bin p of s spans the
    cells from floor(p * size / s) up to, but not including, ceil((p + 1) * size / s); neighbouring bins may share a
    cell. No gradient reaches `boxes`; the gradient of the features is summed in float32. NaN never is a maximum: a
    bin in which every cell is NaN gives the lowest float32 and no gradient, as in torchvision.

    `jax.vmap` maps it over a batch of images. Under `jax.jit`, all options are static.

    Examples:
      >>> image = np.arange(16).reshape(4, 4, 1)
      >>> roi_pool(image, np.array([[0, 0, 3, 3]]), output_size=2)[0, :, :, 0]
      Array([[ 5.,  7.],
             [13., 15.]], dtype=float32)

    Args:
      features: one map. Integers, such as the pixels of an image, become float32.
      boxes: in network pixels, with inclusive corners.
      stride: network pixels per cell; torchvision's `spatial_scale` is 1 / `stride`.
      output_size: bins along a side, or (rows, columns).
      quantisation: "rounded" divides corners by `stride` and rounds them, halves away from zero; bins
        are laid out first and then clipped to the map (py-faster-rcnn, torchvision). "floor" rounds
        towards zero and clips the box before it is divided into bins (like adaptive max pooling of a slice of
        the map).
      implementation: "xla" is plain JAX; it takes regions one by one, so its memory grows with the map, not with
        the number of regions. "mosaic" is the kernel, for float32 or bfloat16 features. None: the kernel if it can
        run, otherwise plain JAX.
    Raises:
      NotImplementedError: `implementation` is "mosaic" and the kernel cannot run.
      TypeError: an array is of another type; boxes of 16 bits are refused.
      ValueError: an array has another shape, `stride` or `output_size` is not positive, or `quantisation` or
        `implementation` has an unknown value.
    """
    rows, columns = two_sides(output_size)
    require_positive_strides([stride])
    features, boxes = feature_map(features), box_array(boxes, one_list=True)
    # A product, as in the reference; for a power of two it equals the quotient. Conversion to integers stops the
    # gradient.
    corners = boxes * np.float32(1.0 / stride)
    limits = jnp.array([features.shape[1], features.shape[0]], jnp.int32)[None]
    if quantisation == "rounded":
        corners = lax.round(corners, lax.RoundingMethod.AWAY_FROM_ZERO).astype(jnp.int32)
        start = corners[:, :2]
        first, end = _bins(_float_bins, jnp.maximum(corners[:, 2:] - start + 1, 1), rows, columns)
    elif quantisation == "floor":
        corners = jnp.trunc(corners).astype(jnp.int32)
        start = jnp.maximum(corners[:, :2], 0)
        size = jnp.maximum(jnp.minimum(corners[:, 2:] + 1, limits) - start, 0)
        first, end = _bins(_whole_bins, size, rows, columns)
    else:
        raise ValueError(f"quantisation must be 'rounded' or 'floor', got {quantisation!r}")
    first = jnp.clip(start[..., None] + first, 0, limits[..., None])
    end = jnp.clip(start[..., None] + end, 0, limits[..., None])
    unsupported = choice.unsupported_features(features.dtype)
    if boxes.shape[0] == 0:
        unsupported = "it takes at least one region and there is none"
    chosen = choice.choose("roi_pool", implementation, unsupported=unsupported, check=_kernel_differs)
    pooled = (kernel.roi_pool if chosen == "mosaic" else _pool)(features, first, end)
    return pooled if rows == columns else pooled[:, :rows, :columns]


def _kernel_differs() -> str | None:
    """Returns how the kernel's results differ from those of plain JAX on a small map; gradient included."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((8, 8, 8), np.float32)
    corners = rng.uniform(-4.0, 24.0, (6, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + rng.uniform(2.0, 20.0, (6, 2)).astype(np.float32)], axis=1)
    cotangent = rng.standard_normal((6, 2, 2, 8), np.float32)

    def results(implementation: Implementation) -> tuple[Array, Array]:
        def pool(features: Array) -> Array:
            return roi_pool(features, boxes, stride=4, output_size=2, implementation=implementation)

        pooled, pull = jax.vjp(pool, jnp.asarray(features))
        return pooled, pull(jnp.asarray(cotangent))[0]

    differences = zip(results("mosaic"), results("xla"), strict=True)
    # Not <=: NaN differs.
    if not all(float(jnp.abs(kernel - plain).max()) < 1e-4 for kernel, plain in differences):
        return "the features or the gradient of the kernel differ from those of plain JAX"
    return None


def _pool(
    features: Float[Array, "h w c"], first: Int[Array, "r 2 s"], end: Int[Array, "r 2 s"]
) -> Float[Array, "r s s c"]:
    """Returns the maxima of the bins whose columns and rows go from `first` up to, but not including, `end`."""
    columns_first = features.astype(jnp.float32).swapaxes(0, 1)

    # Without checkpoint, the maxima over columns of every region would stay in memory until the backward pass.
    @jax.checkpoint
    def pool(bounds: tuple[Array, Array]) -> Array:
        first, end = bounds
        columns = _range_max(columns_first, first[0], end[0])
        return _range_max(columns.swapaxes(0, 1), first[1], end[1])

    return lax.map(pool, (first, end)).astype(features.dtype)


# The first cell of every bin, and the cell after its last one.
Bounds = tuple[Int[Array, "r _ s"], Int[Array, "r _ s"]]


def _bins(along: Callable[[Array, int], Bounds], size: Int[Array, "r 2"], rows: int, columns: int) -> Bounds:
    """Returns the bins along x and y, with as many along both as along the longer side of the output.

    Bins behind the last one of the shorter side are empty and are thrown away.
    """
    if rows == columns:
        return along(size, rows)

    def padded(bounds: Array) -> Array:
        return jnp.pad(bounds, ((0, 0), (0, 0), (0, max(rows, columns) - bounds.shape[2])))

    axes = along(size[:, :1], columns), along(size[:, 1:], rows)
    first, end = (jnp.concatenate([padded(bounds) for bounds in axis], axis=1) for axis in zip(*axes, strict=True))
    return first, end


def _whole_bins(size: Int[Array, "r a"], bins: int) -> Bounds:
    """Returns the bounds of every bin in whole numbers."""
    numbers = jnp.arange(bins, dtype=jnp.int32)[None, None]
    return numbers * size[..., None] // bins, -(-(numbers + 1) * size[..., None] // bins)


# In cells along a side. Only boxes that were not clipped to the image can be larger.
LARGEST_BOX = 4096


def _float_bins(size: Int[Array, "r a"], bins: int) -> Bounds:
    """Returns the first cell of every bin and the cell after its last one, rounded as in the references.

    The references multiply by a float32 quotient. So 31 cells in 7 bins end at cell 32: 7 * (31 / 7) > 31.
    """
    # NumPy computes the quotient: XLA multiplies by a reciprocal instead, whose rounding differs between devices.
    quotients = np.arange(LARGEST_BOX + 1, dtype=np.float32) / np.float32(bins)
    quotient = jnp.asarray(quotients)[jnp.minimum(size, LARGEST_BOX)]
    quotient = jnp.where(size > LARGEST_BOX, size.astype(jnp.float32) / bins, quotient)[..., None]
    parts = jnp.arange(bins + 1, dtype=jnp.float32)[None, None]
    first = jnp.floor(parts[..., :-1] * quotient)
    end = jnp.ceil(parts[..., 1:] * quotient)
    return first.astype(jnp.int32), end.astype(jnp.int32)


# Where each maximum is, and an empty array with as many rows as there are cells.
Residuals = tuple[Int[Array, "s a c"], Float[Array, "n 0"]]


@jax.custom_vjp
def _range_max(cells: Float[Array, "n a c"], first: Int[Array, " s"], end: Int[Array, " s"]) -> Float[Array, "s a c"]:
    """Returns the maximum of cells[first:end] for every bin; 0 for empty bins."""
    return _range_max_forward(cells, first, end)[0]


def _range_max_forward(
    cells: Float[Array, "n a c"], first: Int[Array, " s"], end: Int[Array, " s"]
) -> tuple[Float[Array, "s a c"], Residuals]:
    bins = (len(first), *cells.shape[1:])

    def step(i, state):
        maximum, place = state
        in_bin = (first <= i) & (i < end)
        larger = in_bin[:, None, None] & (cells[i][None] > maximum)
        return jnp.where(larger, cells[i][None], maximum), jnp.where(larger, i, place)

    start = jnp.full(bins, jnp.finfo(jnp.float32).min), jnp.full(bins, -1, jnp.int32)
    maximum, place = lax.fori_loop(jnp.int32(0), jnp.int32(len(cells)), step, start)
    maximum = jnp.where((first < end)[:, None, None], maximum, 0.0)
    # An empty array carries the static number of cells to the backward pass.
    return maximum, (place, jnp.zeros((len(cells), 0)))


def _range_max_backward(
    residuals: Residuals, cotangent: Float[Array, "s a c"]
) -> tuple[Float[Array, "n a c"], None, None]:
    place, cells = residuals
    numbers = jnp.arange(len(cells), dtype=jnp.int32)[:, None, None]

    def step(p, gradient):
        return gradient + jnp.where(numbers == place[p][None], cotangent[p][None], 0.0)

    gradient = jnp.zeros((len(cells), *cotangent.shape[1:]))
    return lax.fori_loop(0, len(cotangent), step, gradient), None, None


_range_max.defvjp(_range_max_forward, _range_max_backward)
