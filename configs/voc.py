"""Faster R-CNN with ResNet-101 on PASCAL VOC 2007: trainval to test, as faster-rcnn.pytorch trains it.

    python train.py --config configs/voc.py --data.root data/VOCdevkit

Caffe-style C4 network, short side 600, batch size 1, 7 epochs of the images and their mirrored copies. The learning
rate is 1e-3, and 1e-4 after 5 epochs.
Published by faster-rcnn.pytorch: mAP 75.2 (VOC 2007 metric) in 7 x 0.88 hours and 3.2 GB on a TITAN Xp. It trains on
difficult objects; this configuration does not, unless you add --data.use_difficult.
The reference starts from Caffe's ImageNet weights: give that file with --init. Without it, training starts from random
weights and will not reach the published result. We have measured neither the result nor the time.
"""

from pathlib import Path

from fasterrcnn_jax.config import Config, DataConfig, TrainConfig
from fasterrcnn_jax.config.families import resnet_c4, voc_schedule
from fasterrcnn_jax.data.voc import CLASS_NAMES

# Every image with an object that is not difficult, and its mirrored copy: at most 2 x 5,011.
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
