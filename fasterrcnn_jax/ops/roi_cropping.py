"""Crop and pool: takes bilinear samples of every region, then the maxima of 2 x 2 samples or the samples themselves.

Jaderberg et al. 2015 (arXiv:1506.02025).
"""

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
    max_pool: bool = True,
) -> Float[Array, "r s s c"]:
    """Returns `output_size` x `output_size` features per box, in float32: maxima of 2 x 2 samples, or samples.

    This is the crop of spatial transformers, eq. 5. There are n samples along an axis: twice `output_size` with
    `max_pool`, `output_size` without. Sample i is at cell coordinate (x1 + i * (x2 - x1) / (n - 1)) / stride, so the
    first and the last sample are on the borders of the box. Cell (j, k) is at (k * stride, j * stride); cells outside
    the map are zero. The gradient goes to the first of equal samples in row-major order. No gradient reaches `boxes`.

    Args:
      boxes: in network pixels.
      max_pool: return the maximum of 2 x 2 samples for each cell; False: one sample for each cell.
    Raises:
      ValueError: there are fewer than two samples along an axis.
    """
    samples_per_cell = 2 if max_pool else 1
    if output_size * samples_per_cell < 2:
        raise ValueError(f"output_size must be at least {2 // samples_per_cell}, got {output_size}")
    boxes = lax.stop_gradient(boxes)
    steps = jnp.linspace(0.0, 1.0, samples_per_cell * output_size)[None, :, None]
    points = (boxes[:, None, :2] + steps * (boxes[:, None, 2:] - boxes[:, None, :2])) / stride
    height, width, _ = features.shape
    samples = contract(features, linear_weights(points[..., 1], height), linear_weights(points[..., 0], width))
    if not max_pool:
        return samples
    # jnp.maximum would split the gradient in halves if both are equal.
    left, right = samples[:, :, ::2], samples[:, :, 1::2]
    columns = jnp.where(right > left, right, left)
    top, bottom = columns[:, ::2], columns[:, 1::2]
    return jnp.where(bottom > top, bottom, top)
