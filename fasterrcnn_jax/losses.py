"""The four losses, each as a sum and a count, so that devices can be added before dividing.

Ren et al. 2015 (arXiv:1506.01497), eq. 1; Fast R-CNN (arXiv:1504.08083), eq. 1-3. Both box losses are
divided by all sampled anchors (RoIs), not by the foreground ones: a picture with few objects then
weighs less in the box loss, as in the reference implementations.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fasterrcnn_jax.matching import FOREGROUND
from fasterrcnn_jax.structures import AnchorTargets, Mean, RoiTargets


def smooth_l1(error: Float[Array, "*b"], *, sigma: float) -> Float[Array, "*b"]:
    """Returns `0.5 (sigma e)^2` where `|e| < 1 / sigma^2`, `|e| - 0.5 / sigma^2` elsewhere."""
    beta = 1.0 / sigma**2
    size = jnp.abs(error)
    return jnp.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def rpn_losses(
    objectness: Float[Array, "a"], deltas: Float[Array, "a 4"], targets: AnchorTargets, *, sigma: float
) -> tuple[Mean, Mean]:
    """Returns the binary cross-entropy and the smooth L1 loss of one image's sampled anchors."""
    sampled = targets.labels >= 0
    foreground = targets.labels == FOREGROUND
    count = sampled.sum().astype(jnp.float32)
    entropy = optax.sigmoid_binary_cross_entropy(objectness, foreground.astype(jnp.float32))
    distance = smooth_l1(deltas - targets.deltas, sigma=sigma).sum(axis=-1)
    return (
        Mean(jnp.where(sampled, entropy, 0.0).sum(), count),
        Mean(jnp.where(foreground, distance, 0.0).sum(), count),
    )


def box_losses(
    class_logits: Float[Array, "r k"],
    deltas: Float[Array, "r k 4"],
    targets: RoiTargets,
    *,
    sigma: float,
) -> tuple[Mean, Mean]:
    """Returns the softmax cross-entropy and the smooth L1 loss of one image's RoIs.

    Only the deltas of a RoI's own class count, and only where that class is not background.
    """
    count = targets.valid.sum().astype(jnp.float32)
    entropy = optax.softmax_cross_entropy_with_integer_labels(class_logits, targets.labels)
    one_hot = jax.nn.one_hot(targets.labels, deltas.shape[1], dtype=jnp.float32)
    of_class = jnp.einsum("rkd,rk->rd", deltas, one_hot, precision=jax.lax.Precision.HIGHEST)
    distance = smooth_l1(of_class - targets.deltas, sigma=sigma).sum(axis=-1)
    foreground = targets.valid & (targets.labels > 0)
    return (
        Mean(jnp.where(targets.valid, entropy, 0.0).sum(), count),
        Mean(jnp.where(foreground, distance, 0.0).sum(), count),
    )
