"""Which level of a feature pyramid a region is taken from. Lin et al. 2017 (arXiv:1612.03144), eq. 1."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fasterrcnn_jax.boxes import area

# A region of the size of an ImageNet crop goes where a single-map detector takes all: to conv4_x.
CANONICAL_SIZE, CANONICAL_LEVEL = 224.0, 4
# Keeps the root of an exact power of two from falling one level short in float32; torchvision's value.
EPSILON = 1e-6


def assign_levels(boxes: Float[Array, "*b 4"], *, lowest: int, highest: int) -> Int[Array, "*b"]:
    """Returns `floor(4 + log2(sqrt(area) / 224))`, cut to `lowest`..`highest`; `lowest` for empty boxes.

    Level k has a stride of 2^k network pixels.

    Raises:
      ValueError: `highest` is below `lowest`.
    """
    if highest < lowest:
        raise ValueError(f"need lowest <= highest, got {lowest} and {highest}")
    levels = jnp.floor(CANONICAL_LEVEL + jnp.log2(jnp.sqrt(jnp.maximum(area(boxes), 0.0)) / CANONICAL_SIZE) + EPSILON)
    # Cut as integers: not-a-number becomes one, and so a level that there is.
    return jnp.clip(levels.astype(jnp.int32), lowest, highest)
