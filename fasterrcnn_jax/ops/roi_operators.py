"""Computes the features of regions with the operator that the configuration names."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from fasterrcnn_jax.config import RoiFeaturesConfig
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.ops.roi_alignment import roi_align, roi_align_average
from fasterrcnn_jax.ops.roi_cropping import roi_crop
from fasterrcnn_jax.ops.roi_pooling import roi_pool


def roi_features(
    features: tuple[Float[Array, "_ _ c"], ...],
    boxes: Float[Array, "r 4"],
    *,
    strides: tuple[int, ...],
    far_corner_offset: int,
    config: RoiFeaturesConfig,
    implementation: Implementation = None,
) -> Float[Array, "r s s c"]:
    """Returns `config.output_size` x `config.output_size` features per box, in the type of `features`.

    Args:
      features: one map, or the levels of a pyramid, fine to coarse. In a pyramid the features of each box are
        taken from the level that fits its size.
      boxes: in network pixels.
      strides: network pixels per cell of every map. In a pyramid they are powers of two, each twice the one before.
      far_corner_offset: subtracted from x2 and y2 first, because the old operators read inclusive corners.
    Raises:
      ValueError: the operator takes a single map and several maps are given.
    """
    boxes = boxes - jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 1.0]) * far_corner_offset, boxes.shape)
    if config.operator == "align":
        return roi_align(
            features,
            boxes,
            strides=strides,
            output_size=config.output_size,
            sampling_ratio=config.sampling_ratio,
            aligned=config.aligned,
            implementation=implementation,
        )
    single, *others = features
    if others:
        raise ValueError(f"the operator {config.operator} takes a single map, got {len(features)}")
    operators = {
        "align_average": roi_align_average,
        "pool": functools.partial(roi_pool, quantisation=config.quantisation, implementation=implementation),
        "crop": functools.partial(roi_crop, max_pool=config.crop_max_pool),
    }
    pooled = operators[config.operator](single, boxes, stride=strides[0], output_size=config.output_size)
    return pooled.astype(single.dtype)
