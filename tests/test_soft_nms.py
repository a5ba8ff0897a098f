"""Soft-NMS: comparison with the loop of the paper, the two rules by hand, and its place in the postprocessing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from fasterrcnn_jax.config import BoxCoderConfig, PostprocessConfig
from fasterrcnn_jax.ops.postprocessing import postprocess
from fasterrcnn_jax.ops.suppression import soft_nms
from fasterrcnn_jax.structures import Proposals

STATIC = ("kind", "iou_threshold", "sigma", "score_threshold", "max_output")
jitted = jax.jit(soft_nms, static_argnames=STATIC)
KINDS = ("linear", "gaussian")


def run(boxes, scores, valid=None, groups=None, **options):
    count = len(boxes)
    valid = np.ones(count, bool) if valid is None else valid
    groups = np.zeros(count, np.int32) if groups is None else groups
    defaults = dict(kind="gaussian", iou_threshold=0.3, sigma=0.5, score_threshold=0.01, max_output=8)
    index, score, is_kept = jitted(np.float32(boxes), np.float32(scores), valid, groups=groups, **(defaults | options))
    assert not np.asarray(score)[~np.asarray(is_kept)].any() and not np.asarray(index)[~np.asarray(is_kept)].any()
    return np.asarray(index)[np.asarray(is_kept)].tolist(), np.asarray(score)[np.asarray(is_kept)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_loop_of_the_paper(kind, seed):
    generator = np.random.default_rng(seed)
    centre = generator.uniform(20, 80, (4, 2))[generator.integers(0, 4, 60)]
    half = generator.uniform(8, 20, (60, 2))
    boxes = np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)
    scores = generator.permutation(60).astype(np.float32) / 60
    valid, groups = generator.random(60) < 0.8, generator.integers(0, 3, 60).astype(np.int32)
    options = dict(kind=kind, iou_threshold=0.3, sigma=0.4, score_threshold=0.05, max_output=30)
    want = oracles.soft_nms(boxes, scores, valid, groups=groups, **options)
    indices, found = run(boxes, scores, valid, groups, **options)
    assert len(want) >= 20 and indices == [index for index, _ in want]
    np.testing.assert_allclose(found, [score for _, score in want], rtol=1e-5)


PAIR = [[0, 0, 10, 10], [0, 0, 10, 6]]  # IoU .6


@pytest.mark.parametrize(
    "options, second",
    [
        (dict(kind="linear"), 0.8 * 0.4),
        (dict(kind="linear", iou_threshold=0.65), 0.8),
        (dict(kind="gaussian"), 0.8 * np.exp(-0.36 / 0.5)),
        (dict(kind="gaussian", sigma=2.0), 0.8 * np.exp(-0.36 / 2.0)),
    ],
)
def test_the_second_of_two_boxes_keeps_part_of_its_score(options, second):
    indices, scores = run(PAIR, [0.9, 0.8], **options)
    assert indices == [0, 1]
    np.testing.assert_allclose(scores, [0.9, second], rtol=1e-5)


def test_a_box_that_falls_to_the_threshold_is_dropped():
    assert run(PAIR, [0.9, 0.5], kind="linear", score_threshold=0.3)[0] == [0]


def test_boxes_of_another_group_keep_their_score():
    np.testing.assert_allclose(run(PAIR, [0.9, 0.8], groups=np.int32([1, 2]))[1], [0.9, 0.8], rtol=1e-6)


def test_the_best_after_all_changes_are_returned():
    """The second box falls behind the third, which overlaps nothing."""
    indices, _ = run([*PAIR, [50, 50, 60, 60]], [0.9, 0.8, 0.5], kind="linear", max_output=2)
    assert indices == [0, 2]


def test_equal_scores_are_taken_by_ascending_index_and_identical_boxes_do_not_disturb():
    boxes = [[0, 0, 10, 10], [30, 30, 40, 40], [0, 0, 10, 10]]
    assert run(boxes, [0.5, 0.5, 0.5], kind="linear")[0] == [0, 1]  # the third falls to 0
    assert run(boxes[:0] or np.zeros((0, 4)), [])[0] == []


@pytest.mark.parametrize(
    "options, message",
    [(dict(iou_threshold=0.0), "iou_threshold"), (dict(sigma=0.0), "sigma"), (dict(max_output=0), "max_output")],
)
def test_values_out_of_range_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        run(PAIR, [0.9, 0.8], **options)
    with pytest.raises(TypeError, match="float32"):
        soft_nms(
            jnp.zeros((1, 4), jnp.float16),
            jnp.ones(1),
            jnp.ones(1, bool),
            kind="linear",
            iou_threshold=0.5,
            sigma=0.5,
            score_threshold=0.0,
            max_output=1,
            groups=jnp.zeros(1, jnp.int32),
        )


@functools.partial(jax.jit, static_argnames="config")
def detections(logits, proposals, config):
    return postprocess(
        logits,
        jnp.zeros((len(logits), 1, 4)),
        proposals,
        jnp.array([80.0, 100.0]),
        means=(0.0,) * 4,
        stds=(1.0,) * 4,
        coder=BoxCoderConfig(),
        config=config,
    )


@pytest.mark.parametrize("kind, sigma, factor", [("linear", 0.5, 0.4), ("gaussian", 0.3, np.exp(-0.36 / 0.3))])
def test_the_postprocessing_lowers_scores_within_a_class_in_place_of_nms(kind, sigma, factor):
    """Two proposals with an IoU of .6, both of class 1 and, weaker, of class 2."""
    boxes = np.float32([[0, 0, 50, 10], [0, 0, 50, 6]])
    proposals = Proposals(boxes, boxes[:, 0], np.ones(2, bool))
    probabilities = np.float32([[0.1, 0.6, 0.3], [0.6, 0.3, 0.1]])
    config = PostprocessConfig(soft_nms=kind, soft_nms_sigma=sigma, score_threshold=0.01, max_detections=5)
    found = detections(np.log(probabilities), proposals, config)
    valid = np.asarray(found.valid)
    assert valid.tolist() == [True] * 4 + [False]
    rows = sorted(zip(np.asarray(found.labels)[valid].tolist(), np.asarray(found.scores)[valid].tolist()))
    want = [(1, 0.3 * factor), (1, 0.6), (2, 0.1 * factor), (2, 0.3)]
    assert [label for label, _ in rows] == [label for label, _ in want]
    np.testing.assert_allclose([score for _, score in rows], [score for _, score in want], rtol=1e-5)
    assert np.asarray(found.scores)[valid].tolist() == sorted(np.asarray(found.scores)[valid].tolist(), reverse=True)
    hard = detections(np.log(probabilities), proposals, dataclasses.replace(config, soft_nms=None))
    assert np.asarray(hard.valid).sum() == 2
