"""The heads: objectness and box deltas per anchor; classes and box deltas per region.

Ren et al. 2015 (arXiv:1506.01497), section 3.1; He et al. 2015 (arXiv:1512.03385), appendix A.
"""

import functools
import math

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, UInt32

from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.models.layers import Conv, Linear, dropout
from fasterrcnn_jax.models.resnet import Stage, stage_channels

Keys = Key[Array, "b"] | UInt32[Array, "b 2"]


class RpnHead(nnx.Module):
    """A 3 x 3 convolution, then one logit and four deltas per anchor.

    One logit: the reference's two-way softmax equals the sigmoid of the logits' difference, which spreads
    sqrt(2) times as widely at the start as each of the two.
    """

    def __init__(self, config: ModelConfig, in_channels: int, *, rng: np.random.Generator):
        rpn = config.rpn
        anchors = len(rpn.anchor_scales) * len(rpn.anchor_ratios)
        self.conv = Conv(in_channels, rpn.channels, 3, bias=True, std=0.01, rng=rng)
        self.objectness = Conv(rpn.channels, anchors, 1, bias=True, std=0.01 * math.sqrt(2.0), rng=rng)
        self.deltas = Conv(rpn.channels, 4 * anchors, 1, bias=True, std=0.01, rng=rng)

    def __call__(
        self, features: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b a"], Float[Array, "b a 4"]]:
        """Returns objectness logits and deltas, in the order of `grid_anchors`."""
        x = jax.nn.relu(self.conv(features))
        batch = x.shape[0]
        return self.objectness(x).reshape(batch, -1), self.deltas(x).reshape(batch, -1, 4)


class ResNetTail(nnx.Module):
    """ResNet stage 4 on each region; its cells averaged or laid out as one vector."""

    def __init__(self, config: ModelConfig, *, rng: np.random.Generator):
        self.summary = config.box_head.summary
        self.channels = stage_channels(config.backbone, 4)
        if self.summary == "flatten":
            self.channels *= math.ceil(config.roi_features.output_size / 2) ** 2
        self.stage = Stage(4, stride=2, config=config.backbone, rng=rng)

    def __call__(
        self, pooled: Float[Array, "b r s s c"], dropout_keys: Keys | None
    ) -> Float[Array, "b r d"]:
        batch, rois = pooled.shape[:2]
        x = self.stage(pooled.reshape(-1, *pooled.shape[2:]))
        x = x.mean(axis=(1, 2)) if self.summary == "mean" else x
        return x.reshape(batch, rois, -1)


class VggTail(nnx.Module):
    """VGG16's fc6 and fc7 on each region, with dropout in training."""

    def __init__(self, config: ModelConfig, in_channels: int, *, rng: np.random.Generator):
        head = config.box_head
        self.rate = head.dropout
        self.channels = head.channels
        inputs = in_channels * config.roi_features.output_size**2
        self.fc6 = Linear(inputs, head.channels, std=math.sqrt(2.0 / inputs), rng=rng)
        self.fc7 = Linear(head.channels, head.channels, std=math.sqrt(2.0 / head.channels), rng=rng)

    def __call__(
        self, pooled: Float[Array, "b r s s c"], dropout_keys: Keys | None
    ) -> Float[Array, "b r d"]:
        x = pooled.reshape(*pooled.shape[:2], -1)
        for number, layer in enumerate((self.fc6, self.fc7)):
            x = jax.nn.relu(layer(x))
            if dropout_keys is not None and self.rate > 0.0:
                keys = jax.vmap(functools.partial(jax.random.fold_in, data=number))(dropout_keys)
                x = jax.vmap(functools.partial(dropout, rate=self.rate))(keys, x)
        return x


class BoxHead(nnx.Module):
    """The tail of the network on each region, then class logits and deltas per class or for all of them."""

    def __init__(self, config: ModelConfig, in_channels: int, num_classes: int, *, rng: np.random.Generator):
        if config.backbone.name == "vgg16":
            self.tail = VggTail(config, in_channels, rng=rng)
        else:
            self.tail = ResNetTail(config, rng=rng)
        boxes = 1 if config.box_head.class_agnostic else num_classes + 1
        self.class_logits = Linear(self.tail.channels, num_classes + 1, std=0.01, rng=rng)
        self.deltas = Linear(self.tail.channels, 4 * boxes, std=0.001, rng=rng)

    def __call__(
        self, pooled: Float[Array, "b r s s c"], dropout_keys: Keys | None = None
    ) -> tuple[Float[Array, "b r k"], Float[Array, "b r k2 4"]]:
        """Returns logits and deltas; class 0 is background and deltas of its own are never read.

        Args:
          dropout_keys: one per image, for training; without them nothing is dropped.
        """
        x = self.tail(pooled, dropout_keys)
        return self.class_logits(x), self.deltas(x).reshape(*x.shape[:2], -1, 4)
