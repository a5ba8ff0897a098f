"""The two heads: objectness and box deltas per anchor; classes and box deltas per region.

Ren et al. 2015 (arXiv:1506.01497), section 3.1; He et al. 2015 (arXiv:1512.03385), appendix A.
"""

import math

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.models.layers import Conv, Linear
from fasterrcnn_jax.models.resnet import Stage, stage_channels


class RpnHead(nnx.Module):
    """A 3 x 3 convolution, then one logit and four deltas per anchor.

    One logit: the reference's two-way softmax equals the sigmoid of the logits' difference.
    """

    def __init__(self, config: ModelConfig, *, rng: np.random.Generator):
        rpn = config.rpn
        anchors = len(rpn.anchor_sizes) * len(rpn.anchor_ratios)
        in_channels = stage_channels(config.backbone, 3)
        self.conv = Conv(in_channels, rpn.channels, 3, bias=True, std=0.01, rng=rng)
        self.objectness = Conv(rpn.channels, anchors, 1, bias=True, std=0.01, rng=rng)
        self.deltas = Conv(rpn.channels, 4 * anchors, 1, bias=True, std=0.01, rng=rng)

    def __call__(
        self, features: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b a"], Float[Array, "b a 4"]]:
        """Returns objectness logits and deltas, in the order of `grid_anchors`."""
        x = jax.nn.relu(self.conv(features))
        batch = x.shape[0]
        return self.objectness(x).reshape(batch, -1), self.deltas(x).reshape(batch, -1, 4)


class BoxHead(nnx.Module):
    """ResNet stage 4 on each region, then class logits and class-specific deltas."""

    def __init__(self, config: ModelConfig, num_classes: int, *, rng: np.random.Generator):
        self.summary = config.box_head.summary
        features = stage_channels(config.backbone, 4)
        if self.summary == "flatten":
            features *= math.ceil(config.roi_align.output_size / 2) ** 2
        self.stage = Stage(4, stride=2, config=config.backbone, rng=rng)
        self.class_logits = Linear(features, num_classes + 1, std=0.01, rng=rng)
        self.deltas = Linear(features, 4 * (num_classes + 1), std=0.001, rng=rng)

    def __call__(
        self, pooled: Float[Array, "b r s s c"]
    ) -> tuple[Float[Array, "b r k"], Float[Array, "b r k 4"]]:
        """Returns logits and deltas per class; class 0 is background and its deltas are never read."""
        batch, rois = pooled.shape[:2]
        x = self.stage(pooled.reshape(-1, *pooled.shape[2:]))
        x = x.mean(axis=(1, 2)) if self.summary == "mean" else x.reshape(batch * rois, -1)
        logits = self.class_logits(x).reshape(batch, rois, -1)
        return logits, self.deltas(x).reshape(batch, rois, -1, 4)
