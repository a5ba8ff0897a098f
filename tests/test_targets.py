"""The training targets of the two stages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import arrays

from fasterrcnn_jax.config import LossConfig, RoiSamplingConfig, RpnConfig
from fasterrcnn_jax.ops.anchors import cell_anchors, grid_anchors
from fasterrcnn_jax.ops.losses import box_losses
from fasterrcnn_jax.ops.targets import anchor_targets, roi_targets
from fasterrcnn_jax.structures import GroundTruth, Proposals

# Ratios with whole sides: IoUs are exact, so ties are exact too.
ANCHORS = grid_anchors(cell_anchors(16.0, (1.0, 2.0), (0.25, 1.0, 4.0), rounding="none"), (3, 4), (16, 16))
A, G, P = len(ANCHORS), 3, 10
# Smaller than the 48 x 64 of the grid: some anchors reach over each border.
IMAGE_HW = np.float32([44, 60])

EVERY_ANCHOR = RpnConfig(anchors_per_image=A, fg_fraction=1.0, allowed_border=None)
SOME_ANCHORS = RpnConfig(anchors_per_image=12, fg_fraction=0.5, fg_iou=0.4, allowed_border=None)
EVERY_ROI = RoiSamplingConfig(fg_fraction=1.0)
SOME_ROIS = RoiSamplingConfig(fg_fraction=0.5)


jitted_anchor_targets = functools.partial(jax.jit, static_argnames="config")(anchor_targets)


def run_anchors(key, valid, gt, *, config):
    return jitted_anchor_targets(key, ANCHORS, valid, IMAGE_HW, gt, config=config)


every_anchor = functools.partial(run_anchors, config=EVERY_ANCHOR)
some_anchors = functools.partial(run_anchors, config=SOME_ANCHORS)

run_rois = functools.partial(jax.jit, static_argnames=("rois_per_image", "config"))(roi_targets)
every_roi = functools.partial(run_rois, rois_per_image=P + G, config=EVERY_ROI)
some_rois = functools.partial(run_rois, rois_per_image=6, config=SOME_ROIS)


def corners(n):
    points = arrays(np.int32, (n, 2, 2), elements=st.integers(0, 15))
    return points.map(lambda p: (4 * np.sort(p, axis=1)).reshape(n, 4).astype(np.float32))


@st.composite
def ground_truths(draw):
    """Returns boxes of positive area in any of the slots and zeros in the other slots."""
    boxes = draw(corners(G))
    valid = draw(arrays(bool, G)) & (oracles.area(boxes) > 0)
    labels = draw(arrays(np.int32, G, elements=st.integers(1, 5)))
    return GroundTruth(np.where(valid[:, None], boxes, np.float32(0)), np.where(valid, labels, 0), valid)


@st.composite
def all_proposals(draw):
    valid = draw(arrays(bool, P))
    coarse = arrays(np.int32, (P, 2, 2), elements=st.integers(0, 4))  # many overlap a ground-truth box
    boxes = np.sort(12.0 * draw(coarse), axis=1).reshape(P, 4).astype(np.float32)
    boxes = np.where(valid[:, None], boxes, np.float32(0))
    return Proposals(boxes, np.zeros(P, np.float32), valid)


def padded(gt, slots):
    return GroundTruth(*(np.concatenate([x, np.zeros((slots, *x.shape[1:]), x.dtype)]) for x in gt))


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


KEY = jax.random.key(0)


@pytest.mark.parametrize("allowed_border", [None, 0.0, 6.0])
@pytest.mark.parametrize("clobber_positives", [False, True])
@given(ground_truths(), arrays(bool, A))
def test_anchor_targets_equal_the_loop(allowed_border, clobber_positives, gt, anchor_valid):
    options = dict(allowed_border=allowed_border, clobber_positives=clobber_positives)
    found = run_anchors(KEY, anchor_valid, gt, config=dataclasses.replace(EVERY_ANCHOR, **options))
    within = [oracles.within_border(anchor, *IMAGE_HW, allowed_border) for anchor in ANCHORS]
    usable = anchor_valid & np.array(within)
    iou = np.where(usable[:, None], oracles.iou_matrix(ANCHORS, gt.boxes), np.float32(0))
    indices, labels = oracles.match(
        iou, gt.valid, fg_iou=0.7, bg_iou=(0, 0.3), low_quality=True, clobber_positives=clobber_positives
    )
    labels = np.where(usable, labels, -1)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.foreground, labels == 1)
    expected = np.zeros((A, 4))
    for i in np.flatnonzero(labels == 1):
        expected[i] = oracles.encode(gt.boxes[indices[i]], ANCHORS[i])
    np.testing.assert_allclose(found.deltas, expected, atol=1e-5)


@given(ground_truths())
def test_sampled_anchors_keep_the_label_they_have_without_sampling(gt):
    """The foreground threshold is low, so that foreground sometimes exceeds the quota."""
    iou = oracles.iou_matrix(ANCHORS, gt.boxes)
    _, labels = oracles.match(iou, gt.valid, fg_iou=SOME_ANCHORS.fg_iou, bg_iou=(0, 0.3), low_quality=True)
    targets = some_anchors(KEY, np.ones(A, bool), gt)
    found = np.asarray(targets.labels)
    # Foreground before sampling is still reported, with its deltas.
    np.testing.assert_array_equal(targets.foreground, np.array(labels) == 1)
    everything = run_anchors(
        KEY, np.ones(A, bool), gt, config=dataclasses.replace(EVERY_ANCHOR, fg_iou=SOME_ANCHORS.fg_iou)
    )
    np.testing.assert_array_equal(targets.deltas, everything.deltas)
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
        stds = (0.1, 0.1, 0.2, 0.2)
        deltas = oracles.encode(gt.boxes[matched], box, stds=stds) if foreground else np.zeros(4)
        expected.append([*box, label, *deltas])
    valid = np.asarray(found.valid)
    rows = np.column_stack([found.boxes, found.labels, found.deltas])
    order = np.lexsort(rows[valid].T[::-1])
    expected = np.array(expected).reshape(-1, 9)
    np.testing.assert_allclose(rows[valid][order], expected[np.lexsort(expected.T[::-1])], atol=1e-4)
    assert not rows[~valid].any()


@given(all_proposals(), ground_truths())
def test_ground_truth_is_among_the_rois(proposals, gt):
    found = every_roi(KEY, proposals, gt)
    for box in gt.boxes[gt.valid]:
        same = (np.asarray(found.boxes) == box).all(axis=1) & np.asarray(found.valid)
        assert same.any()
        assert (np.asarray(found.labels)[same] > 0).all()
        np.testing.assert_array_equal(np.asarray(found.deltas)[same], 0)


@given(all_proposals(), ground_truths())
def test_without_added_ground_truth_every_roi_is_a_proposal(proposals, gt):
    """The proposals have the same labels and targets as with the ground truth among them."""
    config = RoiSamplingConfig(fg_fraction=1.0, add_ground_truth=False)
    found = run_rois(KEY, proposals, gt, rois_per_image=len(proposals.boxes), config=config)
    with_objects = every_roi(KEY, proposals, gt)
    rows, more = (
        np.column_stack([rois.boxes, rois.labels, rois.deltas])[np.asarray(rois.valid)]
        for rois in (found, with_objects)
    )
    assert len(rows) == proposals.valid.sum() and len(more) == len(rows) + gt.valid.sum()
    assert {tuple(row) for row in rows[:, :4]} == {tuple(box) for box in proposals.boxes[proposals.valid]}
    # The nearest row is the same one, up to rounding: the two programs differ.
    apart = np.abs(rows[:, None] - more[None]).max(axis=2)
    assert (apart.min(axis=1, initial=np.inf) <= 1e-5).all()


@given(all_proposals(), ground_truths(), st.integers(0, 9))
def test_sampled_rois_meet_their_quota(proposals, gt, seed):
    """At most half of six RoIs are foreground; all of them may be if there is no background."""
    found = some_rois(jax.random.key(seed), proposals, gt)
    everything = every_roi(KEY, proposals, gt)
    foreground = int((np.asarray(everything.labels) > 0).sum())
    background = int((np.asarray(everything.labels)[np.asarray(everything.valid)] == 0).sum())
    limit = 3 if background else 6
    assert (np.asarray(found.labels) > 0).sum() == min(foreground, limit)
    assert np.asarray(found.valid).sum() == min(foreground, limit) + min(background, 6 - min(foreground, limit))


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
    config = RoiSamplingConfig(fg_fraction=1.0, bg_iou=(0.1, 0.5))
    proposals = Proposals(boxes, jnp.zeros(3), jnp.ones(3, bool))
    found = run_rois(KEY, proposals, gt, rois_per_image=4, config=config)
    assert sorted(found.labels[found.valid].tolist()) == [0, 3, 3]


def one_box(box, label=3, slots=1):
    boxes = np.zeros((slots, 4), np.float32)
    boxes[0] = box
    valid = np.arange(slots) < 1
    return GroundTruth(boxes, np.where(valid, label, 0).astype(np.int32), valid)


# Along the left border of the image: the first reaches 6 pixels over it, the second touches it. Both lie
# within the others' borders.
BORDER_ANCHORS = np.float32([[-6, 10, 10, 26], [0, 10, 16, 26], [20, 10, 36, 26]])


@pytest.mark.parametrize(
    "allowed_border, labels",
    [
        # The box equals the first anchor. If that anchor is left out, the second one is the best.
        (0.0, [-1, 1, 0]),
        (5.9, [-1, 1, 0]),
        # If it is allowed, it takes part, and the second (IoU .45) is neither the best nor background.
        (6.0, [1, -1, 0]),
        (None, [1, -1, 0]),
    ],
)
@pytest.mark.parametrize("side", ["left", "top", "right", "bottom"])
def test_allowed_border_decides_which_anchors_take_part(allowed_border, labels, side):
    image_hw = np.float32([100, 100])

    def turned(boxes):
        boxes = boxes if side in ("left", "right") else boxes[:, [1, 0, 3, 2]]
        return boxes if side in ("left", "top") else (100 - boxes)[:, [2, 3, 0, 1]]

    config = RpnConfig(allowed_border=allowed_border, anchors_per_image=3, fg_fraction=1.0)
    gt = one_box(turned(BORDER_ANCHORS[:1])[0])
    anchors = turned(BORDER_ANCHORS)
    found = jitted_anchor_targets(KEY, anchors, np.ones(3, bool), image_hw, gt, config=config)
    assert found.labels.tolist() == labels


@pytest.mark.parametrize("clobber_positives, label", [(False, 1), (True, 0)])
def test_all_anchors_that_tie_for_a_box_are_foreground_unless_clobbered(clobber_positives, label):
    """The box is small and in the middle of the image, so the IoU of every anchor is far below the thresholds."""
    box = np.float32([30, 22, 34, 26])
    found = run_anchors(
        KEY,
        np.ones(A, bool),
        one_box(box),
        config=dataclasses.replace(EVERY_ANCHOR, clobber_positives=clobber_positives),
    )
    iou = oracles.iou_matrix(ANCHORS, box[None])[:, 0]
    ties = iou == iou.max()
    assert ties.sum() > 1 and iou.max() < 0.3
    assert (np.asarray(found.labels)[ties] == label).all()
    assert (np.asarray(found.labels)[~ties] == 0).all()


def test_the_default_sample_is_256_with_at_most_half_foreground():
    """There are 200 copies of the box and 400 anchors away from it."""
    anchors = np.repeat(np.float32([[10, 10, 50, 50], [60, 60, 90, 90]]), [200, 400], axis=0)
    image_hw, gt = np.float32([100, 100]), one_box([10, 10, 50, 50])
    for count in (600, 250, 220):
        valid = np.arange(600) < count
        found = jitted_anchor_targets(KEY, anchors, valid, image_hw, gt, config=RpnConfig())
        labels = np.asarray(found.labels)
        assert (labels == 1).sum() == 128
        assert (labels == 0).sum() == min(count - 200, 128)
        assert np.asarray(found.foreground).sum() == 200


@given(ground_truths(), arrays(bool, A), st.permutations(range(G)), st.integers(0, 9))
def test_anchor_labels_do_not_depend_on_the_slots_of_the_ground_truth(gt, anchor_valid, order, seed):
    """Only labels are compared: deltas may differ if two boxes tie for an anchor."""
    key, order = jax.random.key(seed), np.array(order)
    moved = GroundTruth(*(leaf[order] for leaf in gt))
    for run in (every_anchor, some_anchors):
        one, other = run(key, anchor_valid, gt), run(key, anchor_valid, moved)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.foreground, other.foreground)


@given(all_proposals(), ground_truths(), arrays(np.float32, (P + G, 4), elements=st.floats(0, 60, width=32)))
def test_targets_do_not_read_what_padding_holds(proposals, gt, garbage):
    dirty_gt = gt._replace(boxes=np.where(gt.valid[:, None], gt.boxes, garbage[P:]))
    dirty = proposals._replace(boxes=np.where(proposals.valid[:, None], proposals.boxes, garbage[:P]))
    assert_same(some_rois(KEY, proposals, gt), some_rois(KEY, dirty, dirty_gt))
    anchor_valid = np.ones(A, bool)
    assert_same(some_anchors(KEY, anchor_valid, gt), some_anchors(KEY, anchor_valid, dirty_gt))


@given(ground_truths(), arrays(bool, A))
def test_anchor_targets_do_not_depend_on_where_padding_lies(gt, anchor_valid):
    """The valid boxes are moved to the front, in their order."""
    order = np.argsort(~gt.valid, kind="stable")
    dense = GroundTruth(*(leaf[order] for leaf in gt))
    for run in (every_anchor, some_anchors):
        assert_same(run(KEY, anchor_valid, gt), run(KEY, anchor_valid, dense))


def proposals_at(*boxes):
    boxes = np.float32(boxes)
    return Proposals(boxes, np.zeros(len(boxes), np.float32), np.ones(len(boxes), bool))


def test_without_background_all_rois_may_be_foreground():
    """The limit is a quarter of eight; all candidates, including the ground truth, equal the ground-truth box."""
    box = [10, 10, 50, 50]
    found = run_rois(KEY, proposals_at(*[box] * 9), one_box(box), rois_per_image=8, config=RoiSamplingConfig())
    assert found.labels.tolist() == [3] * 8 and found.valid.all()


def test_with_one_background_the_limit_on_foreground_holds():
    box = [10, 10, 50, 50]
    proposals = proposals_at(*[box] * 9, [60, 60, 90, 90])
    found = run_rois(KEY, proposals, one_box(box), rois_per_image=8, config=RoiSamplingConfig())
    assert found.labels[found.valid].tolist() == [3, 3, 0]
    # The other slots are padding, although more foreground is available.
    for leaf in found:
        assert leaf.shape[0] == 8 and not np.asarray(leaf)[3:].any()


def test_without_foreground_all_rois_are_background():
    """Without ground truth, no box is added to the proposals."""
    nothing = GroundTruth(np.zeros((2, 4), np.float32), np.zeros(2, np.int32), np.zeros(2, bool))
    proposals = proposals_at(*[[10, 10, 50, 50]] * 9)
    found = run_rois(KEY, proposals, nothing, rois_per_image=8, config=RoiSamplingConfig())
    assert found.labels.tolist() == [0] * 8 and found.valid.all()


@jax.jit
def box_losses_and_gradients(outputs, targets):
    """Returns box losses and gradients for logits and deltas that are all equal."""

    def losses(outputs):
        deltas = jnp.broadcast_to(outputs[:, :, None], (*outputs.shape, 4))
        found = box_losses(outputs, deltas, targets, config=LossConfig())
        return found.classification, found.box

    gradients = jax.jacrev(lambda outputs: [mean.sum for mean in losses(outputs)])(outputs)
    return losses(outputs), gradients


@pytest.mark.parametrize("bg_iou", [(0.0, 0.5), (0.1, 0.5)])
def test_without_foreground_and_background_the_sample_is_empty_and_costs_nothing(bg_iou):
    """There is no ground truth, and no proposal reaches the lower limit of background or none exists."""
    nothing = GroundTruth(np.zeros((2, 4), np.float32), np.zeros(2, np.int32), np.zeros(2, bool))
    proposals = proposals_at(*[[10, 10, 50, 50]] * 9)
    if bg_iou[0] == 0.0:
        proposals = proposals._replace(valid=np.zeros(9, bool))
    found = run_rois(KEY, proposals, nothing, rois_per_image=8, config=RoiSamplingConfig(bg_iou=bg_iou))
    for leaf in found:
        assert leaf.shape[0] == 8 and not np.any(leaf)

    (classes, boxes), gradients = box_losses_and_gradients(np.ones((8, 5), np.float32), found)
    assert classes == boxes == (0, 0)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("low, labels", [(0.0, [0, 0, 0, 3, 3]), (0.1, [0, 0, 3, 3])])
def test_background_starts_at_its_lower_limit(low, labels):
    """IoUs of exactly .1 (which float32 rounds up), .05, .2 and 1."""
    proposals = proposals_at([0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 20], [0, 0, 10, 100])
    config = RoiSamplingConfig(fg_fraction=1.0, bg_iou=(low, 0.5))
    found = run_rois(KEY, proposals, one_box([0, 0, 10, 100]), rois_per_image=5, config=config)
    assert sorted(found.labels[found.valid].tolist()) == labels


def test_box_means_and_stds_normalise_the_targets():
    means, stds = (0.1, -0.2, 0.3, -0.4), (0.5, 0.25, 0.2, 0.1)
    box, proposal = np.float32([12, 10, 52, 60]), np.float32([10, 14, 50, 58])
    config = RoiSamplingConfig(fg_fraction=1.0, box_means=means, box_stds=stds)
    found = run_rois(KEY, proposals_at(proposal), one_box(box), rois_per_image=2, config=config)
    for roi, deltas in zip(np.asarray(found.boxes), np.asarray(found.deltas)):
        np.testing.assert_allclose(deltas, oracles.encode(box, roi, means, stds), atol=1e-5)
    assert {tuple(roi) for roi in np.asarray(found.boxes).tolist()} == {tuple(box), tuple(proposal)}


def test_a_raised_foreground_threshold_leaves_a_gap_that_no_roi_is_drawn_from():
    """IoU .6 is neither foreground at .7 nor background below .5."""
    proposals = proposals_at([0, 0, 10, 60], [0, 0, 10, 40])
    config = RoiSamplingConfig(fg_fraction=1.0, fg_iou=0.7, bg_iou=(0.0, 0.5))
    found = run_rois(KEY, proposals, one_box([0, 0, 10, 100]), rois_per_image=3, config=config)
    assert sorted(found.labels[found.valid].tolist()) == [0, 3]
