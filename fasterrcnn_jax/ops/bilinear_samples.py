"""The cells around the sample points of regions, and their weights, one sample of every bin at a time.

Shapes: n images (all mapped axes folded into one), r regions, s bins along a side.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from fasterrcnn_jax.kernels.roi_align import SampleGrid


def over_samples(
    grid: SampleGrid,
    maps: Sequence[tuple[int, int]],
    sampling_ratio: int,
    add: Callable[[list[tuple[Array, Array]], Array], Array],
    total: Array,
    *,
    unroll: bool = False,
) -> Array:
    """Returns `total` after `add` was called for each sample of a bin with the cells around this sample.

    Args:
      add: takes a list of (index, weight), both [n r s s], and the total; returns the new total. An index counts the
        cells of all levels of all images in sequence.
    """
    most = jnp.max(grid.samples, axis=(0, 1), initial=0.0).astype(jnp.int32)
    columns, rows = (sampling_ratio, sampling_ratio) if sampling_ratio else most
    heights, widths = np.array(maps, np.int32).T
    ends = np.cumsum(heights * widths, dtype=np.int32)
    images = ends[-1] * jnp.arange(grid.level.shape[0], dtype=jnp.int32)
    begins = images[:, None] + jnp.asarray(ends - heights * widths)[grid.level]
    heights, widths = jnp.asarray(heights)[grid.level], jnp.asarray(widths)[grid.level]

    def body(i, total):
        neighbours_x = _neighbours(grid, 0, i % columns, widths)
        neighbours_y = _neighbours(grid, 1, i // columns, heights)
        corners = []
        for j, weight_y in neighbours_y:
            for k, weight_x in neighbours_x:
                index = begins[..., None, None] + j[..., None] * widths[..., None, None] + k[..., None, :]
                corners.append((index, weight_y[..., None] * weight_x[..., None, :]))
        return add(corners, total)

    # The loop takes one sample at a time, so the number of samples needs no bound.
    return lax.fori_loop(0, rows * columns, body, total, unroll=unroll)


def _neighbours(
    grid: SampleGrid, axis: int, sample: ArrayLike, sizes: Int[Array, "n r"]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Returns, along one axis, the cells [n r s] before and after one sample of every bin, with their weights."""
    sample = jnp.float32(sample)
    samples, step = grid.samples[..., axis, None], grid.step[..., axis, None]
    last = (sizes[..., None] - 1).astype(jnp.float32)
    points = grid.bin_start[..., axis, :] + (sample + 0.5) * step
    counted = (points >= -1.0) & (points <= last + 1.0) & (sample < samples)
    points = jnp.clip(jnp.where(counted, points, 0.0), 0.0, last)
    before = jnp.floor(points)
    behind = jnp.minimum(before + 1.0, last)
    part, share = points - before, jnp.where(counted, 1.0 / jnp.maximum(samples, 1.0), 0.0)
    return (before.astype(jnp.int32), share * (1.0 - part)), (behind.astype(jnp.int32), share * part)
