"""What the RPN and the box head are trained towards, for one image.

Ren et al. 2015 (arXiv:1506.01497), section 3.1.2; Fast R-CNN (arXiv:1504.08083), section 2.3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32

from fasterrcnn_jax.box_coder import Weights, encode
from fasterrcnn_jax.boxes import pairwise_iou
from fasterrcnn_jax.config import RoiSamplingConfig, RpnConfig
from fasterrcnn_jax.matching import FOREGROUND, IGNORED, match
from fasterrcnn_jax.sampling import sample
from fasterrcnn_jax.structures import AnchorTargets, GroundTruth, Proposals, RoiTargets

Key = PRNGKeyArray | UInt32[Array, "2"]


def anchor_targets(
    key: Key,
    anchors: Float[Array, "a 4"],
    anchor_valid: Bool[Array, "a"],
    ground_truth: GroundTruth,
    *,
    config: RpnConfig,
) -> AnchorTargets:
    """Labels a random sample of the anchors; everything else is ignored.

    Args:
      anchor_valid: False for anchors whose cell lies in the padding; they are never sampled.
    """
    iou = jnp.where(anchor_valid[:, None], pairwise_iou(anchors, ground_truth.boxes), 0.0)
    matches = match(
        iou,
        ground_truth.valid,
        fg_iou=config.fg_iou,
        bg_iou=(0.0, config.bg_iou),
        low_quality=True,
    )
    labels = jnp.where(anchor_valid, matches.labels, IGNORED)
    chosen = sample(key, labels, size=config.anchors_per_image, fg_fraction=config.fg_fraction)
    keep = jnp.zeros(labels.shape, bool).at[chosen.indices].set(chosen.valid)
    labels = jnp.where(keep, labels, IGNORED)
    matched = ground_truth.boxes[matches.matched_gt_indices]
    return AnchorTargets(
        labels, _deltas_where(labels == FOREGROUND, matched, anchors, (1.0, 1.0, 1.0, 1.0))
    )


def roi_targets(
    key: Key, proposals: Proposals, ground_truth: GroundTruth, *, config: RoiSamplingConfig
) -> RoiTargets:
    """Samples and labels RoIs among the proposals and the ground-truth boxes themselves.

    The ground truth is added so that the head sees foreground before the RPN proposes any.
    """
    boxes = jnp.concatenate([proposals.boxes, ground_truth.boxes])
    valid = jnp.concatenate([proposals.valid, ground_truth.valid])
    matches = match(
        pairwise_iou(boxes, ground_truth.boxes),
        ground_truth.valid,
        fg_iou=config.fg_iou,
        bg_iou=config.bg_iou,
        low_quality=False,
    )
    chosen = sample(
        key,
        jnp.where(valid, matches.labels, IGNORED),
        size=config.rois_per_image,
        fg_fraction=config.fg_fraction,
    )
    boxes = jnp.where(chosen.valid[:, None], boxes[chosen.indices], 0.0)
    matched = matches.matched_gt_indices[chosen.indices]
    foreground = chosen.valid & (matches.labels[chosen.indices] == FOREGROUND)
    return RoiTargets(
        boxes,
        jnp.where(foreground, ground_truth.labels[matched], 0),
        _deltas_where(foreground, ground_truth.boxes[matched], boxes, config.box_weights),
        chosen.valid,
    )


def _deltas_where(
    foreground: Bool[Array, "n"],
    matched: Float[Array, "n 4"],
    anchors: Float[Array, "n 4"],
    weights: Weights,
) -> Float[Array, "n 4"]:
    """Encodes where foreground; elsewhere the boxes may be padding, whose logarithm is not finite."""
    unit = jnp.array([0.0, 0.0, 1.0, 1.0])
    safe = [jnp.where(foreground[:, None], boxes, unit) for boxes in (matched, anchors)]
    return jnp.where(foreground[:, None], encode(*safe, weights=weights), 0.0)
