"""Computes the four losses, each as a sum and a count that can be added over devices before dividing.

Ren et al. 2015 (arXiv:1506.01497), eq. 1; Fast R-CNN (arXiv:1504.08083), eq. 1-3. As in the reference
implementations, both box losses are divided by the number of all sampled anchors (RoIs), not of the foreground
ones: an image with few objects then weighs less in the box loss. `loss.rpn_box_normalizer` and
`loss.roi_box_normalizer` select other divisors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fasterrcnn_jax.config import LossConfig
from fasterrcnn_jax.ops.matching import FOREGROUND
from fasterrcnn_jax.structures import AnchorTargets, Mean, PerDelta, RoiTargets


class StageLosses(NamedTuple):
    """The two losses of the RPN or of the box head, for one image or for each image of a batch."""

    classification: Mean  # of objectness in the RPN, of classes in the box head
    box: Mean
    foreground: Float[Array, "*b"]  # number of sampled anchors or RoIs that are foreground

    @classmethod
    def none(cls, batch_size: int) -> "StageLosses":
        """Returns a sum of 0 and a count of 0 for each image: this stage is not trained."""
        zeros = jnp.zeros(batch_size)
        return cls(Mean(zeros, zeros), Mean(zeros, zeros), zeros)


def smooth_l1(error: Float[Array, "*b"], *, sigma: float) -> Float[Array, "*b"]:
    """Returns `0.5 (sigma e)^2` where `|e| < 1 / sigma^2`, `|e| - 0.5 / sigma^2` elsewhere."""
    beta = 1.0 / sigma**2
    size = jnp.abs(error)
    return jnp.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def _distance(
    deltas: Float[Array, "n 4"], targets: Float[Array, "n 4"], inside_weights: PerDelta, sigma: float
) -> Float[Array, "n"]:
    weights = jnp.broadcast_to(jnp.asarray(inside_weights, jnp.float32), deltas.shape)
    return smooth_l1(weights * (deltas - targets), sigma=sigma).sum(axis=-1)


def rpn_losses(
    objectness: Float[Array, "a"],
    deltas: Float[Array, "a 4"],
    targets: AnchorTargets,
    num_locations: Int[Array, ""],
    *,
    config: LossConfig,
) -> StageLosses:
    """Returns the binary cross-entropy and the smooth L1 loss of one image's anchors.

    The box loss is the sum over the anchors that `config.rpn_box_anchors` selects, divided by the count that
    `config.rpn_box_normalizer` selects. With `config.rpn_positive_weight` it is this weight times the mean over the
    selected anchors instead. In both cases it is multiplied by `config.rpn_box_weight`.

    Args:
      num_locations: number of feature cells that contain image content.
    """
    import optax  # imported here, because detection does not need it

    sampled = targets.labels >= 0
    foreground = sampled & (targets.labels == FOREGROUND)
    regressed = foreground if config.rpn_box_anchors == "sampled" else targets.foreground
    counts = {
        "sampled": sampled.sum(),
        "positives": regressed.sum(),
        "positive_deltas": 4 * regressed.sum(),
        "locations": num_locations,
    }
    entropy = optax.sigmoid_binary_cross_entropy(objectness, foreground.astype(jnp.float32))
    distance = _distance(deltas, targets.deltas, config.rpn_box_inside_weights, config.rpn_sigma)
    normalizer, weight = config.rpn_box_normalizer, config.rpn_box_weight
    if config.rpn_positive_weight is not None:
        normalizer, weight = "positives", weight * config.rpn_positive_weight
    return StageLosses(
        classification=Mean(jnp.where(sampled, entropy, 0.0).sum(), counts["sampled"].astype(jnp.float32)),
        box=Mean(weight * jnp.where(regressed, distance, 0.0).sum(), counts[normalizer].astype(jnp.float32)),
        foreground=foreground.sum().astype(jnp.float32),
    )


def box_losses(
    class_logits: Float[Array, "r k"],
    deltas: Float[Array, "r k2 4"],
    targets: RoiTargets,
    *,
    config: LossConfig,
) -> StageLosses:
    """Returns the softmax cross-entropy and the smooth L1 loss of one image's RoIs.

    Only the deltas of a RoI's own class enter the box loss, and only if this class is not background. The box
    loss is divided by the count that `config.roi_box_normalizer` selects, and multiplied by `config.roi_box_weight`.

    Args:
      deltas: one set per class, or one set for all classes.
    """
    import optax  # imported here, because detection does not need it

    foreground = targets.valid & (targets.labels > 0)
    counts = {
        "sampled": targets.valid.sum(),
        "positives": foreground.sum(),
        "positive_deltas": 4 * foreground.sum(),
    }
    entropy = optax.softmax_cross_entropy_with_integer_labels(class_logits, targets.labels)
    if deltas.shape[1] == 1:
        of_class = deltas[:, 0]
    else:
        one_hot = jax.nn.one_hot(targets.labels, deltas.shape[1], dtype=jnp.float32)
        of_class = jnp.einsum("rkd,rk->rd", deltas, one_hot, precision=jax.lax.Precision.HIGHEST)
    distance = _distance(of_class, targets.deltas, config.roi_box_inside_weights, config.roi_sigma)
    return StageLosses(
        classification=Mean(jnp.where(targets.valid, entropy, 0.0).sum(), counts["sampled"].astype(jnp.float32)),
        box=Mean(
            config.roi_box_weight * jnp.where(foreground, distance, 0.0).sum(),
            counts[config.roi_box_normalizer].astype(jnp.float32),
        ),
        foreground=foreground.sum().astype(jnp.float32),
    )
