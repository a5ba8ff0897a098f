"""Geometry of float32 xyxy boxes in continuous pixels: [x1, x2) x [y1, y2)."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def area(boxes: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """Returns width x height in square pixels; zero for padding."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(boxes: Float[Array, "n 4"], others: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Returns intersection over union of every pair; 0 where both are empty (padding)."""
    top_left = jnp.maximum(boxes[:, None, :2], others[None, :, :2])
    bottom_right = jnp.minimum(boxes[:, None, 2:], others[None, :, 2:])
    sides = jnp.maximum(bottom_right - top_left, 0.0)
    intersection = sides[..., 0] * sides[..., 1]
    union = area(boxes)[:, None] + area(others)[None, :] - intersection
    return jnp.where(union > 0.0, intersection / jnp.where(union > 0.0, union, 1.0), 0.0)


def clip(boxes: Float[Array, "*b 4"], image_hw: Float[Array, "2"]) -> Float[Array, "*b 4"]:
    """Returns the boxes cut to the picture: x to [0, width], y to [0, height]."""
    height, width = image_hw
    far = jnp.broadcast_to(jnp.stack([width, height, width, height]), boxes.shape)
    return jnp.clip(boxes, 0.0, far)


def min_side(boxes: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """Returns the shorter side in pixels."""
    return jnp.minimum(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])
