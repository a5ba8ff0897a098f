"""Maps the array names of our detector to the names in files of other programs, with one table per format.

A row is (our name, their names, layout). The names are without the last part, which `Format.leaves` converts. `<i>`
is a number and `<i+1>` is that number plus one. A file can use any of the names of a row; we write the first name.

The names come from the sources of these programs, and were compared with state dictionaries of torchvision 0.28 and of
faster-rcnn.pytorch. docs/decisions/0008 lists the formats that were not tested with a published file.
"""

import functools
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.config.families import EFFICIENTNET_RGB
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models import efficientnet
from fasterrcnn_jax.models.layers import EPSILON
from fasterrcnn_jax.weights.layouts import (
    BACKGROUND_LAST,
    NO_BACKGROUND,
    PLAIN,
    TWO_LOGITS,
    Layout,
    after_pooling,
)


class Row(NamedTuple):
    ours: str
    theirs: tuple[str, ...]
    layout: Layout


class Format(NamedTuple):
    """Names and layouts of the files of one program."""

    name: str
    source: str
    markers: tuple[str, ...]  # every file of this format has one of these names; other formats have none
    rows: Callable[[ModelConfig], tuple[Row, ...]]
    leaves: Mapping[str, str]  # the last part of our name -> the end of their name
    constants: Mapping[str, float] = MappingProxyType({})  # last parts with a constant value, which are not in the file
    absent: tuple[str, ...] = ()  # prefixes of our names that the format does not have
    expects: Mapping[str, Any] = MappingProxyType({})  # model settings that the weights were trained with
    prepare: Callable[[dict[str, np.ndarray], str], dict[str, np.ndarray]] = lambda arrays, where: arrays


TORCH_LEAVES = {
    "kernel": ".weight",
    "bias": ".bias",
    "scale": ".weight",
    "mean": ".running_mean",
    "var": ".running_var",
}
CAFFE2_LEAVES = {"kernel": "_w", "bias": "_b", "scale": "_s"}
# Detectron's files have batch norm folded into a factor and an offset. With this mean and variance, our normalisation
# is the identity.
FOLDED = {"mean": 0.0, "var": 1.0 - EPSILON}

# Layers that a classification file does not have.
DETECTOR_ONLY = ("neck/", "rpn_head/", "box_head/")

TORCHVISION_PIXELS = {
    "image.channel_order": "rgb",
    "image.mean": (123.675, 116.28, 103.53),
    "image.std": (58.395, 57.12, 57.375),
}
CAFFE_PIXELS = {
    "image.channel_order": "bgr",
    "image.mean": (102.9801, 115.9465, 122.7717),
    "image.std": (1.0, 1.0, 1.0),
}
DETECTRON2_PIXELS = CAFFE_PIXELS | {"image.mean": (103.53, 116.28, 123.675)}
TORCHVISION_RESNET = {"backbone.stride_in": "3x3", "backbone.stem_pool": "padded"}
CAFFE_RESNET = {"backbone.stride_in": "1x1", "backbone.stem_pool": "ceil"}
DETECTRON2_RESNET = {"backbone.stride_in": "1x1", "backbone.stem_pool": "padded"}

EFFICIENTNET_PIXELS = {f"image.{field}": value for field, value in EFFICIENTNET_RGB.items()}

TORCH_BLOCK = {
    "convs/<k>": "conv<k+1>",
    "norms/<k>": "bn<k+1>",
    "shortcut": "downsample.0",
    "shortcut_norm": "downsample.1",
}
DETECTRON2_BLOCK = {
    "convs/<k>": "conv<k+1>",
    "norms/<k>": "conv<k+1>.norm",
    "shortcut": "shortcut",
    "shortcut_norm": "shortcut.norm",
}
EFFICIENTNET_BLOCK = {
    "expand": "_expand_conv",
    "expand_norm": "_bn0",
    "depthwise": "_depthwise_conv",
    "depthwise_norm": "_bn1",
    "project": "_project_conv",
    "project_norm": "_bn2",
}
CAFFE2_BLOCK = {
    "convs/0": "branch2a",
    "convs/1": "branch2b",
    "convs/2": "branch2c",
    "norms/0": "branch2a_bn",
    "norms/1": "branch2b_bn",
    "norms/2": "branch2c_bn",
    "shortcut": "branch1",
    "shortcut_norm": "branch1_bn",
}


def _row(ours: str, *theirs: str, layout: Layout = PLAIN) -> Row:
    return Row(ours, theirs, layout)


def _resnet(stem: str, stem_norm: str, stage: str, last: str, block: dict[str, str]) -> tuple[Row, ...]:
    """Returns the rows of a ResNet.

    Args:
      stem: name of the first convolution.
      stem_norm: name of its norm.
      stage: prefix of a block in the stages that run on the image.
      last: prefix of a block in stage 4 if it runs per RoI.
      block: names inside a block.
    """
    rows = [_row("backbone/stem", stem), _row("backbone/stem_norm", stem_norm)]
    for ours, theirs in block.items():
        rows.append(_row(f"backbone/stages/<i>/blocks/<j>/{ours}", stage + theirs))
        rows.append(_row(f"box_head/tail/stage/blocks/<j>/{ours}", last + theirs))
    return tuple(rows)


def _vgg16(features: str, classifier: str, config: ModelConfig) -> tuple[Row, ...]:
    """Returns the rows of VGG16; norms, ReLUs and poolings have numbers too, and a ReLU and a dropout follow fc6."""
    has_norm = config.backbone.norm != "none"
    rows, number = [], 0
    for stage, convs in enumerate((2, 2, 3, 3, 3)):
        for i in range(convs):
            rows.append(_row(f"backbone/stages/{stage}/convs/{i}", f"{features}.{number}"))
            rows.append(_row(f"backbone/stages/{stage}/norms/{i}", f"{features}.{number + 1}"))
            number += 3 if has_norm else 2
        number += 1
    cells = after_pooling(config.roi_features.output_size)
    rows.append(_row("box_head/tail/fcs/0", f"{classifier}.0", layout=cells))
    return (*rows, _row("box_head/tail/fcs/1", f"{classifier}.3"))


def _efficientnet(prefix: str, config: ModelConfig) -> tuple[Row, ...]:
    """Returns the rows of an EfficientNet-Lite, whose blocks are numbered through all stages."""
    rows = [_row("backbone/stem", f"{prefix}_conv_stem"), _row("backbone/stem_norm", f"{prefix}_bn0")]
    number = 0
    for stage, blocks in enumerate(efficientnet.stages_of(config.backbone)):
        for i in range(len(blocks)):
            for ours, theirs in EFFICIENTNET_BLOCK.items():
                rows.append(_row(f"backbone/stages/{stage}/blocks/{i}/{ours}", f"{prefix}_blocks.{number}.{theirs}"))
            number += 1
    # The model has none of these: a file that has one is of another network.
    others = (f"{prefix}_blocks.<i>.{name}" for name in ("_depthwise_conv", "_se_reduce"))
    return (*rows, _row("backbone/others/<i>", *others))


def _imagenet_efficientnet(config: ModelConfig) -> tuple[Row, ...]:
    return _efficientnet("", config) if config.backbone.name in efficientnet.SCALES else ()


def _classification(config: ModelConfig) -> tuple[Row, ...]:
    if config.backbone.name == "vgg16":
        return _vgg16("features", "classifier", config)
    return _resnet("conv1", "bn1", "layer<i+1>.<j>.", "layer4.<j>.", TORCH_BLOCK)


def _faster_rcnn_pytorch(config: ModelConfig) -> tuple[Row, ...]:
    if config.backbone.name == "vgg16":
        network = _vgg16("RCNN_base", "RCNN_top", config)
    else:
        network = _resnet("RCNN_base.0", "RCNN_base.1", "RCNN_base.<i+4>.<j>.", "RCNN_top.0.<j>.", TORCH_BLOCK)
    return (
        *network,
        _row("rpn_head/convs/0", "RCNN_rpn.RPN_Conv"),
        _row("rpn_head/objectness", "RCNN_rpn.RPN_cls_score", layout=TWO_LOGITS),
        _row("rpn_head/deltas", "RCNN_rpn.RPN_bbox_pred"),
        _row("box_head/class_logits", "RCNN_cls_score"),
        _row("box_head/deltas", "RCNN_bbox_pred"),
    )


def _torchvision_fpn(config: ModelConfig) -> tuple[Row, ...]:
    """Returns the rows; second names are those before torchvision 0.13, which the published files use."""
    head, cells = config.box_head, after_pooling(config.roi_features.output_size)
    fcs = ["fc6", "fc7"] if head.convs == 0 else [str(head.convs + 1 + 2 * i) for i in range(head.layers)]
    body = "backbone.body."
    if config.backbone.name in efficientnet.SCALES:
        trunk = _efficientnet(body, config)
    else:
        trunk = _resnet(f"{body}conv1", f"{body}bn1", f"{body}layer<i+1>.<j>.", f"{body}layer4.<j>.", TORCH_BLOCK)
    return (
        *trunk,
        _row("neck/lateral/<i>", "backbone.fpn.inner_blocks.<i>.0", "backbone.fpn.inner_blocks.<i>"),
        _row("neck/lateral_norms/<i>", "backbone.fpn.inner_blocks.<i>.1"),
        _row("neck/output/<i>", "backbone.fpn.layer_blocks.<i>.0", "backbone.fpn.layer_blocks.<i>"),
        _row("neck/output_norms/<i>", "backbone.fpn.layer_blocks.<i>.1"),
        _row("rpn_head/convs/0", "rpn.head.conv.0.0", "rpn.head.conv"),
        _row("rpn_head/convs/<i>", "rpn.head.conv.<i>.0"),
        _row("rpn_head/objectness", "rpn.head.cls_logits"),
        _row("rpn_head/deltas", "rpn.head.bbox_pred"),
        _row("box_head/tail/convs/<i>", "roi_heads.box_head.<i>.0"),
        _row("box_head/tail/norms/<i>", "roi_heads.box_head.<i>.1"),
        *(
            _row(f"box_head/tail/fcs/{i}", f"roi_heads.box_head.{name}", layout=PLAIN if i else cells)
            for i, name in enumerate(fcs)
        ),
        _row("box_head/class_logits", "roi_heads.box_predictor.cls_score"),
        _row("box_head/deltas", "roi_heads.box_predictor.bbox_pred"),
    )


def _detectron2_fpn(config: ModelConfig) -> tuple[Row, ...]:
    body, rpn, roi = "backbone.bottom_up.", "proposal_generator.rpn_head.", "roi_heads."
    cells = after_pooling(config.roi_features.output_size)
    deltas = PLAIN if config.box_head.class_agnostic else NO_BACKGROUND
    stem = f"{body}stem.conv1"
    return (
        *_resnet(stem, f"{stem}.norm", f"{body}res<i+2>.<j>.", f"{body}res5.<j>.", DETECTRON2_BLOCK),
        _row("neck/lateral/<i>", "backbone.fpn_lateral<i+2>"),
        _row("neck/output/<i>", "backbone.fpn_output<i+2>"),
        _row("rpn_head/convs/0", f"{rpn}conv"),
        _row("rpn_head/objectness", f"{rpn}objectness_logits"),
        _row("rpn_head/deltas", f"{rpn}anchor_deltas"),
        _row("box_head/tail/fcs/0", f"{roi}box_head.fc1", layout=cells),
        _row("box_head/tail/fcs/<i>", f"{roi}box_head.fc<i+1>"),
        _row("box_head/class_logits", f"{roi}box_predictor.cls_score", layout=BACKGROUND_LAST),
        _row("box_head/deltas", f"{roi}box_predictor.bbox_pred", layout=deltas),
    )


def _detectron_backbone(config: ModelConfig) -> tuple[Row, ...]:
    return _resnet("conv1", "res_conv1_bn", "res<i+2>_<j>_", "res5_<j>_", CAFFE2_BLOCK)


def _with_our_epsilon(arrays: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Returns the arrays with batch norm weights converted from epsilon 0 to `EPSILON`, for the same output."""
    adapted = dict(arrays)
    for name in arrays:
        norm = name.removesuffix("running_var")
        # Arrays of different shapes are no batch norm.
        if norm != name and f"{norm}weight" in arrays and arrays[f"{norm}weight"].shape == arrays[name].shape:
            var = arrays[name].astype(np.float64)
            if not var.min(initial=np.inf) > 0.0:
                raise InputError(f"{where}: {name} must be positive, as the format has epsilon 0; got {var.min()}")
            weight = arrays[f"{norm}weight"] * np.sqrt((var + EPSILON) / var)
            adapted[f"{norm}weight"] = weight.astype(np.float32)
    return adapted


CLASSIFICATION_MARKERS = ("layer1.0.conv1.weight", "features.0.weight")

TORCHVISION = Format(
    name="torchvision",
    source="ImageNet classification, torchvision: resnet18 to resnet152, vgg16, vgg16_bn",
    markers=CLASSIFICATION_MARKERS,
    rows=_classification,
    leaves=TORCH_LEAVES,
    absent=DETECTOR_ONLY,
    expects=TORCHVISION_PIXELS | TORCHVISION_RESNET,
)
CAFFE = Format(
    name="caffe",
    source="ImageNet classification, Caffe, converted by faster-rcnn.pytorch: vgg16_caffe, resnet101_caffe",
    markers=CLASSIFICATION_MARKERS,
    rows=_classification,
    leaves=TORCH_LEAVES,
    absent=DETECTOR_ONLY,
    expects=CAFFE_PIXELS | CAFFE_RESNET,
)
DETECTRON = Format(
    name="detectron",
    source="ImageNet classification, Detectron and detectron2: R-50.pkl, R-101.pkl of MSRA",
    markers=("res2_0_branch2a_w",),
    rows=_detectron_backbone,
    leaves=CAFFE2_LEAVES,
    constants=FOLDED,
    absent=DETECTOR_ONLY,
    expects=DETECTRON2_PIXELS | DETECTRON2_RESNET,
)
EFFICIENTNET = Format(
    name="efficientnet",
    source="ImageNet classification, EfficientNet-PyTorch and its Lite: efficientnet-lite0, -lite1, -lite2",
    markers=("_conv_stem.weight",),
    rows=_imagenet_efficientnet,
    leaves=TORCH_LEAVES,
    absent=DETECTOR_ONLY,
    expects=EFFICIENTNET_PIXELS,
)
FASTER_RCNN_PYTORCH = Format(
    name="faster_rcnn_pytorch",
    source="detectors of faster-rcnn.pytorch: VGG16 and ResNet-C4",
    markers=("RCNN_base.0.weight",),
    rows=_faster_rcnn_pytorch,
    leaves=TORCH_LEAVES,
    expects=CAFFE_PIXELS | CAFFE_RESNET,
)
TORCHVISION_FPN = Format(
    name="torchvision_fpn",
    source="detectors of torchvision: fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2",
    markers=("backbone.body.conv1.weight", "backbone.body._conv_stem.weight"),
    rows=_torchvision_fpn,
    leaves=TORCH_LEAVES,
    expects=TORCHVISION_PIXELS | TORCHVISION_RESNET,
)
TORCHVISION_FPN_EPSILON_0 = TORCHVISION_FPN._replace(
    name="torchvision_fpn_epsilon_0",
    source="fasterrcnn_resnet50_fpn published for COCO, and models fine-tuned from it: batch norm with epsilon 0",
    markers=(),  # the names are the same
    prepare=_with_our_epsilon,
)
DETECTRON2_FPN = Format(
    name="detectron2_fpn",
    source="detectors of detectron2: R50-FPN, R101-FPN",
    markers=("backbone.bottom_up.stem.conv1.weight",),
    rows=_detectron2_fpn,
    leaves=TORCH_LEAVES,
    expects=DETECTRON2_PIXELS | DETECTRON2_RESNET,
)

FORMATS = (
    TORCHVISION,
    CAFFE,
    DETECTRON,
    EFFICIENTNET,
    FASTER_RCNN_PYTORCH,
    TORCHVISION_FPN,
    TORCHVISION_FPN_EPSILON_0,
    DETECTRON2_FPN,
)

# First digits of the SHA-256 of files whose names would give another format.
PUBLISHED = {"258fb6c6": TORCHVISION_FPN_EPSILON_0}


def find(rows: tuple[Row, ...], ours: str) -> tuple[tuple[str, ...], Layout] | None:
    """Returns their names of `ours` (our name without its last part) and the layout; None if there is no row."""
    for row in rows:
        match = _pattern(row.ours).fullmatch(ours)
        if match:
            return tuple(_filled(theirs, match.groupdict()) for theirs in row.theirs), row.layout
    return None


def is_named(rows: tuple[Row, ...], theirs: str) -> bool:
    """Returns whether any row has the name `theirs` for some number."""
    return any(_pattern(name).fullmatch(theirs) for row in rows for name in row.theirs)


@functools.cache
def _pattern(template: str) -> re.Pattern:
    return re.compile(re.sub(r"<(\w)(\\\+\d)?>", r"(?P<\1>\\d+)", re.escape(template)))


def _filled(template: str, numbers: dict[str, str]) -> str:
    return re.sub(r"<(\w)\+?(\d?)>", lambda found: str(int(numbers[found[1]]) + int(found[2] or 0)), template)
