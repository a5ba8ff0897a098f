"""Boxes as deltas from anchors, and back. Ren et al. 2015 (arXiv:1506.01497), eq. 2."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

Weights = tuple[float, float, float, float]

# exp() of a larger value would turn a 16 px anchor into a box wider than a 1000 px image.
MAX_LOG_SCALE = math.log(1000.0 / 16.0)


def _centres_and_sides(boxes: Float[Array, "*b 4"]):
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sides, sides


def _like(deltas: Float[Array, "*b 4"], weights: Weights) -> Float[Array, "*b 4"]:
    return jnp.broadcast_to(jnp.asarray(weights, jnp.float32), deltas.shape)


def encode(
    boxes: Float[Array, "*b 4"], anchors: Float[Array, "*b 4"], *, weights: Weights
) -> Float[Array, "*b 4"]:
    """Returns the deltas that carry `anchors` onto `boxes`; inverse of `decode`.

    `t_x = (x - x_a) / w_a`, `t_w = log(w / w_a)`, each times its weight.

    Args:
      boxes: target boxes; positive width and height (filter padding first).
      anchors: positive width and height.
      weights: multiplies `(dx, dy, dw, dh)`; the reciprocal of Fast R-CNN's target stds in the box head.
    """
    centres, sides = _centres_and_sides(boxes)
    anchor_centres, anchor_sides = _centres_and_sides(anchors)
    deltas = jnp.concatenate(
        [(centres - anchor_centres) / anchor_sides, jnp.log(sides / anchor_sides)], axis=-1
    )
    return deltas * _like(deltas, weights)


def decode(
    deltas: Float[Array, "*b 4"], anchors: Float[Array, "*#b 4"], *, weights: Weights
) -> Float[Array, "*b 4"]:
    """Returns the boxes that `deltas` make of `anchors`; log scales above `MAX_LOG_SCALE` are cut."""
    deltas = deltas / _like(deltas, weights)
    anchor_centres, anchor_sides = _centres_and_sides(anchors)
    centres = deltas[..., :2] * anchor_sides + anchor_centres
    half = 0.5 * jnp.exp(jnp.minimum(deltas[..., 2:], MAX_LOG_SCALE)) * anchor_sides
    return jnp.concatenate([centres - half, centres + half], axis=-1)
