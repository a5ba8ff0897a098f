"""Turns box-head outputs into the detections of one image. Fast R-CNN (arXiv:1504.08083), section 2.4."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fasterrcnn_jax.config import BoxCoderConfig, PostprocessConfig
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.ops.box_coder import decode
from fasterrcnn_jax.ops.boxes import clip, min_side
from fasterrcnn_jax.ops.suppression import batched_nms, soft_nms
from fasterrcnn_jax.structures import Detections, PerDelta, Proposals


def postprocess(
    class_logits: Float[Array, "p k"],
    deltas: Float[Array, "p k2 4"],
    proposals: Proposals,
    image_hw: Float[Array, "2"],
    *,
    means: PerDelta,
    stds: PerDelta,
    coder: BoxCoderConfig,
    config: PostprocessConfig,
    implementation: Implementation = None,
) -> Detections:
    """Returns the `config.max_detections` best detections after class-wise NMS; boxes in network pixels.

    The steps are: softmax, decoding with the deltas of each class, clipping to the image, score threshold, NMS or
    Soft-NMS within each class, selection of the best over all classes.

    Args:
      deltas: one set per class, background first, or one set for all classes; normalised by `means` and `stds`.
    """
    num_classes = class_logits.shape[-1] - 1
    scores = jax.nn.softmax(class_logits)[:, 1:].reshape(-1)
    of_class = deltas if deltas.shape[1] == 1 else deltas[:, 1:]
    offset = coder.far_corner_offset
    boxes = decode(
        of_class,
        proposals.boxes[:, None, :],
        means=means,
        stds=stds,
        max_log_scale=coder.max_log_scale,
        far_corner_offset=offset,
    )
    boxes = jnp.broadcast_to(boxes, (boxes.shape[0], num_classes, 4)).reshape(-1, 4)
    boxes = clip(boxes, image_hw, far_corner_offset=offset)
    labels = jnp.tile(jnp.arange(1, num_classes + 1, dtype=jnp.int32), proposals.valid.shape[0])
    valid = jnp.repeat(proposals.valid, num_classes)
    valid &= (scores > config.score_threshold) & (min_side(boxes) > 0.0)
    if config.soft_nms is None:
        kept, kept_valid = batched_nms(
            boxes,
            scores,
            labels,
            valid,
            iou_threshold=config.nms_threshold,
            max_output=config.max_detections,
            implementation=implementation,
        )
        kept_scores = scores[kept]
    else:
        kept, kept_scores, kept_valid = soft_nms(
            boxes,
            scores,
            valid,
            kind=config.soft_nms,
            iou_threshold=config.nms_threshold,
            sigma=config.soft_nms_sigma,
            score_threshold=config.score_threshold,
            max_output=config.max_detections,
            groups=labels,
        )
    return Detections(
        jnp.where(kept_valid[:, None], boxes[kept], 0.0),
        jnp.where(kept_valid, kept_scores, 0.0),
        jnp.where(kept_valid, labels[kept], 0),
        kept_valid,
    )
