"""Turns RPN outputs into region proposals. Ren et al. 2015 (arXiv:1506.01497), section 3.3."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from fasterrcnn_jax.config import BoxCoderConfig, ProposalConfig
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.ops.box_coder import decode
from fasterrcnn_jax.ops.boxes import clip, larger_than
from fasterrcnn_jax.ops.selection import best_positions
from fasterrcnn_jax.ops.suppression import nms
from fasterrcnn_jax.structures import Proposals


def propose(
    objectness: Float[Array, "a"],
    deltas: Float[Array, "a 4"],
    anchors: Float[Array, "a 4"],
    anchor_valid: Bool[Array, "a"],
    image_hw: Float[Array, "2"],
    scale: Float[Array, "2"],
    *,
    level_sizes: tuple[int, ...] | None = None,
    config: ProposalConfig,
    coder: BoxCoderConfig,
    implementation: Implementation = None,
) -> Proposals:
    """Returns the `config.post_nms_top_n` best boxes of one image, clipped to the image.

    The steps are: decoding, clipping to the image, selection of the best boxes of each level by objectness, NMS
    within each level, selection of the best over all levels. Small boxes are dropped before or after the first
    selection (`config.drop_small`). No gradient passes: to the box head the proposals are constants.

    Args:
      objectness: logits.
      anchor_valid: False for anchors whose cell lies in the padding; they are never proposed.
      scale: (y, x) network pixels per pixel of the original image. `config.min_size` is in original pixels.
      level_sizes: number of anchors on each pyramid level, in order; None: all anchors are on one map.
    """
    offset = coder.far_corner_offset
    boxes = decode(deltas, anchors, max_log_scale=coder.max_log_scale, far_corner_offset=offset)
    boxes = clip(boxes, image_hw, far_corner_offset=offset)
    boxes, objectness = lax.stop_gradient((boxes, objectness))
    large = larger_than(boxes, config.min_size, scale)
    valid = anchor_valid & large
    # Logits have the same order as probabilities, without the ties of saturated sigmoids.
    ranked = jnp.where(valid if config.drop_small == "first" else anchor_valid, objectness, -jnp.inf)
    sizes = level_sizes or (len(anchors),)
    numbers = [min(config.pre_nms_top_n, size) for size in sizes]
    # NMS sorts its input, so the order here matters only among equal scores.
    top = best_positions(ranked, sizes, numbers)
    groups = jnp.asarray(np.repeat(np.arange(len(sizes), dtype=np.int32), numbers))
    boxes, logits, valid = boxes[top], ranked[top], valid[top]
    kept, kept_valid = nms(
        boxes,
        logits,
        valid,
        iou_threshold=config.nms_threshold,
        max_output=config.post_nms_top_n,
        groups=None if len(sizes) == 1 else groups,
        implementation=implementation,
    )
    return Proposals(
        jnp.where(kept_valid[:, None], boxes[kept], 0.0),
        jnp.where(kept_valid, jax.nn.sigmoid(logits[kept]), 0.0),
        kept_valid,
    )
