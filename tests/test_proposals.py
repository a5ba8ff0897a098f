"""Region proposals of one image."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from fasterrcnn_jax.anchors import cell_anchors, grid_anchors
from fasterrcnn_jax.config import ProposalConfig
from fasterrcnn_jax.proposals import propose

ANCHORS = grid_anchors(cell_anchors((16, 32), (0.5, 1, 2)), (6, 8), 16)
A = len(ANCHORS)
IMAGE_HW = np.float32([80, 100])
CONFIG = ProposalConfig(pre_nms_top_n=100, post_nms_top_n=30, nms_threshold=0.6, min_size=12)
IN_PICTURE = np.repeat((np.mgrid[0:6, 0:8] * 16 < IMAGE_HW[:, None, None]).all(axis=0).ravel(), 6)


@jax.jit
def run(objectness, deltas, anchor_valid):
    return propose(
        objectness, deltas, jnp.asarray(ANCHORS), anchor_valid, jnp.asarray(IMAGE_HW), config=CONFIG
    )


def rpn_outputs(seed):
    generator = np.random.default_rng(seed)
    objectness = (generator.permutation(A) / A * 8 - 4).astype(np.float32)
    return objectness, generator.normal(0, 0.3, (A, 4)).astype(np.float32)


def reference(objectness, deltas, anchor_valid):
    """Decode, clip, drop small ones, best by objectness, NMS."""
    boxes = np.array(
        [
            oracles.clip(oracles.decode(d, a), *IMAGE_HW)
            for d, a in zip(deltas, ANCHORS, strict=True)
        ],
        np.float32,
    )
    sides = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    usable = np.flatnonzero(anchor_valid & (sides >= CONFIG.min_size))
    best = sorted(usable, key=lambda i: -objectness[i])[: CONFIG.pre_nms_top_n]
    kept = oracles.greedy_nms(
        boxes[best],
        objectness[best],
        np.ones(len(best), bool),
        iou_threshold=CONFIG.nms_threshold,
        max_output=CONFIG.post_nms_top_n,
    )
    chosen = np.array(best)[kept]
    return boxes[chosen], 1 / (1 + np.exp(-objectness[chosen]))


@pytest.mark.parametrize("seed", range(4))
def test_proposals_equal_the_loop(seed):
    outputs = rpn_outputs(seed)
    found = run(*outputs, IN_PICTURE)
    boxes, scores = reference(*outputs, IN_PICTURE)
    valid = np.asarray(found.valid)
    assert len(boxes) == valid.sum() > 10
    np.testing.assert_allclose(np.asarray(found.boxes)[valid], boxes, atol=1e-3)
    np.testing.assert_allclose(np.asarray(found.scores)[valid], scores, rtol=1e-5)


def test_proposals_stay_in_the_picture_and_keep_the_minimum_size():
    objectness, deltas = rpn_outputs(5)
    found = run(objectness, 4 * deltas, IN_PICTURE)
    boxes = np.asarray(found.boxes)[np.asarray(found.valid)]
    assert (boxes >= 0).all() and (boxes[:, 2::2] <= 100).all() and (boxes[:, 3::2] <= 80).all()
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= CONFIG.min_size


def test_anchors_in_the_padding_never_propose():
    """However high they score, and wherever their deltas carry them."""
    objectness, deltas = rpn_outputs(6)
    clean = run(objectness, deltas, IN_PICTURE)
    objectness, deltas = objectness.copy(), deltas.copy()
    objectness[~IN_PICTURE], deltas[~IN_PICTURE, :2] = 100.0, -2.0
    dirty = run(objectness, deltas, IN_PICTURE)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("remaining", [0, 3])
def test_shape_is_fixed_when_few_remain(remaining):
    objectness, _ = rpn_outputs(7)
    anchor_valid = np.zeros(A, bool)
    # Anchors of one shape in the middle of cells far apart: none suppresses another.
    anchor_valid[[(row * 8 + column) * 6 + 3 for row, column in ((1, 1), (1, 4), (3, 2))][:remaining]] = True
    found = run(objectness, np.zeros((A, 4), np.float32), anchor_valid)
    valid = np.asarray(found.valid)
    assert found.boxes.shape == (30, 4) and found.scores.shape == (30,)
    assert valid.tolist() == [True] * remaining + [False] * (30 - remaining)
    assert not np.asarray(found.boxes)[~valid].any() and not np.asarray(found.scores)[~valid].any()


def test_scores_descend_and_are_probabilities():
    found = run(*rpn_outputs(8), IN_PICTURE)
    scores = np.asarray(found.scores)[np.asarray(found.valid)]
    assert (np.diff(scores) <= 0).all() and scores.min() > 0 and scores.max() < 1


def test_saturated_objectness_still_orders_the_proposals():
    """Above a logit of 17 every sigmoid is 1 in float32."""
    objectness, deltas = rpn_outputs(9)
    plain, saturated = run(objectness, deltas, IN_PICTURE), run(objectness + 64, deltas, IN_PICTURE)
    np.testing.assert_array_equal(plain.boxes, saturated.boxes)


def test_no_gradient_passes():
    objectness, deltas = rpn_outputs(10)

    def total(objectness, deltas):
        found = run(objectness, deltas, IN_PICTURE)
        return found.boxes.sum() + found.scores.sum()

    for gradient in jax.grad(total, argnums=(0, 1))(jnp.asarray(objectness), jnp.asarray(deltas)):
        assert not np.any(gradient)


def test_more_slots_than_anchors_are_padding():
    config = ProposalConfig(pre_nms_top_n=50, post_nms_top_n=5, min_size=1)
    found = jax.jit(lambda *args: propose(*args, config=config))(
        jnp.zeros(2),
        jnp.zeros((2, 4)),
        jnp.array([[0.0, 0, 20, 20], [40, 40, 60, 60]]),
        jnp.ones(2, bool),
        jnp.array([80.0, 80.0]),
    )
    assert found.valid.tolist() == [True, True, False, False, False]
