"""Matches anchors or proposals with ground-truth boxes."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Real

from fasterrcnn_jax.ops.boxes import pairwise_iou
from fasterrcnn_jax.ops.inputs import AnyArray, box_array, real_array, validity

IGNORED, BACKGROUND, FOREGROUND = -1, 0, 1

# `match_boxes` holds the IoU of this many pairs of an image at once: 268,569 anchors (800 x 1344 pixels) and 124
# ground-truth boxes. Each further block costs ten launches on a GPU.
PAIRS_AT_ONCE = 2**25


class Matches(NamedTuple):
    matched_gt_indices: Int[Array, "n"]  # the ground-truth box of highest IoU; 0 if there is none
    labels: Int[Array, "n"]  # IGNORED, BACKGROUND or FOREGROUND


class _Overlaps(NamedTuple):
    """The highest IoU of each box with the ground-truth boxes seen so far."""

    best: Float[Array, "n"]
    gt_index: Int[Array, "n"]  # of the first ground-truth box with this IoU
    reaches: Bool[Array, "n"]  # whether it has the highest IoU of some ground-truth box, and this IoU is above zero


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
    bg_iou = _background_range(fg_iou, bg_iou)
    iou = real_array(iou, "iou")
    gt_valid = validity(gt_valid, iou.shape[1], "gt_valid")
    if iou.shape[1] == 0:
        # Without objects every box overlaps one slot of padding with IoU 0.
        iou, gt_valid = jnp.zeros((iou.shape[0], 1)), jnp.zeros(1, bool)
    return _labelled(_overlaps(iou, gt_valid), fg_iou, bg_iou, low_quality, clobber_positives)


def match_boxes(
    boxes: Real[AnyArray, "n 4"],
    gt_boxes: Real[AnyArray, "g 4"],
    valid: Bool[AnyArray, "n"] | None = None,
    gt_valid: Bool[AnyArray, "g"] | None = None,
    *,
    fg_iou: float,
    bg_iou: tuple[float, float] | None = None,
    low_quality: bool = False,
    clobber_positives: bool = False,
) -> Matches:
    """Returns the same as `match(pairwise_iou(boxes, gt_boxes), ...)` with less memory.

    It compares at most 2^25 pairs of an image at a time. Beyond that number, more ground-truth boxes need no more
    memory. Under `jax.vmap`, the limit holds for each image. Outside of `jax.jit`, a larger call is compiled each time.

    Examples:
      >>> match_boxes(np.array([[0, 0, 8, 8], [20, 20, 30, 30]]), np.array([[0, 0, 8, 9]]), fg_iou=0.5)
      Matches(matched_gt_indices=Array([0, 0], dtype=int32), labels=Array([1, 0], dtype=int32))

    Args:
      valid: False for padding among `boxes`, whose IoU counts as 0. None: there is no padding.
    Raises:
      TypeError: the boxes are of a type that `fasterrcnn_jax.ops` does not take, or a mask is not boolean.
      ValueError: the boxes have another shape, or the thresholds do not satisfy
        0 <= bg_iou[0] < bg_iou[1] <= fg_iou <= 1.
    """
    bg_iou = _background_range(fg_iou, bg_iou)
    boxes, gt_boxes = box_array(boxes, one_list=True), box_array(gt_boxes, "gt_boxes", one_list=True)
    valid, gt_valid = validity(valid, boxes.shape[0], "valid"), validity(gt_valid, gt_boxes.shape[0], "gt_valid")
    if gt_boxes.shape[0] == 0:
        gt_boxes, gt_valid = jnp.zeros((1, 4)), jnp.zeros(1, bool)
    # Labels and indices have no gradient. Otherwise `jax.grad` outside of `jax.jit` would keep the IoU of all pairs.
    boxes, gt_boxes = lax.stop_gradient((boxes, gt_boxes))
    number, objects = boxes.shape[0], gt_boxes.shape[0]
    # An exported program may have symbolic sizes.
    is_static = isinstance(number, int) and isinstance(objects, int)
    blocks = -(-objects // max(1, PAIRS_AT_ONCE // max(1, number))) if is_static else 1
    # All blocks have the same number of boxes, so that little padding is needed.
    columns = -(-objects // blocks)
    padding = blocks * columns - objects
    gt_boxes = jnp.pad(gt_boxes, ((0, padding), (0, 0))).reshape(blocks, columns, 4)
    gt_valid = jnp.pad(gt_valid, (0, padding)).reshape(blocks, columns)

    def compared(gt_boxes: Float[Array, "g 4"], gt_valid: Bool[Array, "g"]) -> _Overlaps:
        return _overlaps(jnp.where(valid[:, None], pairwise_iou(boxes, gt_boxes), 0.0), gt_valid)

    def widen(found: _Overlaps, block: tuple[Array, Array, Array]) -> tuple[_Overlaps, None]:
        start, gt_boxes, gt_valid = block
        more = compared(gt_boxes, gt_valid)
        # Of equal IoUs the first counts, as in `argmax`.
        is_better = more.best > found.best
        return _Overlaps(
            jnp.where(is_better, more.best, found.best),
            jnp.where(is_better, start + more.gt_index, found.gt_index),
            found.reaches | more.reaches,
        ), None

    found = compared(gt_boxes[0], gt_valid[0])
    if blocks > 1:
        starts = columns * jnp.arange(1, blocks, dtype=jnp.int32)
        found, _ = lax.scan(widen, found, (starts, gt_boxes[1:], gt_valid[1:]))
    return _labelled(found, fg_iou, bg_iou, low_quality, clobber_positives)


def _background_range(fg_iou: float, bg_iou: tuple[float, float] | None) -> tuple[float, float]:
    bg_iou = (0.0, fg_iou) if bg_iou is None else bg_iou
    if not 0.0 <= bg_iou[0] < bg_iou[1] <= fg_iou <= 1.0:
        raise ValueError(f"need 0 <= bg_iou[0] < bg_iou[1] <= fg_iou <= 1, got {bg_iou} and {fg_iou}")
    return bg_iou


def _overlaps(iou: Float[Array, "n g"], gt_valid: Bool[Array, "g"]) -> _Overlaps:
    iou = jnp.where(gt_valid[None, :], iou, 0.0)
    best_of_gt = iou.max(axis=0, initial=0.0)
    reaches = (iou == best_of_gt[None, :]) & (best_of_gt > 0.0)[None, :]
    return _Overlaps(iou.max(axis=1), iou.argmax(axis=1).astype(jnp.int32), reaches.any(axis=1))


def _labelled(
    found: _Overlaps, fg_iou: float, bg_iou: tuple[float, float], low_quality: bool, clobber_positives: bool
) -> Matches:
    background = (found.best >= bg_iou[0]) & (found.best < bg_iou[1])
    labels = jnp.where(background, BACKGROUND, jnp.where(found.best >= fg_iou, FOREGROUND, IGNORED))
    if low_quality:
        labels = jnp.where(found.reaches & ~(background & clobber_positives), FOREGROUND, labels)
    return Matches(found.gt_index, labels.astype(jnp.int32))
