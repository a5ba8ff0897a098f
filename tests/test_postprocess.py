"""From the box head's outputs to the detections of one image."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from fasterrcnn_jax.config import BoxCoderConfig, PostprocessConfig
from fasterrcnn_jax.ops import postprocessing
from fasterrcnn_jax.ops.postprocessing import postprocess
from fasterrcnn_jax.structures import Proposals

pytestmark = pytest.mark.usefixtures("quick_compilation")

P, K, D = 60, 4, 100
IMAGE_HW = np.float32([80, 100])
CONFIG = PostprocessConfig(score_threshold=0.1, nms_threshold=0.5, max_detections=D)
MEANS, STDS = (0.01, -0.02, 0.03, -0.04), (0.1, 0.1, 0.2, 0.2)
CAFFE = BoxCoderConfig(far_corner_offset=1, max_log_scale=None)

jitted_postprocess = functools.partial(jax.jit, static_argnames=("means", "stds", "coder", "config"))(postprocess)


def run(logits, deltas, proposals, *, means=MEANS, stds=STDS, coder=BoxCoderConfig(), config=CONFIG):
    return jitted_postprocess(logits, deltas, proposals, IMAGE_HW, means=means, stds=stds, coder=coder, config=config)


def head_outputs(seed):
    """Six clusters of proposals, a third of them padding."""
    generator = np.random.default_rng(seed)
    centre = generator.uniform(0, [100, 80], (6, 2))[generator.integers(0, 6, P)]
    half = generator.uniform(8, 20, (P, 2))
    boxes = np.concatenate([centre - half, centre + half], axis=1).clip(0, [100, 80] * 2)
    valid = np.arange(P) % 3 > 0
    boxes = np.where(valid[:, None], boxes, 0).astype(np.float32)
    logits = generator.normal(0, 1.5, (P, K + 1)).astype(np.float32)
    deltas = generator.normal(0, 1, (P, K + 1, 4)).astype(np.float32)
    return logits, deltas, Proposals(boxes, np.zeros(P, np.float32), valid)


def candidates(logits, deltas, proposals, coder=BoxCoderConfig()):
    """(box, score, label) of every class of every valid proposal above the threshold."""
    rows, offset = [], dict(far_corner_offset=coder.far_corner_offset)
    for i in np.flatnonzero(proposals.valid):
        probabilities = np.exp(logits[i]) / np.exp(logits[i]).sum()
        for label in range(1, K + 1):
            delta = deltas[i, label if deltas.shape[1] > 1 else 0]
            box = oracles.decode(delta, proposals.boxes[i], MEANS, STDS, max_log_scale=coder.max_log_scale, **offset)
            box = oracles.clip(box, *IMAGE_HW, **offset)
            if probabilities[label] > CONFIG.score_threshold and box[2] > box[0] and box[3] > box[1]:
                rows.append((box, probabilities[label], label))
    return rows


def reference(*outputs, limit=D, coder=BoxCoderConfig()):
    """One NMS per class, then the best over all classes."""
    survivors = []
    rows = candidates(*outputs, coder)
    for label in range(1, K + 1):
        of_class = [row for row in rows if row[2] == label]
        kept = oracles.greedy_nms(
            np.array([row[0] for row in of_class], np.float32),
            np.array([row[1] for row in of_class]),
            np.ones(len(of_class), bool),
            iou_threshold=CONFIG.nms_threshold,
        )
        survivors += [of_class[i] for i in kept]
    return sorted(survivors, key=lambda row: -row[1])[:limit]


def assert_detections(found, expected):
    valid = np.asarray(found.valid)
    assert valid.sum() == len(expected) and valid[: len(expected)].all()
    np.testing.assert_array_equal(np.asarray(found.labels)[valid], [row[2] for row in expected])
    np.testing.assert_allclose(np.asarray(found.scores)[valid], [row[1] for row in expected], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(found.boxes)[valid], [row[0] for row in expected], atol=1e-3)


@pytest.mark.parametrize("classes", [K + 1, 1])
@pytest.mark.parametrize("coder", [BoxCoderConfig(), CAFFE], ids=["plain", "caffe"])
@pytest.mark.parametrize("seed", range(3))
def test_detections_equal_one_nms_per_class_then_the_best(seed, coder, classes):
    """Tested with deltas per class and with one set of deltas for all classes."""
    logits, deltas, proposals = head_outputs(seed)
    outputs = logits, deltas[:, :classes], proposals
    expected = reference(*outputs, coder=coder)
    assert len({row[2] for row in expected}) == K
    assert 20 < len(expected) < len(candidates(*outputs))
    assert_detections(run(*outputs, coder=coder), expected)


def test_max_detections_keeps_the_best_over_all_classes():
    outputs = head_outputs(3)
    config = PostprocessConfig(score_threshold=0.1, nms_threshold=0.5, max_detections=7)
    assert_detections(run(*outputs, config=config), reference(*outputs, limit=7))


ZEROS = (0.0, 0.0, 0.0, 0.0)


def one_box_with(deltas, *, classes=K + 1, **options):
    """Returns the detected box of one proposal at [10, 10, 30, 40] of class 2."""
    logits, _, proposals = one_proposal(0.9)
    every = np.zeros((P, classes, 4), np.float32)
    every[0, min(2, classes - 1)] = deltas
    found = run(logits, every, proposals, **(dict(means=ZEROS) | options))
    assert found.labels.tolist()[:2] == [2, 0]
    return np.asarray(found.boxes)[0]


@pytest.mark.parametrize("classes", [K + 1, 1])
def test_means_and_stds_are_taken_out_of_the_deltas(classes):
    options = dict(classes=classes, means=(0.0, 0.1, 0.0, 0.0), stds=(0.5, 0.1, 0.2, 0.2))
    found = one_box_with([0.2, 0, 0, 0], **options)
    np.testing.assert_allclose(found, [12, 13, 32, 43], atol=1e-4)  # .2 * .5 of 20, .1 of 30


@pytest.mark.parametrize(
    "coder, expected",
    [
        (BoxCoderConfig(), [10, 10, 30, 40]),
        (BoxCoderConfig(far_corner_offset=1), [10, 10, 31, 41]),
    ],
)
def test_far_corner_offset_moves_the_far_corners_of_detections(coder, expected):
    np.testing.assert_allclose(one_box_with(ZEROS, coder=coder), expected, atol=1e-5)


@pytest.mark.parametrize("coder", [BoxCoderConfig(), CAFFE], ids=["plain", "caffe"])
def test_detections_end_at_the_image(coder):
    """The box moves to the right and down; half of its width and a third of its height remain inside the image."""
    found = one_box_with([40.0, 20.0, 0, 0], coder=coder)
    np.testing.assert_allclose(found, [90, 70, 100, 80], atol=1e-4)


def test_with_an_offset_a_box_beyond_the_image_keeps_one_border_pixel():
    """The box moves twenty widths to the left; inclusive corners clipped to [0, side - 1] always keep a pixel."""
    found = one_box_with([-200.0, 0, 0, 0], coder=CAFFE)
    np.testing.assert_allclose(found, [0, 10, 1, 41], atol=1e-4)


@pytest.mark.parametrize("limit, width", [(0.5, 20 * np.exp(0.5)), (None, 20 * np.exp(1.0))])
def test_log_scales_are_cut_to_the_coders_limit(limit, width):
    found = one_box_with([5.0, 0, 5.0, 0], coder=BoxCoderConfig(max_log_scale=limit))
    assert found[2] - found[0] == pytest.approx(width, rel=1e-5)


@pytest.mark.parametrize("nms_threshold, count", [(0.5, 1), (0.7, 2)])
def test_overlapping_boxes_are_suppressed_only_within_a_class(nms_threshold, count):
    """Two proposals with an IoU of .6 are both of class 2; the second is of class 3, too."""
    logits = np.full((P, K + 1), -1e3, np.float32)
    logits[0, 2], logits[1, 2], logits[1, 3] = 0.0, 0.0, -0.1
    boxes = np.zeros((P, 4), np.float32)
    boxes[:2] = [0, 0, 50, 10], [0, 0, 50, 6]
    proposals = Proposals(boxes, boxes[:, 0], np.arange(P) < 2)
    config = PostprocessConfig(score_threshold=0.1, nms_threshold=nms_threshold)
    found = run(logits, np.zeros((P, K + 1, 4), np.float32), proposals, means=ZEROS, config=config)
    labels = np.asarray(found.labels)[np.asarray(found.valid)].tolist()
    assert sorted(labels) == [2] * count + [3]


def test_invalid_proposals_never_appear():
    logits, deltas, proposals = head_outputs(4)
    clean = run(logits, deltas, proposals)
    logits[~proposals.valid], deltas[~proposals.valid] = [0, 50, 0, 0, 0], 3.0
    proposals.boxes[~proposals.valid] = [0, 0, 100, 80]
    dirty = run(logits, deltas, proposals)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


def one_proposal(probability):
    """Class 2 of one proposal at `probability`, the rest background."""
    logits = np.full((P, K + 1), -1e3, np.float32)
    logits[0, 0], logits[0, 2] = np.log(1 - probability), np.log(probability)
    boxes = np.zeros((P, 4), np.float32)
    boxes[0] = 10, 10, 30, 40
    return logits, np.zeros((P, K + 1, 4), np.float32), Proposals(boxes, boxes[:, 0], np.arange(P) < 1)


@pytest.mark.parametrize("probability, count", [(0.11, 1), (0.09, 0)])
def test_only_scores_above_the_threshold_are_detections(probability, count):
    found = run(*one_proposal(probability), means=ZEROS)
    assert np.asarray(found.valid).sum() == count
    if count:
        assert found.labels[0] == 2 and found.scores[0] == pytest.approx(probability, rel=1e-4)
        np.testing.assert_allclose(found.boxes[0], [10, 10, 30, 40], atol=1e-4)


def test_a_score_equal_to_the_threshold_is_not_a_detection():
    """py-faster-rcnn and faster-rcnn.pytorch keep scores above `thresh`. The softmax of two equal logits is 1/2."""
    config = dataclasses.replace(CONFIG, score_threshold=0.5)
    for logit, count in ((0.0, 0), (1e-6, 1)):
        logits, deltas, proposals = one_proposal(0.5)
        logits[0, [0, 2]] = 0.0, logit
        assert np.asarray(run(logits, deltas, proposals, config=config).valid).sum() == count


def test_padding_of_detections_is_zero():
    found = run(*one_proposal(0.9))
    for leaf in found:
        assert leaf.shape[0] == D
        assert not np.asarray(leaf)[1:].any()


def test_a_box_moved_out_of_the_image_is_not_a_detection():
    logits, deltas, proposals = one_proposal(0.9)
    deltas[0, 2, 0] = -10 * 5  # five widths to the left
    assert np.any(run(logits, 0 * deltas, proposals).valid)
    assert not np.any(run(logits, deltas, proposals).valid)


def test_background_deltas_are_never_read():
    logits, deltas, proposals = head_outputs(5)
    clean = run(logits, deltas, proposals)
    deltas[:, 0] = np.nan
    for a, b in zip(clean, run(logits, deltas, proposals), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("threshold", [0.05, 0.2])
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("soft", [None, "gaussian"])
def test_classes_that_cannot_reach_the_threshold_change_nothing(monkeypatch, threshold, agnostic, soft):
    """Of scores whose sum is 1, fewer than 1 / threshold are above the threshold."""
    generator = np.random.default_rng(0)
    _, _, proposals = head_outputs(0)
    classes = 45
    # Many scores of a region are equal, and as many as possible are just above the threshold.
    logits = generator.choice(np.float32([-9, 3, 3.1]), (P, classes + 1), p=(0.6, 0.3, 0.1))
    logits[:6, 1:] = -30.0
    logits[:6, 1 : int(1 / threshold)] = 2.0
    deltas = generator.normal(0, 1, (P, 1 if agnostic else classes + 1, 4)).astype(np.float32)
    config = dataclasses.replace(CONFIG, score_threshold=threshold, soft_nms=soft)

    def found():
        options = dict(means=MEANS, stds=STDS, coder=BoxCoderConfig(), config=config)
        return jax.jit(functools.partial(postprocess, **options))(logits, deltas, proposals, IMAGE_HW)

    few = found()
    sizes = []
    monkeypatch.setattr(postprocessing, "_most_above", lambda threshold: sizes.append(threshold) or 1000)
    for one, other in zip(few, found(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert sizes == [threshold] and few.valid.sum() > 5


def test_only_classes_that_can_reach_the_threshold_are_decoded():
    _, _, proposals = head_outputs(0)
    logits, deltas = np.zeros((P, 401), np.float32), np.zeros((P, 401, 4), np.float32)
    for threshold, boxes in ((0.1, 11 * P), (0.001, 400 * P), (1e-310, 400 * P), (0.0, 400 * P)):
        config = dataclasses.replace(CONFIG, score_threshold=threshold)
        options = dict(means=MEANS, stds=STDS, coder=BoxCoderConfig(), config=config)
        given = jax.tree.map(jnp.asarray, (logits, deltas, proposals, IMAGE_HW))
        program = str(jax.make_jaxpr(functools.partial(postprocess, **options))(*given))
        assert f"f32[{boxes},4]" in program and (f"f32[{400 * P},4]" in program) == (boxes == 400 * P)
