"""Matches anchors or proposals with ground-truth boxes."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Real

from fasterrcnn_jax.ops.inputs import AnyArray, real_array, validity

IGNORED, BACKGROUND, FOREGROUND = -1, 0, 1


class Matches(NamedTuple):
    matched_gt_indices: Int[Array, "n"]  # the ground-truth box of highest IoU; 0 if there is none
    labels: Int[Array, "n"]  # IGNORED, BACKGROUND or FOREGROUND


def match(
    iou: Real[AnyArray, "n g"],
    gt_valid: Bool[AnyArray, "g"] | None = None,
    *,
    fg_iou: float,
    bg_iou: tuple[float, float] | None = None,
    low_quality: bool = False,
    clobber_positives: bool = False,
) -> Matches:
    """Labels each box by its highest IoU with a valid ground-truth box.

    A box is foreground if this IoU is at least `fg_iou`, background if it is in [bg_iou[0], bg_iou[1]), and
    ignored otherwise. With `low_quality`, the boxes that reach the highest IoU of a ground-truth box (ties
    included, if above zero) are also foreground: Ren et al. 2015 (arXiv:1506.01497), section 3.1.2, rule (i).
    Such a box is matched with the ground-truth box that it overlaps most, which may not be the one that made it
    foreground. With `clobber_positives`, such a box stays background if its highest IoU is in the background range.

    Examples:
      >>> match(np.array([[0.8, 0.1], [0.2, 0.4], [0.0, 0.0]]), fg_iou=0.5)
      Matches(matched_gt_indices=Array([0, 1, 0], dtype=int32), labels=Array([1, 0, 0], dtype=int32))

    Args:
      iou: of each box with each ground-truth box, as from `pairwise_iou`; g may be 0.
      gt_valid: False for padding among the ground-truth boxes. None: there is no padding.
      bg_iou: None: (0, `fg_iou`), and no box is ignored.
    Raises:
      ValueError: the thresholds do not satisfy 0 <= bg_iou[0] < bg_iou[1] <= fg_iou <= 1.
    """
    bg_iou = (0.0, fg_iou) if bg_iou is None else bg_iou
    if not 0.0 <= bg_iou[0] < bg_iou[1] <= fg_iou <= 1.0:
        raise ValueError(f"need 0 <= bg_iou[0] < bg_iou[1] <= fg_iou <= 1, got {bg_iou} and {fg_iou}")
    iou = real_array(iou, "iou")
    gt_valid = validity(gt_valid, iou.shape[1], "gt_valid")
    if iou.shape[1] == 0:
        # Without objects every box overlaps one slot of padding with IoU 0.
        iou, gt_valid = jnp.zeros((iou.shape[0], 1)), jnp.zeros(1, bool)
    iou = jnp.where(gt_valid[None, :], iou, 0.0)
    best = iou.max(axis=1)
    background = (best >= bg_iou[0]) & (best < bg_iou[1])
    labels = jnp.where(background, BACKGROUND, jnp.where(best >= fg_iou, FOREGROUND, IGNORED))
    if low_quality:
        best_of_gt = iou.max(axis=0)
        reaches = (iou == best_of_gt[None, :]) & (best_of_gt > 0.0)[None, :]
        reaches = reaches.any(axis=1) & ~(background & clobber_positives)
        labels = jnp.where(reaches, FOREGROUND, labels)
    return Matches(iou.argmax(axis=1).astype(jnp.int32), labels.astype(jnp.int32))
