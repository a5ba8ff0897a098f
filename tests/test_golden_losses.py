"""The four losses and their gradients, against the reference implementations.

tests/golden/README.md describes the arrays and their origin; each gradient there is the gradient of one loss alone. The
maps of the references are ordered by anchor, row and column. Here ours are, too, because no loss depends on the order.
Our losses are sums and counts; the tests form the mean of each reference from them. Tolerances were fixed before the
comparison: a hundred float32 roundings for sums of thousands of terms, and 1e-7 for gradients, which are divided by
hundreds.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity import compare

from fasterrcnn_jax.config import LossConfig
from fasterrcnn_jax.ops.losses import box_losses, rpn_losses
from fasterrcnn_jax.structures import AnchorTargets, Mean, RoiTargets

GOLDEN = np.load(Path(__file__).parent / "golden" / "losses.npz")
SUM = dict(rtol=1e-5)
GRADIENT = dict(rtol=1e-5, atol=1e-7)
JW, TV = "faster-rcnn.pytorch", "torchvision"


def with_gradients(function):
    """Returns both (sum, count) pairs, the gradient of the first sum by scores and of the second by deltas."""

    @functools.partial(jax.jit, static_argnames="config")
    def run(scores, deltas, targets, *, config=LossConfig()):
        def means(*outputs):
            return [value for value in function(*outputs, targets, config=config) if isinstance(value, Mean)]

        gradients = jax.jacrev(lambda *outputs: [mean.sum for mean in means(*outputs)], argnums=(0, 1))(scores, deltas)
        return means(scores, deltas), gradients[0][0], gradients[1][1]

    return run


rpn = with_gradients(functools.partial(rpn_losses, num_locations=jnp.int32(1)))
box = with_gradients(box_losses)


def anchor_targets(labels, deltas) -> AnchorTargets:
    labels = labels.ravel().astype(np.int32)
    return AnchorTargets(labels, deltas, labels == 1)


def by_anchor(values, image) -> np.ndarray:
    """Returns [36, 6, 8], four channels per anchor, as rows of four."""
    return values[image].reshape(9, 4, 48).transpose(0, 2, 1).reshape(-1, 4)


@pytest.mark.parametrize("sigma", [3, 1])
def test_faster_rcnn_pytorchs_box_loss_of_the_rpn(sigma):
    """The reference divides each image by the sample size of the last image, then takes the mean over the images."""
    loss, outside = 0.0, GOLDEN["rpn_outside_w"].max()
    for image in range(2):
        foreground = by_anchor(GOLDEN["rpn_inside_w"], image)[:, 0] > 0
        sampled = by_anchor(GOLDEN["rpn_outside_w"], image)[:, 0] > 0
        labels = np.where(foreground, 1, np.where(sampled, 0, -1))
        losses, _, gradient = rpn(
            np.zeros(432, np.float32),
            by_anchor(GOLDEN["rpn_pred"], image),
            anchor_targets(labels, by_anchor(GOLDEN["rpn_targets"], image)),
            config=LossConfig(rpn_sigma=float(sigma)),
        )
        count = float(losses[1].count)
        assert count == sampled.sum()
        loss += float(losses[1].sum) * outside / 2
        theirs = by_anchor(GOLDEN[f"jw_rpn_s{sigma}_grad"], image)
        name = f"RPN boxes, sigma {sigma}, gradient, image {image}"
        compare("losses", JW, name, np.asarray(gradient) * outside / 2, theirs, **GRADIENT)
    assert outside == np.float32(1 / count)
    theirs = GOLDEN[f"jw_rpn_s{sigma}_loss"]
    compare("losses", JW, f"RPN boxes, sigma {sigma}", loss, theirs, **SUM)


def test_faster_rcnn_pytorchs_objectness_loss():
    """The reference has two logits; ours is their difference. Its gradients are our gradient and its negative."""
    total, count, gradients = 0.0, 0.0, []
    for image in range(2):
        background, foreground = GOLDEN["rpn_cls_score"][image].reshape(2, -1)
        difference = foreground - background
        targets = anchor_targets(GOLDEN["rpn_labels"][image], np.zeros((432, 4), np.float32))
        losses, gradient, _ = rpn(difference, np.zeros((432, 4), np.float32), targets)
        total, count = total + float(losses[0].sum), count + float(losses[0].count)
        gradients.append(np.asarray(gradient))
        probabilities = np.asarray(jax.nn.sigmoid(difference))
        theirs = GOLDEN["jw_rpn_cls_prob"][image].reshape(2, -1)
        name = f"objectness probabilities, image {image}"
        compare("losses", JW, name, np.stack([1 - probabilities, probabilities]), theirs, atol=5e-7)
    compare("losses", JW, "objectness", total / count, GOLDEN["jw_rpn_cls_loss"], **SUM)
    for image, gradient in enumerate(gradients):
        theirs = GOLDEN["jw_rpn_cls_grad"][image].reshape(2, -1)
        ours = np.stack([-gradient, gradient]) / count
        compare("losses", JW, f"objectness, gradient, image {image}", ours, theirs, **GRADIENT)


def test_faster_rcnn_pytorchs_box_loss_of_the_head():
    """The reference has one set of deltas per RoI, the set of its class."""
    foreground = GOLDEN["roi_inside_w"][:, 0] > 0
    targets = RoiTargets(
        np.zeros((64, 4), np.float32),
        foreground.astype(np.int32),
        GOLDEN["roi_targets"],
        np.ones(64, bool),
    )
    losses, _, gradient = box(np.zeros((64, 2), np.float32), GOLDEN["roi_pred"][:, None], targets)
    assert losses[1].count == 64
    compare("losses", JW, "head boxes", float(losses[1].sum) / 64, GOLDEN["jw_roi_loss"], **SUM)
    ours = np.asarray(gradient)[:, 0] / 64
    compare("losses", JW, "head boxes, gradient", ours, GOLDEN["jw_roi_grad"], **GRADIENT)


def test_torchvisions_losses_of_the_rpn():
    """The reference takes both images at once; its beta 1/9 is our sigma 3."""
    targets = anchor_targets(GOLDEN["tvr_labels"], GOLDEN["tvr_targets"].reshape(-1, 4))
    losses, d_objectness, d_deltas = rpn(GOLDEN["tvr_objectness"][:, 0], GOLDEN["tvr_deltas"], targets)
    count = float(losses[0].count)
    assert count == float(losses[1].count) == 423
    for name, mean, theirs in zip(("objectness", "RPN boxes"), losses, ("objectness", "box")):
        compare("losses", TV, name, float(mean.sum) / count, GOLDEN[f"tvr_loss_{theirs}"], **SUM)
    for name, ours, theirs in (
        ("objectness, gradient", np.asarray(d_objectness)[:, None], "tvr_grad_obj"),
        ("RPN boxes, gradient", np.asarray(d_deltas), "tvr_grad_deltas"),
    ):
        compare("losses", TV, name, ours / count, GOLDEN[theirs], **GRADIENT)


def test_torchvisions_losses_of_the_head():
    targets = RoiTargets(
        np.zeros((96, 4), np.float32),
        GOLDEN["tv_labels"].astype(np.int32),
        GOLDEN["tv_reg_targets"],
        np.ones(96, bool),
    )
    losses, d_logits, d_deltas = box(
        GOLDEN["tv_class_logits"],
        GOLDEN["tv_box_regression"].reshape(96, 21, 4),
        targets,
        config=LossConfig(roi_sigma=3.0),
    )
    for name, mean, theirs in zip(("classes", "head boxes"), losses, ("classifier", "box_reg")):
        compare("losses", TV, name, float(mean.sum) / 96, GOLDEN[f"tv_loss_{theirs}"], **SUM)
    for name, ours, theirs in (
        ("classes, gradient", np.asarray(d_logits), "tv_grad_logits"),
        ("head boxes, gradient", np.asarray(d_deltas).reshape(96, 84), "tv_grad_box"),
    ):
        compare("losses", TV, name, ours / 96, GOLDEN[theirs], **GRADIENT)
