"""RoIAlign: a fixed grid of features for every region. He et al. 2017 (arXiv:1703.06870), section 3.

Bilinear sampling on a regular grid, averaged per bin, is separable: the weight of feature cell (j, k)
in bin (p, q) is a weight in y times a weight in x. So the operation is two small matrix products per
region, forward and backward, with no gather and no scatter: fast on a CPU and deterministic.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Of one image. Between the two products each holds a row of the whole map per bin: 1.8 MB at 7 bins of 63 x 1024.
REGIONS_AT_ONCE = 128


def roi_align(
    features: Float[Array, "h w c"],
    boxes: Float[Array, "r 4"],
    *,
    stride: int,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Float[Array, "r s s c"]:
    """Returns `output_size` x `output_size` features per box, in float32.

    Samples more than one cell outside the map count as zero, the others are clamped to it, as in
    torchvision and detectron2. No gradient reaches `boxes`.

    Args:
      boxes: network pixels. With `sampling_ratio` 0 the work grows with the longest side: clip first.
      sampling_ratio: samples per bin and axis; 0 takes as many as a bin has cells, rounded up, in each
        box by itself (none, and so zeros, where a side is not positive).
      aligned: cell (j, k) of `features` has its centre at ((k + 0.5) * stride, (j + 0.5) * stride)
        network pixels. Otherwise at (k * stride, j * stride), and a box's sides count as at least one
        cell: the operator before detectron2 moved it.
    Raises:
      ValueError: `output_size` is not positive or `sampling_ratio` is negative.
    """
    _require_positive(output_size)
    if sampling_ratio < 0:
        raise ValueError(f"sampling_ratio must be at least 0, got {sampling_ratio}")
    boxes = lax.stop_gradient(boxes) / stride - (0.5 if aligned else 0.0)
    starts, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    if not aligned:
        sides = jnp.maximum(sides, 1.0)
    height, width, _ = features.shape
    weights_y = _bin_weights(starts[:, 1], sides[:, 1], height, output_size, sampling_ratio)
    weights_x = _bin_weights(starts[:, 0], sides[:, 0], width, output_size, sampling_ratio)
    return contract(features, weights_y, weights_x)


def roi_align_average(
    features: Float[Array, "h w c"],
    boxes: Float[Array, "r 4"],
    *,
    stride: int,
    output_size: int,
) -> Float[Array, "r s s c"]:
    """Returns `output_size` x `output_size` features per box, in float32: each the mean of 2 x 2 samples.

    The operator of faster-rcnn.pytorch's first branch. One bilinear sample at each of the
    (`output_size` + 1)^2 corners of the bins, shared by the bins that meet there. Cell (j, k) lies at
    (k * stride, j * stride) and boxes are inclusive in *cells*: a side is x2 - x1 + 1 of them. Samples
    outside [0, h) x [0, w) are zero; those beyond the last cell are extrapolated from the last two.
    No gradient reaches `boxes`.

    Args:
      boxes: network pixels, inclusive corners.
    Raises:
      ValueError: `output_size` is not positive, or `features` has fewer than two cells along a side.
    """
    _require_positive(output_size)
    height, width, _ = features.shape
    if min(height, width) < 2:
        raise ValueError(f"roi_align_average needs a map of at least 2 x 2 cells, got {height} x {width}")
    boxes = lax.stop_gradient(boxes) / stride
    sides = jnp.maximum(boxes[:, 2:] - boxes[:, :2] + 1.0, 0.0)

    def weights(start, side, size):
        corners = jnp.arange(output_size + 1, dtype=jnp.float32)[None]
        points = start[:, None] + corners * (side / output_size)[:, None]
        base = jnp.minimum(jnp.floor(points), size - 2.0)
        part = (points - base)[..., None]
        cells = jnp.arange(size, dtype=jnp.float32)[None, None] - base[..., None]
        at_corners = jnp.where(cells == 0.0, 1.0 - part, 0.0) + jnp.where(cells == 1.0, part, 0.0)
        inside = (points >= 0.0) & (points < size)
        at_corners = jnp.where(inside[..., None], at_corners, 0.0)
        return (at_corners[:, :-1] + at_corners[:, 1:]) / 2.0

    return contract(
        features,
        weights(boxes[:, 1], sides[:, 1], height),
        weights(boxes[:, 0], sides[:, 0], width),
    )


def contract(
    features: Float[Array, "h w c"],
    weights_y: Float[Array, "r p h"],
    weights_x: Float[Array, "r q w"],
) -> Float[Array, "r p q c"]:
    """Returns the sums of all cells of the map, weighted by the product of both weights, in float32."""
    # Interpolation weights must not be rounded to TF32.
    precision = lax.Precision.HIGHEST
    features = features.astype(jnp.float32)

    def contract_one(weights):
        weights_y, weights_x = weights
        rows = jnp.einsum("pj,jkc->pkc", weights_y, features, precision=precision)
        return jnp.einsum("qk,pkc->pqc", weights_x, rows, precision=precision)

    return lax.map(contract_one, (weights_y, weights_x), batch_size=REGIONS_AT_ONCE)


def linear_weights(points: Float[Array, "r p"], size: int) -> Float[Array, "r p {size}"]:
    """Returns the weight of each of `size` cells in linear interpolation at the points; 0 for cells outside."""
    cells = jnp.arange(size, dtype=jnp.float32)[None, None]
    return jnp.maximum(1.0 - jnp.abs(points[..., None] - cells), 0.0)


def _bin_weights(start, side, size, bins, sampling_ratio) -> Float[Array, "r bins size"]:
    """Returns the weight of each of `size` cells in each bin, along one axis; start and side in cells."""
    bin_side = side / bins
    if sampling_ratio:
        counts = jnp.full_like(side, sampling_ratio)
        most = sampling_ratio
    else:
        counts = jnp.ceil(bin_side)
        # XLA divides by multiplying with the reciprocal: whole multiples may come out a little too large.
        counts = jnp.where((counts - 1.0) * bins >= side, counts - 1.0, counts)
        counts = jnp.where(counts > 0.0, counts, 0.0)
        most = counts.max(initial=0.0).astype(jnp.int32)
    bin_starts = start[:, None] + jnp.arange(bins, dtype=jnp.float32)[None] * bin_side[:, None]

    def add_sample(i, total):
        i = jnp.float32(i)
        points = bin_starts + ((i + 0.5) * bin_side / jnp.maximum(counts, 1.0))[:, None]
        counted = (points >= -1.0) & (points <= size) & (i < counts)[:, None]
        weights = linear_weights(jnp.clip(points, 0.0, size - 1.0), size)
        return total + jnp.where(counted[..., None], weights, 0.0)

    # One sample at a time, so that no bound on their number is needed. Nothing here is differentiated.
    total = lax.fori_loop(0, most, add_sample, jnp.zeros((*bin_starts.shape, size)))
    return total / jnp.maximum(counts, 1.0)[:, None, None]


def _require_positive(output_size):
    if output_size < 1:
        raise ValueError(f"output_size must be at least 1, got {output_size}")
