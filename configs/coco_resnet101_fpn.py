"""Faster R-CNN with ResNet-101-FPN on COCO with detectron2's defaults: train2017 to val2017.

    python train.py --config configs/coco_resnet101_fpn.py --data.root data/coco

This is faster_rcnn_R_101_FPN_3x of detectron2: a Caffe-style network, 16 images over 8 devices, 270,000 steps. The
learning rate is 0.02 after 1000 steps of warm-up, and falls to a tenth after 210,000 and again after 250,000 steps.
The short side is 640, 672, 704, 736, 768 or 800 in training and 800 in testing.
Published by detectron2: AP 42.0, 0.286 s per step on 8 V100.
Give ImageNet weights with --init; without them, training will not reach the published result.
We have measured neither the result nor the time.
"""

from pathlib import Path

from fasterrcnn_jax.config import AugmentConfig, Config, DataConfig, TrainConfig
from fasterrcnn_jax.config.families import FPN_TRAINING, detectron2_fpn
from fasterrcnn_jax.data.coco import CLASS_NAMES

config = Config(
    run=Path("runs/coco_resnet101_fpn"),
    data=DataConfig(
        root=Path("data/coco"),
        layout="coco",
        class_names=CLASS_NAMES,
        train_split="train2017",
        test_split="val2017",
        flip="random",
        crop_aspect=None,
        augment=AugmentConfig(short_sides=(640, 672, 704, 736, 768, 800)),
    ),
    model=detectron2_fpn(101),
    train=TrainConfig(
        steps=270_000,
        decay_steps=(210_000, 250_000),
        warmup_steps=1000,
        checkpoint_every=5000,
        **FPN_TRAINING,
    ),
)
