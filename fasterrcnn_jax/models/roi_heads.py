"""The second stage over a batch, Fast R-CNN: sampled RoIs, region features, losses, detections.

Girshick 2015 (arXiv:1504.08083). The functions of `ops` see one image; here they are mapped over the batch, so
the result of an image does not depend on the other images of its batch.
"""

import jax
from jaxtyping import Array, Float

from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector, Features
from fasterrcnn_jax.models.rpn import ImageKeys
from fasterrcnn_jax.ops.anchors import strides_of
from fasterrcnn_jax.ops.losses import StageLosses, box_losses
from fasterrcnn_jax.ops.postprocessing import postprocess
from fasterrcnn_jax.ops.roi_operators import roi_features
from fasterrcnn_jax.ops.targets import roi_targets
from fasterrcnn_jax.structures import Detections, GroundTruth, Proposals, RoiTargets


def rois_per_image(config: ModelConfig, batch_size: int) -> int:
    """Returns how many RoIs are sampled from each image.

    Args:
      batch_size: images of a step on all devices.
    Raises:
      ValueError: `roi_sampling.rois_per_batch` is not a multiple of `batch_size`.
    """
    sampling = config.roi_sampling
    if sampling.rois_per_batch is None:
        return sampling.rois_per_image
    if sampling.rois_per_batch % batch_size:
        raise ValueError(
            f"rois_per_batch must be a multiple of the {batch_size} images of a batch, got {sampling.rois_per_batch}"
        )
    return sampling.rois_per_batch // batch_size


@jax.named_scope("roi_targets")
def sample_rois(
    config: ModelConfig,
    keys: ImageKeys,
    proposals: Proposals,
    ground_truth: GroundTruth,
    *,
    num_devices: int = 1,
) -> RoiTargets:
    """Samples and labels RoIs among the proposals and the ground truth of each image; section 2.3.

    Args:
      num_devices: how many devices hold a part of the same batch, this one included.
    Raises:
      ValueError: `rois_per_batch` cannot be divided evenly among the images.
    """
    count = rois_per_image(config, num_devices * len(proposals.boxes))

    def per_image(key, proposals, ground_truth):
        return roi_targets(key, proposals, ground_truth, rois_per_image=count, config=config.roi_sampling)

    return jax.vmap(per_image)(keys, proposals, ground_truth)


@jax.named_scope("roi_features")
def batch_roi_features(
    model: Detector, features: Features, boxes: Float[Array, "b r 4"], implementation: Implementation = None
) -> Float[Array, "b r s s c"]:
    """Returns the features of each region, from the level that fits its size."""
    config = model.config
    # P6 carries anchors only; no region takes its features from it.
    features = features if config.fpn is None else features[:-1]

    def per_image(features, boxes):
        return roi_features(
            features,
            boxes,
            strides=strides_of(config)[: len(features)],
            far_corner_offset=config.box_coder.far_corner_offset,
            config=config.roi_features,
            implementation=implementation,
        )

    return jax.vmap(per_image)(features, boxes)


def batch_box_losses(
    model: Detector,
    features: Features,
    rois: RoiTargets,
    dropout_keys: ImageKeys | None = None,
    implementation: Implementation = None,
) -> StageLosses:
    """Returns the two losses of the box head for each image; eq. 1 to 3.

    Args:
      dropout_keys: one key per image; None: no dropout.
    """
    pooled = batch_roi_features(model, features, rois.boxes, implementation)
    config = model.config
    norm = config.backbone.norm if config.fpn is None else config.fpn.norm
    # Slots without a RoI must not enter the statistics of batch normalisation.
    roi_valid = rois.valid if norm == "batch" else None
    with jax.named_scope("box_head"):
        class_logits, box_deltas = model.box_head(pooled, dropout_keys=dropout_keys, roi_valid=roi_valid)

    def per_image(class_logits, box_deltas, rois):
        return box_losses(class_logits, box_deltas, rois, config=config.loss)

    with jax.named_scope("box_losses"):
        return jax.vmap(per_image)(class_logits, box_deltas, rois)


def detections_in_regions(
    model: Detector,
    features: Features,
    proposals: Proposals,
    image_hw: Float[Array, "b 2"],
    *,
    implementation: Implementation = None,
) -> Detections:
    """Returns the detections among given regions of the shared features; the second half of `detect`.

    Args:
      image_hw: (height, width) of each image inside the canvas.
    """
    config = model.config
    pooled = batch_roi_features(model, features, proposals.boxes, implementation)
    with jax.named_scope("box_head"):
        class_logits, box_deltas = model.box_head(pooled)

    def per_image(class_logits, box_deltas, proposals, image_hw):
        return postprocess(
            class_logits,
            box_deltas,
            proposals,
            image_hw,
            means=config.roi_sampling.box_means,
            stds=config.roi_sampling.box_stds,
            coder=config.box_coder,
            config=config.postprocess,
            implementation=implementation,
        )

    with jax.named_scope("postprocess"):
        return jax.vmap(per_image)(class_logits, box_deltas, proposals, image_hw)
