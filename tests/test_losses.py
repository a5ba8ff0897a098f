"""The four losses and their gradients, against the formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import arrays

from fasterrcnn_jax.config import LossConfig
from fasterrcnn_jax.ops.losses import box_losses, rpn_losses, smooth_l1
from fasterrcnn_jax.structures import AnchorTargets, Mean, RoiTargets

A, R, K = 12, 8, 3
LOCATIONS = 5
UNEVEN = (0.5, 1.0, 2.0, 0.0)  # different values, to show exchanged coordinates


def with_gradients(function):
    """Returns a function: (scores, deltas, targets) -> both (sum, count) pairs and the gradients of each sum."""

    @functools.partial(jax.jit, static_argnames="config")
    def run(scores, deltas, targets, *, config=LossConfig()):
        def means(*outputs):
            return [value for value in function(*outputs, targets, config=config) if isinstance(value, Mean)]

        sums = jax.jacrev(lambda *outputs: [mean.sum for mean in means(*outputs)], argnums=(0, 1))
        return means(scores, deltas), sums(scores, deltas)

    return run


run_rpn = with_gradients(functools.partial(rpn_losses, num_locations=jnp.int32(LOCATIONS)))
run_box = with_gradients(box_losses)


def smooth_l1_of(error, sigma):
    """Returns the value and the derivative of smooth L1 for one number."""
    if abs(error) < 1 / sigma**2:
        return 0.5 * (sigma * error) ** 2, sigma**2 * error
    return abs(error) - 0.5 / sigma**2, np.sign(error)


numbers = st.integers(-40, 40).map(lambda i: i / 16)  # |error| hits 1/sigma^2 exactly at sigma 2 and 1


def rows(*shape):
    return arrays(np.float32, shape, elements=numbers)


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.0])
@given(error=numbers)
def test_smooth_l1_equals_its_two_pieces(sigma, error):
    value, slope = jax.value_and_grad(functools.partial(smooth_l1, sigma=sigma))(jnp.float32(error))
    expected = smooth_l1_of(error, sigma)
    assert (float(value), float(slope)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(rpn_sigma=1.0, rpn_box_weight=10.0, rpn_box_normalizer="locations"),
        dict(rpn_box_normalizer="positives", rpn_box_inside_weights=UNEVEN),
        dict(rpn_box_anchors="all_positives"),
        dict(rpn_box_anchors="all_positives", rpn_box_normalizer="positives"),
        dict(rpn_positive_weight=0.25, rpn_box_weight=3.0, rpn_box_normalizer="locations"),
        dict(rpn_positive_weight=0.25, rpn_box_anchors="all_positives"),
        # The settings of the box head change nothing here.
        dict(roi_sigma=2.0, roi_box_weight=7.0, roi_box_inside_weights=UNEVEN),
    ],
    ids=str,
)
@given(
    rows(A),
    rows(A, 4),
    arrays(np.int32, A, elements=st.sampled_from([-1, 0, 1])),
    rows(A, 4),
    arrays(bool, A),
)
def test_rpn_losses_and_gradients_equal_the_formulas(options, objectness, deltas, labels, targets, left_out):
    """The ignored anchors are foreground that was not sampled."""
    config = LossConfig(**options)
    sampled, foreground = labels >= 0, (labels == 1) | ((labels < 0) & left_out)
    losses, gradients = run_rpn(objectness, deltas, AnchorTargets(labels, targets, foreground), config=config)
    regressed = foreground if config.rpn_box_anchors == "all_positives" else labels == 1
    weight, count = (
        config.rpn_box_weight,
        {
            "sampled": sampled.sum(),
            "positives": regressed.sum(),
            "locations": LOCATIONS,
        }[config.rpn_box_normalizer],
    )
    if config.rpn_positive_weight is not None:
        weight, count = weight * config.rpn_positive_weight, regressed.sum()
    entropy, distance, d_objectness, d_deltas = 0.0, 0.0, np.zeros(A), np.zeros((A, 4))
    for i, label in enumerate(labels):
        if label >= 0:
            probability = 1 / (1 + np.exp(-np.float64(objectness[i])))
            entropy -= np.log(probability if label == 1 else 1 - probability)
            d_objectness[i] = probability - label
        if regressed[i]:
            for j, inside in enumerate(config.rpn_box_inside_weights):
                error = inside * (np.float64(deltas[i, j]) - targets[i, j])
                value, slope = smooth_l1_of(error, config.rpn_sigma)
                distance, d_deltas[i, j] = distance + weight * value, weight * inside * slope
    assert float(losses[0].sum) == pytest.approx(entropy, rel=1e-4, abs=1e-5)
    assert float(losses[1].sum) == pytest.approx(distance, rel=1e-4, abs=1e-5)
    assert [float(mean.count) for mean in losses] == [sampled.sum(), count]
    (obj_by_obj, obj_by_deltas), (box_by_obj, box_by_deltas) = gradients
    np.testing.assert_allclose(obj_by_obj, d_objectness, atol=1e-5)
    np.testing.assert_allclose(box_by_deltas, d_deltas, rtol=1e-5, atol=1e-5)
    assert not np.any(obj_by_deltas) and not np.any(box_by_obj)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(roi_sigma=3.0),
        dict(roi_box_weight=2.0, roi_box_inside_weights=UNEVEN),
        dict(roi_box_normalizer="positives"),
        dict(roi_box_normalizer="positive_deltas", roi_box_weight=10.0),
        # The settings of the RPN change nothing here.
        dict(rpn_sigma=2.0, rpn_box_weight=7.0, rpn_box_inside_weights=UNEVEN, rpn_positive_weight=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("classes", [K + 1, 1])
@given(
    rows(R, K + 1),
    rows(R, K + 1, 4),
    arrays(np.int32, R, elements=st.integers(0, K)),
    rows(R, 4),
    arrays(bool, R),
)
def test_box_losses_and_gradients_equal_the_formulas(options, classes, logits, deltas, labels, targets, valid):
    """Tested with deltas per class and with one set of deltas for all classes."""
    config = LossConfig(**options)
    deltas = deltas[:, :classes]
    roi_targets = RoiTargets(np.zeros((R, 4), np.float32), labels, targets, valid)
    losses, gradients = run_box(logits, deltas, roi_targets, config=config)
    entropy, distance, d_logits, d_deltas = 0.0, 0.0, np.zeros(logits.shape), np.zeros(deltas.shape)
    for i in np.flatnonzero(valid):
        probabilities = np.exp(np.float64(logits[i])) / np.exp(np.float64(logits[i])).sum()
        entropy -= np.log(probabilities[labels[i]])
        d_logits[i] = probabilities - np.eye(K + 1)[labels[i]]
        if labels[i] > 0:
            of_class = labels[i] if classes > 1 else 0
            for j, inside in enumerate(config.roi_box_inside_weights):
                error = inside * (np.float64(deltas[i, of_class, j]) - targets[i, j])
                value, slope = smooth_l1_of(error, config.roi_sigma)
                distance += config.roi_box_weight * value
                d_deltas[i, of_class, j] = config.roi_box_weight * inside * slope
    assert float(losses[0].sum) == pytest.approx(entropy, rel=1e-4, abs=1e-5)
    assert float(losses[1].sum) == pytest.approx(distance, rel=1e-4, abs=1e-5)
    positives = (valid & (labels > 0)).sum()
    counts = {"sampled": valid.sum(), "positives": positives, "positive_deltas": 4 * positives}
    assert [float(mean.count) for mean in losses] == [valid.sum(), counts[config.roi_box_normalizer]]
    (class_by_logits, class_by_deltas), (box_by_logits, box_by_deltas) = gradients
    np.testing.assert_allclose(class_by_logits, d_logits, atol=1e-5)
    np.testing.assert_allclose(box_by_deltas, d_deltas, rtol=1e-5, atol=1e-5)
    assert not np.any(class_by_deltas) and not np.any(box_by_logits)


def test_nothing_sampled_gives_0_and_a_gradient_of_0():
    nothing = AnchorTargets(np.full(A, -1, np.int32), np.zeros((A, 4), np.float32), np.zeros(A, bool))
    rpn = run_rpn(np.ones(A, np.float32), np.ones((A, 4), np.float32), nothing)
    nothing = RoiTargets(
        np.zeros((R, 4), np.float32),
        np.zeros(R, np.int32),
        np.zeros((R, 4), np.float32),
        np.zeros(R, bool),
    )
    logits, deltas = np.ones((R, K + 1), np.float32), np.ones((R, K + 1, 4), np.float32)
    box = run_box(logits, deltas, nothing)
    for leaf in jax.tree.leaves((rpn, box)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_extreme_logits_stay_finite():
    labels = np.int32([0, 1] * (A // 2))
    targets = AnchorTargets(labels, np.zeros((A, 4), np.float32), labels == 1)
    objectness = np.float32([1e4, -1e4] * (A // 2))
    losses, gradients = run_rpn(objectness, np.full((A, 4), 1e6, np.float32), targets)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((losses, gradients)))


def rpn_box_loss(**options):
    """Returns the loss for 3 foreground anchors in a sample of 4 and 1 not sampled, each with an error of 1 in x."""
    labels = np.int32([1, 1, 1, 0] + [-1] * (A - 4))
    foreground = (labels == 1) | (np.arange(A) == 4)
    deltas = np.zeros((A, 4), np.float32)
    deltas[:, 0] = 1.0
    targets = AnchorTargets(labels, np.zeros((A, 4), np.float32), foreground)
    mean = run_rpn(np.zeros(A, np.float32), deltas, targets, config=LossConfig(**options))[0][1]
    return float(mean.sum) / float(mean.count)


EACH = 1 - 0.5 / 9  # smooth L1 of 1 at sigma 3


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(), 3 * EACH / 4),
        (dict(rpn_sigma=1.0), 3 * 0.5 / 4),
        (dict(rpn_box_weight=10.0), 10 * 3 * EACH / 4),
        (dict(rpn_box_normalizer="positives"), EACH),
        (dict(rpn_box_normalizer="positive_deltas"), EACH / 4),
        (dict(rpn_box_normalizer="locations"), 3 * EACH / LOCATIONS),
        (dict(rpn_box_anchors="all_positives"), 4 * EACH / 4),
        (dict(rpn_box_anchors="all_positives", rpn_box_normalizer="positives"), EACH),
        (dict(rpn_positive_weight=0.25), 0.25 * EACH),
        (dict(rpn_positive_weight=0.25, rpn_box_normalizer="locations", rpn_box_weight=2.0), 0.5 * EACH),
        (dict(rpn_box_inside_weights=(0.0, 1.0, 1.0, 1.0)), 0.0),
        (dict(rpn_box_inside_weights=(2.0, 1.0, 1.0, 1.0)), 3 * (2 - 0.5 / 9) / 4),
    ],
    ids=str,
)
def test_the_rpn_box_loss_follows_each_of_its_settings(options, expected):
    assert rpn_box_loss(**options) == pytest.approx(expected, rel=1e-6)
