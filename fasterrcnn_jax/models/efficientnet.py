"""EfficientNet-Lite under a pyramid. Tan and Le 2019 (arXiv:1905.11946), table 1 and equation 3.

Lite is the authors' variant for devices without a GPU (`lite` in the EfficientNet folder of the repository
tensorflow/tpu): no squeeze-and-excitation, ReLU6 in place of swish, and a stem and a last stage of the same size in
every network of the family. The blocks are those of MobileNetV2, Sandler et al. 2018 (arXiv:1801.04381), section 3.3.
"""

import math
from typing import NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fasterrcnn_jax.config import BackboneConfig, ImageConfig
from fasterrcnn_jax.models.layers import (
    NORMS,
    BatchNorm,
    Conv,
    DepthwiseConv,
    FrozenBatchNorm,
    Valid,
    conv_norm,
    first_std,
    relu6,
    run_stage,
    valid_mask,
)

# Of the published weights.
EPSILON = 1e-3
STEM = 32


class Row(NamedTuple):
    """A row of table 1: blocks with equal settings, of which the first one strides."""

    blocks: int
    size: int  # of the depthwise convolution
    stride: int
    expansion: int
    channels: int


TABLE = (
    Row(1, 3, 1, 1, 16),
    Row(2, 3, 2, 6, 24),
    Row(2, 5, 2, 6, 40),
    Row(3, 3, 2, 6, 80),
    Row(3, 5, 1, 6, 112),
    Row(4, 5, 2, 6, 192),
    Row(1, 3, 1, 6, 320),
)
# The rows whose last block makes the map of stride 4, 8, 16 and 32.
STAGE_ENDS = (1, 2, 4, 6)
# Factors on the numbers of channels and of blocks.
SCALES = {"efficientnet_lite0": (1.0, 1.0), "efficientnet_lite1": (1.0, 1.1), "efficientnet_lite2": (1.1, 1.2)}


def _rounded(channels: float) -> int:
    """Returns the nearest multiple of 8; the next one where that is less than nine tenths of `channels`."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def stages_of(config: BackboneConfig) -> tuple[tuple[Row, ...], ...]:
    """Returns the blocks of each stage, one row for each block, with its own stride and the scaled channels."""
    wide, deep = SCALES[config.name]
    stages, blocks = [], []
    for number, row in enumerate(TABLE):
        is_end = number in (0, len(TABLE) - 1)
        channels = _rounded(_rounded(row.channels * wide) * config.width / 64)
        for block in range(row.blocks if is_end else math.ceil(row.blocks * deep)):
            blocks.append(row._replace(blocks=1, stride=1 if block else row.stride, channels=channels))
        if number in STAGE_ENDS:
            stages.append(tuple(blocks))
            blocks = []
    return tuple(stages)


def _norm(config: BackboneConfig, channels: int) -> nnx.Module:
    kinds = {"frozen_batch": FrozenBatchNorm, "batch": BatchNorm}
    return kinds[config.norm](channels, epsilon=EPSILON) if config.norm in kinds else NORMS[config.norm](channels)


class Block(nnx.Module):
    """An inverted residual block: 1 x 1 to more channels, depthwise, 1 x 1 to few channels without an activation."""

    def __init__(self, in_channels: int, row: Row, *, config: BackboneConfig, rng: np.random.Generator):
        channels = in_channels * row.expansion
        self.adds = row.stride == 1 and in_channels == row.channels
        self.expand = Conv(in_channels, channels, 1, rng=rng) if row.expansion > 1 else None
        self.expand_norm = _norm(config, channels) if row.expansion > 1 else None
        self.depthwise = DepthwiseConv(channels, row.size, stride=row.stride, rng=rng)
        self.depthwise_norm = _norm(config, channels)
        # As in a block of ResNet: with statistics that were not measured, a branch starts at zero.
        std = 0.0 if self.adds and config.norm == "frozen_batch" else None
        self.project = Conv(channels, row.channels, 1, std=std, rng=rng)
        self.project_norm = _norm(config, row.channels)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        valid_in: Float[Array, "b h w 1"] | None,
        valid_out: Float[Array, "b h2 w2 1"] | None,
    ) -> Float[Array, "b h2 w2 d"]:
        y = x
        if self.expand is not None and self.expand_norm is not None:
            y = relu6(conv_norm(self.expand, self.expand_norm, y, valid_in))
        y = relu6(conv_norm(self.depthwise, self.depthwise_norm, y, valid_out))
        y = conv_norm(self.project, self.project_norm, y, valid_out)
        return x + y if self.adds else y


class Stage(nnx.Module):
    """Blocks up to the last one of a resolution."""

    def __init__(self, in_channels: int, rows: tuple[Row, ...], *, config: BackboneConfig, rng: np.random.Generator):
        inputs = (in_channels, *(row.channels for row in rows))
        self.blocks = nnx.List([Block(inputs[i], row, config=config, rng=rng) for i, row in enumerate(rows)])
        # The first stage has a block before the one that strides.
        self.striding = next(i for i, row in enumerate(rows) if row.stride == 2)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        valid_in: Float[Array, "b h w 1"] | None,
        valid_out: Float[Array, "b h2 w2 1"] | None,
    ) -> Float[Array, "b h2 w2 d"]:
        for i, block in enumerate(self.blocks):
            x = block(x, valid_out if i > self.striding else valid_in, valid_in if i < self.striding else valid_out)
        return x


class EfficientNet(nnx.Module):
    """Stem and stages: turns normalised images into the maps of strides 4 to 32.

    The published network's last 1 x 1 convolution, which only its classifier reads, is left out.
    """

    def __init__(self, config: BackboneConfig, image: ImageConfig, *, pyramid: bool = True, rng: np.random.Generator):
        assert pyramid, "the configuration allows no other use"
        self.config = config
        rows = stages_of(config)
        self.channels = tuple(blocks[-1].channels for blocks in rows)
        stem = _rounded(STEM * config.width / 64)
        self.stem = Conv(3, stem, 3, stride=2, padding="same", std=first_std(3, stem, image), rng=rng)
        self.stem_norm = _norm(config, stem)
        inputs = (stem, *self.channels)
        self.stages = nnx.List([Stage(inputs[i], blocks, config=config, rng=rng) for i, blocks in enumerate(rows)])

    def __call__(
        self, images: Float[Array, "b h w 3"], image_hw: Float[Array, "b 2"]
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Returns four maps with 4, 8, 16 and 32 network pixels per cell."""
        height, width = images.shape[1:3]

        def valid(stride: int) -> Valid:
            if not self.config.mask_padding:
                return None
            return valid_mask(image_hw, (-(-height // stride), -(-width // stride)), stride)

        x = relu6(conv_norm(self.stem, self.stem_norm, images, valid(2)))
        maps = []
        for number, stage in enumerate(self.stages):
            stride = 2 * 2**number
            x = run_stage(stage, x, valid(stride), valid(2 * stride), remat=self.config.remat)
            maps.append(x)
        return tuple(maps)
