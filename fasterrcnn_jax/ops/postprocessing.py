"""Turns box-head outputs into the detections of one image. Fast R-CNN (arXiv:1504.08083), section 2.4."""

import sys

import jax
import jax.numpy as jnp
from jax import lax
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
    scores = jax.nn.softmax(class_logits.astype(jnp.float32))[:, 1:]
    classes = jnp.broadcast_to(jnp.arange(num_classes, dtype=jnp.int32)[None], scores.shape)
    of_class = deltas if deltas.shape[1] == 1 else deltas[:, 1:]
    above = _most_above(config.score_threshold)
    if above < num_classes:
        # The other scores cannot be above the threshold: their boxes are not decoded or sorted.
        scores, classes = lax.top_k(scores, above)
        if deltas.shape[1] > 1:
            of_class = jnp.take_along_axis(of_class, classes[..., None], axis=1)
    offset = coder.far_corner_offset
    boxes = decode(
        of_class,
        proposals.boxes[:, None, :],
        means=means,
        stds=stds,
        max_log_scale=coder.max_log_scale,
        far_corner_offset=offset,
    )
    boxes = jnp.broadcast_to(boxes, (*scores.shape, 4)).reshape(-1, 4)
    boxes = clip(boxes, image_hw, far_corner_offset=offset)
    valid = jnp.repeat(proposals.valid, scores.shape[1])
    scores, labels = scores.reshape(-1), 1 + classes.reshape(-1)
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


def _most_above(threshold: float) -> int:
    """Returns how many scores can be above the threshold if their sum is 1, plus one for rounding."""
    # For lower thresholds one would not be enough.
    return int(1.0 / threshold) + 1 if threshold >= 1e-4 else sys.maxsize
