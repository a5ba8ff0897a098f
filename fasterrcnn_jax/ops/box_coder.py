"""Encodes boxes as deltas from anchors and decodes them. Ren et al. 2015 (arXiv:1506.01497), eq. 2.

Deltas `(dx, dy, dw, dh)` may be normalised, `(delta - mean) / std`: Fast R-CNN (arXiv:1504.08083), section 2.3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from fasterrcnn_jax.ops.inputs import AnyArray, box_array, real_array
from fasterrcnn_jax.structures import MAX_LOG_SCALE, PerDelta

ZEROS: PerDelta = (0.0, 0.0, 0.0, 0.0)
ONES: PerDelta = (1.0, 1.0, 1.0, 1.0)


def _centres_and_sides(boxes: Float[Array, "*b 4"]) -> tuple[Float[Array, "*b 2"], Float[Array, "*b 2"]]:
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sides, sides


def _like(deltas: Float[Array, "*b 4"], values: PerDelta) -> Float[Array, "*b 4"]:
    return jnp.broadcast_to(jnp.asarray(values, jnp.float32), deltas.shape)


def encode(
    boxes: Real[AnyArray, "*b 4"],
    anchors: Real[AnyArray, "*b 4"],
    *,
    means: PerDelta = ZEROS,
    stds: PerDelta = ONES,
) -> Float[Array, "*b 4"]:
    """Returns the normalised deltas that move `anchors` onto `boxes`; the inverse of `decode`.

    `t_x = (x - x_a) / w_a`, `t_w = log(w / w_a)`.

    Examples:
      >>> encode(np.array([[10.0, 0, 30, 20]]), np.array([[0.0, 0, 20, 20]]))
      Array([[0.5, 0. , 0. , 0. ]], dtype=float32)

    Args:
      boxes: target boxes with positive width and height (filter out padding first).
      anchors: boxes with positive width and height.
      means: of the deltas (dx, dy, dw, dh).
      stds: of the deltas. torchvision's `weights` are 1 / `stds`.
    Raises:
      TypeError: the boxes are of a type that `fasterrcnn_jax.ops` does not take.
    """
    boxes, anchors = box_array(boxes), box_array(anchors, "anchors")
    centres, sides = _centres_and_sides(boxes)
    anchor_centres, anchor_sides = _centres_and_sides(anchors)
    deltas = jnp.concatenate([(centres - anchor_centres) / anchor_sides, jnp.log(sides / anchor_sides)], axis=-1)
    return (deltas - _like(deltas, means)) / _like(deltas, stds)


def decode(
    deltas: Real[AnyArray, "*b 4"],
    anchors: Real[AnyArray, "*#b 4"],
    *,
    means: PerDelta = ZEROS,
    stds: PerDelta = ONES,
    max_log_scale: float | None = MAX_LOG_SCALE,
    far_corner_offset: int = 0,
) -> Float[Array, "*b 4"]:
    """Returns the boxes that result when normalised `deltas` are applied to `anchors`; the inverse of `encode`.

    Examples:
      >>> decode(np.array([[0.5, 0, 0, 0]]), np.array([[0.0, 0, 20, 20]]))
      Array([[10.,  0., 30., 20.]], dtype=float32)

    Args:
      max_log_scale: the upper limit of the log scales dw and dh. None: no limit; sides may overflow to infinity.
      far_corner_offset: added to x2 and y2. 1 reproduces the Caffe implementations, which decode
        `x2 = centre + w / 2` and treat it as an inclusive corner.
    Raises:
      TypeError: the anchors are of a type that `fasterrcnn_jax.ops` does not take.
    """
    deltas, anchors = real_array(deltas, "deltas"), box_array(anchors, "anchors")
    deltas = deltas * _like(deltas, stds) + _like(deltas, means)
    anchor_centres, anchor_sides = _centres_and_sides(anchors)
    centres = deltas[..., :2] * anchor_sides + anchor_centres
    log_scales = deltas[..., 2:]
    if max_log_scale is not None:
        log_scales = jnp.minimum(log_scales, max_log_scale)
    half = 0.5 * jnp.exp(log_scales) * anchor_sides
    return jnp.concatenate([centres - half, centres + half + far_corner_offset], axis=-1)
