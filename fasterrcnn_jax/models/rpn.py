"""The region proposal network over a batch: predictions, targets, proposals, losses.

Ren et al. 2015 (arXiv:1506.01497), section 3.1. The functions of `ops` see one image; here they are mapped over
the batch, so the result of an image does not depend on the other images of its batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from fasterrcnn_jax.config import ModelConfig, ProposalConfig
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector, Features
from fasterrcnn_jax.models.layers import level_masks, sides_of
from fasterrcnn_jax.ops.anchors import (
    AnchorGrid,
    anchors_of,
    anchors_on_image,
    check_border,
)
from fasterrcnn_jax.ops.losses import StageLosses, rpn_losses
from fasterrcnn_jax.ops.matching import IGNORED
from fasterrcnn_jax.ops.proposals import propose
from fasterrcnn_jax.ops.selection import first_positions
from fasterrcnn_jax.ops.targets import anchor_targets
from fasterrcnn_jax.structures import AnchorTargets, GroundTruth, Proposals

ImageKeys = Key[Array, "b"] | UInt32[Array, "b 2"]


class RpnOutput(NamedTuple):
    """The predictions of the RPN for the anchors of a batch. Anchors are in the order of `anchors_of`."""

    grid: AnchorGrid
    objectness: Float[Array, "b a"]  # logits
    deltas: Float[Array, "b a 4"]
    anchor_valid: Bool[Array, "b a"]  # False: the anchor lies in padding; it is neither trained on nor proposed
    image_hw: Float[Array, "b 2"]  # (height, width) of each image inside the canvas

    @property
    def num_locations(self) -> Int[Array, "b"]:
        """Returns the number of feature cells of each image that contain image content."""
        return self.anchor_valid.sum(axis=1) // self.grid.per_cell


@jax.named_scope("rpn_head")
def rpn_output(
    model: Detector,
    features: Features,
    image_hw: Float[Array, "b 2"],
    image_valid: Bool[Array, "b"] | None = None,
) -> RpnOutput:
    """Returns objectness and deltas of all anchors, in float32; section 3.1.

    Args:
      image_valid: False for rows that only fill the batch. None: every row is an image.
    """
    config = model.config
    objectness, deltas = model.rpn_head(features, level_masks(config, features, image_hw))
    grid = anchors_of(config, tuple(sides_of(level) for level in features))
    anchor_valid = anchors_on_image(grid, image_hw, config)
    if image_valid is not None:
        anchor_valid = anchor_valid & image_valid[:, None]
    return RpnOutput(grid, objectness, deltas, anchor_valid, image_hw)


@jax.named_scope("anchor_targets")
def batch_anchor_targets(
    config: ModelConfig,
    keys: ImageKeys,
    rpn: RpnOutput,
    ground_truth: GroundTruth,
    *,
    canvas: tuple[int, int],
) -> AnchorTargets:
    """Labels a random sample of the anchors of each image; section 3.1.2.

    Args:
      canvas: (height, width) of the padded images.
    Raises:
      InputError: every anchor reaches too far over the border of the canvas.
    """
    check_border(rpn.grid, canvas, config.rpn.allowed_border)
    anchors = jnp.asarray(rpn.grid.anchors)

    def per_image(key, anchor_valid, image_hw, ground_truth):
        return anchor_targets(key, anchors, anchor_valid, image_hw, ground_truth, config=config.rpn)

    return jax.vmap(per_image)(keys, rpn.anchor_valid, rpn.image_hw, ground_truth)


@jax.named_scope("proposals")
def batch_proposals(
    config: ModelConfig,
    rpn: RpnOutput,
    scale: Float[Array, "b 2"],
    limits: ProposalConfig,
    implementation: Implementation = None,
) -> Proposals:
    """Returns the region proposals of each image; section 3.3.

    Args:
      scale: (y, x) network pixels per pixel of the original image.
      limits: `config.train_proposals` or `config.test_proposals`.
    """
    anchors = jnp.asarray(rpn.grid.anchors)

    def per_image(objectness, deltas, anchor_valid, image_hw, scale):
        return propose(
            objectness,
            deltas,
            anchors,
            anchor_valid,
            image_hw,
            scale,
            level_sizes=rpn.grid.level_sizes,
            config=limits,
            coder=config.box_coder,
            implementation=implementation,
        )

    return jax.vmap(per_image)(rpn.objectness, rpn.deltas, rpn.anchor_valid, rpn.image_hw, scale)


@jax.named_scope("rpn_losses")
def batch_rpn_losses(model: Detector, features: Features, rpn: RpnOutput, targets: AnchorTargets) -> StageLosses:
    """Returns the two losses of the RPN for each image; eq. 1.

    The losses are computed from the features around the sampled anchors, so the cost of the gradient grows with their
    number. With `loss.rpn_box_anchors` "all_positives", and where many convolutions or small maps make it cheaper, the
    losses read all predictions in `rpn`.

    Args:
      features: the maps that `rpn` was computed from.
      targets: at most `model.config.rpn.anchors_per_image` anchors of an image have a label; with more, the losses of
        the image are NaN.
    """
    config = model.config

    def per_image(objectness, deltas, targets, num_locations):
        return rpn_losses(objectness, deltas, targets, num_locations, config=config.loss)

    size = min(config.rpn.anchors_per_image, targets.labels.shape[1])
    sampled = targets.labels >= 0
    complete = sampled.sum(axis=1) <= size
    cells = rpn.grid.anchors.shape[0] // rpn.grid.per_cell
    if config.loss.rpn_box_anchors == "all_positives" or not _sampled_is_cheaper(size, config.rpn.convs, cells):
        losses = jax.vmap(per_image)(rpn.objectness, rpn.deltas, targets, rpn.num_locations)
        return jax.tree.map(lambda x: jnp.where(complete, x, jnp.nan), losses)
    anchors, valid = jax.vmap(lambda chosen: first_positions(chosen, size))(sampled)
    predictions = model.rpn_head.at_anchors(features, anchors, level_masks(config, features, rpn.image_hw))
    targets = jax.tree.map(lambda x: jax.vmap(lambda of_image, here: of_image[here])(x, anchors), targets)
    targets = targets._replace(labels=jnp.where(valid, targets.labels, IGNORED))
    losses = jax.vmap(per_image)(*predictions, targets, rpn.num_locations)
    return jax.tree.map(lambda x: jnp.where(complete, x, jnp.nan), losses)


def _sampled_is_cheaper(anchors: int, convs: int, cells: int) -> bool:
    """Returns whether the predictions of the anchors take less work than those of all cells.

    The first of n convolutions is computed for (2n - 1)^2 cells around an anchor, the last one for the anchor's own
    cell.
    """
    return anchors * sum((2 * number + 1) ** 2 for number in range(convs)) < convs * cells
