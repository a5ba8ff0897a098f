"""RoIAlign: a fixed grid of features for every region. He et al. 2017 (arXiv:1703.06870), section 3.

Bilinear sampling on a regular grid, averaged per bin, is separable: the weight of feature cell (j, k)
in bin (p, q) is a weight in y times a weight in x. So the operation is two small matrix products per
region, forward and backward, with no gather and no scatter: fast on a CPU and deterministic.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def roi_align(
    features: Float[Array, "h w c"],
    boxes: Float[Array, "r 4"],
    *,
    stride: int,
    output_size: int,
    sampling_ratio: int,
) -> Float[Array, "r s s c"]:
    """Returns `output_size` x `output_size` features per box, in float32.

    Cell (j, k) of `features` has its centre at ((k + 0.5) * stride, (j + 0.5) * stride) network pixels
    (the form called `aligned=True` elsewhere). Samples more than one cell outside the map count as
    zero, the others are clamped to it, as in torchvision and detectron2. No gradient reaches `boxes`.

    Args:
      boxes: network pixels.
      sampling_ratio: samples per bin and axis.
    Raises:
      ValueError: `output_size` or `sampling_ratio` is not positive.
    """
    if output_size < 1 or sampling_ratio < 1:
        raise ValueError(
            f"output_size and sampling_ratio must be at least 1, got {output_size} and {sampling_ratio}"
        )
    boxes = lax.stop_gradient(boxes) / stride - 0.5
    height, width, _ = features.shape
    weights_y = _bin_weights(boxes[:, 1], boxes[:, 3], height, output_size, sampling_ratio)
    weights_x = _bin_weights(boxes[:, 0], boxes[:, 2], width, output_size, sampling_ratio)
    # Interpolation weights must not be rounded to TF32.
    precision = lax.Precision.HIGHEST
    features = features.astype(jnp.float32)
    rows = jnp.einsum("rpj,jkc->rpkc", weights_y, features, precision=precision)
    return jnp.einsum("rqk,rpkc->rpqc", weights_x, rows, precision=precision)


def _bin_weights(start, end, size, bins, samples) -> Float[Array, "r bins size"]:
    """Returns the weight of each of `size` cells in each bin, along one axis; start and end in cells."""
    steps = (jnp.arange(bins * samples, dtype=jnp.float32) + 0.5) / (bins * samples)
    points = start[:, None] + steps[None, :] * (end - start)[:, None]
    inside = (points >= -1.0) & (points <= size)
    points = jnp.clip(points, 0.0, size - 1.0)
    cells = jnp.arange(size, dtype=jnp.float32)
    weights = jnp.maximum(1.0 - jnp.abs(points[..., None] - cells[None, None, :]), 0.0)
    weights = jnp.where(inside[..., None], weights, 0.0)
    return weights.reshape(-1, bins, samples, size).mean(axis=2)
