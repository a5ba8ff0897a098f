"""Faster R-CNN with ResNet-101 on PASCAL VOC 2007 + 2012: both trainval sets to 2007 test.

    python train.py --config configs/voc0712.py --data.root data/VOCdevkit

This is the schedule of tf-faster-rcnn: batch size 1, 110,000 steps, learning rate 1e-3 and 1e-4 after 80,000 steps,
weight decay 1e-4, 256 cropped regions per image, without the ground-truth boxes among them (USE_GT False).
Published by tf-faster-rcnn: mAP 79.8 (VOC 2007 metric, "best of 2-3 attempts"). One difference is left: it crops 7 x 7
samples and runs stage 4 at their resolution; here 14 x 14 samples are pooled to 7 x 7, and stage 4 halves them, as in
faster-rcnn.pytorch. faster-rcnn.pytorch publishes no result for both years; the ResNet paper reports 76.4.

The reference starts from Caffe's ImageNet weights: give that file with --init. Without it, training starts from random
weights and will not reach the published result. We have measured neither the result nor the time.
"""

from dataclasses import replace
from pathlib import Path

from fasterrcnn_jax.config import (
    Config,
    DataConfig,
    RoiFeaturesConfig,
    RoiSamplingConfig,
    TrainConfig,
)
from fasterrcnn_jax.config.families import RESNET_TRAINING, resnet_c4
from fasterrcnn_jax.data.voc import CLASS_NAMES

config = Config(
    run=Path("runs/voc0712"),
    data=DataConfig(
        root=Path("data/VOCdevkit"),
        layout="vocdevkit",
        class_names=CLASS_NAMES,
        train_split="2007_trainval+2012_trainval",
        test_split="2007_test",
    ),
    model=replace(
        resnet_c4(101),
        roi_sampling=RoiSamplingConfig(rois_per_image=256, add_ground_truth=False),
        roi_features=RoiFeaturesConfig(operator="crop"),
    ),
    train=TrainConfig(
        steps=110_000,
        batch_size=1,
        learning_rate=1e-3,
        decay_steps=(80_000,),
        checkpoint_every=10_000,
        **RESNET_TRAINING,
    ),
)
