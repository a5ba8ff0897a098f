"""Faster R-CNN: the stages in order, for training and for detection.

Ren et al. 2015 (arXiv:1506.01497). The stages before and after the network's layers see one image and
are mapped over the batch here, so an image's result never depends on its batch mates.
"""

import functools
import importlib
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree, UInt32

from fasterrcnn_jax.anchor_grid import AnchorGrid, anchors_of, anchors_on_picture, check_border, strides_of
from fasterrcnn_jax.config import BackboneConfig, ModelConfig, ProposalConfig
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.losses import box_losses, rpn_losses
from fasterrcnn_jax.matching import FOREGROUND
from fasterrcnn_jax.models.fpn import Fpn
from fasterrcnn_jax.models.heads import BoxHead, Keys, RpnHead
from fasterrcnn_jax.models.layers import valid_mask
from fasterrcnn_jax.models.pixels import normalised
from fasterrcnn_jax.models.resnet import ResNet
from fasterrcnn_jax.models.vgg import Vgg16
from fasterrcnn_jax.postprocess import postprocess
from fasterrcnn_jax.proposals import propose
from fasterrcnn_jax.roi_features import roi_features
from fasterrcnn_jax.structures import (
    AnchorTargets,
    Batch,
    Detections,
    GroundTruth,
    Images,
    Losses,
    Mean,
    Proposals,
    RoiTargets,
)
from fasterrcnn_jax.targets import anchor_targets, roi_targets

# Losses and detection log when they are traced: once per program, so that recompilation shows.
logger = logging.getLogger(__name__)

# Of every level, fine to coarse: the shared features that the heads read.
Levels = tuple[Float[Array, "b _ _ c"], ...]


class Detector(nnx.Module):
    """The layers and their configuration; a pytree whose structure carries everything static."""

    def __init__(
        self,
        config: ModelConfig,
        class_names: tuple[str, ...],
        *,
        backbone: type[nnx.Module] | None = None,
        rng: np.random.Generator,
    ):
        self.config = config
        self.class_names = class_names
        backbone = backbone or backbone_class(config.backbone)
        pyramid = {} if config.fpn is None else {"pyramid": True}
        self.backbone = backbone(config.backbone, config.image, rng=rng, **pyramid)
        self.neck = None if config.fpn is None else Fpn(config.fpn, self.backbone.channels, rng=rng)
        channels = self.backbone.channels[-1] if config.fpn is None else config.fpn.channels
        self.rpn_head = RpnHead(config, channels, rng=rng)
        own = True if not isinstance(self.backbone, (ResNet, Vgg16)) else None
        self.box_head = BoxHead(config, channels, len(class_names), fully_connected=own, rng=rng)


def backbone_class(config: BackboneConfig) -> type[nnx.Module]:
    """Returns the class that `config` names; a user's own is imported.

    Raises:
      InputError: `config.own` cannot be imported.
    """
    if config.own is None:
        return Vgg16 if config.name == "vgg16" else ResNet
    module, name = config.own.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"model.backbone.own = {config.own}: {error}") from error


def create(
    config: ModelConfig, class_names: tuple[str, ...], *, seed: int, backbone: type[nnx.Module] | None = None
) -> Detector:
    """Returns a detector with fresh random weights.

    Args:
      backbone: in place of the class that `config.backbone` names.
    """
    return Detector(config, class_names, backbone=backbone, rng=np.random.default_rng(seed))


def split(model: Detector) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """Returns (structure, what training moves, what it does not): constants and the fixed stages."""
    fixed = model.config.backbone.fixed_stages

    def is_trained(path, _):
        if path[0] != "backbone" or not fixed:
            return True
        # The stem counts to the first stage.
        return path[1] == "stages" and path[2] >= fixed

    return nnx.split(model, nnx.All(nnx.Param, is_trained), ...)


def shared_features(model: Detector, images: Images, image_hw: Float[Array, "b 2"]) -> Levels:
    """Returns the maps that RPN and box head read, in the model's compute type: one, or P2 to P6."""
    config = model.config
    pixels = normalised(images, image_hw, config.image)
    maps = model.backbone(pixels.astype(config.compute_dtype), image_hw)
    levels = maps if model.neck is None else model.neck(maps, _masks(config, maps, image_hw))
    # The library's own maps have them; one of another stride would put every box in a wrong place.
    canvas = np.array(images.shape[1:3])
    for level, stride in zip(levels, strides_of(config), strict=True):
        if (np.abs(np.array(level.shape[1:3]) * stride - canvas) >= stride).any():
            raise ValueError(
                f"a map of {level.shape[1]} x {level.shape[2]} cells for a canvas of {images.shape[1]} x "
                f"{images.shape[2]} has not the configured stride {stride}"
            )
    return levels


def _masks(
    config: ModelConfig, maps: tuple[Float[Array, "b _ _ _"], ...], image_hw: Float[Array, "b 2"]
) -> tuple[Float[Array, "b _ _ 1"] | None, ...]:
    """Returns for each map where it holds picture; None where padding is not masked."""
    return tuple(
        valid_mask(image_hw, x.shape[1:3], stride) if config.backbone.mask_padding else None
        for x, stride in zip(maps, strides_of(config), strict=False)
    )


def rpn_outputs(
    model: Detector, levels: Levels, image_hw: Float[Array, "b 2"]
) -> tuple[Float[Array, "b a"], Float[Array, "b a 4"]]:
    """Returns objectness logits and deltas of all anchors, in float32."""
    return model.rpn_head(levels, _masks(model.config, levels, image_hw))


def _grid(config: ModelConfig, levels: Levels) -> AnchorGrid:
    return anchors_of(config, tuple(level.shape[1:3] for level in levels))


def _propose(
    config: ModelConfig,
    proposal_config: ProposalConfig,
    grid: AnchorGrid,
    objectness: Float[Array, "b a"],
    deltas: Float[Array, "b a 4"],
    anchor_valid: Bool[Array, "b a"],
    image_hw: Float[Array, "b 2"],
    scale: Float[Array, "b 2"],
    implementation: Implementation,
) -> Proposals:
    options = dict(
        level_sizes=grid.level_sizes,
        config=proposal_config,
        coder=config.box_coder,
        implementation=implementation,
    )
    return jax.vmap(functools.partial(propose, **options), in_axes=(0, 0, None, 0, 0, 0))(
        objectness, deltas, jnp.asarray(grid.anchors), anchor_valid, image_hw, scale
    )


def _roi_features(
    model: Detector, levels: Levels, boxes: Float[Array, "b r 4"], implementation: Implementation
) -> Float[Array, "b r s s c"]:
    config = model.config
    # No region is taken from P6: it is there for the anchors.
    levels = levels if config.fpn is None else levels[:-1]
    options = dict(
        strides=strides_of(config)[: len(levels)],
        far_corner_offset=config.box_coder.far_corner_offset,
        config=config.roi_features,
        implementation=implementation,
    )
    return jax.vmap(functools.partial(roi_features, **options))(levels, boxes)


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


class _RpnSide(NamedTuple):
    """What the RPN says of a batch's anchors, and towards what it is trained."""

    grid: AnchorGrid
    objectness: Float[Array, "b a"]
    deltas: Float[Array, "b a 4"]
    anchor_valid: Bool[Array, "b a"]
    targets: AnchorTargets

    @property
    def num_locations(self) -> Int[Array, "b"]:
        """Feature cells that hold picture."""
        return self.anchor_valid.sum(axis=1) // self.grid.per_cell


# Of every image: for its anchors, its RoIs and its dropout.
_ImageKeys = Key[Array, "b 3"] | UInt32[Array, "b 3 2"]
# Of every image: the two means of RPN or box head, and how much of the sample is foreground.
_Side = tuple[Mean, Mean, Float[Array, "b"]]


def training_losses(
    model: Detector,
    batch: Batch,
    key: PRNGKeyArray | UInt32[Array, "2"],
    *,
    num_devices: int = 1,
    implementation: Implementation = None,
) -> Losses:
    """Returns the four losses of a batch as sums and counts; approximate joint training, section 3.2.

    Randomness is folded from `key` per image by its index: which anchors and RoIs are drawn for an
    image, and what dropout drops, does not depend on how images are batched or spread over devices.

    Args:
      num_devices: devices that hold another part of the same batch each, this one included.
      implementation: of NMS and region features; `fasterrcnn_jax/kernels/README.md`.
    Raises:
      InputError: no anchor lies within `allowed_border` of the canvas.
      ValueError: `rois_per_batch` cannot be divided over the images.
    """
    levels, keys, ground_truth = _trained_on(model, batch, key)
    rpn = _rpn_side(model, batch, levels, keys, ground_truth)
    proposals = _propose(
        model.config,
        model.config.train_proposals,
        rpn.grid,
        rpn.objectness,
        rpn.deltas,
        rpn.anchor_valid,
        batch.image_hw,
        batch.scale,
        implementation,
    )
    losses = losses_towards(
        model,
        levels,
        rpn.objectness,
        rpn.deltas,
        rpn.targets,
        _rois(model.config, proposals, ground_truth, keys, num_devices),
        num_locations=rpn.num_locations,
        dropout_keys=keys[:, 2],
        implementation=implementation,
    )
    return _summed(losses)


def rpn_training_losses(
    model: Detector,
    batch: Batch,
    key: PRNGKeyArray | UInt32[Array, "2"],
    *,
    num_devices: int = 1,
    implementation: Implementation = None,
) -> Losses:
    """Returns the losses of the RPN alone, those of the box head as zeros over zero; steps 1 and 3 of section 3.2.

    Arguments, and which anchors are drawn, as in `training_losses`.

    Raises:
      InputError: no anchor lies within `allowed_border` of the canvas.
    """
    levels, keys, ground_truth = _trained_on(model, batch, key)
    rpn = _rpn_side(model, batch, levels, keys, ground_truth)
    side = _rpn_losses_towards(model.config, rpn.objectness, rpn.deltas, rpn.targets, rpn.num_locations)
    return _summed(_losses(side, _no_side(batch)))


def box_training_losses(
    model: Detector,
    batch: Batch,
    key: PRNGKeyArray | UInt32[Array, "2"],
    *,
    num_devices: int = 1,
    implementation: Implementation = None,
) -> Losses:
    """Returns the losses of the box head on the proposals in the batch, those of the RPN as zeros over zero.

    Fast R-CNN, and steps 2 and 4 of section 3.2. Arguments, and which RoIs are drawn of the same proposals, as in
    `training_losses`.

    Raises:
      ValueError: the batch holds no proposals, or `rois_per_batch` cannot be divided over the images.
    """
    if batch.proposals is None:
        raise ValueError("the box head alone is trained on the proposals in the batch, which holds none")
    levels, keys, ground_truth = _trained_on(model, batch, key)
    proposals = batch.proposals._replace(valid=batch.proposals.valid & batch.image_valid[:, None])
    rois = _rois(model.config, proposals, ground_truth, keys, num_devices)
    side = _box_losses_towards(model, levels, rois, keys[:, 2], implementation)
    return _summed(_losses(_no_side(batch), side))


def losses_towards(
    model: Detector,
    levels: Levels,
    objectness: Float[Array, "b a"],
    deltas: Float[Array, "b a 4"],
    a_targets: AnchorTargets,
    rois: RoiTargets,
    *,
    num_locations: Int[Array, "b"],
    dropout_keys: Keys | None,
    implementation: Implementation = None,
) -> Losses:
    """Returns the four losses of each image towards given targets: the second half of `training_losses`.

    Args:
      num_locations: feature cells that hold picture.
      dropout_keys: one per image; None drops nothing.
    """
    rpn = _rpn_losses_towards(model.config, objectness, deltas, a_targets, num_locations)
    return _losses(rpn, _box_losses_towards(model, levels, rois, dropout_keys, implementation))


def _trained_on(
    model: Detector, batch: Batch, key: PRNGKeyArray | UInt32[Array, "2"]
) -> tuple[Levels, _ImageKeys, GroundTruth]:
    """Returns the shared features, three keys per image, and the ground truth."""
    logger.info("compiling the training step for images %s", batch.images.shape)
    levels = shared_features(model, batch.images, batch.image_hw)
    keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index), 3))(batch.image_index)
    # Rows that only fill the batch take part in nothing.
    valid = batch.ground_truth.valid & batch.image_valid[:, None]
    return levels, keys, batch.ground_truth._replace(valid=valid)


def _rpn_side(
    model: Detector, batch: Batch, levels: Levels, keys: _ImageKeys, ground_truth: GroundTruth
) -> _RpnSide:
    config = model.config
    objectness, deltas = rpn_outputs(model, levels, batch.image_hw)
    grid = _grid(config, levels)
    check_border(grid, batch.images.shape[1:3], config.rpn.allowed_border)
    anchor_valid = anchors_on_picture(grid, batch.image_hw, config) & batch.image_valid[:, None]
    targets = jax.vmap(functools.partial(anchor_targets, config=config.rpn), in_axes=(0, None, 0, 0, 0))(
        keys[:, 0], jnp.asarray(grid.anchors), anchor_valid, batch.image_hw, ground_truth
    )
    return _RpnSide(grid, objectness, deltas, anchor_valid, targets)


def _rois(
    config: ModelConfig, proposals: Proposals, ground_truth: GroundTruth, keys: _ImageKeys, num_devices: int
) -> RoiTargets:
    rois_per_image = _rois_per_image(config, num_devices * len(proposals.boxes))
    options = dict(rois_per_image=rois_per_image, config=config.roi_sampling)
    return jax.vmap(functools.partial(roi_targets, **options))(keys[:, 1], proposals, ground_truth)


def _rpn_losses_towards(
    config: ModelConfig,
    objectness: Float[Array, "b a"],
    deltas: Float[Array, "b a 4"],
    targets: AnchorTargets,
    num_locations: Int[Array, "b"],
) -> _Side:
    means = jax.vmap(functools.partial(rpn_losses, config=config.loss))(objectness, deltas, targets, num_locations)
    return *means, (targets.labels == FOREGROUND).sum(axis=1).astype(jnp.float32)


def _box_losses_towards(
    model: Detector,
    levels: Levels,
    rois: RoiTargets,
    dropout_keys: Keys | None,
    implementation: Implementation,
) -> _Side:
    pooled = _roi_features(model, levels, rois.boxes, implementation)
    class_logits, box_deltas = model.box_head(pooled, dropout_keys=dropout_keys)
    means = jax.vmap(functools.partial(box_losses, config=model.config.loss))(class_logits, box_deltas, rois)
    return *means, (rois.valid & (rois.labels > 0)).sum(axis=1).astype(jnp.float32)


def _no_side(batch: Batch) -> _Side:
    zeros = jnp.zeros(len(batch.images))
    return Mean(zeros, zeros), Mean(zeros, zeros), zeros


def _losses(rpn: _Side, box: _Side) -> Losses:
    return Losses(*rpn[:2], *box[:2], rpn[2], box[2])


def _summed(losses: Losses) -> Losses:
    return jax.tree.map(lambda per_image: per_image.sum(), losses)


def find_proposals(
    model: Detector,
    images: Images,
    image_hw: Float[Array, "b 2"],
    scale: Float[Array, "b 2"],
    *,
    implementation: Implementation = None,
) -> Proposals:
    """Returns the proposals of the RPN alone, as many and as far apart as the box head is trained on.

    Arguments as those of `detect`; boxes are in network pixels.
    """
    logger.info("compiling proposals for images %s", images.shape)
    levels = shared_features(model, images, image_hw)
    return _proposals_in(model, levels, image_hw, scale, model.config.train_proposals, implementation)


def detect_in_given(
    model: Detector,
    images: Images,
    image_hw: Float[Array, "b 2"],
    proposals: Proposals,
    *,
    implementation: Implementation = None,
) -> Detections:
    """Returns the detections among given proposals, in network pixels, without the RPN.

    The other arguments are those of `detect`.
    """
    logger.info("compiling detection in given proposals for images %s", images.shape)
    levels = shared_features(model, images, image_hw)
    return detect_in(model, levels, proposals, image_hw, implementation=implementation)


def _proposals_in(
    model: Detector,
    levels: Levels,
    image_hw: Float[Array, "b 2"],
    scale: Float[Array, "b 2"],
    proposal_config: ProposalConfig,
    implementation: Implementation,
) -> Proposals:
    config = model.config
    objectness, deltas = rpn_outputs(model, levels, image_hw)
    grid = _grid(config, levels)
    anchor_valid = anchors_on_picture(grid, image_hw, config)
    return _propose(
        config, proposal_config, grid, objectness, deltas, anchor_valid, image_hw, scale, implementation
    )


def detect(
    model: Detector,
    images: Images,
    image_hw: Float[Array, "b 2"],
    scale: Float[Array, "b 2"],
    *,
    implementation: Implementation = None,
) -> Detections:
    """Returns `max_detections` detections per image with their validity; fixed shapes throughout.

    Pure: call it inside your own `jax.jit` or `jax.vmap`. Pass the model as an argument; closing over
    it would bake its weights into the program. The other arguments are what `preprocess` returns.

    Args:
      images: preprocessed pictures (`fasterrcnn_jax.preprocess`), zero beyond `image_hw`.
      image_hw: (height, width) of each picture inside the canvas; boxes are returned in its pixels.
      scale: (y, x) network pixels per pixel of the stored picture.
      implementation: of NMS and region features: "xla" is plain JAX and what `jax.export` needs, "mosaic" the
        GPU kernels; None, decided while tracing, takes the kernels where they can run.
    """
    logger.info("compiling detection for images %s", images.shape)
    levels = shared_features(model, images, image_hw)
    proposals = _proposals_in(model, levels, image_hw, scale, model.config.test_proposals, implementation)
    return detect_in(model, levels, proposals, image_hw, implementation=implementation)


def detect_in(
    model: Detector,
    levels: Levels,
    proposals: Proposals,
    image_hw: Float[Array, "b 2"],
    *,
    implementation: Implementation = None,
) -> Detections:
    """Returns the detections among given regions of the shared features: Fast R-CNN, the second half of `detect`."""
    config = model.config
    class_logits, box_deltas = model.box_head(_roi_features(model, levels, proposals.boxes, implementation))
    options = dict(
        means=config.roi_sampling.box_means,
        stds=config.roi_sampling.box_stds,
        coder=config.box_coder,
        config=config.postprocess,
        implementation=implementation,
    )
    return jax.vmap(functools.partial(postprocess, **options))(class_logits, box_deltas, proposals, image_hw)
