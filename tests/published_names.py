"""Lists the names and shapes of the arrays in files of other programs, for any width, independently of our tables.

Shapes are in torch's order: (out, in, rows, columns) and (out, in).
"""

import itertools

import numpy as np
from reference_weights import rule_weight

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


def by_rule(shapes):
    """Returns the arrays for {name: shape} by the rule in tests/golden/README.md."""
    return {name: rule_weight(name, list(shape), 0) for name, shape in shapes.items()}


def torch_norm(name, channels):
    return {f"{name}.{end}": (channels,) for end in ("weight", "bias", "running_mean", "running_var")}


def detectron_norm(name, channels):
    return {f"{name}_s": (channels,), f"{name}_b": (channels,)}


def resnet(depth, width, *, conv, norm, names):
    """Returns the convolutions and norms of a ResNet.

    Args:
      conv: function from (name, shape) to the arrays of a convolution.
      norm: function from (name, channels) to the arrays of a norm.
      names: format strings for the stem, its norm, and in a block: convolution k, its norm, shortcut, its norm.
    """
    stem, stem_norm, block_conv, block_norm, shortcut, shortcut_norm = names
    arrays = conv(stem, (width, 3, 7, 7)) | norm(stem_norm, width)
    inputs = width
    for stage, blocks in enumerate(BLOCKS[depth]):
        planes = width * 2**stage
        sizes = [(planes, 1), (planes, 3), (4 * planes, 1)] if depth >= 50 else [(planes, 3), (planes, 3)]
        for block in range(blocks):
            place = dict(layer=stage + 1, res=stage + 2, jw=stage + 4, block=block)
            outputs = inputs
            for k, (channels, size) in enumerate(sizes):
                one = dict(place, k=k + 1, letter="abc"[k])
                arrays |= conv(block_conv.format(**one), (channels, outputs, size, size))
                arrays |= norm(block_norm.format(**one), channels)
                outputs = channels
            if block == 0 and (stage or inputs != outputs):
                arrays |= conv(shortcut.format(**place), (outputs, inputs, 1, 1))
                arrays |= norm(shortcut_norm.format(**place), outputs)
            inputs = outputs
    return arrays


def torch_conv(name, shape):
    return {f"{name}.weight": shape}


def torchvision_resnet(depth, width, prefix=""):
    block = prefix + "layer{layer}.{block}."
    names = ("conv1", "bn1"), ("conv{k}", "bn{k}", "downsample.0", "downsample.1")
    names = *(prefix + name for name in names[0]), *(block + name for name in names[1])
    return resnet(depth, width, conv=torch_conv, norm=torch_norm, names=names)


def faster_rcnn_pytorch_c4(depth, width, *, classes, anchors, rpn_channels):
    """Returns the arrays; objectness has two logits per anchor, and layer 4 is the head."""
    block = "RCNN_base.{jw}.{block}."
    names = "RCNN_base.0", "RCNN_base.1", *(block + end for end in ("conv{k}", "bn{k}", "downsample.0", "downsample.1"))
    found = resnet(depth, width, conv=torch_conv, norm=torch_norm, names=names)
    trunk = {name.replace("RCNN_base.7.", "RCNN_top.0."): shape for name, shape in found.items()}
    outputs = width * 8 * (4 if depth >= 50 else 1)
    return trunk | faster_rcnn_pytorch_heads(outputs // 2, outputs, classes, anchors, rpn_channels)


def faster_rcnn_pytorch_heads(shared, outputs, classes, anchors, rpn_channels):
    return {
        **with_bias("RCNN_rpn.RPN_Conv", (rpn_channels, shared, 3, 3)),
        **with_bias("RCNN_rpn.RPN_cls_score", (2 * anchors, rpn_channels, 1, 1)),
        **with_bias("RCNN_rpn.RPN_bbox_pred", (4 * anchors, rpn_channels, 1, 1)),
        **with_bias("RCNN_cls_score", (classes + 1, outputs)),
        **with_bias("RCNN_bbox_pred", (4 * (classes + 1), outputs)),
    }


def with_bias(name, shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def vgg16(width, fc, *, features, classifier, norm):
    arrays, inputs, place = {}, 3, 0
    for multiple, convs in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(convs):
            arrays |= with_bias(f"{features}.{place}", (width * multiple, inputs, 3, 3))
            if norm:
                arrays |= torch_norm(f"{features}.{place + 1}", width * multiple)
            inputs, place = width * multiple, place + (3 if norm else 2)
        place += 1
    arrays |= with_bias(f"{classifier}.0", (fc, inputs * 49))
    return arrays | with_bias(f"{classifier}.3", (fc, fc))


def torchvision_fpn(depth, width, *, version, channels, fc, classes, before_0_13=False):
    prefix = "backbone.body."
    arrays = torchvision_resnet(depth, width, prefix)
    outputs = [width * 2**stage * (4 if depth >= 50 else 1) for stage in range(4)]
    for i, inputs in enumerate(outputs):
        for name, shape in (("inner", (channels, inputs, 1, 1)), ("layer", (channels, channels, 3, 3))):
            place = f"backbone.fpn.{name}_blocks.{i}"
            if version == 2:
                arrays |= {f"{place}.0.weight": shape} | torch_norm(f"{place}.1", channels)
            else:
                arrays |= with_bias(place if before_0_13 else f"{place}.0", shape)
    for i in range(version):
        arrays |= with_bias("rpn.head.conv" if before_0_13 else f"rpn.head.conv.{i}.0", (channels, channels, 3, 3))
    arrays |= with_bias("rpn.head.cls_logits", (3, channels, 1, 1))
    arrays |= with_bias("rpn.head.bbox_pred", (12, channels, 1, 1))
    if version == 2:
        for i in range(4):
            place = f"roi_heads.box_head.{i}"
            arrays |= {f"{place}.0.weight": (channels, channels, 3, 3)} | torch_norm(f"{place}.1", channels)
        arrays |= with_bias("roi_heads.box_head.5", (fc, channels * 49))
    else:
        arrays |= with_bias("roi_heads.box_head.fc6", (fc, channels * 49))
        arrays |= with_bias("roi_heads.box_head.fc7", (fc, fc))
    arrays |= with_bias("roi_heads.box_predictor.cls_score", (classes + 1, fc))
    return arrays | with_bias("roi_heads.box_predictor.bbox_pred", (4 * (classes + 1), fc))


def detectron_backbone(depth, width):
    def conv(name, shape):
        return {f"{name}_w": shape}

    block = "res{res}_{block}_"
    ends = ("branch2{letter}", "branch2{letter}_bn", "branch1", "branch1_bn")
    names = "conv1", "res_conv1_bn", *(block + end for end in ends)
    return resnet(depth, width, conv=conv, norm=detectron_norm, names=names)


def detectron2_fpn(depth, width, *, channels, fc, classes):
    """Returns the arrays; the box deltas have no background class."""
    prefix = "backbone.bottom_up."
    block = prefix + "res{res}.{block}."
    names = "stem.conv1", "stem.conv1.norm"
    names = (
        *(prefix + name for name in names),
        *(block + end for end in ("conv{k}", "conv{k}.norm", "shortcut", "shortcut.norm")),
    )
    arrays = resnet(depth, width, conv=torch_conv, norm=torch_norm, names=names)
    outputs = [width * 2**stage * (4 if depth >= 50 else 1) for stage in range(4)]
    for level, inputs in zip(itertools.count(2), outputs):
        arrays |= with_bias(f"backbone.fpn_lateral{level}", (channels, inputs, 1, 1))
        arrays |= with_bias(f"backbone.fpn_output{level}", (channels, channels, 3, 3))
    rpn, roi = "proposal_generator.rpn_head.", "roi_heads."
    return {
        **arrays,
        **with_bias(f"{rpn}conv", (channels, channels, 3, 3)),
        **with_bias(f"{rpn}objectness_logits", (3, channels, 1, 1)),
        **with_bias(f"{rpn}anchor_deltas", (12, channels, 1, 1)),
        **with_bias(f"{roi}box_head.fc1", (fc, channels * 49)),
        **with_bias(f"{roi}box_head.fc2", (fc, fc)),
        **with_bias(f"{roi}box_predictor.cls_score", (classes + 1, fc)),
        **with_bias(f"{roi}box_predictor.bbox_pred", (4 * classes, fc)),
    }


def numbers_of_batches(arrays):
    """Returns torch's training counters, one per norm."""
    norms = [name.removesuffix("running_var") for name in arrays if name.endswith("running_var")]
    return {f"{norm}num_batches_tracked": np.array(7, np.int64) for norm in norms}
