"""The features of a region by the operator that the configuration names."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from fasterrcnn_jax.config import RoiFeaturesConfig
from fasterrcnn_jax.roi_align import roi_align, roi_align_average
from fasterrcnn_jax.roi_crop import roi_crop
from fasterrcnn_jax.roi_pool import roi_pool


def roi_features(
    features: Float[Array, "h w c"],
    boxes: Float[Array, "r 4"],
    *,
    stride: int,
    far_corner_offset: int,
    config: RoiFeaturesConfig,
) -> Float[Array, "r s s c"]:
    """Returns `config.output_size` x `config.output_size` features per box, in float32.

    Args:
      boxes: network pixels.
      far_corner_offset: taken off the far corners first: the old operators read inclusive ones.
    """
    operators = {
        "align": functools.partial(
            roi_align, sampling_ratio=config.sampling_ratio, aligned=config.aligned
        ),
        "align_average": roi_align_average,
        "pool": functools.partial(roi_pool, quantisation=config.quantisation),
        "crop": roi_crop,
    }
    boxes = boxes - jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 1.0]) * far_corner_offset, boxes.shape)
    return operators[config.operator](features, boxes, stride=stride, output_size=config.output_size)
