"""Pictures as they come from the host, as the network reads them."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fasterrcnn_jax.config import ImageConfig
from fasterrcnn_jax.models.layers import valid_mask
from fasterrcnn_jax.structures import Images


def normalised(images: Images, image_hw: Float[Array, "b 2"], config: ImageConfig) -> Float[Array, "b h w 3"]:
    """Returns the pictures less mean, over std, zero beyond `image_hw`; those in float come so from the host.

    Raises:
      TypeError: they are not what `config.pixel_dtype` says, and would be normalised twice or never.
    """
    if (images.dtype == jnp.uint8) != (config.pixel_dtype == "uint8"):
        raise TypeError(f"images must be {config.pixel_dtype} by model.image.pixel_dtype, got {images.dtype.name}")
    if config.pixel_dtype == "float32":
        return images
    mean, std = (np.asarray(values, np.float32).reshape(1, 1, 1, 3) for values in (config.mean, config.std))
    return (images.astype(jnp.float32) - mean) / std * valid_mask(image_hw, images.shape[1:3], 1)
