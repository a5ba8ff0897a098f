"""Computes the geometry of float32 xyxy boxes in continuous pixels: [x1, x2) x [y1, y2)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from fasterrcnn_jax.ops.inputs import AnyArray, box_array, real_array


def area(boxes: Real[AnyArray, "*b 4"]) -> Float[Array, "*b"]:
    """Returns width x height in square pixels; zero for padding.

    Examples:
      >>> area(np.array([[0, 0, 10, 20]]))
      Array([200.], dtype=float32)

    Raises:
      TypeError: the boxes are of a type that `fasterrcnn_jax.ops` does not take.
    """
    boxes = box_array(boxes)
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(boxes: Real[AnyArray, "n 4"], others: Real[AnyArray, "m 4"]) -> Float[Array, "n m"]:
    """Returns the intersection over union (IoU) of every pair; 0 where both boxes are empty (padding).

    Examples:
      >>> pairwise_iou(np.array([[0.0, 0, 10, 10]]), np.array([[0.0, 0, 10, 5], [20, 20, 30, 30]]))
      Array([[0.5, 0. ]], dtype=float32)

    Raises:
      TypeError: the boxes are of a type that `fasterrcnn_jax.ops` does not take.
      ValueError: the boxes have another shape.
    """
    boxes, others = box_array(boxes, one_list=True), box_array(others, "others", one_list=True)
    top_left = jnp.maximum(boxes[:, None, :2], others[None, :, :2])
    bottom_right = jnp.minimum(boxes[:, None, 2:], others[None, :, 2:])
    sides = jnp.maximum(bottom_right - top_left, 0.0)
    intersection = sides[..., 0] * sides[..., 1]
    union = area(boxes)[:, None] + area(others)[None, :] - intersection
    return jnp.where(union > 0.0, intersection / jnp.where(union > 0.0, union, 1.0), 0.0)


def clip(
    boxes: Real[AnyArray, "*b 4"], image_hw: Real[AnyArray, "2"] | tuple[float, float], *, far_corner_offset: int = 0
) -> Float[Array, "*b 4"]:
    """Returns the boxes cut to the image: x to [0, width], y to [0, height].

    Examples:
      >>> clip(np.array([[-5.0, 10, 700, 500]]), (480, 640))
      Array([[  0.,  10., 640., 480.]], dtype=float32)

    Args:
      image_hw: (height, width) of the image.
      far_corner_offset: 1 clips x1 and y1 to [0, side - 1], x2 and y2 to [1, side]. This equals clipping
        inclusive corners to [0, side - 1]: a box keeps at least one pixel at the border of the image.
    Raises:
      TypeError: the boxes are of a type that `fasterrcnn_jax.ops` does not take.
    """
    boxes, image_hw = box_array(boxes), real_array(image_hw, "image_hw")
    far = jnp.tile(image_hw[::-1], 2)
    offset = jnp.array([0.0, 0.0, 1.0, 1.0]) * far_corner_offset
    low, high = offset, far - far_corner_offset + offset
    return jnp.clip(boxes, jnp.broadcast_to(low, boxes.shape), jnp.broadcast_to(high, boxes.shape))


def larger_than(boxes: Float[Array, "*b 4"], min_size: float, scale: Float[Array, "2"]) -> Bool[Array, "*b"]:
    """Returns which boxes have two sides of at least `min_size` pixels of the original image.

    Args:
      scale: (y, x) network pixels per pixel of the original image.
    """
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return (width >= min_size * scale[1]) & (height >= min_size * scale[0])


def min_side(boxes: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """Returns the length of the shorter side in pixels."""
    return jnp.minimum(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])
