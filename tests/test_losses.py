"""The four losses and their gradients, against the formulas and torchvision."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import arrays

from fasterrcnn_jax.losses import box_losses, rpn_losses, smooth_l1
from fasterrcnn_jax.structures import AnchorTargets, RoiTargets

GOLDEN = np.load(Path(__file__).parent / "golden" / "losses.npz")
A, R, K = 12, 8, 3


def with_gradients(function):
    """(outputs, predictions..., targets) -> both (sum, count) pairs and each sum's gradients."""

    @functools.partial(jax.jit, static_argnames="sigma")
    def run(scores, deltas, targets, *, sigma):
        losses = function(scores, deltas, targets, sigma=sigma)
        gradients = jax.jacrev(
            lambda *outputs: [mean.sum for mean in function(*outputs, targets, sigma=sigma)],
            argnums=(0, 1),
        )(scores, deltas)
        return losses, gradients

    return run


run_rpn, run_box = with_gradients(rpn_losses), with_gradients(box_losses)


def smooth_l1_of(error, sigma):
    """Value and derivative of one number."""
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


@pytest.mark.parametrize("sigma", [1.0, 3.0])
@given(rows(A), rows(A, 4), arrays(np.int32, A, elements=st.sampled_from([-1, 0, 1])), rows(A, 4))
def test_rpn_losses_and_gradients_equal_the_formulas(sigma, objectness, deltas, labels, targets):
    losses, gradients = run_rpn(objectness, deltas, AnchorTargets(labels, targets), sigma=sigma)
    entropy, distance, d_objectness, d_deltas = 0.0, 0.0, np.zeros(A), np.zeros((A, 4))
    for i, label in enumerate(labels):
        if label < 0:
            continue
        probability = 1 / (1 + np.exp(-np.float64(objectness[i])))
        entropy -= np.log(probability if label == 1 else 1 - probability)
        d_objectness[i] = probability - label
        if label == 1:
            for j in range(4):
                value, d_deltas[i, j] = smooth_l1_of(np.float64(deltas[i, j]) - targets[i, j], sigma)
                distance += value
    assert float(losses[0].sum) == pytest.approx(entropy, rel=1e-4, abs=1e-5)
    assert float(losses[1].sum) == pytest.approx(distance, rel=1e-4, abs=1e-5)
    assert [float(mean.count) for mean in losses] == [(labels >= 0).sum()] * 2
    (obj_by_obj, obj_by_deltas), (box_by_obj, box_by_deltas) = gradients
    np.testing.assert_allclose(obj_by_obj, d_objectness, atol=1e-5)
    np.testing.assert_allclose(box_by_deltas, d_deltas, rtol=1e-5, atol=1e-5)
    assert not np.any(obj_by_deltas) and not np.any(box_by_obj)


@pytest.mark.parametrize("sigma", [1.0, 3.0])
@given(
    rows(R, K + 1),
    rows(R, K + 1, 4),
    arrays(np.int32, R, elements=st.integers(0, K)),
    rows(R, 4),
    arrays(bool, R),
)
def test_box_losses_and_gradients_equal_the_formulas(sigma, logits, deltas, labels, targets, valid):
    roi_targets = RoiTargets(np.zeros((R, 4), np.float32), labels, targets, valid)
    losses, gradients = run_box(logits, deltas, roi_targets, sigma=sigma)
    entropy, distance, d_logits, d_deltas = 0.0, 0.0, np.zeros(logits.shape), np.zeros(deltas.shape)
    for i in np.flatnonzero(valid):
        probabilities = np.exp(np.float64(logits[i])) / np.exp(np.float64(logits[i])).sum()
        entropy -= np.log(probabilities[labels[i]])
        d_logits[i] = probabilities - np.eye(K + 1)[labels[i]]
        if labels[i] > 0:
            for j in range(4):
                error = np.float64(deltas[i, labels[i], j]) - targets[i, j]
                value, d_deltas[i, labels[i], j] = smooth_l1_of(error, sigma)
                distance += value
    assert float(losses[0].sum) == pytest.approx(entropy, rel=1e-4, abs=1e-5)
    assert float(losses[1].sum) == pytest.approx(distance, rel=1e-4, abs=1e-5)
    assert [float(mean.count) for mean in losses] == [valid.sum()] * 2
    (class_by_logits, class_by_deltas), (box_by_logits, box_by_deltas) = gradients
    np.testing.assert_allclose(class_by_logits, d_logits, atol=1e-5)
    np.testing.assert_allclose(box_by_deltas, d_deltas, rtol=1e-5, atol=1e-5)
    assert not np.any(class_by_deltas) and not np.any(box_by_logits)


def test_nothing_sampled_gives_0_and_a_gradient_of_0():
    nothing = AnchorTargets(np.full(A, -1, np.int32), np.zeros((A, 4), np.float32))
    rpn = run_rpn(np.ones(A, np.float32), np.ones((A, 4), np.float32), nothing, sigma=3.0)
    nothing = RoiTargets(
        np.zeros((R, 4), np.float32),
        np.zeros(R, np.int32),
        np.zeros((R, 4), np.float32),
        np.zeros(R, bool),
    )
    logits, deltas = np.ones((R, K + 1), np.float32), np.ones((R, K + 1, 4), np.float32)
    box = run_box(logits, deltas, nothing, sigma=1.0)
    for leaf in jax.tree.leaves((rpn, box)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_extreme_logits_stay_finite():
    targets = AnchorTargets(np.int32([0, 1] * (A // 2)), np.zeros((A, 4), np.float32))
    objectness = np.float32([1e4, -1e4] * (A // 2))
    losses, gradients = run_rpn(objectness, np.full((A, 4), 1e6, np.float32), targets, sigma=3.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((losses, gradients)))


def test_rpn_losses_equal_torchvision():
    targets = AnchorTargets(
        GOLDEN["rpn_labels"].reshape(-1).astype(np.int32), GOLDEN["rpn_targets"].reshape(-1, 4)
    )
    # beta 1/9 there is sigma 3 here
    losses, gradients = run_rpn(GOLDEN["rpn_objectness"][:, 0], GOLDEN["rpn_deltas"], targets, sigma=3.0)
    count = float(losses[0].count)
    assert float(losses[0].sum) / count == pytest.approx(float(GOLDEN["rpn_loss_objectness"]), rel=1e-5)
    assert float(losses[1].sum) / count == pytest.approx(float(GOLDEN["rpn_loss_box"]), rel=1e-5)
    np.testing.assert_allclose(gradients[0][0] / count, GOLDEN["rpn_grad_obj"][:, 0], atol=1e-7)
    np.testing.assert_allclose(gradients[1][1] / count, GOLDEN["rpn_grad_deltas"], atol=1e-7)


def test_box_losses_equal_torchvision():
    labels = GOLDEN["box_labels"].astype(np.int32)
    targets = RoiTargets(
        np.zeros((96, 4), np.float32), labels, GOLDEN["box_reg_targets"], np.ones(96, bool)
    )
    deltas = GOLDEN["box_box_regression"].reshape(96, 21, 4)
    losses, gradients = run_box(GOLDEN["box_class_logits"], deltas, targets, sigma=3.0)
    assert float(losses[0].sum) / 96 == pytest.approx(float(GOLDEN["box_loss_classifier"]), rel=1e-5)
    assert float(losses[1].sum) / 96 == pytest.approx(float(GOLDEN["box_loss_box_reg"]), rel=1e-5)
    np.testing.assert_allclose(gradients[0][0] / 96, GOLDEN["box_grad_logits"], atol=1e-7)
    np.testing.assert_allclose(
        np.asarray(gradients[1][1]).reshape(96, 84) / 96, GOLDEN["box_grad_box"], atol=1e-7
    )
