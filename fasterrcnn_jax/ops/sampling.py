"""Draws a fixed-size random sample of foreground and background.

Fast R-CNN (arXiv:1504.08083), section 2.3: at most a fraction of the sample is foreground, background
fills the rest. The sample is drawn without replacement. Its size is static; missing entries are marked invalid.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt32

from fasterrcnn_jax.ops import selection
from fasterrcnn_jax.ops.inputs import AnyArray
from fasterrcnn_jax.ops.matching import BACKGROUND, FOREGROUND

# More positions than these would have to share 24 bits of their draws to be taken in another order; of 268,569 anchors,
# 0.016 share them on average.
SPARE = 64


class Sample(NamedTuple):
    indices: Int[Array, "r"]  # foreground first, in random order; 0 in padding
    valid: Bool[Array, "r"]


def sample(
    key: PRNGKeyArray | UInt32[Array, "2"],
    labels: Int[AnyArray, "n"],
    *,
    size: int,
    fg_fraction: float,
    fg_only: Bool[Array, ""] | bool = False,
) -> Sample:
    """Returns `size` positions of `labels`, at most `fg_fraction` of them foreground.

    The limit on foreground, `size * fg_fraction`, is rounded, halves to even, and is at least 1 unless
    `fg_fraction` is 0. The reference implementation samples RoIs in this way.

    Examples:
      >>> drawn = sample(jax.random.key(0), np.array([1, 0, 0, 1, -1]), size=4, fg_fraction=0.5)
      >>> sorted(drawn.indices.tolist()), drawn.valid.tolist()
      ([0, 1, 2, 3], [True, True, True, True])

    Args:
      key: random key of this image.
      labels: IGNORED, BACKGROUND or FOREGROUND; ignored positions are never drawn.
      fg_only: True removes the limit on foreground.
    Raises:
      TypeError: the labels are not integers.
      ValueError: `fg_fraction` is not in [0, 1].
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype.name}")
    if not 0.0 <= fg_fraction <= 1.0:
        raise ValueError(f"fg_fraction must be in [0, 1], got {fg_fraction}")
    size = min(size, labels.shape[0])
    quota = max(1, round(size * fg_fraction)) if fg_fraction > 0.0 else 0
    # A random number for each position makes "the lowest k of a kind" a uniform draw of k of them. Padding appended to
    # `labels` changes nothing.
    foreground, background = _lowest(jax.random.bits(key, labels.shape), labels, size)
    most = jnp.where(fg_only, size, quota)
    num_foreground = jnp.minimum((labels == FOREGROUND).sum(dtype=jnp.int32), most.astype(jnp.int32))
    num_background = (labels == BACKGROUND).sum(dtype=jnp.int32)
    slot = jnp.arange(size, dtype=jnp.int32)
    valid = slot < num_foreground + num_background
    indices = jnp.where(slot < num_foreground, foreground, background[slot - num_foreground])
    return Sample(jnp.where(valid, indices, 0), valid)


# Compiled once for each size and shape, also where `sample` is called outside of `jax.jit`.
@functools.partial(jax.jit, static_argnums=2)
def _lowest(
    draws: UInt32[Array, "n"], labels: Int[Array, "n"], size: int
) -> tuple[Int[Array, "{size}"], Int[Array, "{size}"]]:
    """Returns the positions of the `size` lowest draws of foreground and of background, ascending, ties by position.

    If there are fewer of a kind, other positions follow.
    """
    # Entries of another kind get the largest key, so no draw may have it.
    draws = jnp.minimum(draws, selection.LARGEST - np.uint32(1))
    elsewhere = _lowest_by_counting if labels.shape[0] >= selection.LONG else _lowest_by_sort
    by_top_k, otherwise = (functools.partial(method, size=size) for method in (_lowest_by_top_k, elsewhere))
    return lax.platform_dependent(draws, labels, cpu=by_top_k, default=otherwise)


def _lowest_by_counting(
    draws: UInt32[Array, "n"], labels: Int[Array, "n"], *, size: int
) -> tuple[Int[Array, "{size}"], Int[Array, "{size}"]]:
    """Counts, and sorts only the draws that are taken: sorting all draws takes a GPU dozens of launches."""
    length = labels.shape[0]
    keys = jnp.concatenate([jnp.where(labels == kind, draws, selection.LARGEST) for kind in (FOREGROUND, BACKGROUND)])
    found = selection.lowest_positions(keys, (length, length), (size, size)).reshape(2, size)
    foreground, background = lax.sort((keys[found], found), num_keys=2)[1]
    return foreground, background - length


def _lowest_by_sort(
    draws: UInt32[Array, "n"], labels: Int[Array, "n"], *, size: int
) -> tuple[Int[Array, "{size}"], Int[Array, "{size}"]]:
    """One sort: of few draws it takes a GPU few launches."""
    kinds = jnp.where(labels == FOREGROUND, 0, jnp.where(labels == BACKGROUND, 1, 2))
    position = jnp.arange(labels.shape[0], dtype=jnp.int32)
    order = lax.sort((kinds, draws, position), num_keys=2, is_stable=True)[2]
    num_foreground = (labels == FOREGROUND).sum(dtype=jnp.int32)
    return order[:size], order[jnp.minimum(num_foreground + position[:size], labels.shape[0] - 1)]


def _lowest_by_top_k(
    draws: UInt32[Array, "n"], labels: Int[Array, "n"], *, size: int
) -> tuple[Int[Array, "{size}"], Int[Array, "{size}"]]:
    """Two top-k: on a CPU a top-k of float32 is one pass, and a sort takes forty times as long."""
    # float32 holds 24 bits of a draw exactly. The others decide among the best and SPARE more.
    ranks = -(draws >> 8).astype(jnp.float32)

    def lowest(kind: int) -> Array:
        of_kind = labels == kind
        _, best = lax.top_k(jnp.where(of_kind, ranks, -jnp.inf), min(size + SPARE, labels.shape[0]))
        best = best.astype(jnp.int32)
        return lax.sort((~of_kind[best], draws[best], best), num_keys=3)[2][:size]

    return lowest(FOREGROUND), lowest(BACKGROUND)
