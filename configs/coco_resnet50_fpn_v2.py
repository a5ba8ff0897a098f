"""Faster R-CNN with ResNet-50-FPN on COCO, torchvision's second version: train2017 to val2017.

    python train.py --config configs/coco_resnet50_fpn_v2.py --data.root data/coco

This is fasterrcnn_resnet50_fpn_v2 of torchvision: normalisation in the pyramid, two convolutions in the RPN, and four
convolutions and one fully connected layer in the box head. It differs from torchvision in three points. It has the
schedule of the first version, not 400 epochs on 32 GPUs. Large-scale jitter goes onto our canvases, not 1024 x 1024;
--data.augment.scale_jitter None turns it off. Batch normalisation is fixed, also in the heads.
Published by torchvision: AP 46.7 with its own schedule.
Give ImageNet weights with --init; without them, training will not reach such a result.
We have measured neither the result nor the time.
"""

from pathlib import Path

from fasterrcnn_jax.config import AugmentConfig, Config, DataConfig, TrainConfig
from fasterrcnn_jax.config.families import FPN_TRAINING, resnet_fpn
from fasterrcnn_jax.data.coco import CLASS_NAMES

# 117,266 images of train2017 have objects; 16 per batch.
EPOCH = 117_266 // 16

config = Config(
    run=Path("runs/coco_resnet50_fpn_v2"),
    data=DataConfig(
        root=Path("data/coco"),
        layout="coco",
        class_names=CLASS_NAMES,
        train_split="train2017",
        test_split="val2017",
        flip="random",
        crop_aspect=None,
        augment=AugmentConfig(scale_jitter=(0.1, 2.0)),
    ),
    model=resnet_fpn(50, version=2),
    train=TrainConfig(
        steps=26 * EPOCH,
        decay_steps=(16 * EPOCH, 22 * EPOCH),
        warmup_steps=1000,
        checkpoint_every=2000,
        **FPN_TRAINING,
    ),
)
