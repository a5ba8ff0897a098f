"""Draws a fixed-size random sample of foreground and background.

Fast R-CNN (arXiv:1504.08083), section 2.3: at most a fraction of the sample is foreground, background
fills the rest. The sample is drawn without replacement. Its size is static; missing entries are marked invalid.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt32

from fasterrcnn_jax.ops.inputs import AnyArray
from fasterrcnn_jax.ops.matching import BACKGROUND, FOREGROUND


class Sample(NamedTuple):
    indices: Int[Array, "r"]  # foreground first, in random order
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
    # A random order makes "the first k of a kind" a uniform draw of k of them. Each position has a random
    # number of its own, so that padding appended to `labels` changes nothing.
    shuffled = jnp.argsort(jax.random.bits(key, labels.shape)).astype(jnp.int32)
    kinds = labels[shuffled]
    fg = kinds == FOREGROUND
    fg = fg & (jnp.cumsum(fg) <= jnp.where(fg_only, size, quota))
    # Foreground first, then background, then the rest. The sort is stable, so each kind stays in random order.
    rank = jnp.where(fg, 0, jnp.where(kinds == BACKGROUND, 1, 2))
    order = jnp.argsort(rank, stable=True)[:size]
    return Sample(shuffled[order], rank[order] < 2)
