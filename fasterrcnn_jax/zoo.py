"""Detectors by name: their configuration and the published weights that fit it."""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import jax

from fasterrcnn_jax import checkpoint, families
from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.data import coco, voc
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models import detector
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.weights import files, load_weights
from fasterrcnn_jax.weights.load import assign, formats_of, log, num_classes_of

# torchvision's detectors of COCO have an output for each category id up to 90; these name no object.
UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def _coco_ids() -> tuple[str, ...]:
    names = iter(coco.CLASS_NAMES)
    return tuple(f"unused {i}" if i in UNUSED_IDS else next(names) for i in range(1, 91))


class Model(NamedTuple):
    """A detector of the zoo and the weights that are published for it; preprocessing is part of `config`."""

    name: str
    config: ModelConfig
    class_names: tuple[str, ...]  # of the published weights, without background
    source: str  # where its weights are published
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
            "torchvision, FasterRCNN_ResNet50_FPN_Weights.COCO_V1",
            "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
            "258fb6c6",
            "AP 37.0 on COCO val2017",
        ),
        Model(
            "resnet50_fpn_v2",
            families.resnet_fpn(50, version=2),
            _coco_ids(),
            "torchvision, FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1",
            "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth",
            "dd69338a",
            "AP 46.7 on COCO val2017",
        ),
        Model(
            "resnet50_fpn_detectron2",
            families.detectron2_fpn(50),
            coco.CLASS_NAMES,
            "detectron2 model zoo, faster_rcnn_R_50_FPN_3x",
            None,
            None,
            "AP 40.2 on COCO val2017",
        ),
        Model(
            "resnet101_fpn_detectron2",
            families.detectron2_fpn(101),
            coco.CLASS_NAMES,
            "detectron2 model zoo, faster_rcnn_R_101_FPN_3x",
            None,
            None,
            "AP 42.0 on COCO val2017",
        ),
        Model(
            "vgg16_voc",
            families.vgg16(),
            voc.CLASS_NAMES,
            "faster-rcnn.pytorch, VGG16 on VOC 2007",
            None,
            None,
            "mAP 70.1 on VOC 2007 test",
        ),
        Model(
            "resnet101_c4_voc",
            families.resnet_c4(101),
            voc.CLASS_NAMES,
            "faster-rcnn.pytorch, ResNet-101 on VOC 2007",
            None,
            None,
            "mAP 75.2 on VOC 2007 test",
        ),
        Model(
            "resnet101_c4_coco",
            families.coco_scales(families.resnet_c4(101)),
            coco.CLASS_NAMES,
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
      weights: a file that `load_weights` reads. With another number of classes the last layers start anew. One that
        bears the name of the published file must also have its checksum.
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
    made = detector.create(config, tuple(class_names), seed=seed, backbone=backbone)
    if weights is None:
        return made
    check_published(Path(weights))
    return load_weights(made, weights)


def load(path: str | Path, *, backbone: type | None = None) -> Detector:
    """Returns the detector of a run folder, of one of its checkpoints, or of a file of weights.

    A file is taken for the first model of the zoo that it fills completely; its classes have that model's names
    where there are as many. Of another model, or with names of your own: `create(..., weights=path)`.

    Args:
      backbone: of a checkpoint: your own, in place of the one whose import path it holds; docs/backbone.md.
    Raises:
      InputError: nothing that can be loaded is there.
    """
    path = Path(path)
    if not path.is_file():
        return checkpoint.load(path, backbone=backbone)
    check_published(path)
    weights = files.read(path)
    for info in MODELS.values():
        for format in formats_of(weights):
            classes = num_classes_of(weights, info.config, format)
            if classes is None:
                continue
            names = _names(info, classes)
            empty = jax.eval_shape(lambda info=info, names=names: detector.create(info.config, names, seed=0))
            try:
                model, report = assign(empty, weights, format, where=str(path))
            except InputError:
                continue  # of another network: the next one may fit
            log(report, str(path))
            return model
    raise InputError(
        f"{path}: no model of {', '.join(MODELS)} is filled by it; create(..., weights=...) loads it into another"
    )


def _names(info: Model, classes: int) -> tuple[str, ...]:
    return info.class_names if classes == len(info.class_names) else _numbered(classes)


def _numbered(classes: int) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(1, classes + 1))


def check_published(path: Path) -> None:
    """Raises InputError where a file bears a published name, NAME-DIGITS.pth, and has another checksum."""
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if not named or named[1] not in {model.sha256 for model in MODELS.values()} or not path.is_file():
        return
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not sha256.startswith(named[1]):
        raise InputError(f"{path}: its checksum is not the {named[1]} of its name; was it downloaded to its end?")
