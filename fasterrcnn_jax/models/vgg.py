"""VGG16. Simonyan and Zisserman 2014 (arXiv:1409.1556), table 1, column D.

The thirteen convolutions, without the last pooling, make the shared feature map; fc6 and fc7 run on every
region (`models/heads.py`). With batch normalisation it is the network that torchvision calls vgg16_bn.
"""

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fasterrcnn_jax.config import BackboneConfig, ImageConfig
from fasterrcnn_jax.models.layers import (
    NORMS,
    Conv,
    conv_norm,
    first_std,
    max_pool,
    relu,
    run_stage,
    sides_of,
    valid_mask,
)

CONVS = (2, 2, 3, 3, 3)  # per stage
MULTIPLES = (1, 2, 4, 8, 8)  # of the first stage's channels


class Stage(nnx.Module):
    """3 x 3 convolutions of one resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        convs: int,
        first_std: float | None,
        config: BackboneConfig,
        rng: np.random.Generator,
    ):
        self.convs = nnx.List(
            [
                Conv(
                    out_channels if i else in_channels,
                    out_channels,
                    3,
                    bias=True,
                    std=None if i else first_std,
                    rng=rng,
                )
                for i in range(convs)
            ]
        )
        self.norms = nnx.List([NORMS[config.norm](out_channels) for _ in range(convs)])

    def __call__(self, x: Float[Array, "b h w c"], valid: Float[Array, "b h w 1"] | None) -> Float[Array, "b h w d"]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = relu(conv_norm(conv, norm, x, valid))
        return x


class Vgg16(nnx.Module):
    """conv1_1 to conv5_3: turns normalised images into one feature map."""

    def __init__(self, config: BackboneConfig, image: ImageConfig, *, rng: np.random.Generator):
        self.config = config
        channels = (3, *(config.width * multiple for multiple in MULTIPLES))
        self.channels = channels[-1:]
        self.stages = nnx.List(
            [
                Stage(
                    channels[i],
                    channels[i + 1],
                    convs=convs,
                    first_std=None if i else first_std(3, config.width, image),
                    config=config,
                    rng=rng,
                )
                for i, convs in enumerate(CONVS)
            ]
        )

    def __call__(
        self, images: Float[Array, "b h w 3"], image_hw: Float[Array, "b 2"]
    ) -> tuple[Float[Array, "b h2 w2 c"]]:
        """Returns one map with `config.stride` network pixels per cell; the last one or two poolings are left out."""
        x, stride = images, 1
        for i, stage in enumerate(self.stages):
            if i and stride < self.config.stride:
                x, stride = max_pool(x, size=2), 2 * stride
            valid = valid_mask(image_hw, sides_of(x), stride) if self.config.mask_padding else None
            x = run_stage(stage, x, valid, remat=self.config.remat)
        return (x,)
