"""The cells around some cells of a pyramid, with a gradient that is written cell by cell."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fasterrcnn_jax.kernels import choice


def cells_around(
    levels: Sequence[Float[Array, "b _ _ c"]], cells: Int[Array, "b s"], *, radius: int
) -> tuple[Float[Array, "b s k k c"], Bool[Array, "b s k k"]]:
    """Returns the k x k cells around each of the given cells, and which of them are on the map; k = 2 `radius` + 1.

    Neighbours beyond the border of the map are zeros. The gradient has the same bits in every run, on a GPU too.

    Args:
      cells: they count the cells of all levels in sequence, row by row.
    """
    sides = [(level.shape[1], level.shape[2]) for level in levels]
    heights, widths = (jnp.asarray(side, jnp.int32) for side in zip(*sides, strict=True))
    ends = np.cumsum([height * width for height, width in sides], dtype=np.int32)
    level = sum(((cells >= end).astype(jnp.int32) for end in ends[:-1]), start=jnp.zeros_like(cells))
    height, width, end = heights[level], widths[level], jnp.asarray(ends)[level]
    begin = end - height * width
    around = jnp.arange(-radius, radius + 1, dtype=jnp.int32)[None, None]
    rows = ((cells - begin) // width)[..., None] + around
    columns = ((cells - begin) % width)[..., None] + around
    in_rows, in_columns = ((x >= 0) & (x < side[..., None]) for x, side in ((rows, height), (columns, width)))
    inside = in_rows[..., :, None] & in_columns[..., None, :]
    indices = (begin[..., None] + rows * width[..., None])[..., :, None] + columns[..., None, :]
    flat = jnp.concatenate([level.reshape(level.shape[0], -1, level.shape[-1]) for level in levels], axis=1)
    side = 2 * radius + 1
    indices, on_map = (x.reshape(*cells.shape, side * side) for x in (indices, inside))
    values = jax.vmap(_take)(flat, indices, on_map, cells)
    return values.reshape(*cells.shape, side, side, flat.shape[-1]), inside


@jax.custom_vjp
def _take(
    flat: Float[Array, "n c"], indices: Int[Array, "s k"], on_map: Bool[Array, "s k"], centres: Int[Array, "s"]
) -> Float[Array, "s k c"]:
    del centres
    return jnp.where(on_map[..., None], flat[jnp.where(on_map, indices, 0)], 0)


Residuals = tuple[Array, Array, Array, Array]


def _take_forward(flat: Array, indices: Array, on_map: Array, centres: Array) -> tuple[Array, Residuals]:
    # An empty array carries the static length of the list.
    return _take(flat, indices, on_map, centres), (flat[:, :0], indices, on_map, centres)


def _take_backward(residuals: Residuals, gradient: Float[Array, "s k c"]) -> tuple[Array, None, None, None]:
    empty, *where = residuals
    add = added_at_once if choice.device()[0] == "cpu" else added_without_collisions
    return add(empty.shape[0], *where, gradient), None, None, None


_take.defvjp(_take_forward, _take_backward)


def added_at_once(
    length: int, indices: Int[Array, "s k"], on_map: Bool[Array, "s k"], centres: Int[Array, "s"], values: Array
) -> Float[Array, "n c"]:
    """Returns a list of `length` sums of the values [s k c] that belong to each index."""
    del centres
    zeros = jnp.zeros((length, values.shape[-1]), values.dtype)
    return zeros.at[jnp.where(on_map, indices, length)].add(values, mode="drop")


def added_without_collisions(
    length: int, indices: Int[Array, "s k"], on_map: Bool[Array, "s k"], centres: Int[Array, "s"], values: Array
) -> Float[Array, "n c"]:
    """Returns the same as `added_at_once`, by additions of which no two go to the same index.

    A GPU adds to one index in any order, and its sum has other bits in the next run. Here a matrix product adds the
    values of equal neighbourhoods. Then each of the k neighbours has an addition of its own, because different cells
    have different left neighbours, and so on.
    """
    samples, neighbours = indices.shape
    same = centres[:, None] == centres[None, :]
    position = jnp.arange(samples, dtype=jnp.int32)
    is_first = jnp.argmax(same, axis=1) == position
    values = jnp.einsum("st,tkc->skc", same.astype(values.dtype), values, precision=lax.Precision.HIGHEST)
    total = jnp.zeros((length, values.shape[-1]), values.dtype)
    for k in range(neighbours):
        # Those that are dropped have indices of their own, too: equal ones would break the promise of the addition.
        index = jnp.where(on_map[:, k] & is_first, indices[:, k], length + position)
        total = total.at[index].add(values[:, k], mode="drop", unique_indices=True)
    return total
