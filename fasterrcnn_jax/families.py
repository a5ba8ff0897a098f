"""The detectors and schedules of the reference code base, as functions that build configurations.

Values are those of faster-rcnn.pytorch (cfgs/*.yml, trainval_net.py and the tables of its README).
"""

import math
from dataclasses import replace
from typing import Any, Literal

from fasterrcnn_jax.config import (
    BackboneConfig,
    BoxHeadConfig,
    ModelConfig,
    RoiFeaturesConfig,
    RoiSamplingConfig,
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
