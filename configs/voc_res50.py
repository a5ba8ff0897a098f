"""Faster R-CNN with ResNet-50 on PASCAL VOC 2007: trainval to test, by the res50.yml of faster-rcnn.pytorch.

    python train.py --config configs/voc_res50.py --data.root data/VOCdevkit

Regions are cropped and max-pooled, 256 of them per image; the schedule is that of ResNet-101. The reference
publishes no figure for it, and its later branch has lost the crop operator that this file of its asks for.
The reference starts from Caffe's weights trained on ImageNet: give the file with --init. Without it this starts from
random ones, and no such figure is to be expected. We have not measured it: neither the figure nor the time.
"""

from pathlib import Path

from fasterrcnn_jax.config import Config, DataConfig, TrainConfig
from fasterrcnn_jax.config.families import resnet_c4, voc_schedule
from fasterrcnn_jax.data.voc import CLASS_NAMES

# Every image with an object that is not difficult, and its mirrored copy: 2 x 5,011 at most.
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
