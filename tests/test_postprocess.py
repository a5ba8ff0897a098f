"""From the box head's outputs to the detections of one image."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from fasterrcnn_jax.config import PostprocessConfig
from fasterrcnn_jax.postprocess import postprocess
from fasterrcnn_jax.structures import Proposals

P, K, D = 60, 4, 100
IMAGE_HW = np.float32([80, 100])
CONFIG = PostprocessConfig(score_threshold=0.1, nms_threshold=0.5, max_detections=D)
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@jax.jit
def run(logits, deltas, proposals):
    return postprocess(
        logits, deltas, proposals, jnp.asarray(IMAGE_HW), box_weights=WEIGHTS, config=CONFIG
    )


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


def candidates(logits, deltas, proposals):
    """(box, score, label) of every class of every valid proposal above the threshold."""
    rows = []
    for i in np.flatnonzero(proposals.valid):
        probabilities = np.exp(logits[i]) / np.exp(logits[i]).sum()
        for label in range(1, K + 1):
            box = oracles.clip(oracles.decode(deltas[i, label], proposals.boxes[i], WEIGHTS), *IMAGE_HW)
            if probabilities[label] > CONFIG.score_threshold and box[2] > box[0] and box[3] > box[1]:
                rows.append((box, probabilities[label], label))
    return rows


def reference(*outputs, limit=D):
    """One NMS per class, then the best over all classes."""
    survivors = []
    rows = candidates(*outputs)
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


@pytest.mark.parametrize("seed", range(3))
def test_detections_equal_one_nms_per_class_then_the_best(seed):
    outputs = head_outputs(seed)
    expected = reference(*outputs)
    assert len({row[2] for row in expected}) == K
    assert 20 < len(expected) < len(candidates(*outputs))
    assert_detections(run(*outputs), expected)


def test_max_detections_keeps_the_best_over_all_classes():
    outputs = head_outputs(3)
    config = PostprocessConfig(score_threshold=0.1, nms_threshold=0.5, max_detections=7)
    limited = jax.jit(
        lambda *args: postprocess(*args, jnp.asarray(IMAGE_HW), box_weights=WEIGHTS, config=config)
    )
    assert_detections(limited(*outputs), reference(*outputs, limit=7))


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
def test_score_threshold_decides(probability, count):
    found = run(*one_proposal(probability))
    assert np.asarray(found.valid).sum() == count
    if count:
        assert found.labels[0] == 2 and found.scores[0] == pytest.approx(probability, rel=1e-4)
        np.testing.assert_allclose(found.boxes[0], [10, 10, 30, 40], atol=1e-4)


def test_padding_of_detections_is_zero():
    found = run(*one_proposal(0.9))
    for leaf in found:
        assert leaf.shape[0] == D
        assert not np.asarray(leaf)[1:].any()


def test_box_moved_out_of_the_picture_is_no_detection():
    logits, deltas, proposals = one_proposal(0.9)
    deltas[0, 2, 0] = -10 * 5  # five widths to the left
    assert not np.any(run(logits, deltas, proposals).valid)


def test_background_deltas_are_never_read():
    logits, deltas, proposals = head_outputs(5)
    clean = run(logits, deltas, proposals)
    deltas[:, 0] = np.nan
    for a, b in zip(clean, run(logits, deltas, proposals), strict=True):
        np.testing.assert_array_equal(a, b)
