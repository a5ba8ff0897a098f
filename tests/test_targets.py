"""What the two stages are trained towards."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import arrays

from fasterrcnn_jax.anchors import cell_anchors, grid_anchors
from fasterrcnn_jax.config import RoiSamplingConfig, RpnConfig
from fasterrcnn_jax.structures import GroundTruth, Proposals
from fasterrcnn_jax.targets import anchor_targets, roi_targets

GOLDEN = np.load(Path(__file__).parent / "golden" / "targets.npz")
# Ratios with whole sides: intersections over union are exact, ties are ties.
ANCHORS = grid_anchors(cell_anchors((16, 32), (0.25, 1, 4)), (3, 4), 16)
A, G, P = len(ANCHORS), 3, 10

EVERY_ANCHOR = RpnConfig(anchors_per_image=A, fg_fraction=1.0)
SOME_ANCHORS = RpnConfig(anchors_per_image=12, fg_fraction=0.5, fg_iou=0.4)
EVERY_ROI = RoiSamplingConfig(rois_per_image=P + G, fg_fraction=1.0)
SOME_ROIS = RoiSamplingConfig(rois_per_image=6, fg_fraction=0.5)


@jax.jit
def every_anchor(key, valid, gt):
    return anchor_targets(key, jnp.asarray(ANCHORS), valid, gt, config=EVERY_ANCHOR)


@jax.jit
def some_anchors(key, valid, gt):
    return anchor_targets(key, jnp.asarray(ANCHORS), valid, gt, config=SOME_ANCHORS)


@jax.jit
def every_roi(key, proposals, gt):
    return roi_targets(key, proposals, gt, config=EVERY_ROI)


@jax.jit
def some_rois(key, proposals, gt):
    return roi_targets(key, proposals, gt, config=SOME_ROIS)


def corners(n):
    points = arrays(np.int32, (n, 2, 2), elements=st.integers(0, 15))
    return points.map(lambda p: (4 * np.sort(p, axis=1)).reshape(n, 4).astype(np.float32))


@st.composite
def ground_truths(draw):
    """Boxes of positive area in any of the slots; zeros in the others."""
    boxes = draw(corners(G))
    valid = draw(arrays(bool, G)) & (oracles.area(boxes) > 0)
    labels = draw(arrays(np.int32, G, elements=st.integers(1, 5)))
    return GroundTruth(np.where(valid[:, None], boxes, np.float32(0)), np.where(valid, labels, 0), valid)


@st.composite
def all_proposals(draw):
    valid = draw(arrays(bool, P))
    coarse = arrays(np.int32, (P, 2, 2), elements=st.integers(0, 4))  # many meet a ground truth
    boxes = np.sort(12.0 * draw(coarse), axis=1).reshape(P, 4).astype(np.float32)
    boxes = np.where(valid[:, None], boxes, np.float32(0))
    return Proposals(boxes, np.zeros(P, np.float32), valid)


def padded(gt, slots):
    return GroundTruth(
        *(np.concatenate([x, np.zeros((slots, *x.shape[1:]), x.dtype)]) for x in gt)
    )


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


KEY = jax.random.key(0)


@given(ground_truths(), arrays(bool, A))
def test_anchor_targets_equal_the_loop(gt, anchor_valid):
    found = every_anchor(KEY, anchor_valid, gt)
    iou = np.where(anchor_valid[:, None], oracles.iou_matrix(ANCHORS, gt.boxes), np.float32(0))
    indices, labels = oracles.match(iou, gt.valid, fg_iou=0.7, bg_iou=(0, 0.3), low_quality=True)
    labels = np.where(anchor_valid, labels, -1)
    np.testing.assert_array_equal(found.labels, labels)
    expected = np.zeros((A, 4))
    for i in np.flatnonzero(labels == 1):
        expected[i] = oracles.encode(gt.boxes[indices[i]], ANCHORS[i])
    np.testing.assert_allclose(found.deltas, expected, atol=1e-5)


@given(ground_truths())
def test_sampled_anchors_keep_the_label_they_have_without_sampling(gt):
    """With a low foreground threshold, so that the quota is exceeded now and then."""
    everything = RpnConfig(anchors_per_image=A, fg_fraction=1.0, fg_iou=SOME_ANCHORS.fg_iou)
    iou = oracles.iou_matrix(ANCHORS, gt.boxes)
    _, labels = oracles.match(
        iou, gt.valid, fg_iou=everything.fg_iou, bg_iou=(0, 0.3), low_quality=True
    )
    found = np.asarray(some_anchors(KEY, np.ones(A, bool), gt).labels)
    np.testing.assert_array_equal(found[found >= 0], np.array(labels)[found >= 0])
    foreground = min(labels.count(1), 6)
    assert (found == 1).sum() == foreground
    assert (found == 0).sum() == min(labels.count(0), 12 - foreground)


@given(ground_truths(), arrays(bool, A))
def test_anchor_targets_ignore_appended_padding(gt, anchor_valid):
    for run in (every_anchor, some_anchors):
        assert_same(run(KEY, anchor_valid, gt), run(KEY, anchor_valid, padded(gt, 4)))


@given(all_proposals(), ground_truths())
def test_roi_targets_ignore_appended_padding(proposals, gt):
    assert_same(some_rois(KEY, proposals, gt), some_rois(KEY, proposals, padded(gt, 4)))


@given(all_proposals(), ground_truths())
def test_roi_targets_equal_the_loop(proposals, gt):
    found = every_roi(KEY, proposals, gt)
    boxes = np.concatenate([proposals.boxes, gt.boxes])
    iou = oracles.iou_matrix(boxes, gt.boxes)
    indices, labels = oracles.match(iou, gt.valid, fg_iou=0.5, bg_iou=(0, 0.5), low_quality=False)
    expected = []
    for i in np.flatnonzero(np.concatenate([proposals.valid, gt.valid])):
        box, matched = boxes[i], indices[i]
        foreground = labels[i] == 1
        label = gt.labels[matched] if foreground else 0
        deltas = oracles.encode(gt.boxes[matched], box, (10, 10, 5, 5)) if foreground else np.zeros(4)
        expected.append([*box, label, *deltas])
    valid = np.asarray(found.valid)
    rows = np.column_stack([found.boxes, found.labels, found.deltas])
    order = np.lexsort(rows[valid].T[::-1])
    expected = np.array(expected).reshape(-1, 9)
    np.testing.assert_allclose(
        rows[valid][order], expected[np.lexsort(expected.T[::-1])], atol=1e-4
    )
    assert not rows[~valid].any()


@given(all_proposals(), ground_truths())
def test_ground_truth_is_among_the_rois(proposals, gt):
    found = every_roi(KEY, proposals, gt)
    for box in gt.boxes[gt.valid]:
        same = (np.asarray(found.boxes) == box).all(axis=1) & np.asarray(found.valid)
        assert same.any()
        assert (np.asarray(found.labels)[same] > 0).all()
        np.testing.assert_array_equal(np.asarray(found.deltas)[same], 0)


@given(all_proposals(), ground_truths(), st.integers(0, 9))
def test_sampled_rois_meet_their_quota(proposals, gt, seed):
    found = some_rois(jax.random.key(seed), proposals, gt)
    everything = every_roi(KEY, proposals, gt)
    foreground = int((np.asarray(everything.labels) > 0).sum())
    background = int((np.asarray(everything.labels)[np.asarray(everything.valid)] == 0).sum())
    assert (np.asarray(found.labels) > 0).sum() == min(foreground, 3)
    assert np.asarray(found.valid).sum() == min(foreground, 3) + min(background, 6 - min(foreground, 3))


@given(all_proposals(), arrays(bool, A))
def test_without_ground_truth_all_is_background_and_finite(proposals, anchor_valid):
    nothing = GroundTruth(np.zeros((G, 4), np.float32), np.zeros(G, np.int32), np.zeros(G, bool))
    anchors = every_anchor(KEY, anchor_valid, nothing)
    rois = every_roi(KEY, proposals, nothing)
    np.testing.assert_array_equal(anchors.labels, np.where(anchor_valid, 0, -1))
    assert not np.any(rois.labels) and np.asarray(rois.valid).sum() == proposals.valid.sum()
    assert not np.any(anchors.deltas) and not np.any(rois.deltas)


def test_raised_background_threshold_leaves_far_proposals_out():
    gt = GroundTruth(jnp.array([[0.0, 0, 10, 10]]), jnp.array([3]), jnp.array([True]))
    boxes = jnp.array([[0.0, 0, 10, 9], [0, 0, 10, 3], [50, 50, 60, 60]])
    config = RoiSamplingConfig(rois_per_image=4, fg_fraction=1.0, bg_iou=(0.1, 0.5))
    proposals = Proposals(boxes, jnp.zeros(3), jnp.ones(3, bool))
    found = jax.jit(lambda *args: roi_targets(*args, config=config))(KEY, proposals, gt)
    assert sorted(found.labels[found.valid].tolist()) == [0, 3, 3]


@pytest.mark.parametrize("image", [0, 1])
def test_roi_targets_equal_torchvision(image):
    expected_labels = GOLDEN[f"roi_labels_{image}"]
    count, num_gt = len(expected_labels), int(GOLDEN["num_gt"][image])
    boxes = GOLDEN["rois"][image, : count - num_gt]
    gt = GOLDEN["gt"][image, :num_gt]
    config = RoiSamplingConfig(rois_per_image=count, fg_fraction=1.0)
    found = jax.jit(lambda *args: roi_targets(*args, config=config))(
        KEY,
        Proposals(boxes, np.zeros(len(boxes), np.float32), np.ones(len(boxes), bool)),
        GroundTruth(gt[:, :4], gt[:, 4].astype(np.int32), np.ones(num_gt, bool)),
    )
    assert found.valid.all()
    rows = {tuple(box): i for i, box in enumerate(np.concatenate([boxes, gt[:, :4]]).tolist())}
    order = [rows[tuple(box)] for box in found.boxes.tolist()]
    np.testing.assert_array_equal(found.labels, expected_labels[order])
    expected = np.where(expected_labels[:, None] > 0, GOLDEN[f"roi_targets_{image}"], 0)[order]
    np.testing.assert_allclose(found.deltas, expected, rtol=1e-4, atol=1e-4)
