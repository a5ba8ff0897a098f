"""Faster R-CNN with ResNet-50-FPN on PASCAL VOC 2007 + 2012: both trainval sets to 2007 test.

    python train.py --config configs/voc_resnet50_fpn.py --data.root data/VOCdevkit

This is torchvision's detector at VOC's usual size: short side 600, long side at most 1000, batch size 16, 12 epochs.
mmdetection publishes mAP 79.5 (VOC 2007 metric) for ResNet-50-FPN on these data sets, with its own schedule.
Give ImageNet weights with --init; without them, training will not reach such a result.
We have measured neither the result nor the time.
"""

from dataclasses import replace
from pathlib import Path

from fasterrcnn_jax.config import Config, DataConfig, TrainConfig
from fasterrcnn_jax.config.families import FPN_TRAINING, resnet_fpn
from fasterrcnn_jax.data.voc import CLASS_NAMES

MODEL = resnet_fpn(50)
# 16,551 images in both data sets; 16 per batch.
EPOCH = 16_551 // 16

config = Config(
    run=Path("runs/voc_resnet50_fpn"),
    data=DataConfig(
        root=Path("data/VOCdevkit"),
        layout="vocdevkit",
        class_names=CLASS_NAMES,
        train_split="2007_trainval+2012_trainval",
        test_split="2007_test",
        flip="random",
        crop_aspect=None,
    ),
    model=replace(
        MODEL,
        image=replace(
            MODEL.image,
            short_side=600,
            long_side=1000,
            canvases=((608, 800), (800, 608), (608, 1024), (1024, 608)),
        ),
    ),
    train=TrainConfig(
        steps=12 * EPOCH,
        decay_steps=(8 * EPOCH, 11 * EPOCH),
        warmup_steps=500,
        checkpoint_every=1000,
        **FPN_TRAINING,
    ),
)
