"""RoIAlign for Mosaic GPU: one launch for all images and levels, and a gradient that is gathered, not scattered.

The mean of samples on a regular grid is separable: the weight of a cell in a bin is the weight of its row times the
weight of its column. XLA writes these weights to tables. If every bin has the same number of samples, the table of the
forward pass lists the cells beside the samples of a bin; the other tables hold the weights of all cells along an axis,
and the range of cells of each bin. Forward: one block per region and block of channels sums the cells of every bin.
Backward: one block per tile of cells and block of channels visits the regions that overlap its tile in ascending order,
sums the gradients of their bins in the tile, and writes each gradient once. There are no atomic additions, so two runs
give the same bits. Sums are float32 for every feature type.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from fasterrcnn_jax.kernels import mosaic
from jax import lax

# Cells per side of a tile in the backward pass: 16 sums of up to 4 channels per thread. Larger tiles would visit each
# region less often but leave registers for fewer blocks, and other blocks are what hides the latency of loads.
TILE = 4
# Cells (forward; with taps, in as many rows) or bins (backward) of a row that are loaded at once.
AT_ONCE = 4
# If a bin takes several adaptive samples, they are more than half a cell apart: at most four are between the two
# neighbours of a cell; one more at each end allows for rounding.
ADAPTIVE_SAMPLES_OF_A_CELL = 6


class SampleGrid(NamedTuple):
    """The sample points of r regions of n images; axes are in the order (x, y), in cells of the region's level."""

    level: jax.Array  # [n r] int32
    bin_start: jax.Array  # [n r 2 s] float32
    step: jax.Array  # [n r 2] float32, from sample to sample; the first is half a step after the bin's start
    samples: jax.Array  # [n r 2] float32, a whole number: samples of one bin along the axis


def forward(features: tuple[jax.Array, ...], grid: SampleGrid, *, sampling_ratio: int) -> jax.Array:
    """Returns the features [n r s s c] of the regions, in the type of `features`.

    Args:
      features: [n h w c] of every level, float32 or bfloat16.
      sampling_ratio: the number of samples per bin and axis if it is the same for all regions; otherwise 0.
    """
    from jax.experimental import pallas as pl

    given = features[0].shape[3]
    features = tuple(mosaic.padded_channels(level) for level in features)
    problems, *_, channels = features[0].shape
    _, regions, _, bins = grid.bin_start.shape
    block = mosaic.channel_block(channels)
    sizes = [(level.shape[1], level.shape[2]) for level in features]
    if sampling_ratio:
        sum_of_bin, tables = _sum_of_taps, _taps(grid, sizes, sampling_ratio)
    else:
        weights = _weights(grid, sizes, sampling_ratio)
        sum_of_bin, tables = _sum_of_range, (*_cells_of_bins(weights), weights)

    def roi_align_forward(*refs):
        maps, (level, *tables, pooled) = refs[: len(sizes)], refs[len(sizes) :]
        n, r = lax.axis_index("problem"), lax.axis_index("region")
        c = pl.ds(pl.multiple_of(lax.axis_index("channels") * block, block), block)

        def pool(cells, width):
            @pl.loop(0, bins)
            def _(p):
                @pl.loop(0, bins)
                def _(q):
                    total = sum_of_bin(lambda k: cells[n, k, c].astype(jnp.float32), width, tables, (n, r, p, q), block)
                    pooled[n, r, p, q, c] = total.astype(pooled.dtype)

        for number, (cells, (_, width)) in enumerate(zip(maps, sizes, strict=True)):
            pl.when(level[n, r] == number)(lambda cells=cells, width=width: pool(cells, width))

    pooled = _kernel(
        roi_align_forward,
        out_type=jax.ShapeDtypeStruct((problems, regions, bins, bins, channels), features[0].dtype),
        # The last axis may have 2^31 - 1 blocks, the others 65,535.
        grid=(channels // block, problems, regions),
        grid_names=("channels", "problem", "region"),
    )(*(level.reshape(problems, -1, channels) for level in features), grid.level, *tables)
    return pooled[..., :given]


def _sum_of_taps(cell: Callable, width: int, tables: Sequence, place: tuple, block: int) -> jax.Array:
    """Returns the weighted sum of the cells of bin `place` (n, r, p, q); `cell` loads one by its place in the map."""
    cells, weights = tables
    n, r, p, q = place
    taps = cells.shape[-1]
    at_once = next(count for count in range(AT_ONCE, 0, -1) if taps % count == 0)

    def rows(j, total):
        def columns(k, total):
            i = [k * at_once + near for near in range(at_once)]
            in_row = [(cells[n, r, 0, q, i_], weights[n, r, 0, q, i_]) for i_ in i]
            for near in range(at_once):
                row, weight = (table[n, r, 1, p, j * at_once + near] for table in tables)
                row_sum = sum(weight_x * cell(row * width + column) for column, weight_x in in_row)
                total += weight * row_sum
            return total

        return lax.fori_loop(0, taps // at_once, columns, total)

    return lax.fori_loop(0, taps // at_once, rows, _zeros(block))


def _sum_of_range(cell: Callable, width: int, tables: Sequence, place: tuple, block: int) -> jax.Array:
    """Returns the same sum from the weights of all cells, from a bin's first cell to its last."""
    from jax.experimental import pallas as pl

    first, end, weights = tables
    n, r, p, q = place
    first_column, end_column = first[n, r, 0, q], end[n, r, 0, q]

    def columns(i, total):
        k = [first_column + i * AT_ONCE + near for near in range(AT_ONCE)]
        # The weights after a bin's last cell are zero.
        weights_x = [weights[n, r, 0, q, k_] for k_ in k]
        k = [jnp.minimum(k_, width - 1) for k_ in k]

        def row(j, total):
            row_sum = sum(w * cell(j * width + k_) for w, k_ in zip(weights_x, k, strict=True))
            return total + weights[n, r, 1, p, j] * row_sum

        return lax.fori_loop(first[n, r, 1, p], end[n, r, 1, p], row, total)

    return lax.fori_loop(0, pl.cdiv(end_column - first_column, AT_ONCE), columns, _zeros(block))


def backward(
    cotangent: jax.Array, grid: SampleGrid, *, maps: tuple[tuple[int, int], ...], sampling_ratio: int
) -> tuple[jax.Array, ...]:
    """Returns the gradients [n h w c] of the features of every level, in the type of `cotangent` [n r s s c].

    Args:
      maps: height and width of every level.
    """
    from jax.experimental import pallas as pl

    given = cotangent.shape[4]
    cotangent = mosaic.padded_channels(cotangent)
    problems, regions, bins, _, channels = cotangent.shape
    block, roi_block = mosaic.channel_block(channels), mosaic.channel_block(regions + -regions % mosaic.THREADS)
    weights = _weights(grid, maps, sampling_ratio)
    first, end = _cells_of_bins(weights)
    columns = _bins_of_tiles(first[:, :, 0], end[:, :, 0], grid.level, [width for _, width in maps])
    rows = _bins_of_tiles(first[:, :, 1], end[:, :, 1], grid.level, [height for height, _ in maps])
    tiles = _tiles(maps)

    def roi_align_backward(tiles, columns, rows, weights, cotangent, *gradients):
        t, n = lax.axis_index("tile"), lax.axis_index("problem")
        c = pl.ds(pl.multiple_of(lax.axis_index("channels") * block, block), block)
        level, row_tile, column_tile, y, x = (tiles[t, i] for i in range(tiles.shape[1]))

        def visit(r, sums):
            first_column, end_column = columns[n, 0, column_tile, r], columns[n, 1, column_tile, r]

            def row(p, sums):
                def of_bins(i, row_sums):
                    q = [first_column + i * AT_ONCE + near for near in range(AT_ONCE)]
                    is_bin = [q_ < end_column for q_ in q]
                    q = [jnp.minimum(q_, bins - 1) for q_ in q]
                    values = [cotangent[n, r, p, q_, c].astype(jnp.float32) for q_ in q]
                    values = [
                        jnp.where(jnp.broadcast_to(is_one, value.shape), value, 0.0)
                        for is_one, value in zip(is_bin, values, strict=True)
                    ]
                    weights_x = [[weights[n, r, 0, q_, x, k] for k in range(TILE)] for q_ in q]
                    for value, of_cells in zip(values, weights_x, strict=True):
                        row_sums = tuple(
                            total + weight * value for total, weight in zip(row_sums, of_cells, strict=True)
                        )
                    return row_sums

                weights_y = [weights[n, r, 1, p, y, j] for j in range(TILE)]
                chunks = pl.cdiv(end_column - first_column, AT_ONCE)
                row_sums = lax.fori_loop(0, chunks, of_bins, tuple(_zeros(block) for _ in range(TILE)))
                return tuple(sums[j * TILE + k] + weights_y[j] * row_sums[k] for j, k in np.ndindex(TILE, TILE))

            return lax.fori_loop(rows[n, 0, row_tile, r], rows[n, 1, row_tile, r], row, sums)

        def visit_block(i, sums):
            here = pl.ds(pl.multiple_of(i * roi_block, roi_block), roi_block)
            # Ranks fall from the size of the block to 1; rank 0: the region does not overlap the tile.
            meets = jnp.minimum(columns[n, 1, column_tile, here], rows[n, 1, row_tile, here]) > 0
            ranks = jnp.where(meets, roi_block - lax.iota(jnp.int32, roi_block), 0)

            def visit_next(state):
                rank, sums = state
                sums = visit((i + 1) * roi_block - rank, sums)
                return jnp.max(jnp.where(ranks < rank, ranks, 0)), sums

            return lax.while_loop(lambda state: state[0] > 0, visit_next, (jnp.max(ranks), sums))[1]

        sums = tuple(_zeros(block) for _ in range(TILE**2))
        sums = lax.fori_loop(0, columns.shape[3] // roi_block, visit_block, sums)
        for number, gradient in enumerate(gradients):
            for (j, k), total in zip(np.ndindex(TILE, TILE), sums, strict=True):
                j, k = y * TILE + j, x * TILE + k

                @pl.when((level == number) & (j < gradient.shape[1]) & (k < gradient.shape[2]))
                def _(gradient=gradient, j=j, k=k, total=total):
                    gradient[n, j, k, c] = total.astype(gradient.dtype)

    gradients = _kernel(
        roi_align_backward,
        out_type=tuple(jax.ShapeDtypeStruct((problems, *cells, channels), cotangent.dtype) for cells in maps),
        grid=(channels // block, problems, len(tiles)),
        grid_names=("channels", "problem", "tile"),
    )(tiles, columns, rows, weights.reshape(*weights.shape[:4], -1, TILE), cotangent)
    return tuple(gradient[..., :given] for gradient in gradients)


def _weights(grid: SampleGrid, maps: Sequence[tuple[int, int]], sampling_ratio: int) -> jax.Array:
    """Returns the weight [n r 2 s cells] of every cell in every bin along each axis, column by column and row by row.

    The last axis has as many cells as the longest side of a map. Zeros follow, because AT_ONCE cells are read from the
    last cell on, and they complete the last tile.
    """
    sizes = jnp.array([(width, height) for height, width in maps], jnp.float32)[grid.level][..., None, None]
    cells = max(map(max, maps)) + AT_ONCE - 1
    cells = jnp.arange(cells + -cells % TILE, dtype=jnp.float32)[None, None, None, None]
    start, step, samples = (
        grid.bin_start[..., None],
        grid.step[..., None, None],
        grid.samples[..., None, None],
    )
    if sampling_ratio:
        candidates = [jnp.float32(i) for i in range(sampling_ratio)]
    else:
        nearest = jnp.maximum(jnp.floor((cells - 1.0 - start) / step - 0.5), 0.0)
        candidates = [nearest + i for i in range(ADAPTIVE_SAMPLES_OF_A_CELL)]
    total = jnp.zeros(jnp.broadcast_shapes(start.shape, cells.shape))
    for i in candidates:
        points = start + (i + 0.5) * step
        counted = (points >= -1.0) & (points <= sizes) & (i < samples)
        distance = jnp.abs(jnp.clip(points, 0.0, sizes - 1.0) - cells)
        total += jnp.where(counted, jnp.maximum(1.0 - distance, 0.0), 0.0)
    return total / jnp.maximum(samples, 1.0)


def _taps(grid: SampleGrid, maps: Sequence[tuple[int, int]], sampling_ratio: int) -> tuple[jax.Array, jax.Array]:
    """Returns the two cells beside every sample of a bin along each axis, and their weights, both [n r 2 s 2 i].

    A cell beside several samples is listed several times.
    """
    last = jnp.array([(width - 1, height - 1) for height, width in maps], jnp.float32)[grid.level][..., None, None]
    samples = jnp.arange(sampling_ratio, dtype=jnp.float32)[None, None, None, None]
    points = grid.bin_start[..., None] + (samples + 0.5) * grid.step[..., None, None]
    counted = (points >= -1.0) & (points <= last + 1.0)
    points = jnp.clip(jnp.where(counted, points, 0.0), 0.0, last)
    before = jnp.floor(points)
    part, share = points - before, jnp.where(counted, 1.0 / sampling_ratio, 0.0)
    cells = jnp.concatenate([before, jnp.minimum(before + 1.0, last)], axis=-1).astype(jnp.int32)
    return cells, jnp.concatenate([share * (1.0 - part), share * part], axis=-1)


def _cells_of_bins(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns for every bin the first cell with a weight and the one after the last, [n r 2 s]; empty: end <= first."""
    cells = weights.shape[-1]
    numbers = jnp.arange(cells, dtype=jnp.int32)[None, None, None, None]
    first = jnp.where(weights > 0.0, numbers, cells).min(axis=-1)
    end = jnp.where(weights > 0.0, numbers + 1, 0).max(axis=-1)
    return first, end


def _bins_of_tiles(first: jax.Array, end: jax.Array, level: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Returns [n 2 t r] along one axis: the first bin of a region in a tile, and the one after its last, or 0 if none.

    The t tiles are the tiles of all levels in sequence. Regions are padded to the number that a block of threads reads.
    """
    starts = np.concatenate([np.arange(0, size, TILE, dtype=np.int32) for size in sizes])[None, :, None, None]
    levels = np.repeat(np.arange(len(sizes), dtype=np.int32), [-(-size // TILE) for size in sizes])
    first, end, bins = first[:, None], end[:, None], first.shape[-1]
    meets = (first < starts + TILE) & (end > starts) & (level[:, None] == levels[None, :, None])[..., None]
    numbers = jnp.arange(bins, dtype=jnp.int32)[None, None, None]
    begin = jnp.where(meets, numbers, bins).min(axis=-1)
    stop = jnp.where(meets, numbers + 1, 0).max(axis=-1)
    return jnp.pad(jnp.stack([begin, stop], axis=1), ((0, 0), (0, 0), (0, 0), (0, -first.shape[2] % mosaic.THREADS)))


def _tiles(maps: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns [t 5] for every tile: its level, its numbers along y and x in all levels, and those in its own level.

    Coarse levels come first: their tiles overlap the most regions and must not start last.
    """
    tiles, row_tiles, column_tiles = [], 0, 0
    for level, (height, width) in enumerate(maps):
        rows, columns = -(-height // TILE), -(-width // TILE)
        tiles[:0] = [(level, row_tiles + j, column_tiles + k, j, k) for j, k in np.ndindex(rows, columns)]
        row_tiles, column_tiles = row_tiles + rows, column_tiles + columns
    return np.array(tiles, np.int32)


def _kernel(body: Callable, **options: Any) -> Callable:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # Threads do not exchange data through memory, so their stores need no barriers.
    return mosaic.kernel(body, compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True), **options)


def _zeros(block: int) -> jax.Array:
    """Returns a vector of zeros, in the same layout over the threads as a vector that is read from memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.layout_cast(jnp.zeros(block), plgpu.Layout.WG_STRIDED((block,), vec_size=block // mosaic.THREADS))
