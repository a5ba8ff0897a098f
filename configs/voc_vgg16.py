"""Faster R-CNN with VGG16 on PASCAL VOC 2007: trainval to test, as faster-rcnn.pytorch trains it.

    python train.py --config configs/voc_vgg16.py --data.root data/VOCdevkit

Short side 600, batch size 1, 6 epochs of the images and their mirrored copies. The learning rate is 1e-3, and 1e-4
after 5 epochs; biases train at twice the learning rate; gradients are clipped at norm 10.
Published by faster-rcnn.pytorch: mAP 70.1 (VOC 2007 metric) in 6 x 0.76 hours and 3.3 GB on a TITAN Xp. The paper
reports 69.9 with 4-step alternating training.
The reference starts from Caffe's ImageNet weights: give that file with --init. Without it, training starts from random
weights and will not reach the published result. We have measured neither the result nor the time.
"""

from pathlib import Path

from fasterrcnn_jax.config import Config, DataConfig, TrainConfig
from fasterrcnn_jax.config.families import vgg16, voc_schedule
from fasterrcnn_jax.data.voc import CLASS_NAMES

# Every image with an object that is not difficult, and its mirrored copy: at most 2 x 5,011.
IMAGES = 10022

config = Config(
    run=Path("runs/voc_vgg16"),
    data=DataConfig(
        root=Path("data/VOCdevkit"),
        layout="vocdevkit",
        class_names=CLASS_NAMES,
        train_split="2007_trainval",
        test_split="2007_test",
    ),
    model=vgg16(),
    train=TrainConfig(**voc_schedule(1, images=IMAGES, backbone="vgg16")),
)
