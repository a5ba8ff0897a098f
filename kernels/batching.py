"""Makes `vmap` of a kernel one launch over all mapped axes instead of a mapped launch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def fold_mapped_axes(launch: Callable) -> Callable:
    """Returns `launch` with another `vmap`: it folds mapped axes into the leading axis of arguments and results.

    Args:
      launch: takes and returns pytrees of arrays, each with the same leading axis of problems.
    """
    folded = custom_vmap(launch)

    @folded.def_vmap
    # The size of a mapped axis is an int, or a symbol while a program for any batch size is exported.
    def rule(axis_size: Any, is_mapped: list[Any], *arguments: Any) -> tuple[Any, Any]:
        def fold(mapped: bool, x: jax.Array) -> jax.Array:
            if not mapped:
                x = jnp.broadcast_to(x[None], (axis_size, *x.shape))
            # Not -1: without a region, an array is empty.
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        is_mapped_first, first = (jax.tree.leaves(tree)[0] for tree in (is_mapped, arguments))
        problems = first.shape[1 if is_mapped_first else 0]
        results = folded(*jax.tree.map(fold, tuple(is_mapped), arguments))
        results = jax.tree.map(lambda x: x.reshape(axis_size, problems, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return functools.wraps(launch)(folded)
