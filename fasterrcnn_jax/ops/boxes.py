"""Geometry of float32 xyxy boxes in continuous pixels: [x1, x2) x [y1, y2)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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


def clip(
    boxes: Float[Array, "*b 4"], image_hw: Float[Array, "2"], *, far_corner_offset: int = 0
) -> Float[Array, "*b 4"]:
    """Returns the boxes cut to the image: x to [0, width], y to [0, height].

    Args:
      far_corner_offset: 1 gives every box at least the image's border pixel, as inclusive corners
        clipped to [0, side - 1] have it: near corners to [0, side - 1], far corners to [1, side].
    """
    far = jnp.tile(image_hw[::-1], 2)
    offset = jnp.array([0.0, 0.0, 1.0, 1.0]) * far_corner_offset
    low, high = offset, far - far_corner_offset + offset
    return jnp.clip(boxes, jnp.broadcast_to(low, boxes.shape), jnp.broadcast_to(high, boxes.shape))


def larger_than(boxes: Float[Array, "*b 4"], min_size: float, scale: Float[Array, "2"]) -> Bool[Array, "*b"]:
    """Returns where both sides reach `min_size` pixels of the stored image: times (y, x) `scale` here."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return (width >= min_size * scale[1]) & (height >= min_size * scale[0])


def min_side(boxes: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """Returns the shorter side in pixels."""
    return jnp.minimum(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])
