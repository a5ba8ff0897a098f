"""From RPN outputs to region proposals. Ren et al. 2015 (arXiv:1506.01497), section 3.3."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from fasterrcnn_jax.box_coder import decode
from fasterrcnn_jax.boxes import clip, larger_than
from fasterrcnn_jax.config import BoxCoderConfig, ProposalConfig
from fasterrcnn_jax.nms import nms
from fasterrcnn_jax.structures import Proposals


def propose(
    objectness: Float[Array, "a"],
    deltas: Float[Array, "a 4"],
    anchors: Float[Array, "a 4"],
    anchor_valid: Bool[Array, "a"],
    image_hw: Float[Array, "2"],
    scale: Float[Array, "2"],
    *,
    config: ProposalConfig,
    coder: BoxCoderConfig,
) -> Proposals:
    """Returns the `config.post_nms_top_n` best boxes of one image, clipped to the picture.

    Decode, clip to the true image, drop small boxes, keep the best by objectness, NMS. No gradient
    passes: the proposals are inputs of the box head, not functions that it trains.

    Args:
      objectness: logits.
      anchor_valid: False for anchors whose cell lies in the padding; they never propose.
      scale: (y, x) network pixels per pixel of the stored picture; small is meant in the latter.
    """
    offset = coder.far_corner_offset
    boxes = decode(deltas, anchors, max_log_scale=coder.max_log_scale, far_corner_offset=offset)
    boxes = clip(boxes, image_hw, far_corner_offset=offset)
    boxes, objectness = lax.stop_gradient((boxes, objectness))
    valid = anchor_valid & larger_than(boxes, config.min_size, scale)
    top_n = min(config.pre_nms_top_n, boxes.shape[0])
    # Logits order as probabilities do, without the ties of saturated sigmoids.
    logits, top = lax.top_k(jnp.where(valid, objectness, -jnp.inf), top_n)
    boxes, valid = boxes[top], valid[top]
    kept, kept_valid = nms(
        boxes,
        logits,
        valid,
        iou_threshold=config.nms_threshold,
        max_output=config.post_nms_top_n,
    )
    return Proposals(
        jnp.where(kept_valid[:, None], boxes[kept], 0.0),
        jnp.where(kept_valid, jax.nn.sigmoid(logits[kept]), 0.0),
        kept_valid,
    )
