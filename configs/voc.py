"""Faster R-CNN with ResNet-101 on PASCAL VOC 2007: trainval to test, as faster-rcnn.pytorch trains it.

    python train.py --config configs/voc.py --data.root data/VOCdevkit

Caffe-style C4 network, short side 600, batch size 1, 7 epochs of the images and their mirrored copies, learning
rate 1e-3 and a tenth of it after 5. Published by faster-rcnn.pytorch: mAP 75.2 (VOC 2007 metric) in 7 x 0.88 hours
and 3.2 GB on a TITAN Xp; it trains on difficult objects, this does not (--data.use_difficult).
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
    run=Path("runs/voc"),
    data=DataConfig(
        root=Path("data/VOCdevkit"),
        layout="vocdevkit",
        class_names=CLASS_NAMES,
        train_split="2007_trainval",
        test_split="2007_test",
    ),
    model=resnet_c4(101),
    train=TrainConfig(**voc_schedule(1, images=IMAGES, backbone="resnet101")),
)
