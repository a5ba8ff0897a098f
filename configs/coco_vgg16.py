"""Faster R-CNN with VGG16 on COCO: train2017 to val2017, short side 800.

    python train.py --config configs/coco_vgg16.py --data.root data/coco

Four anchor scales from 64 pixels up, short side 800. It trains 16 images over 8 devices for 6 epochs of the images and
their mirrored copies. The learning rate is 1e-2, and 1e-3 after 4 epochs.
Published by faster-rcnn.pytorch: AP 29.2 in 6 x 4.9 hours on 8 GPUs, 7.2 GB each. It uses trainval35k and minival of
2014, which are almost the same images.
The reference starts from Caffe's ImageNet weights: give that file with --init. Without it, training starts from random
weights and will not reach the published result. We have measured neither the result nor the time.
"""

from pathlib import Path

from fasterrcnn_jax.config import Config, DataConfig, TrainConfig
from fasterrcnn_jax.config.families import VGG16_TRAINING, coco_scales, vgg16
from fasterrcnn_jax.data.coco import CLASS_NAMES

# train2017 has 118,287 images, 117,266 of them with objects. Each is used twice (also mirrored), 16 per batch.
EPOCH = 2 * 117_266 // 16

config = Config(
    run=Path("runs/coco_vgg16"),
    data=DataConfig(
        root=Path("data/coco"),
        layout="coco",
        class_names=CLASS_NAMES,
        train_split="train2017",
        test_split="val2017",
    ),
    model=coco_scales(vgg16()),
    train=TrainConfig(
        steps=6 * EPOCH,
        batch_size=16,
        learning_rate=1e-2,
        decay_steps=(4 * EPOCH,),
        checkpoint_every=2000,
        **VGG16_TRAINING,
    ),
)
