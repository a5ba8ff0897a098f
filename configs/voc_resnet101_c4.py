"""Faster R-CNN with ResNet-101-C4 on PASCAL VOC 2007 + 2012, from torchvision's ImageNet weights.

    python train.py --config configs/voc_resnet101_c4.py --data.root data/VOCdevkit --init resnet101-63fe2227.pth

This is the detector of configs/voc0712.py, but with torchvision's ResNet, whose weights are easy to get: the stride is
in the 3x3 convolution, the pooling is padded, and the channels are RGB. Regions use RoIAlign.
Published for ResNet-101-C4 on these data sets: mAP 76.4 (He et al. 2015, table 7) and 79.8 (tf-faster-rcnn), both from
Caffe's weights. We have measured neither the result nor the time.
"""

from dataclasses import replace
from pathlib import Path

from fasterrcnn_jax.config import Config, DataConfig, RoiSamplingConfig, TrainConfig
from fasterrcnn_jax.config.families import IMAGENET_RGB, RESNET_TRAINING, resnet_c4
from fasterrcnn_jax.data.voc import CLASS_NAMES

MODEL = resnet_c4(101)

config = Config(
    run=Path("runs/voc_resnet101_c4"),
    data=DataConfig(
        root=Path("data/VOCdevkit"),
        layout="vocdevkit",
        class_names=CLASS_NAMES,
        train_split="2007_trainval+2012_trainval",
        test_split="2007_test",
    ),
    model=replace(
        MODEL,
        image=replace(MODEL.image, **IMAGENET_RGB),
        backbone=replace(MODEL.backbone, stride_in="3x3", stem_pool="padded"),
        roi_sampling=RoiSamplingConfig(rois_per_image=256),
    ),
    train=TrainConfig(
        steps=110_000,
        batch_size=1,
        learning_rate=1e-3,
        decay_steps=(80_000,),
        checkpoint_every=10_000,
        **RESNET_TRAINING,
    ),
)
