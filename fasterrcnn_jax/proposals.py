"""From RPN outputs to region proposals. Ren et al. 2015 (arXiv:1506.01497), section 3.3."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from fasterrcnn_jax.box_coder import decode
from fasterrcnn_jax.boxes import clip, min_side
from fasterrcnn_jax.config import ProposalConfig
from fasterrcnn_jax.nms import nms
from fasterrcnn_jax.structures import Proposals


def propose(
    objectness: Float[Array, "a"],
    deltas: Float[Array, "a 4"],
    anchors: Float[Array, "a 4"],
    anchor_valid: Bool[Array, "a"],
    image_hw: Float[Array, "2"],
    *,
    config: ProposalConfig,
) -> Proposals:
    """Returns the `config.post_nms_top_n` best boxes of one image, clipped to the picture.

    Decode, clip to the true image, drop small boxes, keep the best by objectness, NMS. No gradient
    passes: the proposals are inputs of the box head, not functions that it trains.

    Args:
      objectness: logits.
      anchor_valid: False for anchors whose cell lies in the padding; they never propose.
    """
    boxes = clip(decode(deltas, anchors, weights=(1.0, 1.0, 1.0, 1.0)), image_hw)
    boxes, objectness = lax.stop_gradient((boxes, objectness))
    valid = anchor_valid & (min_side(boxes) >= config.min_size)
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
