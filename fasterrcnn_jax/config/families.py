"""The detectors and schedules of the reference code bases, as functions that build configurations.

Values are those of faster-rcnn.pytorch (cfgs/*.yml, trainval_net.py and the tables of its README); of pyramids
those of torchvision and detectron2.
"""

import math
from dataclasses import replace
from typing import Any, Literal

from fasterrcnn_jax.config import (
    BackboneConfig,
    BoxHeadConfig,
    FpnConfig,
    ImageConfig,
    LossConfig,
    ModelConfig,
    PostprocessConfig,
    ProposalConfig,
    RoiFeaturesConfig,
    RoiSamplingConfig,
    RpnConfig,
)

# How torchvision's weights expect pixels; fields of `ImageConfig`.
IMAGENET_RGB = {
    "channel_order": "rgb",
    "mean": (123.675, 116.28, 103.53),
    "std": (58.395, 57.12, 57.375),
}

# Fields of `TrainConfig`.
VGG16_TRAINING = {"weight_decay": 5e-4, "double_bias": True, "clip_norm": 10.0}
RESNET_TRAINING = {"weight_decay": 1e-4, "double_bias": False}
# 16 images over 8 devices: torchvision's and detectron2's. Objectness is one logit there too.
FPN_TRAINING = {
    "batch_size": 16,
    "learning_rate": 0.02,
    "weight_decay": 1e-4,
    "bias_decay": True,
    "double_bias": False,
    "double_objectness": False,
}

# Batch size -> learning rate, epochs before it falls to a tenth, epochs in all for VGG16 and for ResNet-101.
_VOC_SCHEDULES = {
    1: (1e-3, 5, 6, 7),
    4: (4e-3, 8, 9, 10),
    16: (1e-2, 8, 10, 10),
    24: (1e-2, 10, 11, 12),
}


def resnet_c4(depth: Literal[50, 101, 152]) -> ModelConfig:
    """Returns the Caffe-style ResNet-C4 detector: stages 1-3 shared, stage 4 per region, mean over its cells.

    Depth 50 has twice the RoIs and crops its regions (res50.yml); the others align (res101.yml).
    """
    small = depth == 50
    return ModelConfig(
        backbone=BackboneConfig(name=f"resnet{depth}"),
        roi_sampling=RoiSamplingConfig(rois_per_image=256 if small else 128),
        roi_features=RoiFeaturesConfig(operator="crop" if small else "align"),
    )


def vgg16(*, norm: Literal["none", "frozen_batch"] = "none") -> ModelConfig:
    """Returns the VGG16 detector: conv1_1 to conv2_2 fixed, fc6 and fc7 with dropout on 256 RoIs (vgg16.yml)."""
    return ModelConfig(
        backbone=BackboneConfig(name="vgg16", norm=norm, fixed_stages=2),
        roi_sampling=RoiSamplingConfig(rois_per_image=256),
        box_head=BoxHeadConfig(dropout=0.5),
    )


def resnet_fpn(
    depth: Literal[18, 34, 50, 101, 152],
    *,
    norm: Literal["frozen_batch", "group"] = "frozen_batch",
    version: Literal[1, 2] = 1,
) -> ModelConfig:
    """Returns torchvision's ResNet-FPN detector (fasterrcnn_resnet50_fpn), at short side 800 and long side 1333.

    Version 2 is fasterrcnn_resnet50_fpn_v2: normalisation in the pyramid, two convolutions in the RPN, four and
    one fully connected layer in the box head. Group normalisation, for training from nothing, goes everywhere
    and comes with masked padding.
    """
    scratch, second = norm == "group", version == 2
    proposals = {"nms_threshold": 0.7, "min_size": 1e-3, "drop_small": "after_top_n"}
    return ModelConfig(
        image=ImageConfig(
            short_side=800,
            long_side=1333,
            size_rounding="down",
            canvases=((800, 1088), (1088, 800), (800, 1344), (1344, 800)),
            **IMAGENET_RGB,
        ),
        backbone=BackboneConfig(
            name=f"resnet{depth}",
            norm=norm,
            stride_in="3x3",
            stem_pool="padded",
            fixed_stages=0 if scratch else 1,
            mask_padding=scratch,
        ),
        fpn=FpnConfig(norm=norm if scratch or second else "none"),
        rpn=RpnConfig(
            anchor_base=32.0,
            anchor_scales=(1.0,),
            anchor_rounding="half",
            anchor_centre="corner",
            anchor_stride="canvas",
            anchors_in_padding=not scratch,
            allowed_border=None,
            channels=256,
            convs=2 if second else 1,
        ),
        train_proposals=ProposalConfig(pre_nms_top_n=2000, post_nms_top_n=2000, **proposals),
        test_proposals=ProposalConfig(pre_nms_top_n=1000, post_nms_top_n=1000, **proposals),
        roi_sampling=RoiSamplingConfig(rois_per_image=512),
        roi_features=RoiFeaturesConfig(sampling_ratio=2),
        box_head=BoxHeadConfig(convs=4 if second else 0, layers=1 if second else 2, channels=1024, dropout=0.0),
        loss=LossConfig(roi_sigma=3.0),
        postprocess=PostprocessConfig(nms_threshold=0.5),
    )


def detectron2_fpn(depth: Literal[50, 101]) -> ModelConfig:
    """Returns the ResNet-FPN detector with the defaults of detectron2 (Base-RCNN-FPN.yaml).

    Caffe-style network and BGR means, anchors that are not rounded and 64 pixels apart on P6, aligned adaptive
    RoIAlign, L1 in both box losses: sigma 1000 differs from it by less than 1e-6 per value.
    """
    model = resnet_fpn(depth)
    return replace(
        model,
        image=replace(
            model.image,
            size_rounding="nearest",
            channel_order="bgr",
            mean=(103.53, 116.28, 123.675),
            std=(1.0, 1.0, 1.0),
        ),
        backbone=replace(model.backbone, stride_in="1x1"),
        rpn=replace(model.rpn, anchor_rounding="none", anchor_stride="level"),
        train_proposals=replace(model.train_proposals, post_nms_top_n=1000),
        roi_features=replace(model.roi_features, sampling_ratio=0, aligned=True),
        loss=replace(model.loss, rpn_sigma=1000.0, roi_sigma=1000.0),
    )


def coco_scales(model: ModelConfig) -> ModelConfig:
    """Returns the detector for COCO at short side 800: a smaller anchor scale, more proposals (res101_ls.yml)."""
    return replace(
        model,
        image=replace(
            model.image,
            short_side=800,
            long_side=1200,
            canvases=((800, 1072), (1072, 800), (800, 1200), (1200, 800)),
        ),
        rpn=replace(model.rpn, anchor_scales=(4.0, 8.0, 16.0, 32.0)),
        test_proposals=replace(model.test_proposals, post_nms_top_n=1000),
    )


def voc_schedule(
    batch_size: Literal[1, 4, 16, 24], *, images: int, backbone: Literal["vgg16", "resnet101"]
) -> dict[str, Any]:
    """Returns the fields of `TrainConfig` for a batch size that the reference publishes results for.

    Momentum SGD. VGG16: weight decay 5e-4, biases at twice the rate, gradients clipped at norm 10; ResNet:
    weight decay 1e-4. Biases never decay.

    Args:
      images: per epoch, mirrored copies included.
    """
    learning_rate, decay_epochs, *epochs = _VOC_SCHEDULES[batch_size]
    is_vgg = backbone == "vgg16"
    steps_per_epoch = math.ceil(images / batch_size)
    return {
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "steps": steps_per_epoch * epochs[0 if is_vgg else 1],
        "decay_steps": (steps_per_epoch * decay_epochs,),
        "checkpoint_every": 1000,
        **(VGG16_TRAINING if is_vgg else RESNET_TRAINING),
    }
