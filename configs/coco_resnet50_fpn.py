"""Faster R-CNN with ResNet-50-FPN on COCO, as torchvision defines and trains it: train2017 to val2017.

    python train.py --config configs/coco_resnet50_fpn.py --data.root data/coco

This is fasterrcnn_resnet50_fpn of torchvision: short side 800, long side at most 1333, 16 images over 8 devices, 26
epochs. The learning rate is 0.02 after 1000 steps of warm-up, and falls to a tenth after 16 and again after 22 epochs.
Published by torchvision: AP 37.0, 0.2288 s per step of 2 images per V100.
Give ImageNet weights with --init; without them, training will not reach the published result.
We have measured neither the result nor the time.
"""

from pathlib import Path

from fasterrcnn_jax.config import Config, DataConfig, TrainConfig
from fasterrcnn_jax.config.families import FPN_TRAINING, resnet_fpn
from fasterrcnn_jax.data.coco import CLASS_NAMES

# 117,266 images of train2017 have objects; 16 per batch.
EPOCH = 117_266 // 16

config = Config(
    run=Path("runs/coco_resnet50_fpn"),
    data=DataConfig(
        root=Path("data/coco"),
        layout="coco",
        class_names=CLASS_NAMES,
        train_split="train2017",
        test_split="val2017",
        flip="random",
        crop_aspect=None,
    ),
    model=resnet_fpn(50),
    train=TrainConfig(
        steps=26 * EPOCH,
        decay_steps=(16 * EPOCH, 22 * EPOCH),
        warmup_steps=1000,
        checkpoint_every=2000,
        **FPN_TRAINING,
    ),
)
