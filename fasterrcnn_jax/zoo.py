"""Detectors by name: their configuration and the published weights that fit it."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from fasterrcnn_jax.config import ModelConfig, families
from fasterrcnn_jax.data import coco, voc
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import Detector, create_detector
from fasterrcnn_jax.weights import files, load_weights
from fasterrcnn_jax.weights.files import Weights
from fasterrcnn_jax.weights.load import (
    assign,
    formats_of,
    log,
    num_classes_of,
    stored_model,
)
from fasterrcnn_jax.weights.tables import Format


def _coco_ids() -> tuple[str, ...]:
    names = iter(coco.CLASS_NAMES)
    return tuple(f"unused {i}" if i in coco.UNUSED_IDS else next(names) for i in range(1, 91))


class Model(NamedTuple):
    """A detector of the zoo and the weights that are published for it; preprocessing is part of `config`."""

    name: str
    config: ModelConfig
    class_names: tuple[str, ...]  # of the published weights, without background
    formats: tuple[str, ...]  # of `weights.tables`, in which they are published
    source: str  # where
    file: str | None  # name of that file
    sha256: str | None  # first digits of its checksum
    published: str  # the result that its authors state for it; we have measured none of them


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
    """Returns configuration, classes and provenance of a model.

    Raises:
      InputError: no model has that name; names all.
    """
    if name not in MODELS:
        raise InputError(f"no model is named {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]


def create(
    model: str | ModelConfig,
    class_names: tuple[str, ...] | None = None,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    backbone: type | None = None,
) -> Detector:
    """Returns a detector by name or configuration, with weights from a file or fresh random ones.

    Args:
      class_names: without background. None: those of the model's published weights, or class 1, class 2 …
      num_classes: how many of these, in place of their names.
      weights: a file that `load_weights` reads. With another number of classes the last layers start anew.
      backbone: your own class; docs/backbone.md.
    Raises:
      InputError: no such model, or a file that does not fit it.
      ValueError: both or, for a configuration, neither of `class_names` and `num_classes` are given.
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
    config = model if info is None else info.config
    made = create_detector(config, tuple(class_names), seed=seed, backbone=backbone)
    if weights is None:
        return made
    return load_weights(made, weights)


def load(path: str | Path, *, backbone: type | None = None) -> Detector:
    """Returns the detector of a run folder, of one of its checkpoints, or of a file of weights.

    A file that we wrote says which model it is. Another one is taken for the first model of the zoo that is published
    in its format and that it fills; its classes have that model's names where there are as many. Of another model,
    or with names of your own: `create(..., weights=path)`.

    Args:
      backbone: of a checkpoint: your own, in place of the one whose import path it holds; docs/backbone.md.
    Raises:
      InputError: nothing that can be loaded is there.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        # Imported here: a model of a weights file needs no Orbax.
        from fasterrcnn_jax.training import checkpoint

        return checkpoint.load(path, backbone=backbone)
    weights, where = files.read(path), str(path)
    stored = stored_model(weights, where)
    for format in formats_of(weights):
        for config, class_names in [stored] if stored else _candidates(weights, format):
            empty = jax.eval_shape(functools.partial(create_detector, config, class_names, seed=0))
            try:
                model, report = assign(empty, weights, format, where=where)
            except InputError:
                if stored:
                    raise
                continue  # of another network: the next one may fit
            log(report, where)
            return model
    raise InputError(
        f"{path}: no model of {', '.join(MODELS)} is filled by it; create(..., weights=...) loads it into another"
    )


def _candidates(weights: Weights, format: Format) -> Iterator[tuple[ModelConfig, tuple[str, ...]]]:
    """Yields configuration and class names of the models whose weights are published in that format."""
    for info in MODELS.values():
        classes = num_classes_of(weights, info.config, format)
        if format.name in info.formats and classes is not None:
            yield info.config, _names(info, classes)


def _names(info: Model, classes: int) -> tuple[str, ...]:
    return info.class_names if classes == len(info.class_names) else _numbered(classes)


def _numbered(classes: int) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(1, classes + 1))
