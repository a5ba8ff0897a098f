"""Detectors by name: their configuration and the published weights that fit it."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fasterrcnn_jax.config import ModelConfig, families
from fasterrcnn_jax.data import coco, voc
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import BackboneClass, Detector, create_detector, empty_detector, given_backbone
from fasterrcnn_jax.weights import files, pretrained
from fasterrcnn_jax.weights import load_weights as load_file
from fasterrcnn_jax.weights.files import Weights
from fasterrcnn_jax.weights.load import (
    assign,
    assign_own,
    formats_of,
    log,
    num_classes_of,
    stored_model,
)
from fasterrcnn_jax.weights.tables import Format

logger = logging.getLogger(__name__)


def _coco_ids() -> tuple[str, ...]:
    names = iter(coco.CLASS_NAMES)
    return tuple(f"unused {i}" if i in coco.UNUSED_IDS else next(names) for i in range(1, 91))


class Model(NamedTuple):
    """A detector of the zoo and its published weights. Its preprocessing is part of `config`."""

    name: str
    config: ModelConfig
    class_names: tuple[str, ...]  # classes of the published weights, without background
    formats: tuple[str, ...]  # formats of `weights.tables` that the weights are published in
    source: str  # who publishes the weights
    file: str | None  # name of the published file
    sha256: str | None  # first digits of the file's checksum
    published: str  # result that the authors publish; we have not measured it


MODELS = {
    model.name: model
    for model in (
        Model(
            "resnet50_fpn",
            families.resnet_fpn(50),
            _coco_ids(),
            ("torchvision_fpn", "torchvision_fpn_epsilon_0"),
            "torchvision, FasterRCNN_ResNet50_FPN_Weights.COCO_V1",
            "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
            "258fb6c6",
            "AP 37.0 on COCO val2017",
        ),
        Model(
            "resnet50_fpn_v2",
            families.resnet_fpn(50, version=2),
            _coco_ids(),
            ("torchvision_fpn",),
            "torchvision, FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1",
            "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth",
            "dd69338a",
            "AP 46.7 on COCO val2017",
        ),
        Model(
            "resnet50_fpn_detectron2",
            families.detectron2_fpn(50),
            coco.CLASS_NAMES,
            ("detectron2_fpn",),
            "detectron2 model zoo, faster_rcnn_R_50_FPN_3x",
            None,
            None,
            "AP 40.2 on COCO val2017",
        ),
        Model(
            "resnet101_fpn_detectron2",
            families.detectron2_fpn(101),
            coco.CLASS_NAMES,
            ("detectron2_fpn",),
            "detectron2 model zoo, faster_rcnn_R_101_FPN_3x",
            None,
            None,
            "AP 42.0 on COCO val2017",
        ),
        Model(
            "vgg16_voc",
            families.vgg16(),
            voc.CLASS_NAMES,
            ("faster_rcnn_pytorch",),
            "faster-rcnn.pytorch, VGG16 on VOC 2007",
            None,
            None,
            "mAP 70.1 on VOC 2007 test",
        ),
        Model(
            "resnet101_c4_voc",
            families.resnet_c4(101),
            voc.CLASS_NAMES,
            ("faster_rcnn_pytorch",),
            "faster-rcnn.pytorch, ResNet-101 on VOC 2007",
            None,
            None,
            "mAP 75.2 on VOC 2007 test",
        ),
        Model(
            "resnet101_c4_coco",
            families.coco_scales(families.resnet_c4(101)),
            coco.CLASS_NAMES,
            ("faster_rcnn_pytorch",),
            "faster-rcnn.pytorch, ResNet-101 on COCO at 800 pixels",
            None,
            None,
            "AP 37.0 on COCO minival",
        ),
    )
}


def list_models() -> list[str]:
    """Returns the names that `create` knows."""
    return list(MODELS)


def model_info(name: str) -> Model:
    """Returns the configuration, classes and source of a model.

    Raises:
      InputError: no model has that name; the message lists all names.
    """
    if name not in MODELS:
        raise InputError(f"no model is named {name!r}; the models are {', '.join(MODELS)}")
    return MODELS[name]


def create(
    model: str | ModelConfig,
    class_names: tuple[str, ...] | None = None,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    backbone: BackboneClass | None = None,
) -> Detector:
    """Returns the detector of a name or configuration, with weights from a path or with random weights.

    Args:
      class_names: class names without background. None: the classes of the model's published weights.
      num_classes: number of classes, instead of `class_names`. The names are those of the published weights if the
        number is the same, otherwise class 1, class 2, ...
      weights: a path that `load_weights` reads, or "imagenet". If its number of classes differs, the last layers get
        random weights.
      backbone: your own backbone class; see docs/backbone.md.
    Raises:
      InputError: there is no such model, or the weights do not fit it.
      ValueError: `class_names` and `num_classes` are both given, or a configuration is given with neither.
    """
    info = model_info(model) if isinstance(model, str) else None
    if class_names is not None and num_classes is not None:
        raise ValueError("give class_names or num_classes, not both")
    if num_classes is not None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        class_names = _names(info, num_classes) if info else _numbered(num_classes)
    if class_names is None:
        if info is None:
            raise ValueError("a configuration needs class_names or num_classes")
        class_names = info.class_names
    config = model_info(model).config if isinstance(model, str) else model
    made = create_detector(config, tuple(class_names), seed=seed, backbone=backbone)
    if weights is None:
        return made
    return load_weights(made, weights)


def load_weights(model: Detector, path: str | Path, *, format: str | None = None) -> Detector:
    """Returns the model with the weights of a run folder, of one checkpoint or of a weights file; logs what was used.

    From a detector with another number of classes, all layers except the last two are read. `model` gives the classes
    of all layers, so a backbone class that a checkpoint names is never imported.

    Args:
      path: a run folder, RUN/best, one checkpoint RUN/checkpoints/STEP, or a file: `.safetensors`, `.pth` of torch, or
        `.pkl` of NumPy arrays. No code in a file is run. ImageNet weights fill only the layers they have. "imagenet":
        the file in the installed package with ImageNet weights for the model's backbone; a path of that name is
        "./imagenet".
      format: `name` of one of `weights.tables.FORMATS`, for a file of another program; None: the names in the file
        decide. Caffe's and torchvision's ImageNet weights have the same names; the model's channel order decides
        between them.
    Raises:
      InputError: the path cannot be read or is of another network; names the path and the array or the field.
    """
    path = pretrained.imagenet_file(model.config.backbone) if path == pretrained.IMAGENET else Path(path)
    if not path.is_dir():
        return load_file(model, path, format=format)
    if format is not None:
        raise InputError(f"{path}: format must be None for a run folder, got {format}")
    # Imported here, because loading a weights file does not need Orbax.
    from fasterrcnn_jax.training import checkpoint

    found = checkpoint.read_weights(path)
    where, config = str(found.folder), found.config
    model, report = assign_own(model, found.arrays, config.model, config.data.class_names, where=where)
    log(report, where)
    return model


# What a training of one part leaves untrained.
_UNTRAINED = {"rpn": "box head", "fast_rcnn": "RPN"}


def load(path: str | Path, *, backbone: BackboneClass | None = None) -> Detector:
    """Returns the detector of a run folder, of one checkpoint, or of a weights file.

    A file that we wrote stores its model. For a file of another program, the first model of the zoo is used that is
    published in the file's format and has the same arrays. Its classes get that model's class names if their number
    is the same. For any other model, or for your own class names, use `create(..., weights=path)`.

    Args:
      backbone: your own backbone class, for a model that was trained with it; see docs/backbone.md. A class that the
        file names is never imported.
    Raises:
      InputError: the path does not exist, it cannot be loaded, or it needs a backbone class that is not given.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        # Imported here, because loading a weights file does not need Orbax.
        from fasterrcnn_jax.training import checkpoint

        model = checkpoint.load(path, backbone=backbone)
        scheme = checkpoint.load_run_config(path).train.scheme
        if scheme in _UNTRAINED:
            logger.warning(
                "%s: train.scheme was %s, so the %s was not trained in this run", path, scheme, _UNTRAINED[scheme]
            )
        return model
    weights, where = files.read(path), str(path)
    stored = stored_model(weights, where)
    for format in formats_of(weights):
        for config, class_names in [stored] if stored else _candidates(weights, format):
            given = given_backbone(config.backbone, backbone, where)
            empty = empty_detector(config, class_names, backbone=given, where=where)
            try:
                model, report = assign(empty, weights, format, where=where)
            except InputError:
                if stored:
                    raise
                continue  # the file is from another network; the next candidate may fit
            log(report, where)
            return model
    raise InputError(
        f"{path}: the file fits none of the models {', '.join(MODELS)}; "
        "create(..., weights=...) loads it into another model"
    )


def _candidates(weights: Weights, format: Format) -> Iterator[tuple[ModelConfig, tuple[str, ...]]]:
    """Yields the configurations and class names of the models whose weights are published in `format`."""
    for info in MODELS.values():
        classes = num_classes_of(weights, info.config, format)
        if format.name in info.formats and classes is not None:
            yield info.config, _names(info, classes)


def _names(info: Model, classes: int) -> tuple[str, ...]:
    return info.class_names if classes == len(info.class_names) else _numbered(classes)


def _numbered(classes: int) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(1, classes + 1))
