"""Whole detectors with weights made by a rule, against faster-rcnn.pytorch: every stage, losses, gradients.

The comparison is with the pytorch-1.0 branch on a CPU. Adaptations to the reference are in this file, not in the
library. Inclusive corners become continuous ones (+1). The two objectness logits of the reference are compared by their
difference. Our box head gets the recorded regions of the reference, and padding counts as valid (in the reference,
padding passes through the head). Our losses get the recorded RoIs, labels and targets (the reference draws background
with replacement) and are normalised as in the reference: the RPN's box loss by the count of the last image. The canvas
has the size of the image. In these models, torch's own float32 run differs from its float64 run by up to 2e-4.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_weights
from fidelity import compare, continuous
from flax import nnx

from fasterrcnn_jax.config import (
    BoxCoderConfig,
    ImageConfig,
    PostprocessConfig,
    ProposalConfig,
)
from fasterrcnn_jax.config.families import resnet_c4, vgg16
from fasterrcnn_jax.data.transforms import to_canvas
from fasterrcnn_jax.models.detector import Detector, shared_features, split
from fasterrcnn_jax.models.faster_rcnn import detect, losses_for_targets
from fasterrcnn_jax.models.roi_heads import detections_in_regions
from fasterrcnn_jax.models.rpn import rpn_output
from fasterrcnn_jax.ops.anchors import anchors_of
from fasterrcnn_jax.ops.box_coder import decode
from fasterrcnn_jax.ops.boxes import clip
from fasterrcnn_jax.ops.postprocessing import postprocess
from fasterrcnn_jax.ops.proposals import propose
from fasterrcnn_jax.ops.roi_operators import roi_features
from fasterrcnn_jax.ops.targets import anchor_targets
from fasterrcnn_jax.structures import GroundTruth, Proposals, RoiTargets

pytestmark = pytest.mark.usefixtures("quick_compilation")

REFERENCE = "faster-rcnn.pytorch"
HW = (200, 272)
IMAGE_HW = np.float32([HW])
ALL = 10**9  # nothing is left to a draw

FAMILIES = {
    "VGG16": ("vgg16", vgg16(), reference_weights.vgg16_table()),
    "ResNet-101-C4": ("res101", resnet_c4(101), reference_weights.resnet_c4_table((3, 4, 23, 3))),
}


def configured(config, score_threshold):
    """Returns a configuration with the Caffe box coder, no minimum size (never applied there), no random anchors."""
    return dataclasses.replace(
        config,
        image=ImageConfig(short_side=200, long_side=272, canvases=((208, 272), (272, 208))),
        box_coder=BoxCoderConfig(far_corner_offset=1, max_log_scale=None),
        rpn=dataclasses.replace(config.rpn, anchors_per_image=ALL),
        test_proposals=ProposalConfig(pre_nms_top_n=6000, post_nms_top_n=300, min_size=0.0),
        postprocess=PostprocessConfig(score_threshold=score_threshold),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """Returns (name, golden numbers, model, table)."""
    file, config, table = FAMILIES[request.param]
    golden = np.load(Path(__file__).parent / "golden" / f"model_{file}.npz")
    weights = reference_weights.rule_weights(golden)

    def build():
        names = tuple(f"class{k}" for k in range(1, 21))
        return Detector(configured(config, 0.05), names, rng=np.random.default_rng(0))

    yield request.param, golden, reference_weights.load(build, table, weights), table
    jax.clear_caches()  # compiled programs keep up to half a gigabyte in memory


def network_input(golden, model, *names):
    """Returns the input from the library's own preprocessing, on a canvas of the image's size."""
    return np.stack([to_canvas(golden[name], HW, model.config.image)[0] for name in names])


@pytest.fixture(scope="module")
def forward(case):
    _, golden, model, _ = case

    @jax.jit
    def run(model, images):
        levels = shared_features(model, images, jnp.asarray(IMAGE_HW))
        return levels, *model.rpn_head(levels)

    return run(model, network_input(golden, model, "image"))


def nchw(features):
    return np.asarray(features).transpose(0, 3, 1, 2)


def samples(values, count):
    """Returns the values at the recorded places, which are evenly spread over the flattened array."""
    flat = np.asarray(values).ravel()
    return flat[np.arange(count) * (flat.size // count)]


def per_anchor(maps, values):
    """Returns [1, values * A, h, w], where the values of an anchor are neighbours, as [1, h * w * A, values]."""
    batch, channels, height, width = maps.shape
    maps = maps.reshape(batch, channels // values, values, height, width)
    return maps.transpose(0, 3, 4, 1, 2).reshape(batch, -1, values)


def logit_difference(scores):
    background, foreground = np.split(scores, 2, axis=1)
    return per_anchor(foreground - background, 1)[..., 0]


def test_features_objectness_and_deltas(case, forward):
    name, golden, _, _ = case
    (features,), objectness, deltas = forward
    assert nchw(features).shape == tuple(golden["base_feat_shape"])
    maps = samples(nchw(features), 1024)
    compare(f"{name}: features", REFERENCE, "shared features", maps, golden["base_feat_samples"], atol=1e-4)
    theirs = logit_difference(golden["rpn_cls_score"])
    compare(f"{name}: features", REFERENCE, "objectness", objectness, theirs, atol=2e-4)
    theirs = per_anchor(golden["rpn_bbox_pred"], 4)
    compare(f"{name}: features", REFERENCE, "RPN deltas", deltas, theirs, atol=1e-4)


def test_proposals_are_the_same_boxes_in_the_same_order(case, forward):
    name, golden, model, _ = case
    (features,), objectness, deltas = forward
    anchors = anchors_of(model.config, (features.shape[1:3],)).anchors
    found = propose(
        objectness[0],
        deltas[0],
        jnp.asarray(anchors),
        jnp.ones(len(anchors), bool),
        jnp.asarray(IMAGE_HW[0]),
        jnp.ones(2),
        config=model.config.test_proposals,
        coder=model.config.box_coder,
    )
    count = int(found.valid.sum())
    rois = golden["rois"][0, :, 1:]
    assert not rois[count:].any() and rois[count - 1].any()
    theirs = continuous(rois[:count])
    compare(f"{name}: proposals", REFERENCE, "valid proposals", found.boxes[:count], theirs, atol=0.02)


def recorded_regions(golden):
    rois = continuous(golden["rois"][:, :, 1:])
    return Proposals(jnp.asarray(rois), jnp.ones(rois.shape[:2]), jnp.ones(rois.shape[:2], bool))


@pytest.fixture(scope="module")
def head_outputs(case, forward):
    """Returns (region features, class logits, box deltas, fc7 of four) in the recorded regions."""
    _, golden, model, _ = case

    @jax.jit
    def run(model, features, boxes):
        options = dict(strides=(16,), far_corner_offset=1, config=model.config.roi_features)
        pooled = roi_features((features[0][0],), boxes[0], **options)
        return pooled, *model.box_head(pooled[None]), model.box_head.tail(pooled[None, :4], None)

    return run(model, forward[0], recorded_regions(golden).boxes)


def test_region_features_logits_and_deltas(case, head_outputs):
    name, golden, _, _ = case
    pooled, logits, deltas, summary = head_outputs
    values = samples(nchw(pooled), 1024)
    compare(f"{name}: box head", REFERENCE, "RoIAlign", values, golden["pool_samples"], atol=1e-4)
    compare(f"{name}: box head", REFERENCE, "fc7", summary[0], golden["fc7_first4"], atol=2e-4)
    compare(f"{name}: box head", REFERENCE, "class logits", logits[0], golden["cls_score_logits"], atol=3e-4)
    theirs = golden["bbox_pred_every4"].reshape(1, 75, 21, 4)
    compare(f"{name}: box head", REFERENCE, "box deltas", deltas[:, ::4], theirs, atol=2e-4)


def kept_first(golden, recorded, deltas):
    """Yields (class, order of the recorded regions in which those that the reference kept for it come first).

    Regions thinner than a feature cell or beyond the last one have exactly the same features, and so the same scores,
    as other regions. The unstable sort of the reference decides which of them suppresses the others; ours takes the
    first. The order does not affect regions of different scores.
    """
    regions = jnp.asarray(continuous(golden["rois"][0, :, None, 1:]))
    boxes = decode(deltas, regions, stds=(0.1, 0.1, 0.2, 0.2), max_log_scale=None, far_corner_offset=1)
    boxes = np.asarray(clip(boxes, jnp.asarray(IMAGE_HW[0]), far_corner_offset=1))
    for label in range(1, 21):
        rows = golden[recorded][golden[recorded][:, 0] == label]
        kept = [np.abs(boxes[:, label] - continuous(row[1:5])).max(axis=1).argmin() for row in rows]
        yield label, np.argsort(~np.isin(np.arange(len(boxes)), kept), kind="stable")


@pytest.mark.parametrize("recorded, score_threshold", [("dets_t05", 0.05), ("dets_t00", 0.0)])
def test_detections_in_the_recorded_regions(case, head_outputs, recorded, score_threshold):
    name, golden, model, _ = case
    _, logits, deltas, _ = head_outputs
    options = dict(
        means=model.config.roi_sampling.box_means,
        stds=model.config.roi_sampling.box_stds,
        coder=model.config.box_coder,
        config=PostprocessConfig(score_threshold=score_threshold),
    )
    run = jax.jit(functools.partial(postprocess, **options))
    regions = jax.tree.map(lambda leaf: leaf[0], recorded_regions(golden))
    found = []
    for label, order in kept_first(golden, recorded, deltas[0]):
        ordered = Proposals(*(leaf[order] for leaf in regions))
        one = run(logits[0, order], deltas[0, order], ordered, jnp.asarray(IMAGE_HW[0]))
        of_class = np.asarray(one.valid & (one.labels == label))
        found.append([np.asarray(leaf)[of_class] for leaf in one])
    boxes, scores, labels, _ = (np.concatenate(leaves) for leaves in zip(*found))
    best = np.argsort(-scores, kind="stable")
    boxes, scores, labels = boxes[best], scores[best], labels[best]
    theirs = golden[recorded]
    if len(theirs) > 100:
        # The reference keeps all detections that share the hundredth score; detections above it are compared.
        least = np.sort(theirs[:, 5])[-100] + 1e-6
        theirs, chosen = theirs[theirs[:, 5] > least], scores > least
        boxes, scores, labels = boxes[chosen], scores[chosen], labels[chosen]
    assert len(scores) == len(theirs) >= 90
    theirs = theirs[np.argsort(-theirs[:, 5], kind="stable")]
    concept = f"{name}: detections above {score_threshold}"
    compare(concept, REFERENCE, "scores", scores, theirs[:, 5], atol=3e-4)
    # Scores closer than the tolerance may change places, so each of theirs is paired with the nearest of ours.
    pairs = []
    for label, *box, score in theirs:
        near = np.flatnonzero((labels == label) & (np.abs(scores - score) <= 3e-4))
        pairs.append(near[np.abs(boxes[near] - continuous(box)).max(axis=1).argmin()])
    assert sorted(pairs) == list(range(len(theirs)))
    apart = np.abs(np.diff(theirs[:, 5], prepend=2.0, append=-1.0)) > 6e-4
    apart = apart[1:] & apart[:-1]
    compare(concept, REFERENCE, "labels in order where scores differ", labels[apart], theirs[apart, 0].astype(int))
    compare(concept, REFERENCE, "labels", labels[pairs], theirs[:, 0].astype(int))
    compare(concept, REFERENCE, "boxes", boxes[pairs], continuous(theirs[:, 1:5]), atol=0.03)


def test_detect_finds_the_same_detections_as_the_head_on_its_own_proposals(case, forward):
    """The proposals of `detect` are the recorded valid ones, so it finds every detection that is not from padding."""
    name, golden, model, _ = case
    images = network_input(golden, model, "image")
    found = jax.jit(detect)(model, images, IMAGE_HW, np.ones((1, 2), np.float32))
    rois = recorded_regions(golden)
    valid = jnp.asarray(golden["rois"][:, :, 1:].any(axis=-1))
    if name == "ResNet-101-C4":  # one proposal is the single pixel at the origin, which looks like padding
        valid = jnp.ones_like(valid)
    among = jax.jit(detections_in_regions)(model, forward[0], rois._replace(valid=valid), jnp.asarray(IMAGE_HW))
    np.testing.assert_array_equal(found.valid, among.valid)
    np.testing.assert_allclose(found.scores, among.scores, atol=3e-4)


@pytest.fixture(scope="module")
def training(case):
    """Returns (losses, gradients by our path), normalised as the reference does."""
    _, golden, model, _ = case
    graphdef, params, frozen = split(model)
    images = network_input(golden, model, "image", "image_b")
    gt = golden["gt_boxes"]
    valid = gt[..., 2] > 0
    ground_truth = GroundTruth(
        jnp.asarray(np.where(valid[..., None], continuous(gt[..., :4]), 0)),
        jnp.asarray(gt[..., 4].astype(np.int32)),
        jnp.asarray(valid),
    )
    rois = RoiTargets(
        boxes=jnp.asarray(continuous(golden["train_rois"][..., 1:])),
        labels=jnp.asarray(golden["train_roi_labels"].astype(np.int32)),
        deltas=jnp.asarray(golden["train_roi_targets"]),
        valid=jnp.ones((2, 32), bool),
    )
    keys = jax.random.split(jax.random.key(0), 2)
    image_hw = jnp.asarray(np.repeat(IMAGE_HW, 2, axis=0))

    @functools.partial(jax.jit, static_argnums=0)
    def run(graphdef, params, frozen, images):
        def total(params):
            model = nnx.merge(graphdef, params, frozen)
            levels = shared_features(model, images, image_hw)
            anchors = jnp.asarray(anchors_of(model.config, (levels[0].shape[1:3],)).anchors)
            label = functools.partial(anchor_targets, config=model.config.rpn)
            targets = jax.vmap(label, in_axes=(0, None, None, 0, 0))(
                keys, anchors, jnp.ones(len(anchors), bool), image_hw, ground_truth
            )
            losses = losses_for_targets(model, levels, rpn_output(model, levels, image_hw), targets, rois)
            rpn_class, rpn_box, *box = losses.means.values()
            parts = jnp.stack(
                [
                    rpn_class.sum.sum() / rpn_class.count.sum(),
                    rpn_box.sum.sum() / rpn_box.count[-1] / 2,
                    *(mean.sum.sum() / mean.count.sum() for mean in box),
                ]
            )
            return parts.sum(), parts

        return jax.grad(total, has_aux=True)(params)

    gradients, parts = run(graphdef, params, frozen, images)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return np.asarray(parts), {reference_weights.name_of(path): np.asarray(leaf) for path, leaf in leaves}


LOSSES = ("rpn_loss_cls", "rpn_loss_box", "RCNN_loss_cls", "RCNN_loss_bbox")


def test_training_losses(case, training):
    name, golden, _, _ = case
    for ours, key in zip(training[0], LOSSES):
        compare(f"{name}: losses", REFERENCE, key, ours, golden[key], rtol=1e-4)


def test_gradients_of_the_sum_of_the_losses(case, training):
    name, golden, _, table = case
    by_key = {table[path].key: table[path].theirs(gradient) for path, gradient in training[1].items()}
    for key, norm, values in zip(golden["grad_keys"], golden["grad_norms"], golden["grad_samples"]):
        ours = by_key[str(key)]
        ours_norm = np.linalg.norm(ours.astype(np.float64))
        compare(f"{name}: gradients", REFERENCE, f"norm of {key}", ours_norm, norm, rtol=1e-3)
        # A single entry is known only relative to the root mean square of the gradient.
        tolerance = dict(atol=1e-3 * norm / np.sqrt(ours.size), rtol=1e-3)
        compare(f"{name}: gradients", REFERENCE, f"entries of {key}", samples(ours, 8), values, **tolerance)


def test_parameters_that_the_reference_never_trains_are_not_trained(case, training):
    """The frozen parameters of the reference are our constants and fixed stages; all others have a gradient."""
    _, golden, _, table = case
    trained = {table[path].key for path in training[1]}
    frozen = {str(key) for key in golden["params_without_grad"]}
    assert trained.isdisjoint(frozen)
    statistics = {key for key in golden["state_keys"] if "running_" in key}
    assert trained | frozen | statistics == {str(key) for key in golden["state_keys"]}
