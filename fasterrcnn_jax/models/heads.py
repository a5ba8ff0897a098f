"""The heads: objectness and box deltas per anchor; classes and box deltas per region.

Ren et al. 2015 (arXiv:1506.01497), section 3.1; He et al. 2015 (arXiv:1512.03385), appendix A.
"""

import math
from typing import Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt32

from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.models.layers import NORMS, BatchNorm, Conv, Linear, conv_joined, conv_norm, dropout, regroups, relu
from fasterrcnn_jax.ops.anchors import anchors_per_cell
from fasterrcnn_jax.ops.neighbourhoods import cells_around

Keys = Key[Array, "b"] | UInt32[Array, "b 2"]


def _unchanged(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return x


# By `rpn.activation`.
ACTIVATIONS = {"relu": relu, "none": _unchanged}


class RpnHead(nnx.Module):
    """3 x 3 convolutions, then one logit and four deltas per anchor; all levels share the weights.

    One logit is enough: the two-way softmax of the reference equals the sigmoid of the difference of its two
    logits. At the start the std of this difference is sqrt(2) times the std of each logit.
    """

    def __init__(self, config: ModelConfig, in_channels: int, *, rng: np.random.Generator):
        rpn = config.rpn
        anchors = anchors_per_cell(rpn)
        self.activation = ACTIVATIONS[rpn.activation]
        self.convs = nnx.List(
            [
                Conv(rpn.channels if i else in_channels, rpn.channels, 3, bias=True, std=0.01, rng=rng)
                for i in range(rpn.convs)
            ]
        )
        std = 0.01 * math.sqrt(2.0)
        self.objectness = Conv(rpn.channels, anchors, 1, bias=True, std=std, predicts=True, rng=rng)
        self.deltas = Conv(rpn.channels, 4 * anchors, 1, bias=True, std=0.01, predicts=True, rng=rng)

    def __call__(
        self,
        levels: tuple[Float[Array, "b _ _ c"], ...],
        valids: tuple[Float[Array, "b _ _ 1"] | None, ...] | None = None,
    ) -> tuple[Float[Array, "b a"], Float[Array, "b a 4"]]:
        """Returns objectness logits and deltas in float32, in the order of `anchors_of`.

        Args:
          valids: the mask of each level, as from `level_masks`; None if padding is not masked.
        """
        batch = levels[0].shape[0]
        objectness, deltas = [], []
        for x, valid in zip(levels, valids or (None,) * len(levels), strict=True):
            for conv in self.convs:
                x = self.activation(conv(x))
                x = x if valid is None else x * valid.astype(x.dtype)
            logits, offsets = self._predictions(x)
            objectness.append(logits.reshape(batch, -1))
            deltas.append(offsets.reshape(batch, -1, 4))
        return jnp.concatenate(objectness, axis=1), jnp.concatenate(deltas, axis=1)

    def at_anchors(
        self,
        levels: tuple[Float[Array, "b _ _ c"], ...],
        anchors: Int[Array, "b s"],
        valids: tuple[Float[Array, "b _ _ 1"] | None, ...] | None = None,
    ) -> tuple[Float[Array, "b s"], Float[Array, "b s 4"]]:
        """Returns the objectness and deltas of the given anchors, computed from the cells around them.

        The cost of the gradient grows with the number of anchors. The gradient of the call is computed for every cell,
        although it is zero almost everywhere.

        Args:
          anchors: positions in the order of `anchors_of`.
          valids: as in the call.
        """
        per_cell = self.objectness.kernel.shape[-1]
        cells, radius = anchors // per_cell, len(self.convs)
        x, mask = cells_around(levels, cells, radius=radius)
        mask = mask[..., None].astype(x.dtype)
        if valids is not None and valids[0] is not None:
            mask = cells_around(cast("tuple[Array, ...]", valids), cells, radius=radius)[0].astype(x.dtype)
        for conv in self.convs:
            mask = mask[:, :, 1:-1, 1:-1]
            x = self.activation(conv.inside(x)) * mask
        logits, offsets = (y.reshape(*anchors.shape, per_cell, -1) for y in self._predictions(x[:, :, 0]))
        one = jax.nn.one_hot(anchors % per_cell, per_cell, dtype=logits.dtype)[..., None]
        return (logits * one).sum(axis=(-2, -1)), (offsets * one).sum(axis=-2)

    def _predictions(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w a"], Float[Array, "b h w d"]]:
        if not regroups():
            return self.objectness(x), self.deltas(x)
        # The map is read once, and so is its gradient.
        return conv_joined(self.objectness, self.deltas, x)


class FcTail(nnx.Module):
    """Fully connected layers on each region, with dropout in training; convolutions may come before them.

    For VGG16 the layers are fc6 and fc7; on a pyramid there are two layers (Lin et al. 2017, arXiv:1612.03144,
    section 4.2).
    """

    def __init__(self, config: ModelConfig, in_channels: int, *, rng: np.random.Generator):
        head, norm = config.box_head, "none" if config.fpn is None else config.fpn.norm
        self.rate = head.dropout
        self.channels = head.channels
        self.convs = nnx.List(
            [Conv(in_channels, in_channels, 3, bias=norm == "none", rng=rng) for _ in range(head.convs)]
        )
        self.norms = nnx.List([NORMS[norm](in_channels) for _ in range(head.convs)])
        inputs = in_channels * config.roi_features.output_size**2
        sizes = (inputs, *(head.channels for _ in range(head.layers)))
        # The std of PyTorch's layer, with which torchvision's heads start. He's is 2.4 times as large: fine-tuned from
        # ImageNet weights on a hundred images, it gave 0.05 less AP (docs/training.md).
        self.fcs = nnx.List(
            [Linear(size, head.channels, std=1.0 / math.sqrt(3.0 * size), rng=rng) for size in sizes[:-1]]
        )

    def __call__(
        self, pooled: Float[Array, "b r s s c"], dropout_keys: Keys | None, roi_valid: Bool[Array, "b r"] | None = None
    ) -> Float[Array, "b r d"]:
        x = pooled.reshape(-1, *pooled.shape[2:])
        valid = region_masks(roi_valid, x.shape[1])
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = relu(conv_norm(conv, norm, x, valid))
        x = x.reshape(*pooled.shape[:2], -1)
        for number, layer in enumerate(self.fcs):
            x = relu(layer(x))
            if dropout_keys is not None and self.rate > 0.0:
                x = jax.vmap(self._dropped, in_axes=(0, 0, None))(dropout_keys, x, number)
        return x

    def _dropped(
        self, key: PRNGKeyArray | UInt32[Array, "2"], x: Float[Array, "r d"], number: int
    ) -> Float[Array, "r d"]:
        """Returns the activations of one image after layer `number` with dropout."""
        return dropout(jax.random.fold_in(key, number), x, rate=self.rate)


def region_masks(roi_valid: Bool[Array, "b r"] | None, side: int) -> Float[Array, "br s s 1"] | None:
    """Returns the mask of regions with `side` x `side` cells for a normalisation layer; None for no mask."""
    if roi_valid is None:
        return None
    mask = roi_valid.reshape(-1, 1, 1, 1).astype(jnp.float32)
    return jnp.broadcast_to(mask, (len(mask), side, side, 1))


@runtime_checkable
class Tail(Protocol):
    """The interface of a tail, an `nnx.Module` that the box head runs on each region.

    In training with batch normalisation, a tail that contains a `BatchNorm` gets a third argument: which regions are
    valid, [B, R].
    """

    @property
    def channels(self) -> int: ...

    def __call__(self, pooled: Float[Array, "b r s s c"], dropout_keys: Keys | None, /) -> Float[Array, "b r d"]: ...


class BoxHead(nnx.Module):
    """The tail of the network on each region, then class logits and box deltas per class or for all classes."""

    def __init__(
        self,
        config: ModelConfig,
        in_channels: int,
        num_classes: int,
        *,
        tail: Tail | None = None,
        rng: np.random.Generator,
    ):
        """Builds the head on `tail`, the layers that the backbone provides; None: fully connected layers."""
        self.tail = FcTail(config, in_channels, rng=rng) if tail is None else tail
        boxes = 1 if config.box_head.class_agnostic else num_classes + 1
        self.class_logits = Linear(self.tail.channels, num_classes + 1, std=0.01, predicts=True, rng=rng)
        self.deltas = Linear(self.tail.channels, 4 * boxes, std=0.001, predicts=True, rng=rng)

    def __call__(
        self,
        pooled: Float[Array, "b r s s c"],
        dropout_keys: Keys | None = None,
        roi_valid: Bool[Array, "b r"] | None = None,
    ) -> tuple[Float[Array, "b r k"], Float[Array, "b r k2 4"]]:
        """Returns logits and deltas in float32; class 0 is background, and its deltas are never read.

        Args:
          dropout_keys: one key per image, for training; None: no dropout.
          roi_valid: the regions that batch normalisation takes its statistics from; None: all.
        """
        # A tail without batch normalisation need not know the third argument.
        tail = self.tail
        parts = nnx.iter_modules(tail) if roi_valid is not None and isinstance(tail, nnx.Module) else ()
        counts = any(isinstance(part, BatchNorm) for _, part in parts)
        x = tail(pooled, dropout_keys, *((roi_valid,) if counts else ()))
        return self.class_logits(x), self.deltas(x).reshape(*x.shape[:2], -1, 4)
