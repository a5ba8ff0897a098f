"""The losses of the RPN read the predictions of sampled anchors, and their gradient is that of all predictions."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fasterrcnn_jax.kernels import choice

from fasterrcnn_jax.models import rpn as rpn_module
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.models.layers import level_masks
from fasterrcnn_jax.models.rpn import batch_rpn_losses, rpn_output
from fasterrcnn_jax.ops.losses import rpn_losses
from fasterrcnn_jax.structures import AnchorTargets

IMAGE_HW = jnp.asarray([[64.0, 96.0], [40.0, 50.0]])
# No other array has this number of channels, so a program shows it only in maps of the RPN.
CHANNELS = 13


@pytest.fixture(scope="module", autouse=True)
def environment():
    with tiny.quick_compilation():
        yield


def detector(random_weights, *, convs=1, pyramid=True, mask=True, **loss):
    config = tiny.FPN if pyramid else tiny.MODEL
    rpn = dataclasses.replace(config.rpn, convs=convs, channels=CHANNELS, anchors_per_image=24)
    config = dataclasses.replace(
        config,
        rpn=rpn,
        backbone=dataclasses.replace(config.backbone, mask_padding=mask),
        loss=dataclasses.replace(config.loss, **loss),
    )
    return random_weights(lambda: Detector(config, tiny.CLASS_NAMES, rng=np.random.default_rng(0)))


def some_features(model, seed=0):
    rng, channels = np.random.default_rng(seed), model.rpn_head.convs[0].kernel.shape[2]
    sides = ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2)) if model.config.fpn else ((4, 6),)
    return tuple(jnp.asarray(rng.standard_normal((2, *side, channels), np.float32)) for side in sides)


def some_targets(rpn, count=23, seed=1):
    """Labels of at most `count` + 1 anchors of each image, with deltas where they are foreground."""
    rng, shape = np.random.default_rng(seed), rpn.objectness.shape
    labels, foreground = np.full(shape, -1, np.int32), np.zeros(shape, bool)
    for row, valid in enumerate(np.asarray(rpn.anchor_valid)):
        # Fewer in the second image. Anchor 0 is labelled too, because padding also has position 0.
        chosen = rng.choice(np.flatnonzero(valid), count - 10 * row, replace=False)
        labels[row, chosen] = np.arange(count - 10 * row) % 3 == 0
        labels[row, 0] = 0
        foreground[row] = labels[row] == 1
        foreground[row, rng.choice(np.flatnonzero(valid), 5)] = True  # foreground that was not sampled
    deltas = rng.standard_normal((*shape, 4), np.float32) * foreground[..., None]
    return AnchorTargets(*map(jnp.asarray, (labels, deltas, foreground)))


def of_all_predictions(model, features, targets):
    rpn = rpn_output(model, features, IMAGE_HW)

    def per_image(objectness, deltas, targets, num_locations):
        return rpn_losses(objectness, deltas, targets, num_locations, config=model.config.loss)

    return jax.vmap(per_image)(rpn.objectness, rpn.deltas, targets, rpn.num_locations)


def of_sampled(model, features, targets):
    return batch_rpn_losses(model, features, rpn_output(model, features, IMAGE_HW), targets)


def total(losses):
    return (losses.classification.sum + losses.box.sum).sum()


CASES = [
    dict(),
    dict(pyramid=False),
    dict(mask=False),
    dict(convs=2),
    dict(convs=3, pyramid=False),
    dict(rpn_box_normalizer="locations"),
    dict(rpn_box_normalizer="positives"),
    dict(rpn_box_anchors="all_positives"),
]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradient_are_those_of_all_predictions(monkeypatch, random_weights, case, device):
    monkeypatch.setattr(rpn_module, "_sampled_is_cheaper", lambda *_: True)
    model = detector(random_weights, **case)
    features = some_features(model)
    targets = some_targets(rpn_output(model, features, IMAGE_HW))
    wanted, wanted_gradient = jax.value_and_grad(
        lambda model, features: total(of_all_predictions(model, features, targets)), argnums=(0, 1)
    )(model, features)
    if device == "cuda":
        monkeypatch.setattr(choice, "device", lambda: ("cuda", choice.HOPPER))
    found = of_sampled(model, features, targets)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(of_all_predictions(model, features, targets)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda model, features: total(of_sampled(model, features, targets)), argnums=(0, 1))(
        model, features
    )
    assert total(found) == pytest.approx(float(wanted), rel=1e-5)
    leaves = zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True)
    moved = 0
    for one, other in leaves:
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        moved += bool(np.any(other))
    assert moved >= 2 * model.config.rpn.convs + 4


def test_the_backward_pass_holds_no_map_of_the_rpn(random_weights):
    model = detector(random_weights)
    features = some_features(model)
    targets = some_targets(rpn_output(model, features, IMAGE_HW))

    def maps_in_backward_pass(losses):
        _, pull = jax.vjp(lambda model, features: total(losses(model, features, targets)), model, features)
        program = str(jax.make_jaxpr(pull)(jnp.float32(1)))
        return re.findall(rf"f32\[2,\d+,\d+,{CHANNELS}\]", program)

    assert maps_in_backward_pass(of_all_predictions)
    assert set(maps_in_backward_pass(of_sampled)) <= {f"f32[2,24,1,{CHANNELS}]"}


def test_all_predictions_are_read_where_this_is_less_work(random_weights):
    """Around an anchor, three convolutions are computed for 25, 9 and 1 cells."""
    cheaper = rpn_module._sampled_is_cheaper
    assert [cheaper(256, convs, 2394) for convs in (1, 2, 3, 8, 64)] == [True, True, False, False, False]
    assert cheaper(256, 3, 89_523) and cheaper(256, 1, 257) and not cheaper(256, 1, 256)
    model = detector(random_weights, convs=5)
    features = some_features(model)
    rpn = rpn_output(model, features, IMAGE_HW)
    gradient = jax.grad(
        lambda objectness: total(
            batch_rpn_losses(model, features, rpn._replace(objectness=objectness), some_targets(rpn))
        )
    )(rpn.objectness)
    assert np.any(gradient)


def test_more_labels_than_anchors_per_image_make_the_losses_nan(random_weights):
    """A label that is left out of a loss would be a wrong loss that nobody sees."""
    model = detector(random_weights)
    features = some_features(model)
    rpn = rpn_output(model, features, IMAGE_HW)
    targets = some_targets(rpn)
    labels = np.array(targets.labels)
    labels[1, np.flatnonzero(labels[1] < 0)[:25]] = 0
    found = batch_rpn_losses(model, features, rpn, targets._replace(labels=jnp.asarray(labels)))
    assert np.isfinite(found.classification.sum[0]) and np.isnan(found.classification.sum[1])


def test_predictions_of_anchors_are_entries_of_all_predictions(random_weights):
    for convs in (1, 2):
        model = detector(random_weights, convs=convs)
        features = some_features(model)
        rpn = rpn_output(model, features, IMAGE_HW)
        anchors = jnp.asarray(np.random.default_rng(0).integers(0, rpn.objectness.shape[1], (2, 50)), jnp.int32)
        masks = level_masks(model.config, features, IMAGE_HW)
        objectness, deltas = model.rpn_head.at_anchors(features, anchors, masks)
        np.testing.assert_allclose(objectness, jnp.take_along_axis(rpn.objectness, anchors, 1), rtol=1e-5, atol=1e-6)
        wanted = jnp.take_along_axis(rpn.deltas, anchors[..., None], 1)
        np.testing.assert_allclose(deltas, wanted, rtol=1e-5, atol=1e-6)
