"""The detector: its layers, its parameters, and the feature maps that RPN and box head share."""

import importlib

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from fasterrcnn_jax.config import BackboneConfig, ModelConfig
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.fpn import Fpn
from fasterrcnn_jax.models.heads import BoxHead, RpnHead
from fasterrcnn_jax.models.layers import level_masks, normalised
from fasterrcnn_jax.models.resnet import ResNet
from fasterrcnn_jax.models.vgg import Vgg16
from fasterrcnn_jax.ops.anchors import strides_of
from fasterrcnn_jax.structures import Images

# The shared feature maps that the heads read, one per level, fine to coarse.
Features = tuple[Float[Array, "b _ _ c"], ...]


class Detector(nnx.Module):
    """The layers and their configuration; a pytree whose structure carries everything static."""

    def __init__(
        self,
        config: ModelConfig,
        class_names: tuple[str, ...],
        *,
        backbone: type[nnx.Module] | None = None,
        rng: np.random.Generator,
    ):
        self.config = config
        self.class_names = class_names
        backbone = backbone or backbone_class(config.backbone)
        pyramid = {} if config.fpn is None else {"pyramid": True}
        self.backbone = backbone(config.backbone, config.image, rng=rng, **pyramid)
        self.neck = None if config.fpn is None else Fpn(config.fpn, self.backbone.channels, rng=rng)
        channels = self.backbone.channels[-1] if config.fpn is None else config.fpn.channels
        self.rpn_head = RpnHead(config, channels, rng=rng)
        # A backbone may bring layers of its own for the box head, as ResNet brings its stage 4.
        tail = self.backbone.tail(config, rng=rng) if hasattr(self.backbone, "tail") else None
        self.box_head = BoxHead(config, channels, len(class_names), tail=tail, rng=rng)


def backbone_class(config: BackboneConfig) -> type[nnx.Module]:
    """Returns the class that `config` names; a user's own is imported.

    Raises:
      InputError: `config.own` cannot be imported.
    """
    if config.own is None:
        return Vgg16 if config.name == "vgg16" else ResNet
    module, name = config.own.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"model.backbone.own = {config.own}: {error}") from error


def create_detector(
    config: ModelConfig, class_names: tuple[str, ...], *, seed: int, backbone: type[nnx.Module] | None = None
) -> Detector:
    """Returns a detector with random weights.

    Args:
      backbone: used instead of the class that `config.backbone` names.
    """
    return Detector(config, class_names, backbone=backbone, rng=np.random.default_rng(seed))


def split(model: Detector) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """Returns (structure, trained parameters, everything else): constants and the fixed stages are not trained."""
    fixed = model.config.backbone.fixed_stages

    def is_trained(path, _):
        if path[0] != "backbone" or not fixed:
            return True
        # The stem belongs to the first stage.
        return path[1] == "stages" and path[2] >= fixed

    return nnx.split(model, nnx.All(nnx.Param, is_trained), ...)


def shared_features(model: Detector, images: Images, image_hw: Float[Array, "b 2"]) -> Features:
    """Returns the maps that RPN and box head read, in the model's compute type: one, or P2 to P6.

    Raises:
      ValueError: a map of the backbone does not have the stride that the configuration states.
    """
    config = model.config
    pixels = normalised(images, image_hw, config.image)
    maps = model.backbone(pixels.astype(config.compute_dtype), image_hw)
    features = maps if model.neck is None else model.neck(maps, level_masks(config, maps, image_hw))
    # A map of another stride, from a backbone of the user's own, would put every box in a wrong place.
    canvas = np.array(images.shape[1:3])
    for level, stride in zip(features, strides_of(config), strict=True):
        if (np.abs(np.array(level.shape[1:3]) * stride - canvas) >= stride).any():
            raise ValueError(
                f"the backbone returns a map of {level.shape[1]} x {level.shape[2]} cells for a canvas of "
                f"{images.shape[1]} x {images.shape[2]} pixels, which does not have the configured stride {stride}"
            )
    return features
