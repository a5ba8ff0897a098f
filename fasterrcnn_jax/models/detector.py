"""Faster R-CNN: the stages in order, for training and for detection.

Ren et al. 2015 (arXiv:1506.01497). The stages before and after the network's layers see one image and
are mapped over the batch here, so an image's result never depends on its batch mates.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32

from fasterrcnn_jax.anchors import cell_anchors, cell_centres, grid_anchors
from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.losses import box_losses, rpn_losses
from fasterrcnn_jax.models.heads import BoxHead, RpnHead
from fasterrcnn_jax.models.resnet import Backbone
from fasterrcnn_jax.postprocess import postprocess
from fasterrcnn_jax.proposals import propose
from fasterrcnn_jax.roi_align import roi_align
from fasterrcnn_jax.structures import Batch, Detections, Losses
from fasterrcnn_jax.targets import anchor_targets, roi_targets

# Both functions below log when they are traced: once per program, so that recompilation shows.
logger = logging.getLogger(__name__)


class Detector(nnx.Module):
    """The layers and their configuration; a pytree whose structure carries everything static."""

    def __init__(self, config: ModelConfig, class_names: tuple[str, ...], *, rng: np.random.Generator):
        self.config = config
        self.class_names = class_names
        self.backbone = Backbone(config.backbone, rng=rng)
        self.rpn_head = RpnHead(config, rng=rng)
        self.box_head = BoxHead(config, len(class_names), rng=rng)


def create(config: ModelConfig, class_names: tuple[str, ...], *, seed: int) -> Detector:
    """Returns a detector with fresh random weights."""
    return Detector(config, class_names, rng=np.random.default_rng(seed))


def anchors_of(
    config: ModelConfig, grid_hw: tuple[int, int]
) -> tuple[Float[np.ndarray, "a 4"], Float[np.ndarray, "a 2"]]:
    """Returns the anchors of a feature map and the (x, y) centres of their cells."""
    cells = cell_anchors(config.rpn.anchor_sizes, config.rpn.anchor_ratios)
    stride = config.backbone.stride
    centres = np.repeat(cell_centres(grid_hw, stride), len(cells), axis=0)
    return grid_anchors(cells, grid_hw, stride), centres


def _anchor_valid(
    centres: Float[np.ndarray, "a 2"], image_hw: Float[Array, "b 2"], stride: int
) -> Bool[Array, "b a"]:
    """True where the anchor's cell holds picture: without padding the others would not exist."""
    corners = jnp.asarray(centres) - 0.5 * stride
    return (corners[None] < image_hw[:, None, ::-1]).all(axis=-1)


def _pool(model: Detector, features: Float[Array, "b h w c"], boxes: Float[Array, "b r 4"]):
    options = dict(
        stride=model.config.backbone.stride,
        output_size=model.config.roi_align.output_size,
        sampling_ratio=model.config.roi_align.sampling_ratio,
    )
    return jax.vmap(lambda f, b: roi_align(f, b, **options))(features, boxes)


def training_losses(model: Detector, batch: Batch, key: PRNGKeyArray | UInt32[Array, "2"]) -> Losses:
    """Returns the four losses of a batch as sums and counts; approximate joint training, section 3.2.

    Randomness is folded from `key` per image by its index: which anchors and RoIs are drawn for an
    image does not depend on how images are batched or spread over devices.
    """
    logger.info("compiling the training step for images %s", batch.images.shape)
    config = model.config
    features = model.backbone(batch.images, batch.image_hw)
    objectness, deltas = model.rpn_head(features)
    anchors, centres = anchors_of(config, features.shape[1:3])
    anchor_valid = _anchor_valid(centres, batch.image_hw, config.backbone.stride)
    # Rows that only fill the batch take part in nothing.
    anchor_valid &= batch.image_valid[:, None]
    ground_truth = batch.ground_truth._replace(
        valid=batch.ground_truth.valid & batch.image_valid[:, None]
    )

    keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index)))(batch.image_index)
    a_targets = jax.vmap(
        lambda key, valid, gt: anchor_targets(key, jnp.asarray(anchors), valid, gt, config=config.rpn)
    )(keys[:, 0], anchor_valid, ground_truth)
    proposals = jax.vmap(
        lambda *args: propose(*args[:2], jnp.asarray(anchors), *args[2:], config=config.train_proposals)
    )(objectness, deltas, anchor_valid, batch.image_hw)
    rois = jax.vmap(lambda *args: roi_targets(*args, config=config.roi_sampling))(
        keys[:, 1], proposals, ground_truth
    )
    class_logits, box_deltas = model.box_head(_pool(model, features, rois.boxes))

    rpn = jax.vmap(lambda *args: rpn_losses(*args, sigma=config.rpn.sigma))(objectness, deltas, a_targets)
    box = jax.vmap(lambda *args: box_losses(*args, sigma=config.roi_sampling.sigma))(
        class_logits, box_deltas, rois
    )
    return jax.tree.map(lambda per_image: per_image.sum(), Losses(*rpn, *box))


def detect(
    model: Detector, images: Float[Array, "b h w 3"], image_hw: Float[Array, "b 2"]
) -> Detections:
    """Returns `max_detections` detections per image with their validity; fixed shapes throughout.

    Pure: call it inside your own `jax.jit` or `jax.vmap`. Pass the model as an argument; closing over
    it would bake its weights into the program.

    Args:
      images: preprocessed pictures (`fasterrcnn_jax.preprocess`), zero beyond `image_hw`.
      image_hw: (height, width) of each picture inside the canvas; boxes are returned in its pixels.
    """
    logger.info("compiling detection for images %s", images.shape)
    config = model.config
    features = model.backbone(images, image_hw)
    objectness, deltas = model.rpn_head(features)
    anchors, centres = anchors_of(config, features.shape[1:3])
    anchor_valid = _anchor_valid(centres, image_hw, config.backbone.stride)
    proposals = jax.vmap(
        lambda *args: propose(*args[:2], jnp.asarray(anchors), *args[2:], config=config.test_proposals)
    )(objectness, deltas, anchor_valid, image_hw)
    class_logits, box_deltas = model.box_head(_pool(model, features, proposals.boxes))
    options = dict(box_weights=config.roi_sampling.box_weights, config=config.postprocess)
    return jax.vmap(lambda *args: postprocess(*args, **options))(
        class_logits, box_deltas, proposals, image_hw
    )
