"""The detector: its layers, its parameters, and the feature maps that RPN and box head share."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from fasterrcnn_jax.config import BackboneConfig, ImageConfig, ModelConfig
from fasterrcnn_jax.config.checks import fitted
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.models.efficientnet import EfficientNet
from fasterrcnn_jax.models.fpn import Fpn
from fasterrcnn_jax.models.heads import BoxHead, RpnHead
from fasterrcnn_jax.models.layers import BatchNorm, Undrawn, level_masks, normalised
from fasterrcnn_jax.models.resnet import ResNet
from fasterrcnn_jax.models.vgg import Vgg16
from fasterrcnn_jax.ops.anchors import anchors_per_cell, strides_of
from fasterrcnn_jax.structures import Images

# The shared feature maps that the heads read, one per level, fine to coarse.
Features = tuple[Float[Array, "b _ _ c"], ...]


@runtime_checkable
class Backbone(Protocol):
    """The interface of a backbone, an `nnx.Module` that computes feature maps; see docs/backbone.md."""

    @property
    def channels(self) -> tuple[int, ...]: ...

    def __call__(
        self, images: Float[Array, "b h w 3"], image_hw: Float[Array, "b 2"], /
    ) -> tuple[Float[Array, "b _ _ _"], ...]: ...


# A backbone class: it is called with (config, image, *, rng), and pyramid=True with a pyramid.
BackboneClass = Callable[..., Backbone]


class Detector(nnx.Module):
    """The layers and their configuration; a pytree whose structure holds everything that is static."""

    def __init__(
        self,
        config: ModelConfig,
        class_names: tuple[str, ...],
        *,
        backbone: BackboneClass | None = None,
        rng: np.random.Generator,
    ):
        self.config = config
        self.class_names = class_names
        _check_size(config, len(class_names))
        backbone = backbone or backbone_class(config.backbone)
        pyramid = {} if config.fpn is None else {"pyramid": True}
        self.backbone = backbone(config.backbone, config.image, rng=rng, **pyramid)
        self.neck = None if config.fpn is None else Fpn(config.fpn, self.backbone.channels, rng=rng)
        channels = self.backbone.channels[-1] if config.fpn is None else config.fpn.channels
        self.rpn_head = RpnHead(config, channels, rng=rng)
        # A backbone may provide its own layers for the box head, as ResNet provides its stage 4.
        make_tail = getattr(self.backbone, "tail", None)
        tail = None if make_tail is None else make_tail(config, rng=rng)
        self.box_head = BoxHead(config, channels, len(class_names), tail=tail, rng=rng)


def _check_size(config: ModelConfig, num_classes: int) -> None:
    """Raises InputError where a few numbers in a file would fill the memory of the one who detects with its model."""
    proposals, features = config.test_proposals.post_nms_top_n, config.roi_features
    stride = strides_of(config)[0]
    canvases = fitted(config.image.canvases, "model.image.canvases")
    cells = max(height * width for height, width in canvases) // stride**2
    for limit, size, what in (
        (2**22, proposals * num_classes, "test_proposals.post_nms_top_n times the number of classes"),
        (
            2**21,
            proposals * (features.output_size * max(1, features.sampling_ratio)) ** 2,
            "test_proposals.post_nms_top_n times (roi_features.output_size times roi_features.sampling_ratio)^2",
        ),
        (
            2**22,
            cells * anchors_per_cell(config.rpn),
            "the number of anchors (rpn.anchor_scales or rpn.anchor_sizes, rpn.anchor_ratios) on the finest map of the "
            "largest canvas",
        ),
    ):
        if size > limit:
            raise InputError(f"{what} must be at most {limit}, got {size}")


def backbone_class(config: BackboneConfig) -> BackboneClass:
    """Returns the class that `config` names, and imports it if it is the user's own.

    Call this only with a configuration that the user wrote; use `given_backbone` for a configuration from a file.

    Raises:
      InputError: `config.own` cannot be imported.
    """
    if config.own is None:
        is_lite = config.name.startswith("efficientnet")
        return Vgg16 if config.name == "vgg16" else EfficientNet if is_lite else ResNet
    return import_class(config.own, "model.backbone.own")


def import_class(path: str, field: str) -> BackboneClass:
    """Returns the class at MODULE:CLASS.

    Args:
      field: the setting or option that holds `path`, for messages.
    Raises:
      InputError: there is no such class.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{field} = {path}: {error}") from error


def given_backbone(config: BackboneConfig, backbone: BackboneClass | None, where: str) -> BackboneClass:
    """Returns the backbone class for a configuration from a file; it never imports a class that the file names.

    Args:
      backbone: the class that the caller gave, if any.
      where: the file, for messages.
    Raises:
      InputError: the file names a class and the caller gave none.
    """
    if backbone is None and config.own is not None:
        raise InputError(
            f"{where}: the model needs the backbone class {quoted(config.own)}, which is not imported because a file "
            "names it; if you trust it, give it yourself: load(path, backbone=CLASS), or --backbone MODULE:CLASS"
        )
    return backbone or backbone_class(config)


def create_detector(
    config: ModelConfig, class_names: tuple[str, ...], *, seed: int, backbone: BackboneClass | None = None
) -> Detector:
    """Returns a detector with random weights.

    Args:
      backbone: used instead of the class that `config.backbone` names.
    """
    return Detector(config, class_names, backbone=backbone, rng=np.random.default_rng(seed))


def empty_detector(
    config: ModelConfig,
    class_names: tuple[str, ...],
    *,
    backbone: BackboneClass | None = None,
    where: str = "the configuration",
) -> Detector:
    """Returns a detector whose weights have names, shapes and types but no values; draws nothing.

    Args:
      backbone: used instead of the class that `config.backbone` names.
      where: the file that holds the configuration, for messages.
    Raises:
      InputError: the detector would be too large.
    """
    try:
        return jax.eval_shape(lambda: Detector(config, class_names, backbone=backbone, rng=Undrawn(np.random.PCG64(0))))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def with_image_config(model: Detector, image: ImageConfig) -> Detector:
    """Returns a detector with other image settings that shares the weights of `model`."""
    changed = nnx.merge(*nnx.split(model))
    changed.config = dataclasses.replace(model.config, image=image)
    return changed


def split(model: Detector) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """Returns (structure, trained parameters, everything else).

    Not trained are constants, running averages, and the fixed stages.
    """

    def is_trained(path: tuple[Any, ...], _: object) -> bool:
        return not _is_fixed(model.config.backbone, path)

    graphdef, params, rest = nnx.split(model, nnx.All(nnx.Param, is_trained), ...)
    return graphdef, params, rest


def use_batch_statistics(model: Detector, *, axes: tuple[str, ...] = (), parts: tuple[str, ...]) -> None:
    """Changes `model`: its trained batch norm layers use the statistics of the batch from here on.

    Each of these layers then writes its next running averages into the model, so call this on a copy that only one
    training step uses, inside of the function that is differentiated. Fixed stages and other parts keep their running
    averages.

    Args:
      axes: names of the device axes that the batch is spread over.
      parts: the parts of the detector that are trained.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm) and path[0] in parts and not _is_fixed(model.config.backbone, path):
            module.batch_axes = axes


def _is_fixed(config: BackboneConfig, path: tuple[Any, ...]) -> bool:
    """Returns whether the layer or variable at `path` belongs to the stages that are never trained."""
    if path[0] != "backbone":
        return False
    # The stem belongs to the first stage.
    return path[2] < config.fixed_stages if path[1] == "stages" else config.fixed_stages > 0 or config.fixed_stem


def shared_features(model: Detector, images: Images, image_hw: Float[Array, "b 2"]) -> Features:
    """Returns the maps that RPN and box head read, in the model's compute type: one, or P2 to P6.

    Raises:
      ValueError: a map of the backbone does not have the stride that the configuration states.
    """
    config = model.config
    pixels = normalised(images, image_hw, config.image)
    with jax.named_scope("backbone"):
        maps = model.backbone(pixels.astype(config.compute_dtype), image_hw)
    with jax.named_scope("fpn"):
        features = maps if model.neck is None else model.neck(maps, level_masks(config, maps, image_hw))
    # If a user's own backbone returned a map with another stride, every box would be in a wrong place.
    canvas = np.array(images.shape[1:3])
    for level, stride in zip(features, strides_of(config), strict=True):
        if (np.abs(np.array(level.shape[1:3]) * stride - canvas) >= stride).any():
            raise ValueError(
                f"the backbone returns a map of {level.shape[1]} x {level.shape[2]} cells for a canvas of "
                f"{images.shape[1]} x {images.shape[2]} pixels, which does not have the configured stride {stride}"
            )
    return features


def parameter_count(model: Detector) -> int:
    """Returns the number of parameters, fixed ones and the statistics of fixed normalisation included."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
