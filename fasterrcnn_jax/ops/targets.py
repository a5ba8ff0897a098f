"""Makes the training targets of the RPN and the box head for one image.

Ren et al. 2015 (arXiv:1506.01497), section 3.1.2; Fast R-CNN (arXiv:1504.08083), section 2.3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Real, UInt32

from fasterrcnn_jax.config import RoiSamplingConfig, RpnConfig
from fasterrcnn_jax.ops.box_coder import ONES, ZEROS, encode
from fasterrcnn_jax.ops.inputs import AnyArray, box_array, real_array, validity, whole_numbers
from fasterrcnn_jax.ops.matching import BACKGROUND, FOREGROUND, IGNORED, match_boxes
from fasterrcnn_jax.ops.sampling import sample
from fasterrcnn_jax.structures import (
    AnchorTargets,
    GroundTruth,
    PerDelta,
    Proposals,
    RoiTargets,
)

Key = PRNGKeyArray | UInt32[Array, "2"]


def within_border(
    anchors: Float[Array, "a 4"], image_hw: Float[Array, "2"], allowed_border: float | None
) -> Bool[Array, "a"]:
    """Returns which anchors reach at most `allowed_border` pixels over the border of the image; None: all."""
    if allowed_border is None:
        return jnp.ones(anchors.shape[0], bool)
    near = (anchors[:, :2] >= -allowed_border).all(axis=1)
    far = image_hw[::-1] + allowed_border
    return near & (anchors[:, 2:] <= jnp.broadcast_to(far, (anchors.shape[0], 2))).all(axis=1)


def anchor_targets(
    key: Key,
    anchors: Real[AnyArray, "a 4"],
    anchor_valid: Bool[AnyArray, "a"] | None,
    image_hw: Real[AnyArray, "2"] | tuple[float, float],
    ground_truth: GroundTruth,
    *,
    config: RpnConfig | None = None,
) -> AnchorTargets:
    """Labels a random sample of the anchors; all other anchors are ignored.

    Anchors that reach too far over the border (`config.allowed_border`) do not take part: they cannot be the best
    anchor of a ground-truth box either.

    Args:
      anchor_valid: False for anchors whose cell lies in the padding; they are never sampled. None: there is no padding.
      image_hw: (height, width) of the image, in the pixels of the anchors.
      config: None: `RpnConfig()`.
    """
    config = RpnConfig() if config is None else config
    anchors, image_hw = box_array(anchors, "anchors", one_list=True), real_array(image_hw, "image_hw")
    anchor_valid, ground_truth = validity(anchor_valid, anchors.shape[0], "anchor_valid"), _on_device(ground_truth)
    anchor_valid = anchor_valid & within_border(anchors, image_hw, config.allowed_border)
    matches = match_boxes(
        anchors,
        ground_truth.boxes,
        anchor_valid,
        ground_truth.valid,
        fg_iou=config.fg_iou,
        bg_iou=(0.0, config.bg_iou),
        low_quality=True,
        clobber_positives=config.clobber_positives,
    )
    labels = jnp.where(anchor_valid, matches.labels, IGNORED)
    chosen = sample(key, labels, size=config.anchors_per_image, fg_fraction=config.fg_fraction)
    kept = jnp.where(chosen.valid, chosen.indices, labels.shape[0])
    keep = jnp.zeros(labels.shape, bool).at[kept].set(True, mode="drop")
    foreground = labels == FOREGROUND
    matched = ground_truth.boxes[matches.matched_gt_indices]
    return AnchorTargets(
        labels=jnp.where(keep, labels, IGNORED),
        deltas=_deltas_where(foreground, matched, anchors, ZEROS, ONES),
        foreground=foreground,
    )


def roi_targets(
    key: Key,
    proposals: Proposals,
    ground_truth: GroundTruth,
    *,
    rois_per_image: int | None = None,
    config: RoiSamplingConfig | None = None,
) -> RoiTargets:
    """Samples and labels RoIs among the proposals and, with `config.add_ground_truth`, the ground-truth boxes.

    The ground truth is added so that the head sees foreground before the RPN proposes any. At most
    `config.fg_fraction` of the sample is foreground. If no candidate is background, the whole sample may be
    foreground. If no candidate is foreground, the whole sample is background. If there is neither, it is empty.

    Args:
      rois_per_image: size of the sample. None: `config.rois_per_image`.
      config: None: `RoiSamplingConfig()`.
    """
    config = RoiSamplingConfig() if config is None else config
    ground_truth = _on_device(ground_truth)
    boxes = box_array(proposals.boxes, "proposals.boxes", one_list=True)
    valid = validity(proposals.valid, boxes.shape[0], "proposals.valid")
    if config.add_ground_truth:
        boxes = jnp.concatenate([boxes, ground_truth.boxes])
        valid = jnp.concatenate([valid, ground_truth.valid])
    matches = match_boxes(
        boxes,
        ground_truth.boxes,
        gt_valid=ground_truth.valid,
        fg_iou=config.fg_iou,
        bg_iou=config.bg_iou,
        # Only the RPN has this rule. It would change nothing where objects are candidates: their IoU with themselves
        # is 1.
        low_quality=False,
    )
    labels = jnp.where(valid, matches.labels, IGNORED)
    chosen = sample(
        key,
        labels,
        size=config.rois_per_image if rois_per_image is None else rois_per_image,
        fg_fraction=config.fg_fraction,
        fg_only=~(labels == BACKGROUND).any(),
    )
    boxes = jnp.where(chosen.valid[:, None], boxes[chosen.indices], 0.0)
    matched = matches.matched_gt_indices[chosen.indices]
    foreground = chosen.valid & (matches.labels[chosen.indices] == FOREGROUND)
    return RoiTargets(
        boxes=boxes,
        labels=jnp.where(foreground, ground_truth.labels[matched], 0),
        deltas=_deltas_where(foreground, ground_truth.boxes[matched], boxes, config.box_means, config.box_stds),
        valid=chosen.valid,
    )


def _on_device(ground_truth: GroundTruth) -> GroundTruth:
    """Returns the ground truth of one image, which may be NumPy's, as arrays of JAX with at least one slot."""
    boxes = box_array(ground_truth.boxes, "ground_truth.boxes", one_list=True)
    if boxes.shape[0] == 0:
        return GroundTruth(jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32), jnp.zeros(1, bool))
    labels = whole_numbers(ground_truth.labels, "ground_truth.labels", boxes.shape[0])
    return GroundTruth(boxes, labels, validity(ground_truth.valid, boxes.shape[0], "ground_truth.valid"))


def _deltas_where(
    foreground: Bool[Array, "n"],
    matched: Float[Array, "n 4"],
    anchors: Float[Array, "n 4"],
    means: PerDelta,
    stds: PerDelta,
) -> Float[Array, "n 4"]:
    """Returns the deltas of foreground boxes, and zeros for the other boxes.

    The other boxes may be padding; the logarithm of their sides is not finite.
    """
    unit = jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 1.0]), anchors.shape)
    safe = [jnp.where(foreground[:, None], boxes, unit) for boxes in (matched, anchors)]
    return jnp.where(foreground[:, None], encode(*safe, means=means, stds=stds), 0.0)
