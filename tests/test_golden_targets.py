"""Training targets of RPN and box head, against the reference implementations: labels are identical.

tests/golden/README.md describes the arrays and their origin. faster-rcnn.pytorch reads boxes as inclusive corners and
orders its maps by anchor, row and column; torchvision has our order, and its grid is shifted here. The tolerance of
deltas, fixed before the comparison, is 1e-5 plus 1e-4 of the value; normalised deltas are up to ten times as large.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from fidelity import compare, continuous, inclusive

from fasterrcnn_jax.config import RoiSamplingConfig, RpnConfig
from fasterrcnn_jax.ops.anchors import cell_anchors, grid_anchors
from fasterrcnn_jax.ops.box_coder import encode
from fasterrcnn_jax.ops.boxes import pairwise_iou
from fasterrcnn_jax.ops.matching import match
from fasterrcnn_jax.ops.targets import anchor_targets, roi_targets
from fasterrcnn_jax.structures import GroundTruth, Proposals

GOLDEN = np.load(Path(__file__).parent / "golden" / "targets.npz")
RATIOS = (0.5, 1.0, 2.0)
DELTAS = dict(rtol=1e-4, atol=1e-5)
HEAD_DELTAS = dict(rtol=1e-4, atol=1e-4)
SLOTS, PROPOSALS = 20, 300  # everything is padded to these, so that few programs are compiled
KEY = jax.random.key(0)

iou = jax.jit(pairwise_iou)
jitted_encode = jax.jit(encode)
jitted_match = functools.partial(jax.jit, static_argnames=("fg_iou", "bg_iou", "low_quality"))(match)
jitted_anchor_targets = functools.partial(jax.jit, static_argnames="config")(anchor_targets)
jitted_roi_targets = functools.partial(jax.jit, static_argnames=("rois_per_image", "config"))(roi_targets)

JW_ANCHORS = grid_anchors(
    cell_anchors(16.0, (8.0, 16.0, 32.0), RATIOS, rounding="base"), tuple(GOLDEN["grid_hw"].tolist()), (16, 16)
)
TV_LEVELS = [
    (
        cell_anchors(16.0, (size / 16,), RATIOS, rounding="half"),
        (256 // stride, 320 // stride),
        (stride, stride),
    )
    for size, stride in ((32, 4), (64, 8), (128, 16), (256, 32), (512, 64))
]
TV_ANCHORS = np.concatenate([grid_anchors(*level, centre="corner") for level in TV_LEVELS])


def everything(count, **options):
    """Returns a configuration whose sample contains every labelled anchor."""
    return RpnConfig(anchors_per_image=count, fg_fraction=1.0, **options)


def jw_map(values, depth) -> np.ndarray:
    """Returns a map [anchors x depth, rows, columns] of the reference as [rows x columns x anchors, depth]."""
    height, width = GOLDEN["grid_hw"]
    return values.reshape(9, depth, height, width).transpose(2, 3, 0, 1).reshape(-1, depth)


def padded(boxes, labels) -> GroundTruth:
    count = len(boxes)
    extra = SLOTS - count
    return GroundTruth(
        np.concatenate([boxes, np.zeros((extra, 4), np.float32)]),
        np.concatenate([labels, np.zeros(extra)]).astype(np.int32),
        np.arange(SLOTS) < count,
    )


def jw_ground_truth(image) -> GroundTruth:
    count = int(GOLDEN["num_gt"][image])
    rows = GOLDEN["gt"][image, :count]
    return padded(continuous(rows[:, :4]), rows[:, 4])


def run_anchors(anchors, image_hw, gt, config):
    every = np.ones(len(anchors), bool)
    return jitted_anchor_targets(KEY, anchors, every, np.float32(image_hw), gt, config=config)


@pytest.mark.parametrize("image", [0, 1])
def test_faster_rcnn_pytorchs_anchor_labels_and_targets(image):
    reference = "faster-rcnn.pytorch"
    gt, image_hw = jw_ground_truth(image), GOLDEN["image_hw"][image]
    found = run_anchors(JW_ANCHORS, image_hw, gt, everything(len(JW_ANCHORS), allowed_border=0.0))
    labels = np.asarray(found.labels)
    theirs = jw_map(GOLDEN["jw_rpn_labels"][image], 1)[:, 0]
    compare("anchor labels", reference, f"image {image}, all", labels, theirs)
    counts = [(labels == label).sum() for label in (1, 0, -1)]
    compare("anchor labels", reference, f"image {image}, counts", counts, GOLDEN["jw_rpn_counts"][image])
    inside = jw_map(GOLDEN["jw_rpn_inside_w"][image], 1)[:, 0]
    compare("anchor labels", reference, f"image {image}, inside weights", found.foreground, inside)
    foreground = np.asarray(found.foreground)
    targets = jw_map(GOLDEN["jw_rpn_targets"][image], 4)
    ours = np.asarray(found.deltas)
    compare(
        "anchor targets",
        reference,
        f"image {image}, foreground",
        ours[foreground],
        targets[foreground],
        **DELTAS,
    )
    assert not ours[~foreground].any()
    # The reference has targets for every anchor inside the image, even for unused ones.
    corners = inclusive(JW_ANCHORS)
    within = (corners[:, :2] >= 0).all(axis=1) & (corners[:, 2:] < image_hw[::-1]).all(axis=1)
    overlaps = iou(JW_ANCHORS[within], gt.boxes)
    matches = jitted_match(overlaps, gt.valid, fg_iou=0.7, bg_iou=(0.0, 0.3), low_quality=True)
    encoded = jitted_encode(gt.boxes[np.asarray(matches.matched_gt_indices)], JW_ANCHORS[within])
    compare("anchor targets", reference, f"image {image}, all inside", encoded, targets[within], **DELTAS)
    assert not targets[~within].any()


def test_faster_rcnn_pytorchs_outside_weight_is_one_over_the_sample_of_the_last_image():
    for name, config in (
        ("jw_rpn_outside_w_val", everything(len(JW_ANCHORS))),
        ("jw_rpn_outside_w_val_256", RpnConfig()),
    ):
        found = run_anchors(JW_ANCHORS, GOLDEN["image_hw"][1], jw_ground_truth(1), config)
        weight = np.float32(1) / np.float32((np.asarray(found.labels) >= 0).sum())
        compare("anchor labels", "faster-rcnn.pytorch", name, weight, GOLDEN[name])


@pytest.mark.parametrize("image", [0, 1])
def test_faster_rcnn_pytorchs_sample_of_256_anchors(image):
    """All foreground is sampled (73 and 18 of at most 128); the background is drawn differently."""
    found = run_anchors(JW_ANCHORS, GOLDEN["image_hw"][image], jw_ground_truth(image), RpnConfig())
    ours = np.asarray(found.labels)
    theirs = jw_map(GOLDEN["jw_rpn_labels_256"][image], 1)[:, 0]
    every = jw_map(GOLDEN["jw_rpn_labels"][image], 1)[:, 0]
    for label in (1, 0, -1):
        name = f"image {image}, sample of 256: count of {label}"
        compare("anchor labels", "faster-rcnn.pytorch", name, (ours == label).sum(), (theirs == label).sum())
    name = f"image {image}, sample of 256: foreground"
    compare("anchor labels", "faster-rcnn.pytorch", name, ours == 1, theirs == 1)
    for sample in (ours, theirs):
        np.testing.assert_array_equal(sample[sample >= 0], every[sample >= 0])


@pytest.mark.parametrize("image", [0, 1, 2])
def test_torchvisions_anchor_labels_and_targets(image):
    """Compares all five levels, including anchors over the border; image 2 has no objects."""
    rows = GOLDEN[f"tv_gt{image}"]
    gt = padded(rows[:, :4], rows[:, 4])
    config = everything(len(TV_ANCHORS), allowed_border=None)
    found = run_anchors(TV_ANCHORS, (256, 320), gt, config)
    name = f"image {image}"
    compare("anchor labels", "torchvision", name, found.labels, GOLDEN[f"tv_rpn_labels{image}"])
    positives = np.flatnonzero(np.asarray(found.foreground))
    compare("anchor labels", "torchvision", f"{name}, positives", positives, GOLDEN[f"tv_rpn_pos_idx{image}"])
    deltas = np.asarray(found.deltas)[positives]
    compare("anchor targets", "torchvision", name, deltas, GOLDEN[f"tv_rpn_pos_targets{image}"], **DELTAS)
    matches = jitted_match(iou(TV_ANCHORS, gt.boxes), gt.valid, fg_iou=0.7, bg_iou=(0.0, 0.3), low_quality=True)
    indices = np.asarray(matches.matched_gt_indices)
    matched = gt.boxes[indices[positives]]
    compare("matching", "torchvision", f"{name}, boxes", matched, GOLDEN[f"tv_rpn_pos_gt{image}"])
    if image == 0:
        ours = np.select([matches.labels == 1, matches.labels == 0], [indices, -1], -2)
        compare("matching", "torchvision", "Matcher of the RPN", ours, GOLDEN["tv_match_0"])


@pytest.mark.parametrize(
    "name, fg_iou, bg_iou, low_quality",
    [("73T", 0.7, 0.3, True), ("73F", 0.7, 0.3, False), ("55T", 0.5, 0.5, True), ("55F", 0.5, 0.5, False)],
)
def test_torchvisions_matcher_with_ties(name, fg_iou, bg_iou, low_quality):
    options = dict(fg_iou=fg_iou, bg_iou=(0.0, bg_iou), low_quality=low_quality)
    found = jitted_match(GOLDEN["tie_iou"], np.ones(3, bool), **options)
    ours = np.select([found.labels == 1, found.labels == 0], [found.matched_gt_indices, -1], -2)
    compare("matching", "torchvision", f"ties {name}", ours, GOLDEN[f"tv_tie_{name}"])


def every_roi(boxes, valid, gt):
    """Returns the candidates, proposals before ground truth, with the labels and deltas of all."""
    found = jitted_roi_targets(
        KEY,
        Proposals(boxes, np.zeros(PROPOSALS, np.float32), valid),
        gt,
        rois_per_image=PROPOSALS + SLOTS,
        config=RoiSamplingConfig(fg_fraction=1.0),
    )
    candidates = np.concatenate([boxes[valid], gt.boxes[gt.valid]])
    kept = np.asarray(found.valid)
    assert kept.sum() == len(candidates)
    rows = {tuple(box): i for i, box in enumerate(np.asarray(found.boxes)[kept].tolist())}
    order = [rows[tuple(box)] for box in candidates.tolist()]
    return candidates, np.asarray(found.labels)[order], np.asarray(found.deltas)[order]


@pytest.mark.parametrize("image", [0, 1])
def test_faster_rcnn_pytorchs_rois(image):
    reference, gt = "faster-rcnn.pytorch", jw_ground_truth(image)
    rois = GOLDEN["rois"][image]
    valid = rois.any(axis=1)
    # The reference samples from the proposals and all rows of the ground truth; padding rows have overlap -1.
    boxes = np.where(valid[:, None], continuous(rois), np.float32(0))
    candidates = np.concatenate([boxes, gt.boxes])
    overlaps = np.asarray(iou(candidates, gt.boxes))
    is_real = np.concatenate([valid, gt.valid])
    theirs = GOLDEN["jw_ptl_max_overlap"][image]
    np.testing.assert_array_equal(theirs == -1, ~is_real)
    name = f"image {image}, best overlap"
    # One division of areas that float32 rounds once each.
    compare("RoI targets", reference, name, overlaps.max(axis=1)[is_real], theirs[is_real], rtol=1e-5)
    matches = jitted_match(overlaps, gt.valid, fg_iou=0.5, bg_iou=(0.0, 0.5), low_quality=False)
    assigned, theirs = np.asarray(matches.matched_gt_indices), GOLDEN["jw_ptl_gt_assign"][image]
    compare("RoI targets", reference, f"image {image}, assignment", assigned[is_real], theirs[is_real])
    # The reference draws background with replacement, and we do not, so sampled RoIs are compared box by box.
    candidates, labels, deltas = every_roi(boxes, valid, gt)
    rows = {tuple(box): i for i, box in enumerate(candidates.tolist())}
    sampled = [rows[tuple(box)] for box in continuous(GOLDEN["jw_ptl_rois"][image, :, 1:]).tolist()]
    theirs = GOLDEN["jw_ptl_labels"][image]
    compare("RoI targets", reference, f"image {image}, labels of its sample", labels[sampled], theirs)
    inside = (labels[sampled] > 0).astype(np.int8)
    compare("RoI targets", reference, f"image {image}, inside", inside, GOLDEN["jw_ptl_inside_w"][image])
    theirs = GOLDEN["jw_ptl_targets"][image]
    compare("RoI targets", reference, f"image {image}, deltas", deltas[sampled], theirs, **HEAD_DELTAS)
    # Our sample has the same quota.
    proposals = Proposals(boxes, boxes[:, 0], valid)
    own = jitted_roi_targets(KEY, proposals, gt, rois_per_image=128, config=RoiSamplingConfig())
    count = (np.asarray(own.labels) > 0).sum()
    compare("RoI targets", reference, f"image {image}, foreground count", count, inside.sum())
    assert own.valid.all()


@pytest.mark.parametrize("image", [0, 1])
def test_torchvisions_rois(image):
    expected = GOLDEN[f"tv_roi_labels{image}"]
    count = int(GOLDEN["num_gt"][image])
    rows = GOLDEN["gt"][image, :count]
    gt = padded(rows[:, :4], rows[:, 4])
    boxes = GOLDEN["rois"][image]
    candidates, labels, deltas = every_roi(boxes, np.arange(PROPOSALS) < len(expected) - count, gt)
    compare("RoI targets", "torchvision", f"image {image}, labels", labels, expected)
    overlaps = iou(candidates, gt.boxes)
    matches = jitted_match(overlaps, gt.valid, fg_iou=0.5, bg_iou=(0.0, 0.5), low_quality=False)
    # The reference has the index of the matched box only if an IoU reaches .5; otherwise 0.
    matched = np.where(matches.labels == 1, matches.matched_gt_indices, 0)
    compare("matching", "torchvision", f"image {image}, RoIs", matched, GOLDEN[f"tv_roi_matched{image}"])
    # We have no deltas for background, because they are never read.
    foreground = expected > 0
    theirs = GOLDEN[f"tv_roi_targets{image}"]
    name = f"image {image}, foreground deltas"
    compare("RoI targets", "torchvision", name, deltas[foreground], theirs[foreground], **HEAD_DELTAS)
    assert not deltas[~foreground].any()
