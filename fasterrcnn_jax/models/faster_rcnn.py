"""Faster R-CNN on one page: the training losses and the detections, in the order of the paper.

Ren et al. 2015 (arXiv:1506.01497). The region proposal network is in `rpn.py`, the second stage in `roi_heads.py`.
"""

import logging
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector, Features, shared_features
from fasterrcnn_jax.models.roi_heads import (
    batch_box_losses,
    detections_in_regions,
    sample_rois,
)
from fasterrcnn_jax.models.rpn import (
    ImageKeys,
    RpnOutput,
    batch_anchor_targets,
    batch_proposals,
    batch_rpn_losses,
    rpn_output,
)
from fasterrcnn_jax.ops.losses import StageLosses
from fasterrcnn_jax.structures import (
    AnchorTargets,
    Batch,
    Detections,
    GroundTruth,
    Images,
    Losses,
    Proposals,
    RoiTargets,
)

# Losses and detection log when they are traced, once per program, so that recompilation shows.
logger = logging.getLogger(__name__)

StepKey = PRNGKeyArray | UInt32[Array, "2"]


def training_losses(
    model: Detector,
    batch: Batch,
    key: StepKey,
    *,
    num_devices: int = 1,
    implementation: Implementation = None,
) -> Losses:
    """Returns the four losses of a batch as sums and counts; approximate joint training, section 3.2.

    Randomness is folded from `key` per image by its index. The anchors and RoIs sampled from an image, and the
    activations that dropout zeroes, do not depend on how images are batched or spread over devices.

    Args:
      num_devices: how many devices hold a part of the same batch, this one included.
      implementation: implementation of NMS and region features, as in `detect`.
    Raises:
      InputError: no anchor lies within `rpn.allowed_border` of the canvas.
      ValueError: `rois_per_batch` cannot be divided evenly among the images.
    """
    config = model.config
    keys, ground_truth = _keys_per_image(key, batch.image_index), _ground_truth_of(batch)
    features = _training_features(model, batch)
    rpn = rpn_output(model, features, batch.image_hw, batch.image_valid)
    anchor_targets = batch_anchor_targets(config, keys.anchors, rpn, ground_truth, canvas=_canvas(batch))
    proposals = batch_proposals(config, rpn, batch.scale, config.train_proposals, implementation)
    rois = sample_rois(config, keys.rois, proposals, ground_truth, num_devices=num_devices)
    losses = losses_for_targets(
        model, features, rpn, anchor_targets, rois, dropout_keys=keys.dropout, implementation=implementation
    )
    return _summed(losses)


def losses_for_targets(
    model: Detector,
    features: Features,
    rpn: RpnOutput,
    anchor_targets: AnchorTargets,
    rois: RoiTargets,
    *,
    dropout_keys: ImageKeys | None = None,
    implementation: Implementation = None,
) -> Losses:
    """Returns the four losses of each image for given targets; the second half of `training_losses`.

    Args:
      anchor_targets: at most `config.rpn.anchors_per_image` anchors of an image have a label; with more, the RPN losses
        of the image are NaN.
      dropout_keys: one key per image; None: no dropout.
    """
    return _losses(
        batch_rpn_losses(model, features, rpn, anchor_targets),
        batch_box_losses(model, features, rois, dropout_keys, implementation),
    )


def rpn_training_losses(
    model: Detector,
    batch: Batch,
    key: StepKey,
    *,
    num_devices: int = 1,
    implementation: Implementation = None,
) -> Losses:
    """Returns the losses of the RPN alone; steps 1 and 3 of alternating training, section 3.2.

    The losses of the box head have sum 0 and count 0. The arguments, and the sampled anchors, are the same as in
    `training_losses`.

    Raises:
      InputError: no anchor lies within `rpn.allowed_border` of the canvas.
    """
    keys, ground_truth = _keys_per_image(key, batch.image_index), _ground_truth_of(batch)
    features = _training_features(model, batch)
    rpn = rpn_output(model, features, batch.image_hw, batch.image_valid)
    targets = batch_anchor_targets(model.config, keys.anchors, rpn, ground_truth, canvas=_canvas(batch))
    return _summed(_losses(batch_rpn_losses(model, features, rpn, targets), StageLosses.none(len(batch.images))))


def box_training_losses(
    model: Detector,
    batch: Batch,
    key: StepKey,
    *,
    num_devices: int = 1,
    implementation: Implementation = None,
) -> Losses:
    """Returns the losses of the box head alone, on the proposals in the batch: Fast R-CNN.

    Steps 2 and 4 of alternating training, section 3.2. The losses of the RPN have sum 0 and count 0. The arguments,
    and the RoIs sampled from the same proposals, are the same as in `training_losses`.

    Raises:
      ValueError: the batch holds no proposals, or `rois_per_batch` cannot be divided evenly among the images.
    """
    if batch.proposals is None:
        raise ValueError("the box head alone is trained on the proposals in the batch, and this batch holds none")
    keys, ground_truth = _keys_per_image(key, batch.image_index), _ground_truth_of(batch)
    features = _training_features(model, batch)
    proposals = batch.proposals._replace(valid=batch.proposals.valid & batch.image_valid[:, None])
    rois = sample_rois(model.config, keys.rois, proposals, ground_truth, num_devices=num_devices)
    found = batch_box_losses(model, features, rois, keys.dropout, implementation)
    return _summed(_losses(StageLosses.none(len(batch.images)), found))


def detect(
    model: Detector,
    images: Images,
    image_hw: Float[Array, "b 2"],
    scale: Float[Array, "b 2"],
    *,
    implementation: Implementation = None,
) -> Detections:
    """Returns `max_detections` detections per image with their validity, in fixed shapes.

    The function is pure: call it inside your own `jax.jit` or `jax.vmap`. Pass the model as an argument; a model
    that is closed over becomes constants of the program. `preprocess` returns the other arguments.

    Args:
      images: preprocessed images (`fasterrcnn_jax.preprocess`), zero beyond `image_hw`.
      image_hw: (height, width) of each image inside the canvas. Boxes are returned in its pixels.
      scale: (y, x) network pixels per pixel of the original image.
      implementation: implementation of NMS and region features. "xla" is plain JAX, which `jax.export` needs;
        "mosaic" is the GPU kernels; None chooses while tracing: the kernels if they can run, otherwise plain JAX.
    """
    logger.info("compiling detection for images %s", images.shape)
    config = model.config
    features = shared_features(model, images, image_hw)
    rpn = rpn_output(model, features, image_hw)
    proposals = batch_proposals(config, rpn, scale, config.test_proposals, implementation)
    return detections_in_regions(model, features, proposals, image_hw, implementation=implementation)


def find_proposals(
    model: Detector,
    images: Images,
    image_hw: Float[Array, "b 2"],
    scale: Float[Array, "b 2"],
    *,
    implementation: Implementation = None,
) -> Proposals:
    """Returns the proposals of the RPN in network pixels, under the limits that the box head is trained with.

    The arguments are the same as in `detect`.
    """
    logger.info("compiling proposals for images %s", images.shape)
    features = shared_features(model, images, image_hw)
    rpn = rpn_output(model, features, image_hw)
    return batch_proposals(model.config, rpn, scale, model.config.train_proposals, implementation)


def detect_in_proposals(
    model: Detector,
    images: Images,
    image_hw: Float[Array, "b 2"],
    proposals: Proposals,
    *,
    implementation: Implementation = None,
) -> Detections:
    """Returns the detections among given proposals in network pixels, without the RPN: Fast R-CNN.

    The other arguments are the same as in `detect`.
    """
    logger.info("compiling detection in given proposals for images %s", images.shape)
    features = shared_features(model, images, image_hw)
    return detections_in_regions(model, features, proposals, image_hw, implementation=implementation)


class _KeysPerImage(NamedTuple):
    anchors: ImageKeys  # which anchors are sampled
    rois: ImageKeys  # which RoIs are sampled
    dropout: ImageKeys  # which activations are zeroed


def _keys_per_image(key: StepKey, image_index: Int[Array, "b"]) -> _KeysPerImage:
    keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index), 3))(image_index)
    return _KeysPerImage(anchors=keys[:, 0], rois=keys[:, 1], dropout=keys[:, 2])


def _ground_truth_of(batch: Batch) -> GroundTruth:
    # Rows that only fill the batch have no objects.
    valid = batch.ground_truth.valid & batch.image_valid[:, None]
    return batch.ground_truth._replace(valid=valid)


def _training_features(model: Detector, batch: Batch) -> Features:
    logger.info("compiling the training step for images %s", batch.images.shape)
    return shared_features(model, batch.images, batch.image_hw)


def _canvas(batch: Batch) -> tuple[int, int]:
    return batch.images.shape[1], batch.images.shape[2]


def _losses(rpn: StageLosses, box: StageLosses) -> Losses:
    return Losses(
        rpn_objectness=rpn.classification,
        rpn_box=rpn.box,
        box_class=box.classification,
        box_delta=box.box,
        rpn_foreground=rpn.foreground,
        box_foreground=box.foreground,
    )


def _summed(losses: Losses) -> Losses:
    return jax.tree.map(lambda per_image: per_image.sum(), losses)
