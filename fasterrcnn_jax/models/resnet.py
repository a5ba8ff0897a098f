"""ResNet. He et al. 2015 (arXiv:1512.03385), table 1 and appendix A.

Without a pyramid, stages 1 to 3 (conv2_x to conv4_x) make the shared feature map and stage 4 (conv5_x) runs on every
region; this is the C4 detector. With a pyramid, all four stages run on the image.
"""

import math

import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from fasterrcnn_jax.config import BackboneConfig, ImageConfig, ModelConfig
from fasterrcnn_jax.models.heads import Keys, region_masks
from fasterrcnn_jax.models.layers import (
    NORMS,
    Conv,
    Valid,
    conv_norm,
    first_std,
    max_pool,
    relu,
    run_stage,
    valid_mask,
)

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


# Padding (top and left, bottom and right) of the 3 x 3 pooling after the stem. With "ceil", the cell at the bottom or
# right adds the partial window of the reference's ceil mode if the side of the input is even, and none if it is odd.
STEM_POOL_PADDING = {"ceil": (0, 1), "padded": (1, 1)}


def depth_of(config: BackboneConfig) -> int:
    """Returns the depth in the name of the network: 18, 34, 50, 101 or 152."""
    return int(config.name.removeprefix("resnet"))


def stage_channels(config: BackboneConfig, stage: int) -> int:
    """Returns the number of output channels of a stage (1 to 4)."""
    return config.width * 2 ** (stage - 1) * (4 if depth_of(config) >= 50 else 1)


class Block(nnx.Module):
    """A residual block: two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1."""

    def __init__(self, in_channels: int, planes: int, *, stride: int, config: BackboneConfig, rng: np.random.Generator):
        norm = NORMS[config.norm]
        if depth_of(config) >= 50:
            channels, sizes = (in_channels, planes, planes, 4 * planes), (1, 3, 1)
            strides = (stride, 1, 1) if config.stride_in == "1x1" else (1, stride, 1)
        else:
            channels, sizes, strides = (in_channels, planes, planes), (3, 3), (stride, 1)
        # With fixed statistics that were not measured, activations would double with every block, so the branch
        # starts at zero. Loaded weights replace these zeros.
        stds = (None,) * (len(sizes) - 1) + (0.0 if config.norm == "frozen_batch" else None,)
        self.convs = nnx.List(
            [
                Conv(channels[i], channels[i + 1], size, stride=strides[i], std=stds[i], rng=rng)
                for i, size in enumerate(sizes)
            ]
        )
        self.norms = nnx.List([norm(channels[i + 1]) for i in range(len(sizes))])
        projects = stride != 1 or in_channels != channels[-1]
        self.shortcut = Conv(in_channels, channels[-1], 1, stride=stride, rng=rng) if projects else None
        self.shortcut_norm = norm(channels[-1]) if projects else None

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        valid_in: Float[Array, "b h w 1"] | None = None,
        valid_out: Float[Array, "b h2 w2 1"] | None = None,
    ) -> Float[Array, "b h2 w2 d"]:
        y, strided = x, False
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            strided = strided or conv.stride > 1
            y = conv_norm(conv, norm, y, valid_out if strided else valid_in)
            if i < len(self.convs) - 1:
                y = relu(y)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = conv_norm(self.shortcut, self.shortcut_norm, x, valid_out)
        return relu(x + y)


class Stage(nnx.Module):
    """Blocks of one resolution; the first one strides."""

    def __init__(self, stage: int, *, stride: int, config: BackboneConfig, rng: np.random.Generator):
        planes = config.width * 2 ** (stage - 1)
        first = config.width if stage == 1 else stage_channels(config, stage - 1)
        out = stage_channels(config, stage)
        self.blocks = nnx.List(
            [
                Block(out if i else first, planes, stride=1 if i else stride, config=config, rng=rng)
                for i in range(BLOCKS[depth_of(config)][stage - 1])
            ]
        )

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        valid_in: Float[Array, "b h w 1"] | None = None,
        valid_out: Float[Array, "b h2 w2 1"] | None = None,
    ) -> Float[Array, "b h2 w2 d"]:
        for i, block in enumerate(self.blocks):
            x = block(x, valid_out if i else valid_in, valid_out)
        return x


class ResNet(nnx.Module):
    """Stem and stages: turns normalised images into the map of stage 3, or into the maps of stages 1 to 4."""

    def __init__(self, config: BackboneConfig, image: ImageConfig, *, pyramid: bool = False, rng: np.random.Generator):
        self.config = config
        self.pyramid = pyramid
        self.channels = tuple(stage_channels(config, stage) for stage in ((1, 2, 3, 4) if pyramid else (3,)))
        self.stem = Conv(3, config.width, 7, stride=2, std=first_std(7, config.width, image), rng=rng)
        self.stem_norm = NORMS[config.norm](config.width)
        self.strides = (1, 2, config.stride // 8) + ((2,) if pyramid else ())
        self.stages = nnx.List(
            [Stage(stage, stride=stride, config=config, rng=rng) for stage, stride in enumerate(self.strides, 1)]
        )

    def __call__(
        self, images: Float[Array, "b h w 3"], image_hw: Float[Array, "b 2"]
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Returns one map with `config.stride` network pixels per cell; for a pyramid, four maps, strides 4 to 32."""
        height, width = images.shape[1:3]

        def valid(stride: int) -> Valid:
            if not self.config.mask_padding:
                return None
            return valid_mask(image_hw, (-(-height // stride), -(-width // stride)), stride)

        x = relu(conv_norm(self.stem, self.stem_norm, images, valid(2)))
        x = max_pool(x, size=3, padding=STEM_POOL_PADDING[self.config.stem_pool])
        inside = valid(4)
        if inside is not None:
            x = x * inside.astype(x.dtype)
        stride, maps = 4, []
        for stage, stage_stride in zip(self.stages, self.strides, strict=True):
            x = run_stage(stage, x, valid(stride), valid(stride * stage_stride), remat=self.config.remat)
            stride *= stage_stride
            maps.append(x)
        return tuple(maps) if self.pyramid else (x,)

    def tail(self, config: ModelConfig, *, rng: np.random.Generator) -> nnx.Module | None:
        """Returns stage 4 for the box head; None with a pyramid, whose box head has fully connected layers."""
        return None if self.pyramid else ResNetTail(config, rng=rng)


class ResNetTail(nnx.Module):
    """ResNet stage 4 on each region; the cells of its output are averaged or flattened into one vector."""

    def __init__(self, config: ModelConfig, *, rng: np.random.Generator):
        self.summary, self.remat = config.box_head.summary, config.backbone.remat
        self.channels = stage_channels(config.backbone, 4)
        if self.summary == "flatten":
            self.channels *= math.ceil(config.roi_features.output_size / 2) ** 2
        self.stage = Stage(4, stride=2, config=config.backbone, rng=rng)

    def __call__(
        self, pooled: Float[Array, "b r s s c"], dropout_keys: Keys | None, roi_valid: Bool[Array, "b r"] | None = None
    ) -> Float[Array, "b r d"]:
        batch, rois, side = pooled.shape[:3]
        masks = (region_masks(roi_valid, cells) for cells in (side, math.ceil(side / 2)))
        x = run_stage(self.stage, pooled.reshape(-1, *pooled.shape[2:]), *masks, remat=self.remat)
        x = x.mean(axis=(1, 2)) if self.summary == "mean" else x
        return x.reshape(batch, rois, -1)
