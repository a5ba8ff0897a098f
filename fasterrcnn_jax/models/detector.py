"""Faster R-CNN: the stages in order, for training and for detection.

Ren et al. 2015 (arXiv:1506.01497). The stages before and after the network's layers see one image and
are mapped over the batch here, so an image's result never depends on its batch mates.
"""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt32

from fasterrcnn_jax.anchors import cell_anchors, cell_centres, grid_anchors
from fasterrcnn_jax.config import ModelConfig, ProposalConfig
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.losses import box_losses, rpn_losses
from fasterrcnn_jax.models.heads import BoxHead, Keys, RpnHead
from fasterrcnn_jax.models.resnet import ResNet
from fasterrcnn_jax.models.vgg import Vgg16
from fasterrcnn_jax.postprocess import postprocess
from fasterrcnn_jax.proposals import propose
from fasterrcnn_jax.roi_features import roi_features
from fasterrcnn_jax.structures import AnchorTargets, Batch, Detections, Losses, Proposals, RoiTargets
from fasterrcnn_jax.targets import anchor_targets, roi_targets

# Both functions below log when they are traced: once per program, so that recompilation shows.
logger = logging.getLogger(__name__)


class Detector(nnx.Module):
    """The layers and their configuration; a pytree whose structure carries everything static."""

    def __init__(self, config: ModelConfig, class_names: tuple[str, ...], *, rng: np.random.Generator):
        self.config = config
        self.class_names = class_names
        backbone = Vgg16 if config.backbone.name == "vgg16" else ResNet
        self.backbone = backbone(config.backbone, config.image, rng=rng)
        self.rpn_head = RpnHead(config, self.backbone.channels, rng=rng)
        self.box_head = BoxHead(config, self.backbone.channels, len(class_names), rng=rng)


def create(config: ModelConfig, class_names: tuple[str, ...], *, seed: int) -> Detector:
    """Returns a detector with fresh random weights."""
    return Detector(config, class_names, rng=np.random.default_rng(seed))


def split(model: Detector) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """Returns (structure, what training moves, what it does not): constants and the fixed stages."""
    fixed = model.config.backbone.fixed_stages

    def is_trained(path, _):
        if path[0] != "backbone" or not fixed:
            return True
        # The stem counts to the first stage.
        return path[1] == "stages" and path[2] >= fixed

    return nnx.split(model, nnx.All(nnx.Param, is_trained), ...)


def anchors_of(
    config: ModelConfig, grid_hw: tuple[int, int]
) -> tuple[Float[np.ndarray, "a 4"], Float[np.ndarray, "a 2"]]:
    """Returns the anchors of a feature map and the (x, y) centres of their cells."""
    rpn = config.rpn
    cells = cell_anchors(rpn.anchor_base, rpn.anchor_scales, rpn.anchor_ratios, rounding=rpn.anchor_rounding)
    stride = config.backbone.stride
    centres = np.repeat(cell_centres(grid_hw, stride), len(cells), axis=0)
    return grid_anchors(cells, grid_hw, stride), centres


def _anchor_valid(
    centres: Float[np.ndarray, "a 2"], image_hw: Float[Array, "b 2"], stride: int
) -> Bool[Array, "b a"]:
    """True where the anchor's cell holds picture: without padding the others would hardly exist."""
    corners = jnp.asarray(centres) - 0.5 * stride
    return (corners[None] < image_hw[:, None, ::-1]).all(axis=-1)


def _check_border(
    anchors: Float[np.ndarray, "a 4"], canvas: tuple[int, int], allowed_border: float | None
) -> None:
    """Raises InputError where even a picture that fills the canvas has no anchor to train the RPN on."""
    if allowed_border is not None:
        sides = anchors[:, 2:] - anchors[:, :2]
        reach = np.concatenate([-anchors[:, :2], anchors[:, 2:] - np.float32(canvas[::-1])], axis=1)
        if (reach > allowed_border).any(axis=1).all():
            raise InputError(
                f"every anchor reaches more than model.rpn.allowed_border = {allowed_border} pixels over the border "
                f"of a {canvas[0]} x {canvas[1]} canvas: the smallest is {sides.prod(axis=1).min() ** 0.5:.0f} pixels "
                "square; smaller model.rpn.anchor_scales, or None for the border, give the RPN something to learn"
            )


def _propose(
    config: ModelConfig,
    proposal_config: ProposalConfig,
    anchors: Float[np.ndarray, "a 4"],
    objectness: Float[Array, "b a"],
    deltas: Float[Array, "b a 4"],
    anchor_valid: Bool[Array, "b a"],
    image_hw: Float[Array, "b 2"],
    scale: Float[Array, "b 2"],
) -> Proposals:
    options = dict(config=proposal_config, coder=config.box_coder)
    return jax.vmap(functools.partial(propose, **options), in_axes=(0, 0, None, 0, 0, 0))(
        objectness, deltas, jnp.asarray(anchors), anchor_valid, image_hw, scale
    )


def _roi_features(
    model: Detector, features: Float[Array, "b h w c"], boxes: Float[Array, "b r 4"]
) -> Float[Array, "b r s s c"]:
    config = model.config
    options = dict(
        stride=config.backbone.stride,
        far_corner_offset=config.box_coder.far_corner_offset,
        config=config.roi_features,
    )
    return jax.vmap(functools.partial(roi_features, **options))(features, boxes)


def _rois_per_image(config: ModelConfig, batch_size: int) -> int:
    sampling = config.roi_sampling
    if sampling.rois_per_batch is None:
        return sampling.rois_per_image
    if sampling.rois_per_batch % batch_size:
        raise ValueError(
            f"rois_per_batch must be a multiple of the {batch_size} images of a batch, "
            f"got {sampling.rois_per_batch}"
        )
    return sampling.rois_per_batch // batch_size


def training_losses(
    model: Detector, batch: Batch, key: PRNGKeyArray | UInt32[Array, "2"], *, num_devices: int = 1
) -> Losses:
    """Returns the four losses of a batch as sums and counts; approximate joint training, section 3.2.

    Randomness is folded from `key` per image by its index: which anchors and RoIs are drawn for an
    image, and what dropout drops, does not depend on how images are batched or spread over devices.

    Args:
      num_devices: devices that hold another part of the same batch each, this one included.
    Raises:
      InputError: no anchor lies within `allowed_border` of the canvas.
      ValueError: `rois_per_batch` cannot be divided over the images.
    """
    logger.info("compiling the training step for images %s", batch.images.shape)
    config = model.config
    features = model.backbone(batch.images, batch.image_hw)
    objectness, deltas = model.rpn_head(features)
    anchors, centres = anchors_of(config, features.shape[1:3])
    _check_border(anchors, batch.images.shape[1:3], config.rpn.allowed_border)
    anchor_valid = _anchor_valid(centres, batch.image_hw, config.backbone.stride)
    # Rows that only fill the batch take part in nothing.
    anchor_valid &= batch.image_valid[:, None]
    ground_truth = batch.ground_truth._replace(
        valid=batch.ground_truth.valid & batch.image_valid[:, None]
    )

    keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index), 3))(batch.image_index)
    a_targets = jax.vmap(functools.partial(anchor_targets, config=config.rpn), in_axes=(0, None, 0, 0, 0))(
        keys[:, 0], jnp.asarray(anchors), anchor_valid, batch.image_hw, ground_truth
    )
    proposals = _propose(
        config, config.train_proposals, anchors, objectness, deltas, anchor_valid, batch.image_hw, batch.scale
    )
    rois_per_image = _rois_per_image(config, num_devices * batch.images.shape[0])
    rois = jax.vmap(
        functools.partial(roi_targets, rois_per_image=rois_per_image, config=config.roi_sampling)
    )(keys[:, 1], proposals, ground_truth)
    losses = losses_towards(
        model,
        features,
        objectness,
        deltas,
        a_targets,
        rois,
        num_locations=anchor_valid.sum(axis=1) // (len(anchors) // math.prod(features.shape[1:3])),
        dropout_keys=keys[:, 2],
    )
    return jax.tree.map(lambda per_image: per_image.sum(), losses)


def losses_towards(
    model: Detector,
    features: Float[Array, "b h w c"],
    objectness: Float[Array, "b a"],
    deltas: Float[Array, "b a 4"],
    a_targets: AnchorTargets,
    rois: RoiTargets,
    *,
    num_locations: Int[Array, "b"],
    dropout_keys: Keys | None,
) -> Losses:
    """Returns the four losses of each image towards given targets: the second half of `training_losses`.

    Args:
      num_locations: feature cells that hold picture.
      dropout_keys: one per image; None drops nothing.
    """
    config = model.config.loss
    pooled = _roi_features(model, features, rois.boxes)
    class_logits, box_deltas = model.box_head(pooled, dropout_keys=dropout_keys)
    rpn = jax.vmap(functools.partial(rpn_losses, config=config))(
        objectness, deltas, a_targets, num_locations
    )
    box = jax.vmap(functools.partial(box_losses, config=config))(class_logits, box_deltas, rois)
    return Losses(*rpn, *box)


def detect(
    model: Detector,
    images: Float[Array, "b h w 3"],
    image_hw: Float[Array, "b 2"],
    scale: Float[Array, "b 2"],
) -> Detections:
    """Returns `max_detections` detections per image with their validity; fixed shapes throughout.

    Pure: call it inside your own `jax.jit` or `jax.vmap`. Pass the model as an argument; closing over
    it would bake its weights into the program. The other arguments are what `preprocess` returns.

    Args:
      images: preprocessed pictures (`fasterrcnn_jax.preprocess`), zero beyond `image_hw`.
      image_hw: (height, width) of each picture inside the canvas; boxes are returned in its pixels.
      scale: (y, x) network pixels per pixel of the stored picture.
    """
    logger.info("compiling detection for images %s", images.shape)
    config = model.config
    features = model.backbone(images, image_hw)
    objectness, deltas = model.rpn_head(features)
    anchors, centres = anchors_of(config, features.shape[1:3])
    anchor_valid = _anchor_valid(centres, image_hw, config.backbone.stride)
    proposals = _propose(
        config, config.test_proposals, anchors, objectness, deltas, anchor_valid, image_hw, scale
    )
    return detect_in(model, features, proposals, image_hw)


def detect_in(
    model: Detector, features: Float[Array, "b h w c"], proposals: Proposals, image_hw: Float[Array, "b 2"]
) -> Detections:
    """Returns the detections among given regions of a feature map: Fast R-CNN, the second half of `detect`."""
    config = model.config
    class_logits, box_deltas = model.box_head(_roi_features(model, features, proposals.boxes))
    options = dict(
        means=config.roi_sampling.box_means,
        stds=config.roi_sampling.box_stds,
        coder=config.box_coder,
        config=config.postprocess,
    )
    return jax.vmap(functools.partial(postprocess, **options))(class_logits, box_deltas, proposals, image_hw)
