"""Faster R-CNN with ResNet-50 on PASCAL VOC 2007: trainval to test, by the res50.yml of faster-rcnn.pytorch.

    python train.py --config configs/voc_res50.py --data.root data/VOCdevkit

Regions are cropped and max-pooled, 256 per image. The schedule is the schedule of ResNet-101. The reference publishes
no result for this file, and its later branch no longer has the crop operator that the file asks for.
The reference starts from Caffe's ImageNet weights: give that file with --init. Without it, training starts from random
weights. We have measured neither the result nor the time.
"""

from pathlib import Path

from fasterrcnn_jax.config import Config, DataConfig, TrainConfig
from fasterrcnn_jax.config.families import resnet_c4, voc_schedule
from fasterrcnn_jax.data.voc import CLASS_NAMES

# Every image with an object that is not difficult, and its mirrored copy: at most 2 x 5,011.
IMAGES = 10022

config = Config(
    run=Path("runs/voc_res50"),
    data=DataConfig(
        root=Path("data/VOCdevkit"),
        layout="vocdevkit",
        class_names=CLASS_NAMES,
        train_split="2007_trainval",
        test_split="2007_test",
    ),
    model=resnet_c4(50),
    train=TrainConfig(**voc_schedule(1, images=IMAGES, backbone="resnet101")),
)
