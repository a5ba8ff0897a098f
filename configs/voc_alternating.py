"""Faster R-CNN with VGG16 on PASCAL VOC 2007 by 4-step alternating training, as py-faster-rcnn does it.

    python train.py --config configs/voc_alternating.py --data.root data/VOCdevkit

An RPN for 80,000 steps of one image, a detector from the first weights again for 40,000 steps of two on the 2,000
proposals of each image, an RPN on its fixed layers for 80,000, its head on the new proposals for 40,000; learning
rate 1e-3 and a tenth of it after three quarters of each. The stages lie in RUN/stages, the last one and its detector
in RUN. Published by the paper: mAP 69.9 (VOC 2007 metric), from Caffe's weights trained on ImageNet: give the file
with --init. Without it this starts from random ones, and no such figure is to be expected. Unlike py-faster-rcnn, box
targets are divided by fixed deviations, not by those of the data. We have not measured it: neither figure nor time.
"""

from dataclasses import replace
from pathlib import Path

from fasterrcnn_jax.config import (
    AlternatingConfig,
    Config,
    DataConfig,
    ProposalConfig,
    RoiFeaturesConfig,
    RoiSamplingConfig,
    TrainConfig,
)
from fasterrcnn_jax.config.families import vgg16
from fasterrcnn_jax.data.voc import CLASS_NAMES

# Of the largest canvas: before the best 2,000 are taken py-faster-rcnn drops none.
ANCHORS = 38 * 63 * 9

config = Config(
    run=Path("runs/voc_alternating"),
    data=DataConfig(
        root=Path("data/VOCdevkit"),
        layout="vocdevkit",
        class_names=CLASS_NAMES,
        train_split="2007_trainval",
        test_split="2007_test",
        crop_aspect=None,
    ),
    model=replace(
        vgg16(),
        train_proposals=ProposalConfig(pre_nms_top_n=ANCHORS, post_nms_top_n=2000),
        roi_sampling=RoiSamplingConfig(rois_per_batch=128),
        roi_features=RoiFeaturesConfig(operator="pool"),
    ),
    train=TrainConfig(
        scheme="alternating",
        alternating=AlternatingConfig(rpn_batch_size=1),
        steps=240000,
        batch_size=2,
        learning_rate=1e-3,
        checkpoint_every=1000,
    ),
)
