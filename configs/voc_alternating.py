"""Faster R-CNN with VGG16 on PASCAL VOC 2007 by 4-step alternating training, as py-faster-rcnn does it.

    python train.py --config configs/voc_alternating.py --data.root data/VOCdevkit

The four stages:
  1. an RPN, 80,000 steps of one image;
  2. a detector, again from the initial weights, 40,000 steps of two images, on 2,000 stored proposals per image;
  3. an RPN on the fixed shared layers of stage 2, 80,000 steps;
  4. the box head of stage 2 on the new proposals, 40,000 steps.
The learning rate is 1e-3, and 1e-4 after three quarters of each stage. The first three stages are written to
RUN/stages; the last stage, with the final detector, is written to RUN.
Published by the paper: mAP 69.9 (VOC 2007 metric), from Caffe's ImageNet weights: give that file with --init. Without
it, training starts from random weights and will not reach the published result. Unlike py-faster-rcnn, box targets are
divided by fixed standard deviations, not by those of the data. We have measured neither the result nor the time.
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

# Number of anchors on the largest canvas. All of them enter NMS, because py-faster-rcnn drops none before NMS here.
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
