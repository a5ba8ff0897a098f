"""The step-by-step notebook of the reference documents: an image of 800 x 800, its numbers and its shapes.

VGG16 with batch norm, 800 x 800 pixels, boxes (y1, x1, y2, x2) = (20, 30, 400, 500) and (300, 400, 500, 600).
Its anchors are not rounded and are placed as ours are; it puts channels first, and we put them last.
`write_notebook_step.py` ran two training steps of the notebook's network in PyTorch; it names what it changes in them.
"""

import dataclasses
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_weights
import tiny
from fidelity import compare, swapped
from flax import nnx

from fasterrcnn_jax.config import ImageConfig, ProposalConfig, TrainConfig
from fasterrcnn_jax.config.families import notebook_vgg16
from fasterrcnn_jax.models.detector import Detector, shared_features
from fasterrcnn_jax.models.faster_rcnn import losses_for_targets
from fasterrcnn_jax.models.roi_heads import sample_rois
from fasterrcnn_jax.models.rpn import batch_anchor_targets, rpn_output
from fasterrcnn_jax.ops.anchors import anchors_of
from fasterrcnn_jax.ops.boxes import pairwise_iou
from fasterrcnn_jax.ops.proposals import propose
from fasterrcnn_jax.ops.roi_operators import roi_features
from fasterrcnn_jax.ops.targets import anchor_targets, roi_targets, within_border
from fasterrcnn_jax.processes import AXIS, replicate
from fasterrcnn_jax.structures import Batch, GroundTruth, Proposals
from fasterrcnn_jax.training.optimizer import create_optimizer
from fasterrcnn_jax.training.state import merge
from fasterrcnn_jax.training.step import create_state, data_parallel, make_train_step

IMAGE_HW = jnp.float32([800, 800])
BOXES = jnp.float32([[30, 20, 500, 400], [400, 300, 600, 500]])
GROUND_TRUTH = GroundTruth(BOXES, jnp.int32([6, 8]), jnp.ones(2, bool))
CONFIG = notebook_vgg16()
ANCHORS = jnp.asarray(anchors_of(CONFIG, ((50, 50),)).anchors)
KEY = jax.random.key(0)


def labels_of(config):
    targets = anchor_targets(KEY, ANCHORS, jnp.ones(22500, bool), IMAGE_HW, GROUND_TRUTH, config=config)
    return {label: int((targets.labels == label).sum()) for label in (1, 0, -1)}


def test_anchors_inside_the_image_and_the_best_overlap_of_each_box():
    inside = within_border(ANCHORS, IMAGE_HW, CONFIG.rpn.allowed_border)
    compare("notebook", "notebook", "anchors", len(ANCHORS), 22500)
    compare("notebook", "notebook", "anchors inside", int(inside.sum()), 8940)
    best = jnp.where(inside[:, None], pairwise_iou(ANCHORS, BOXES), 0.0).max(axis=0)
    compare("notebook", "notebook", "best IoU of each box", best, np.float32([0.68130493, 0.61035156]), atol=1e-6)


def test_anchors_before_sampling():
    """18 anchors reach a box's best, most of them by a tie; none reaches 0.7."""
    everything = dataclasses.replace(CONFIG.rpn, anchors_per_image=22500, fg_fraction=1.0)
    found = labels_of(everything)
    outside = 22500 - 8940
    compare("notebook", "notebook", "positive anchors", found[1], 18)
    compare("notebook", "notebook", "negative anchors", found[0], 7690)
    compare("notebook", "notebook", "ignored anchors inside", found[-1] - outside, 1232)


def test_anchors_after_sampling():
    compare("notebook", "notebook", "sample of 256", list(labels_of(CONFIG.rpn).values())[:2], [18, 238])


@pytest.fixture(scope="module")
def shapes():
    """Returns the shape of every step, without computing values."""

    def run(images):
        config, model = CONFIG, Detector(CONFIG, tuple(map(str, range(20))), rng=np.random.default_rng(0))
        features = model.backbone(images, IMAGE_HW[None])
        objectness, deltas = model.rpn_head(features)
        proposals = propose(
            objectness[0],
            deltas[0],
            ANCHORS,
            jnp.ones(22500, bool),
            IMAGE_HW,
            jnp.ones(2),
            config=ProposalConfig(pre_nms_top_n=12000, post_nms_top_n=2000),
            coder=config.box_coder,
        )
        rois = roi_targets(KEY, proposals, GROUND_TRUTH, rois_per_image=128, config=config.roi_sampling)
        pooled = roi_features(
            (features[0][0],), rois.boxes, strides=(16,), far_corner_offset=0, config=config.roi_features
        )
        hidden = model.box_head.tail(pooled[None], None)
        logits, box_deltas = model.box_head(pooled[None])
        return dict(
            features=features[0],
            objectness=objectness,
            deltas=deltas,
            proposals=proposals.boxes,
            rois=rois.boxes,
            roi_targets=rois.deltas,
            roi_labels=rois.labels,
            pooled=pooled,
            hidden=hidden,
            logits=logits,
            box_deltas=box_deltas,
        )

    return nnx.eval_shape(run, jax.ShapeDtypeStruct((1, 800, 800, 3), jnp.float32))


SHAPES = {
    "features": (1, 50, 50, 512),
    "objectness": (1, 22500),
    "deltas": (1, 22500, 4),
    "proposals": (2000, 4),
    "rois": (128, 4),
    "roi_targets": (128, 4),
    "roi_labels": (128,),
    "pooled": (128, 7, 7, 512),
    "hidden": (1, 128, 4096),
    "logits": (1, 128, 21),
    "box_deltas": (1, 128, 21, 4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_every_step(shapes, name):
    compare("notebook", "notebook", f"shape of {name}", np.array(shapes[name].shape), np.array(SHAPES[name]))


# The two training steps. Of the small case every layer but the classes has an eighth of the channels, or fewer.
GOLDEN = np.load(Path(__file__).parent / "golden" / "notebook_step.npz")
ALL = 10**9  # nothing is left to a draw
SMALL = dataclasses.replace(
    CONFIG,
    image=ImageConfig(short_side=128, long_side=160, canvases=((128, 160), (160, 128))),
    backbone=dataclasses.replace(CONFIG.backbone, width=8),
    rpn=dataclasses.replace(CONFIG.rpn, anchor_scales=(1.0, 2.0, 4.0), channels=32),
    box_head=dataclasses.replace(CONFIG.box_head, channels=32),
)
SMALL_BOXES = np.float32([[[30, 20, 90, 75], [85, 60, 150, 120]]])
CASES = {
    "small": (SMALL, 3, SMALL_BOXES, np.int32([[1, 3]])),
    "full": (CONFIG, 20, np.asarray(BOXES)[None], np.int32([[6, 8]])),
}
TRAIN = TrainConfig(steps=9, batch_size=1, learning_rate=1e-3, weight_decay=0.0, double_bias=False, warmup_steps=0)
# Fixed before the first comparison: of the first step's losses and statistics, and of what follows an update.
TOLERANCE, LATER_TOLERANCE = 1e-5, 1e-4


class Case:
    """The golden numbers of a case, and our states after each of its steps."""

    def __init__(self, name):
        config, classes, boxes, labels = CASES[name]
        self.golden = {key.partition("/")[2]: GOLDEN[key] for key in GOLDEN if key.startswith(f"{name}/")}
        self.config = dataclasses.replace(
            config,
            rpn=dataclasses.replace(config.rpn, anchors_per_image=ALL, fg_fraction=1.0),
            roi_sampling=dataclasses.replace(config.roi_sampling, rois_per_image=ALL, fg_fraction=1.0),
        )
        self.numbers = range(1, 1 + sum(key.startswith("rois_") for key in self.golden))
        names = tuple(f"class{k}" for k in range(1, classes + 1))
        self.table = reference_weights.table(reference_weights.FASTER_RCNN_PYTORCH, self.config)
        weights = reference_weights.rule_weights(self.golden)
        self.model = reference_weights.load(
            lambda: Detector(self.config, names, rng=np.random.default_rng(0)), self.table, weights
        )
        self.hw = self.config.image.canvases[0]
        image = 60 * np.random.default_rng(3).standard_normal((3, *self.hw), np.float32)
        assert zlib.crc32(image.tobytes()) == self.golden["image_crc32"]
        self.images = np.ascontiguousarray(image.transpose(1, 2, 0))[None]
        self.ground_truth = GroundTruth(boxes, labels, np.ones((1, 2), bool))

    def tolerance(self, relative, rounded, exact):
        """Returns the relative tolerance against float64; at full size no less than the rounding of float32.

        There PyTorch's own float32 is off by up to 6e-6 in a loss and 2.6e-3 in the norm of a gradient. A sum in
        another order is rounded differently, so four times its largest difference is allowed.
        """
        if self.config.backbone.width < 64:
            return relative
        return max(relative, 4.0 * float(np.abs(rounded / exact - 1.0).max()))

    def batch(self, number):
        rois = swapped(self.golden[f"rois_{number}"])[None]
        return Batch(
            images=self.images,
            image_hw=np.float32([self.hw]),
            scale=np.ones((1, 2), np.float32),
            image_index=np.int32([0]),
            image_valid=np.array([True]),
            ground_truth=self.ground_truth,
            proposals=Proposals(rois, np.ones(rois.shape[:2], np.float32), np.ones(rois.shape[:2], bool)),
        )

    def trained(self):
        """Returns (losses of each step, states after each step, gradients of the first step, structure)."""
        optimizer = create_optimizer(TRAIN)
        graphdef, state = create_state(self.model, optimizer, seed=0)
        step = make_train_step(graphdef, optimizer, axis_name=AXIS, losses=losses_on_their_rois)
        devices = jax.local_devices()[:1]
        run = data_parallel(step, devices=devices)
        # Copied, because the step takes the memory of its state.
        state = replicate(jax.tree.map(np.array, state), devices=devices)
        losses, states = [], []
        for number in self.numbers:
            state, metrics = run(state, self.batch(number))
            losses.append(np.array(metrics[:4]))
            states.append(jax.device_get(state))
        # Without decay, the momentum of the first step is its gradient.
        return losses, states, optax.tree.get(states[0].opt_state, "trace"), graphdef


def losses_on_their_rois(model, batch, key, *, num_devices, implementation):
    """Returns the losses of a step whose RoIs are the recorded proposals; the notebook's NMS counts a pixel more."""
    keys, config = jax.random.split(key, 1), model.config
    features = shared_features(model, batch.images, batch.image_hw)
    rpn = rpn_output(model, features, batch.image_hw)
    targets = batch_anchor_targets(config, keys, rpn, batch.ground_truth, canvas=batch.images.shape[1:3])
    rois = sample_rois(config, keys, batch.proposals, batch.ground_truth, num_devices=num_devices)
    found = losses_for_targets(model, features, rpn, targets, rois, implementation=implementation)
    return jax.tree.map(lambda of_image: of_image.sum(), found)


@pytest.fixture(scope="module", params=["small", pytest.param("full", marks=pytest.mark.slow)])
def case(request):
    with tiny.quick_compilation(), jax.numpy_dtype_promotion("standard"):
        case = Case(request.param)
        yield f"notebook, {request.param}", case, case.trained()
    jax.clear_caches()  # the full network takes a gigabyte


def test_losses_of_each_step(case):
    """The first step is compared with PyTorch in float64, so that its rounding is no part of the difference."""
    name, case, (losses, _, _, _) = case
    for number, ours in zip(case.numbers, losses, strict=True):
        if number == 1:
            exact = case.golden["losses_1_f64"]
            rtol = case.tolerance(TOLERANCE, case.golden["losses_1"], exact)
            compare(name, "PyTorch in float64", "losses of step 1", ours, exact, rtol=rtol)
        else:
            theirs = case.golden[f"losses_{number}"]
            compare(name, "PyTorch", f"losses of step {number}", ours, theirs, atol=LATER_TOLERANCE)


@pytest.mark.parametrize("statistic", ["mean", "var"])
def test_running_statistics_after_each_step(case, statistic):
    name, case, (_, states, _, _) = case
    for number, state in zip(case.numbers, states, strict=True):
        leaves = jax.tree_util.tree_leaves_with_path(state.running)
        ours = [leaf for path, leaf in leaves if reference_weights.name_of(path).endswith(f"/{statistic}")]
        theirs = case.golden[f"running_{statistic}_{number}"]
        tolerance = TOLERANCE if number == 1 else LATER_TOLERANCE
        what = f"running {statistic} after step {number}"
        compare(name, "PyTorch", what, np.concatenate(ours), theirs, atol=tolerance, rtol=tolerance)


def test_gradients_of_the_first_step(case):
    """The gradient of one objectness logit is 1 / sqrt(2) of the gradient of two."""
    name, case, (_, _, gradients, _) = case
    ours, norms, exact = {}, case.golden["grad_norms"], case.golden["grad_norms_f64"]
    trained = np.array([key not in WITHOUT_EFFECT for key in case.golden["grad_keys"]])
    rtol = case.tolerance(1e-3, norms[trained], exact[trained])
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        source = case.table[reference_weights.name_of(path)]
        scale = 2**0.5 if "RPN_cls_score" in source.key else 1.0
        ours[source.key] = scale * np.linalg.norm(np.float64(gradient))
    for key, norm in zip(map(str, case.golden["grad_keys"]), exact, strict=True):
        if key in WITHOUT_EFFECT:
            # Against the gradients of thousands of pixels that cancel.
            assert max(norm, ours[key]) < 1e-6 * max(exact)
            continue
        compare(name, "PyTorch in float64", f"norm of the gradient of {key}", ours[key], norm, rtol=rtol)


# Biases before batch norm: what is left of their gradient is rounding.
WITHOUT_EFFECT = {f"RCNN_base.{n}.bias" for n in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)}


def test_detection_uses_the_running_statistics(case):
    """Detection with the weights before the first step and the statistics after it.

    After two updates, PyTorch's own features in float32 differ by 0.03 from those in float64.
    """
    name, case, (_, states, _, graphdef) = case
    first = create_state(case.model, create_optimizer(TRAIN), seed=0)[1]
    model = merge(graphdef, first._replace(running=states[0].running))
    batch = case.batch(1)

    @jax.jit
    def run(model, images, image_hw):
        features = shared_features(model, images, image_hw)
        return features[0], rpn_output(model, features, image_hw).objectness[0]

    features, objectness = run(model, jnp.asarray(batch.images), jnp.asarray(batch.image_hw))
    maps = np.asarray(features).transpose(0, 3, 1, 2).ravel()
    for what, ours, theirs in (
        ("features in detection", maps, case.golden["eval_features"]),
        ("objectness in detection", np.asarray(objectness), case.golden["eval_objectness"]),
    ):
        ours = ours[:: max(1, len(ours) // 1024)]
        compare(name, "PyTorch", what, ours, theirs, atol=LATER_TOLERANCE, rtol=LATER_TOLERANCE)
