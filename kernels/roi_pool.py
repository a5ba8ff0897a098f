"""RoI pooling for Mosaic GPU: maxima of bins of cells, and a gradient that is gathered, not scattered.

Forward: one block per region, row of bins and block of channels visits the cells of its bins in row-major order and
keeps the maximum and its place. Backward: one block per tile of cells and block of channels visits the bins that
overlap its tile, region by region, adds the cotangents whose maximum is one of its cells, and writes each gradient
once. There are no atomic additions, so two runs give the same bits. Sums are float32 for every feature type.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from fasterrcnn_jax.kernels import mosaic
from fasterrcnn_jax.kernels.batching import fold_mapped_axes
from jax import lax

# Cells per side of a tile in the backward pass. A larger tile reads fewer cotangents twice and leaves fewer registers
# for other blocks: with 4 channels per thread, 3 x 3 sums take 90 to 114 registers and 4 x 4 sums take 182.
TILE = 3

# Places of the maxima, first and end of the bins, and an empty array [h w 0].
Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@jax.custom_vjp
def roi_pool(features: jax.Array, first: jax.Array, end: jax.Array) -> jax.Array:
    """Returns the maxima [r s s c] of the bins of r regions, in the type of the features; 0 in empty bins.

    NaN never is a maximum: a bin in which every cell is NaN gives the lowest float32 and no gradient.

    Args:
      features: [h w c], float32 or bfloat16.
      first: [r 2 s] int32, the first column and the first row of every bin; inside the map.
      end: [r 2 s] int32, the column and the row after the last ones. From bin to bin, `first` and `end` never decrease.
    """
    (pooled,) = _forward(False)(mosaic.padded_channels(features)[None], first[None], end[None])
    return pooled[0, ..., : features.shape[2]]


def _roi_pool_forward(features: jax.Array, first: jax.Array, end: jax.Array) -> tuple[jax.Array, Residuals]:
    pooled, argmax = _forward(True)(mosaic.padded_channels(features)[None], first[None], end[None])
    # An empty array carries the static size of the map to the backward pass.
    return pooled[0, ..., : features.shape[2]], (argmax[0], first, end, jnp.zeros((*features.shape[:2], 0)))


def _roi_pool_backward(residuals: Residuals, cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    argmax, first, end, cells = residuals
    height, width, _ = cells.shape
    columns = _bins_of_tiles(first[:, 0], end[:, 0], width)
    rows = _bins_of_tiles(first[:, 1], end[:, 1], height)
    padded = mosaic.padded_channels(cotangent)
    gradient = _backward(height, width)(argmax[None], padded[None], rows[None], columns[None])
    return gradient[0, ..., : cotangent.shape[3]], None, None


roi_pool.defvjp(_roi_pool_forward, _roi_pool_backward)


def _bins_of_tiles(first: jax.Array, end: jax.Array, size: int) -> jax.Array:
    """Returns [r t 2] int32: along one axis, the first bin of a region in a tile, and the one after its last."""
    starts = jnp.arange(0, size, TILE, dtype=jnp.int32)[None, :, None]
    begin = (end[:, None] <= starts).sum(axis=-1, dtype=jnp.int32)
    stop = (first[:, None] < starts + TILE).sum(axis=-1, dtype=jnp.int32)
    return jnp.stack([begin, stop], axis=-1)


@functools.cache
def _forward(with_argmax: bool) -> Callable:
    """Returns the launch ([n h w c], [n r 2 s], [n r 2 s]) -> ([n r s s c],), or a second output with `with_argmax`.

    The second output, [n r s s c] int32, holds the places row * w + column of the first maxima; -1 if a bin has none.
    """

    def launch(features: jax.Array, first: jax.Array, end: jax.Array) -> tuple[jax.Array, ...]:
        from jax.experimental import pallas as pl

        problems, _, width, channels = features.shape
        regions, _, bins = first.shape[1:]
        block = mosaic.channel_block(channels)
        lowest = jnp.finfo(jnp.float32).min

        def roi_pool_forward(features, first, end, pooled, *argmax):
            n, r, p = lax.axis_index("problem"), lax.axis_index("region"), lax.axis_index("row")
            c = pl.ds(pl.multiple_of(lax.axis_index("channels") * block, block), block)
            first_row, end_row = first[n, r, 1, p], end[n, r, 1, p]

            @pl.loop(0, bins)
            def _(q):
                first_column, end_column = first[n, r, 0, q], end[n, r, 0, q]

                def row(j, state):
                    def cell(k, state):
                        maximum, place = state
                        value = features[n, j, k, c].astype(jnp.float32)
                        larger = value > maximum
                        return jnp.where(larger, value, maximum), jnp.where(larger, j * width + k, place)

                    return lax.fori_loop(first_column, end_column, cell, state)

                is_empty = (first_row >= end_row) | (first_column >= end_column)
                start = jnp.where(is_empty, 0.0, lowest)
                state = _spread(start, block), _spread(jnp.int32(-1), block)
                maximum, place = lax.fori_loop(first_row, end_row, row, state)
                pooled[n, r, p, q, c] = maximum.astype(pooled.dtype)
                for ref in argmax:
                    ref[n, r, p, q, c] = place

        shape = (problems, regions, bins, bins, channels)
        outputs = [jax.ShapeDtypeStruct(shape, features.dtype), jax.ShapeDtypeStruct(shape, jnp.int32)]
        return mosaic.kernel(
            roi_pool_forward,
            out_type=tuple(outputs[: 1 + with_argmax]),
            # The last axis may have 2^31 - 1 blocks, the one before 65,535, and the product of the others 65,535.
            grid=(channels // block, bins, problems, regions),
            grid_names=("channels", "row", "problem", "region"),
        )(features, first, end)

    return fold_mapped_axes(launch)


@functools.cache
def _backward(height: int, width: int) -> Callable:
    """Returns the launch that gathers gradients [n h w c] from argmax, cotangent [n r s s c] and the bins of tiles."""

    def launch(argmax: jax.Array, cotangent: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        from jax.experimental import pallas as pl

        problems, regions, _, _, channels = argmax.shape
        block = mosaic.channel_block(channels)

        def roi_pool_backward(argmax, cotangent, rows, columns, gradient):
            n, ty, tx = lax.axis_index("problem"), lax.axis_index("tile_row"), lax.axis_index("tile_column")
            c = pl.ds(pl.multiple_of(lax.axis_index("channels") * block, block), block)
            cells = [(ty * TILE + j, tx * TILE + k) for j, k in np.ndindex(TILE, TILE)]

            def region(r, sums):
                def row(p, sums):
                    def add(q, sums):
                        place = argmax[n, r, p, q, c]
                        value = cotangent[n, r, p, q, c].astype(jnp.float32)
                        return tuple(
                            sum_ + jnp.where(place == j * width + k, value, 0.0)
                            for (j, k), sum_ in zip(cells, sums, strict=True)
                        )

                    return lax.fori_loop(columns[n, r, tx, 0], columns[n, r, tx, 1], add, sums)

                return lax.fori_loop(rows[n, r, ty, 0], rows[n, r, ty, 1], row, sums)

            sums = tuple(_spread(jnp.float32(0.0), block) for _ in cells)
            for (j, k), total in zip(cells, lax.fori_loop(0, regions, region, sums), strict=True):

                @pl.when((j < height) & (k < width))
                def _(j=j, k=k, total=total):
                    gradient[n, j, k, c] = total.astype(gradient.dtype)

        return mosaic.kernel(
            roi_pool_backward,
            out_type=jax.ShapeDtypeStruct((problems, height, width, channels), cotangent.dtype),
            grid=(channels // block, problems, pl.cdiv(height, TILE), pl.cdiv(width, TILE)),
            grid_names=("channels", "problem", "tile_row", "tile_column"),
        )(argmax, cotangent, rows, columns)

    return fold_mapped_axes(launch)


def _spread(value: jax.Array, block: int) -> jax.Array:
    """Returns a vector of `block` equal values, in the same layout over the threads as one that is read from memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = plgpu.Layout.WG_STRIDED((block,), vec_size=block // mosaic.THREADS)
    return plgpu.layout_cast(jnp.full((block,), value), layout)
