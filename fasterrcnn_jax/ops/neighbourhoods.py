"""Takes the cells around given cells of a pyramid; the gradient is added to these cells alone."""

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

    Neighbours beyond the border of the map are zeros. The gradient has the same bits in every run, also on a GPU if it
    is JAX's default device.

    Args:
      cells: numbers of cells, counted through all levels, row by row.
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
    # The empty array is kept for its static length.
    return _take(flat, indices, on_map, centres), (flat[:, :0], indices, on_map, centres)


def _take_backward(residuals: Residuals, gradient: Float[Array, "s k c"]) -> tuple[Array, None, None, None]:
    empty, indices, on_map, centres = residuals
    add = added_at_once if choice.device()[0] == "cpu" else added_without_collisions
    return add(empty.shape[0], indices, on_map, centres, gradient), None, None, None


_take.defvjp(_take_forward, _take_backward)


def added_at_once(
    length: int, indices: Int[Array, "s k"], on_map: Bool[Array, "s k"], centres: Int[Array, "s"], values: Array
) -> Float[Array, "n c"]:
    """Returns `length` sums: at each index, the float32 sum of the values [s k c] that belong to it, in their type."""
    del centres
    zeros = jnp.zeros((length, values.shape[-1]), jnp.float32)
    total = zeros.at[jnp.where(on_map, indices, length)].add(values.astype(jnp.float32), mode="drop")
    return total.astype(values.dtype)


def added_without_collisions(
    length: int, indices: Int[Array, "s k"], on_map: Bool[Array, "s k"], centres: Int[Array, "s"], values: Array
) -> Float[Array, "n c"]:
    """Returns the sums of `added_at_once`, but no two of its additions have the same index at once.

    A GPU performs additions to one index in any order, so the bits of the sum change from run to run. Here a matrix
    product first adds the values of equal cells, in float32. Then there is one addition for each of the k neighbours:
    different cells have different left neighbours, and so on. These k additions have the type of the values.
    """
    same = (centres[:, None] == centres[None, :]).astype(jnp.float32)
    summed = jnp.einsum("st,tkc->skc", same, values.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    summed = summed.astype(values.dtype)
    total = jnp.zeros((length, values.shape[-1]), values.dtype)
    for k, index in enumerate(indices_at_once(length, indices, on_map, centres)):
        total = total.at[index].add(summed[:, k], mode="drop", unique_indices=True)
    return total


def indices_at_once(
    length: int, indices: Int[Array, "s k"], on_map: Bool[Array, "s k"], centres: Int[Array, "s"]
) -> list[Int[Array, "s"]]:
    """Returns the indices of k additions, in each of which every index is another; those from `length` on are dropped.

    Of equal cells, only the first has an index.
    """
    position = jnp.arange(centres.shape[0], dtype=jnp.int32)
    is_first = jnp.argmax(centres[:, None] == centres[None, :], axis=1) == position
    # Dropped values get different indices too, because `unique_indices` promises that no two are equal.
    return [jnp.where(on_map[:, k] & is_first, indices[:, k], length + position) for k in range(indices.shape[1])]
