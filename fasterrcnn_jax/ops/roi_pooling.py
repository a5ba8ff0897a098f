"""RoI pooling: the maxima of a fixed grid of bins in every region. Girshick 2015 (arXiv:1504.08083), section 2.1.

A bin is a range of rows times a range of columns; in plain JAX its maximum is found along one axis and then
along the other, in the kernel by walking its cells. The gradient goes to the first maximum in row-major order,
as in the reference's loops; it is gathered by comparing, cell by cell, so no scatter-add makes its sum depend
on an order.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from fasterrcnn_jax.kernels import choice
from fasterrcnn_jax.kernels import roi_pool as kernel
from fasterrcnn_jax.kernels.choice import Implementation


def roi_pool(
    features: Float[Array, "h w c"],
    boxes: Float[Array, "r 4"],
    *,
    stride: int,
    output_size: int,
    quantisation: Literal["rounded", "floor"],
    implementation: Implementation = None,
) -> Float[Array, "r s s c"]:
    """Returns the maxima of `output_size` x `output_size` bins per box, in the type of `features`; 0 in empty bins.

    A box covers whole cells, its last one included. Bin p of s spans cells floor(p * size / s) to
    ceil((p + 1) * size / s), the last one excluded, from the box's first; neighbours may share a cell.
    No gradient reaches `boxes`; the features' is summed in float32. NaN is larger than nothing: a bin without a
    number is the lowest float32 and gives no gradient, as in torchvision.

    Args:
      boxes: network pixels, inclusive corners.
      quantisation: "rounded" divides corners by `stride` and rounds them, halves away from zero; bins
        are laid out first and then clipped to the map (py-faster-rcnn, torchvision). "floor" rounds
        towards zero and clips the box before it is divided into bins (a slice of the map, then
        adaptive max pooling).
      implementation: "xla" takes regions one by one: what it holds grows with the map, not with their number.
        "mosaic" is the kernel, for float32 and bfloat16 and channels in multiples of 128. None: the kernel
        where it can run.
    Raises:
      NotImplementedError: `implementation` is "mosaic" and the kernel cannot run.
      ValueError: `output_size` is not positive, or `quantisation` or `implementation` is none of the named.
    """
    if output_size < 1:
        raise ValueError(f"output_size must be at least 1, got {output_size}")
    # A product, as in the reference; by a power of two it is the quotient. Integers end its gradient.
    corners = boxes * np.float32(1.0 / stride)
    limits = jnp.array([features.shape[1], features.shape[0]], jnp.int32)[None]
    if quantisation == "rounded":
        corners = lax.round(corners, lax.RoundingMethod.AWAY_FROM_ZERO).astype(jnp.int32)
        start = corners[:, :2]
        first, end = _float_bins(jnp.maximum(corners[:, 2:] - start + 1, 1), output_size)
    elif quantisation == "floor":
        corners = jnp.trunc(corners).astype(jnp.int32)
        start = jnp.maximum(corners[:, :2], 0)
        size = jnp.maximum(jnp.minimum(corners[:, 2:] + 1, limits) - start, 0)
        bins = jnp.arange(output_size, dtype=jnp.int32)[None, None]
        first = bins * size[..., None] // output_size
        end = -(-(bins + 1) * size[..., None] // output_size)
    else:
        raise ValueError(f"quantisation must be 'rounded' or 'floor', got {quantisation!r}")
    first = jnp.clip(start[..., None] + first, 0, limits[..., None])
    end = jnp.clip(start[..., None] + end, 0, limits[..., None])
    unsupported = choice.unsupported_features(features.dtype, features.shape[2])
    if not len(boxes):
        unsupported = "it takes at least one region and there is none"
    if choice.choose("roi_pool", implementation, unsupported=unsupported) == "mosaic":
        return kernel.roi_pool(features, first, end)
    return _pool(features, first, end)


def _pool(
    features: Float[Array, "h w c"], first: Int[Array, "r 2 s"], end: Int[Array, "r 2 s"]
) -> Float[Array, "r s s c"]:
    """Returns the maxima of the bins between the columns and rows `first` and `end`."""
    columns_first = features.astype(jnp.float32).swapaxes(0, 1)

    # Without checkpoint the maxima over columns of every region would wait for the backward pass.
    @jax.checkpoint
    def pool(bounds):
        first, end = bounds
        columns = _range_max(columns_first, first[0], end[0])
        return _range_max(columns.swapaxes(0, 1), first[1], end[1])

    return lax.map(pool, (first, end)).astype(features.dtype)


# Cells. A box has more only where it was not clipped to the image.
LARGEST_BOX = 4096


def _float_bins(size: Int[Array, "r 2"], bins: int) -> tuple[Int[Array, "r 2 s"], Int[Array, "r 2 s"]]:
    """Returns the first cell of every bin and the one after its last, rounded as in the references.

    They multiply with a float32 quotient. So 31 cells in 7 bins end at cell 32: 7 * (31 / 7) > 31.
    """
    # The quotient is NumPy's: XLA multiplies with a reciprocal, and what it rounds differs by device.
    quotients = np.arange(LARGEST_BOX + 1, dtype=np.float32) / np.float32(bins)
    quotient = jnp.asarray(quotients)[jnp.minimum(size, LARGEST_BOX)]
    quotient = jnp.where(size > LARGEST_BOX, size.astype(jnp.float32) / bins, quotient)[..., None]
    parts = jnp.arange(bins + 1, dtype=jnp.float32)[None, None]
    first = jnp.floor(parts[..., :-1] * quotient)
    end = jnp.ceil(parts[..., 1:] * quotient)
    return first.astype(jnp.int32), end.astype(jnp.int32)


@jax.custom_vjp
def _range_max(cells: Float[Array, "n a c"], first: Int[Array, " s"], end: Int[Array, " s"]) -> Float[Array, "s a c"]:
    """Returns the maximum of cells[first:end] for every bin; 0 where there are none."""
    return _range_max_forward(cells, first, end)[0]


def _range_max_forward(cells, first, end):
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


def _range_max_backward(residuals, cotangent):
    place, cells = residuals
    numbers = jnp.arange(len(cells), dtype=jnp.int32)[:, None, None]

    def step(p, gradient):
        return gradient + jnp.where(numbers == place[p][None], cotangent[p][None], 0.0)

    gradient = jnp.zeros((len(cells), *cotangent.shape[1:]))
    return lax.fori_loop(0, len(cotangent), step, gradient), None, None


_range_max.defvjp(_range_max_forward, _range_max_backward)
