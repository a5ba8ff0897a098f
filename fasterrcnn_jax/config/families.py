"""Functions that build the configurations of the reference implementations: detectors and schedules.

The values come from faster-rcnn.pytorch (cfgs/*.yml, trainval_net.py and the tables in its README). The values for
feature pyramids come from torchvision and detectron2.
"""

import math
from dataclasses import replace
from typing import Any, Literal

from fasterrcnn_jax.config import (
    BackboneConfig,
    BoxCoderConfig,
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

# Fields of `ImageConfig`: the pixel format that torchvision's weights expect.
IMAGENET_RGB = {
    "channel_order": "rgb",
    "mean": (123.675, 116.28, 103.53),
    "std": (58.395, 57.12, 57.375),
}

# The pixel format that the weights of EfficientNet-Lite expect.
EFFICIENTNET_RGB = {
    "channel_order": "rgb",
    "mean": (127.0, 127.0, 127.0),
    "std": (128.0, 128.0, 128.0),
}

# Fields of `TrainConfig`.
VGG16_TRAINING = {"weight_decay": 5e-4, "double_bias": True, "clip_norm": 10.0}
RESNET_TRAINING = {"weight_decay": 1e-4, "double_bias": False}
# torchvision and detectron2 train on 16 images over 8 devices. Their objectness is one logit, as ours, so its learning
# rate is not doubled.
FPN_TRAINING = {
    "batch_size": 16,
    "learning_rate": 0.02,
    "weight_decay": 1e-4,
    "bias_decay": True,
    "double_bias": False,
    "double_objectness": False,
}

# Batch size -> learning rate, epochs before it falls to a tenth, total epochs for VGG16, total epochs for ResNet-101.
_VOC_SCHEDULES = {
    1: (1e-3, 5, 6, 7),
    4: (4e-3, 8, 9, 10),
    16: (1e-2, 8, 10, 10),
    24: (1e-2, 10, 11, 12),
}


# The names of the ResNets by depth.
_RESNETS: dict[int, Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]] = {
    18: "resnet18",
    34: "resnet34",
    50: "resnet50",
    101: "resnet101",
    152: "resnet152",
}


def resnet_c4(depth: Literal[50, 101, 152]) -> ModelConfig:
    """Returns the Caffe-style ResNet-C4 detector.

    All regions share stages 1-3. Stage 4 runs on each region and is averaged over its cells. Depth 50 samples twice
    as many RoIs and crops them (res50.yml); the other depths use RoIAlign (res101.yml).
    """
    small = depth == 50
    return ModelConfig(
        backbone=BackboneConfig(name=_RESNETS[depth]),
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


def notebook_vgg16() -> ModelConfig:
    """Returns the detector of the step-by-step notebook: VGG16 with batch norm, trained from random weights.

    The RPN is linear. The ground truth is not among the RoIs, targets are not normalised, regions are pooled from
    corners that are rounded down, and both box losses are ten times the mean over elements.
    """
    return ModelConfig(
        image=ImageConfig(short_side=800, long_side=800, canvases=((800, 800),)),
        backbone=BackboneConfig(name="vgg16", norm="batch", fixed_stages=0, mask_padding=True),
        box_coder=BoxCoderConfig(max_log_scale=None),
        rpn=RpnConfig(anchor_rounding="none", activation="none"),
        roi_sampling=RoiSamplingConfig(add_ground_truth=False, box_stds=(1.0, 1.0, 1.0, 1.0)),
        roi_features=RoiFeaturesConfig(operator="pool", quantisation="floor"),
        box_head=BoxHeadConfig(dropout=0.0),
        loss=LossConfig(
            rpn_sigma=1.0,
            roi_sigma=1.0,
            rpn_box_weight=10.0,
            roi_box_weight=10.0,
            rpn_box_normalizer="positive_deltas",
            roi_box_normalizer="positive_deltas",
        ),
    )


def resnet_fpn(
    depth: Literal[18, 34, 50, 101, 152],
    *,
    norm: Literal["frozen_batch", "group"] = "frozen_batch",
    version: Literal[1, 2] = 1,
) -> ModelConfig:
    """Returns torchvision's ResNet-FPN detector (fasterrcnn_resnet50_fpn), at short side 800 and long side 1333.

    Version 2 is fasterrcnn_resnet50_fpn_v2: normalisation in the pyramid, two convolutions in the RPN, and four
    convolutions and one fully connected layer in the box head. Norm "group" is for training from random weights: it
    uses group normalisation in the whole network and masks the padding.
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
            name=_RESNETS[depth],
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

    It differs from torchvision's detector in the Caffe-style network and BGR means, in anchors that are not rounded
    and lie 64 pixels apart on P6, in aligned adaptive RoIAlign, and in the L1 box losses. Smooth L1 with sigma 1000
    differs from L1 by less than 1e-6 per value.
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
    """Returns `model` adapted to COCO: short side 800, one smaller anchor scale, more proposals (res101_ls.yml)."""
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
    """Returns the fields of `TrainConfig` for a batch size with published results in faster-rcnn.pytorch.

    The optimizer is SGD with momentum. VGG16 uses weight decay 5e-4, twice the learning rate for biases, and gradients
    clipped at norm 10. ResNet uses weight decay 1e-4. Biases never decay.

    Args:
      images: number of images per epoch, including mirrored copies.
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
