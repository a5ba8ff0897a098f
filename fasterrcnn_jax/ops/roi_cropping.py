"""Crop and pool: bilinear samples of every region, then their maxima. Jaderberg et al. 2015 (arXiv:1506.02025)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fasterrcnn_jax.ops.roi_alignment import contract, linear_weights


def roi_crop(
    features: Float[Array, "h w c"],
    boxes: Float[Array, "r 4"],
    *,
    stride: int,
    output_size: int,
) -> Float[Array, "r s s c"]:
    """Returns `output_size` x `output_size` features per box, in float32: maxima of 2 x 2 samples.

    The spatial transformer's crop, eq. 5. Of n = 2 * `output_size` samples per axis, sample i lies at
    (x1 + i * (x2 - x1) / (n - 1)) / stride in cells, so the first and the last lie on the box's
    borders. Cell (j, k) lies at (k * stride, j * stride); cells outside the map are zero. The first
    of equal samples, in row-major order, gets the gradient. None reaches `boxes`.

    Args:
      boxes: network pixels.
    Raises:
      ValueError: `output_size` is not positive.
    """
    if output_size < 1:
        raise ValueError(f"output_size must be at least 1, got {output_size}")
    boxes = lax.stop_gradient(boxes)
    steps = jnp.linspace(0.0, 1.0, 2 * output_size)[None, :, None]
    points = (boxes[:, None, :2] + steps * (boxes[:, None, 2:] - boxes[:, None, :2])) / stride
    height, width, _ = features.shape
    samples = contract(features, linear_weights(points[..., 1], height), linear_weights(points[..., 0], width))
    # Not jnp.maximum, which halves the gradient where both are equal.
    left, right = samples[:, :, ::2], samples[:, :, 1::2]
    columns = jnp.where(right > left, right, left)
    top, bottom = columns[:, ::2], columns[:, 1::2]
    return jnp.where(bottom > top, bottom, top)
