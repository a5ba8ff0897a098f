"""The step-by-step notebook of the reference documents: an image of 800 x 800, its numbers and its shapes.

VGG16 with batch norm, 800 x 800 pixels, boxes (y1, x1, y2, x2) = (20, 30, 400, 500) and (300, 400, 500, 600).
Its anchors are not rounded and are placed as ours are; it puts channels first, and we put them last.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity import compare
from flax import nnx

from fasterrcnn_jax.config import ProposalConfig, RoiFeaturesConfig, RpnConfig
from fasterrcnn_jax.config.families import vgg16
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.ops.anchors import anchors_of
from fasterrcnn_jax.ops.boxes import pairwise_iou
from fasterrcnn_jax.ops.proposals import propose
from fasterrcnn_jax.ops.roi_operators import roi_features
from fasterrcnn_jax.ops.targets import anchor_targets, roi_targets, within_border
from fasterrcnn_jax.structures import GroundTruth

IMAGE_HW = jnp.float32([800, 800])
BOXES = jnp.float32([[30, 20, 500, 400], [400, 300, 600, 500]])
GROUND_TRUTH = GroundTruth(BOXES, jnp.int32([6, 8]), jnp.ones(2, bool))
CONFIG = dataclasses.replace(
    vgg16(norm="frozen_batch"),
    rpn=RpnConfig(anchor_rounding="none"),
    roi_features=RoiFeaturesConfig(operator="pool", quantisation="floor"),
)
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
