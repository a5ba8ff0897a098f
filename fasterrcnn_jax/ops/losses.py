"""Computes the four losses, each as a sum and a count that can be added over devices before dividing.

Ren et al. 2015 (arXiv:1506.01497), eq. 1; Fast R-CNN (arXiv:1504.08083), eq. 1-3. As in the reference
implementations, both box losses are divided by the number of all sampled anchors (RoIs), not of the foreground
ones: an image with few objects then weighs less in the box loss. `loss.rpn_box_normalizer` and
`loss.roi_box_normalizer` select other divisors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from fasterrcnn_jax.config import LossConfig
from fasterrcnn_jax.ops.inputs import AnyArray, real_array
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


def smooth_l1(error: Real[AnyArray, "*b"], *, sigma: float = 1.0) -> Float[Array, "*b"]:
    """Returns `0.5 (sigma e)^2` where `|e| < 1 / sigma^2`, `|e| - 0.5 / sigma^2` elsewhere.

    PyTorch's `beta` is 1 / `sigma`^2.

    Examples:
      >>> smooth_l1(np.array([0.5, -2.0]))
      Array([0.125, 1.5  ], dtype=float32)

    Args:
      error: prediction minus target, of any shape.
    """
    error = real_array(error, "error")
    beta = 1.0 / sigma**2
    size = jnp.abs(error)
    return jnp.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def _distance(
    deltas: Float[Array, "n 4"], targets: Float[Array, "n 4"], inside_weights: PerDelta, sigma: float
) -> Float[Array, "n"]:
    weights = jnp.broadcast_to(jnp.asarray(inside_weights, jnp.float32), deltas.shape)
    return smooth_l1(weights * (deltas - targets), sigma=sigma).sum(axis=-1)


def rpn_losses(
    objectness: Real[AnyArray, "a"],
    deltas: Real[AnyArray, "a 4"],
    targets: AnchorTargets,
    num_locations: Int[AnyArray, ""] | int | None = None,
    *,
    config: LossConfig | None = None,
) -> StageLosses:
    """Returns the binary cross-entropy and the smooth L1 loss of one image's anchors.

    The box loss is the sum over the anchors that `config.rpn_box_anchors` selects, divided by the count that
    `config.rpn_box_normalizer` selects. With `config.rpn_positive_weight` it is this weight times the mean over the
    selected anchors instead. In both cases it is multiplied by `config.rpn_box_weight`.

    Examples:
      >>> targets = AnchorTargets(np.array([1, 0, -1]), np.zeros((3, 4)), np.array([True, False, False]))
      >>> losses = rpn_losses(np.zeros(3), np.ones((3, 4)), targets)
      >>> losses.classification.divided(), losses.box.divided()
      (Array(0.6931472, dtype=float32), Array(1.8888888, dtype=float32))

    Args:
      objectness: one logit for each anchor.
      targets: from `anchor_targets`, or your own: labels of 1, 0, and -1 for anchors that do not count.
      num_locations: number of feature cells that contain image content; for `config.rpn_box_normalizer` "locations".
      config: None: `LossConfig()`.
    Returns:
      Sums and counts, which can be added over images and devices; `losses.box.divided()` is the mean.
    Raises:
      ValueError: `deltas` has another shape, or `config.rpn_box_normalizer` is "locations" and `num_locations` is not
        given.
    """
    import optax  # imported here, because detection does not need it

    config = LossConfig() if config is None else config
    objectness, deltas = real_array(objectness, "objectness"), real_array(deltas, "deltas")
    targets = AnchorTargets(jnp.asarray(targets.labels), real_array(targets.deltas, "targets.deltas"), *targets[2:])
    if deltas.shape != (*objectness.shape, 4):
        raise ValueError(f"deltas must have the shape {[*objectness.shape, 4]}, got {list(deltas.shape)}")
    sampled = targets.labels >= 0
    foreground = sampled & (targets.labels == FOREGROUND)
    regressed = foreground if config.rpn_box_anchors == "sampled" else targets.foreground
    counts = {
        "sampled": sampled.sum(),
        "positives": regressed.sum(),
        "positive_deltas": 4 * regressed.sum(),
    }
    if num_locations is not None:
        counts["locations"] = jnp.asarray(num_locations)
    entropy = optax.sigmoid_binary_cross_entropy(objectness, foreground.astype(jnp.float32))
    distance = _distance(deltas, targets.deltas, config.rpn_box_inside_weights, config.rpn_sigma)
    normalizer, weight = config.rpn_box_normalizer, config.rpn_box_weight
    if config.rpn_positive_weight is not None:
        normalizer, weight = "positives", weight * config.rpn_positive_weight
    if normalizer not in counts:
        raise ValueError(f"rpn_losses needs num_locations, because config.rpn_box_normalizer is {normalizer!r}")
    return StageLosses(
        classification=Mean(jnp.where(sampled, entropy, 0.0).sum(), counts["sampled"].astype(jnp.float32)),
        box=Mean(weight * jnp.where(regressed, distance, 0.0).sum(), counts[normalizer].astype(jnp.float32)),
        foreground=foreground.sum().astype(jnp.float32),
    )


def box_losses(
    class_logits: Real[AnyArray, "r k"],
    deltas: Real[AnyArray, "r k2 4"],
    targets: RoiTargets,
    *,
    config: LossConfig | None = None,
) -> StageLosses:
    """Returns the softmax cross-entropy and the smooth L1 loss of one image's RoIs.

    Only the deltas of a RoI's own class enter the box loss, and only if this class is not background. The box
    loss is divided by the count that `config.roi_box_normalizer` selects, and multiplied by `config.roi_box_weight`.

    Examples:
      >>> targets = RoiTargets(np.zeros((2, 4)), np.array([1, 0]), np.zeros((2, 4)), np.array([True, True]))
      >>> losses = box_losses(np.zeros((2, 3)), np.ones((2, 1, 4)), targets)
      >>> losses.classification.divided(), losses.box.divided()
      (Array(1.0986123, dtype=float32), Array(1., dtype=float32))

    Args:
      class_logits: k of them: background first, then the classes.
      deltas: one set per class, background first (k2 = k), or one set for all classes (k2 = 1).
      targets: from `roi_targets`, or your own: label 0 is background.
      config: None: `LossConfig()`.
    Returns:
      Sums and counts, which can be added over images and devices; `losses.box.divided()` is the mean.
    Raises:
      ValueError: `deltas` has another number of sets.
    """
    import optax  # imported here, because detection does not need it

    config = LossConfig() if config is None else config
    class_logits, deltas = real_array(class_logits, "class_logits"), real_array(deltas, "deltas")
    of_targets = jnp.asarray(targets.labels), real_array(targets.deltas, "targets.deltas"), jnp.asarray(targets.valid)
    targets = RoiTargets(targets.boxes, *of_targets)
    rois, classes = class_logits.shape
    if deltas.shape not in ((rois, classes, 4), (rois, 1, 4)):
        raise ValueError(
            f"deltas must have the shape [{rois}, {classes}, 4], one set for each class and background first, or "
            f"[{rois}, 1, 4], got {list(deltas.shape)}"
        )
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
