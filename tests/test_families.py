"""The detectors and schedules have the numbers of the reference's cfgs/*.yml and of the tables in its README."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fasterrcnn_jax.config import (
    BackboneConfig,
    ModelConfig,
    RoiFeaturesConfig,
    RoiSamplingConfig,
    TrainConfig,
)
from fasterrcnn_jax.config.families import (
    IMAGENET_RGB,
    RESNET_TRAINING,
    VGG16_TRAINING,
    coco_scales,
    detectron2_fpn,
    resnet_c4,
    resnet_fpn,
    vgg16,
    voc_schedule,
)
from fasterrcnn_jax.config.text import load_config
from fasterrcnn_jax.ops.losses import smooth_l1

# VOC 2007 trainval and its mirrored copies: 10022 images, in steps of 1, 4, 16 and 24 of them.
STEPS_PER_EPOCH = {1: 10022, 4: 2506, 16: 627, 24: 418}


def caffe_line(model):
    """Checks the values that all detectors of the reference share."""
    assert model.image.channel_order == "bgr" and model.image.std == (1.0, 1.0, 1.0)
    assert model.image.mean == (102.9801, 115.9465, 122.7717)
    assert (model.backbone.stride, model.rpn.channels, model.rpn.anchor_rounding) == (16, 512, "base")
    assert model.train_proposals == ModelConfig().train_proposals
    assert (model.train_proposals.pre_nms_top_n, model.train_proposals.post_nms_top_n) == (12000, 2000)
    assert model.roi_features.output_size == 7 and not model.roi_features.aligned
    assert model.roi_features.sampling_ratio == 0
    return True


@pytest.mark.parametrize("depth, rois, operator", [(50, 256, "crop"), (101, 128, "align"), (152, 128, "align")])
def test_resnets_have_the_rois_and_the_operator_of_their_file(depth, rois, operator):
    model = resnet_c4(depth)
    assert caffe_line(model)
    assert model.backbone == BackboneConfig(
        name=f"resnet{depth}", norm="frozen_batch", stride_in="1x1", stem_pool="ceil", fixed_stages=1
    )
    assert (model.roi_sampling.rois_per_image, model.roi_features.operator) == (rois, operator)
    assert model.box_head.summary == "mean" and model.test_proposals.post_nms_top_n == 300


@pytest.mark.parametrize("norm", ["none", "frozen_batch"])
def test_vgg16_has_256_rois_dropout_and_its_first_four_convolutions_fixed(norm):
    model = vgg16(norm=norm)
    assert caffe_line(model)
    assert model.backbone == BackboneConfig(name="vgg16", norm=norm, fixed_stages=2)
    assert (model.roi_sampling.rois_per_image, model.roi_features.operator) == (256, "align")
    assert (model.box_head.channels, model.box_head.dropout) == (4096, 0.5)
    assert vgg16() == vgg16(norm="none")


@pytest.mark.parametrize("model", [resnet_c4(101), vgg16()], ids=["res101", "vgg16"])
def test_coco_has_a_smaller_anchor_a_larger_image_and_more_proposals(model):
    coco = coco_scales(model)
    assert (coco.image.short_side, coco.image.long_side) == (800, 1200)
    assert coco.rpn.anchor_scales == (4.0, 8.0, 16.0, 32.0) and model.rpn.anchor_scales == (8.0, 16.0, 32.0)
    assert (coco.test_proposals.pre_nms_top_n, coco.test_proposals.post_nms_top_n) == (6000, 1000)
    assert caffe_line(coco) and coco.roi_sampling == model.roi_sampling and coco.backbone == model.backbone


@pytest.mark.parametrize(
    "batch_size, learning_rate, falls_after, vgg16_epochs, resnet101_epochs",
    [(1, 1e-3, 5, 6, 7), (4, 4e-3, 8, 9, 10), (16, 1e-2, 8, 10, 10), (24, 1e-2, 10, 11, 12)],
)
def test_schedules_are_the_rows_of_the_references_table(
    batch_size, learning_rate, falls_after, vgg16_epochs, resnet101_epochs
):
    epoch = STEPS_PER_EPOCH[batch_size]
    for backbone, epochs in (("vgg16", vgg16_epochs), ("resnet101", resnet101_epochs)):
        train = TrainConfig(**voc_schedule(batch_size, images=10022, backbone=backbone))
        assert (train.batch_size, train.learning_rate) == (batch_size, learning_rate)
        assert (train.steps, train.decay_steps) == (epochs * epoch, (falls_after * epoch,))
        assert (train.schedule, train.decay_factor, train.warmup_steps) == ("steps", 0.1, 0)
        assert (train.optimizer, train.momentum) == ("sgd", 0.9)


def test_vgg16_doubles_bias_rates_and_clips_gradients_and_resnets_do_neither():
    vgg = TrainConfig(**voc_schedule(1, images=10022, backbone="vgg16"))
    resnet = TrainConfig(**voc_schedule(1, images=10022, backbone="resnet101"))
    for train, fields in ((vgg, VGG16_TRAINING), (resnet, RESNET_TRAINING)):
        assert all(getattr(train, name) == value for name, value in fields.items())
    assert (vgg.weight_decay, vgg.double_bias, vgg.bias_decay, vgg.clip_norm) == (5e-4, True, False, 10.0)
    assert (resnet.weight_decay, resnet.double_bias, resnet.bias_decay, resnet.clip_norm) == (1e-4, False, False, None)


def test_imagenet_rgb_is_torchvisions_normalisation_for_0_to_255():
    for name, published in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
        assert IMAGENET_RGB[name] == pytest.approx([255 * value for value in published], rel=1e-6)
    assert IMAGENET_RGB["channel_order"] == "rgb"


CROPPED = replace(
    resnet_c4(101),
    roi_sampling=RoiSamplingConfig(rois_per_image=256, add_ground_truth=False),
    roi_features=RoiFeaturesConfig(operator="crop"),
)
COCO_EPOCH = 14658  # 117,266 images with objects and their mirrored copies, 16 in a step


@pytest.mark.parametrize(
    "name, model, splits, batch_size, learning_rate, falls_at, steps",
    [
        ("voc", resnet_c4(101), "2007_trainval > 2007_test", 1, 1e-3, 50110, 70154),
        ("voc_vgg16", vgg16(), "2007_trainval > 2007_test", 1, 1e-3, 50110, 60132),
        ("voc_res50", resnet_c4(50), "2007_trainval > 2007_test", 1, 1e-3, 50110, 70154),
        ("voc0712", CROPPED, "2007_trainval+2012_trainval > 2007_test", 1, 1e-3, 80000, 110000),
        ("coco", coco_scales(resnet_c4(101)), "train2017 > val2017", 16, 1e-2, 4 * COCO_EPOCH, 6 * COCO_EPOCH),
        ("coco_vgg16", coco_scales(vgg16()), "train2017 > val2017", 16, 1e-2, 4 * COCO_EPOCH, 6 * COCO_EPOCH),
    ],
)
def test_shipped_configurations_have_the_values_of_the_runs_they_name(
    name, model, splits, batch_size, learning_rate, falls_at, steps
):
    config = load_config(Path(__file__).parents[1] / "configs" / f"{name}.py")
    assert config.model == model
    assert f"{config.data.train_split} > {config.data.test_split}" == splits
    assert (config.data.flip, config.data.crop_aspect, config.data.rank_by_aspect) == ("double", 2.0, True)
    assert (config.data.use_difficult, config.data.keep_empty) == (False, False)
    assert len(config.data.class_names) == (80 if name.startswith("coco") else 20)
    train = config.train
    assert (train.batch_size, train.learning_rate, train.decay_steps, train.steps) == (
        batch_size, learning_rate, (falls_at,), steps
    )  # fmt: skip
    fields = VGG16_TRAINING if model.backbone.name == "vgg16" else RESNET_TRAINING
    assert {field: getattr(train, field) for field in fields} == fields


def test_pyramids_have_the_values_of_the_detectors_they_name():
    """torchvision's constructor arguments; detectron2's Base-RCNN-FPN.yaml and config/defaults.py."""
    for model in (resnet_fpn(50), detectron2_fpn(101)):
        assert (model.image.short_side, model.image.long_side) == (800, 1333)
        assert model.fpn.channels == model.rpn.channels == 256
        rpn, sampling = model.rpn, model.roi_sampling
        assert (rpn.anchor_base, rpn.anchor_scales, rpn.anchor_ratios) == (32.0, (1.0,), (0.5, 1.0, 2.0))
        assert (rpn.fg_iou, rpn.bg_iou, rpn.anchors_per_image, rpn.fg_fraction) == (0.7, 0.3, 256, 0.5)
        assert (model.train_proposals.pre_nms_top_n, model.test_proposals.pre_nms_top_n) == (2000, 1000)
        assert model.train_proposals.nms_threshold == model.test_proposals.nms_threshold == 0.7
        assert (sampling.rois_per_image, sampling.fg_fraction, sampling.fg_iou) == (512, 0.25, 0.5)
        assert sampling.box_stds == (0.1, 0.1, 0.2, 0.2)
        assert (model.roi_features.output_size, model.box_head.layers, model.box_head.channels) == (7, 2, 1024)
        post = model.postprocess
        assert (post.score_threshold, post.nms_threshold, post.max_detections) == (0.05, 0.5, 100)
        assert model.backbone.fixed_stages == 1 and model.backbone.norm == "frozen_batch"
    torchvision, detectron2 = resnet_fpn(50), detectron2_fpn(101)
    assert (torchvision.train_proposals.post_nms_top_n, detectron2.train_proposals.post_nms_top_n) == (2000, 1000)
    assert (torchvision.roi_features.sampling_ratio, torchvision.roi_features.aligned) == (2, False)
    assert (detectron2.roi_features.sampling_ratio, detectron2.roi_features.aligned) == (0, True)
    assert (torchvision.backbone.stride_in, detectron2.backbone.stride_in) == ("3x3", "1x1")
    assert (torchvision.image.channel_order, detectron2.image.channel_order) == ("rgb", "bgr")
    assert detectron2.image.mean == (103.53, 116.28, 123.675)
    assert torchvision.loss.roi_sigma == torchvision.loss.rpn_sigma == 3.0
    errors = jnp.float32([-2.0, 0.0, 1e-3, 0.5])
    l1 = smooth_l1(errors, sigma=detectron2.loss.roi_sigma)
    np.testing.assert_allclose(l1, np.abs(errors), atol=1e-6)
    scratch = resnet_fpn(18, norm="group")
    assert scratch.backbone.mask_padding and not scratch.rpn.anchors_in_padding
    assert (scratch.backbone.fixed_stages, scratch.fpn.norm) == (0, "group")


@pytest.mark.parametrize(
    "name, model, warmup, falls_at, steps",
    [
        ("coco_resnet50_fpn", resnet_fpn(50), 1000, (16 * 7329, 22 * 7329), 26 * 7329),
        ("coco_resnet50_fpn_v2", resnet_fpn(50, version=2), 1000, (16 * 7329, 22 * 7329), 26 * 7329),
        ("coco_resnet101_fpn", detectron2_fpn(101), 1000, (210_000, 250_000), 270_000),
        ("voc_resnet50_fpn", resnet_fpn(50), 500, (8 * 1034, 11 * 1034), 12 * 1034),
    ],
)
def test_shipped_pyramids_have_the_schedules_they_name(name, model, warmup, falls_at, steps):
    config = load_config(Path(__file__).parents[1] / "configs" / f"{name}.py")
    if name.startswith("voc"):
        assert (config.model.image.short_side, config.model.image.long_side) == (600, 1000)
        model = replace(model, image=config.model.image)
    assert config.model == model
    train = config.train
    assert (train.batch_size, train.learning_rate, train.momentum, train.weight_decay) == (16, 0.02, 0.9, 1e-4)
    assert (train.warmup_steps, train.decay_steps, train.steps) == (warmup, falls_at, steps)
    assert (train.double_bias, train.double_objectness, train.bias_decay) == (False, False, True)


def test_resnet_101_from_torchvisions_weights():
    config = load_config(Path(__file__).parents[1] / "configs" / "voc_resnet101_c4.py")
    assert (config.model.backbone.stride_in, config.model.backbone.stem_pool) == ("3x3", "padded")
    assert config.model.image.mean == IMAGENET_RGB["mean"]
    assert config.data.train_split == "2007_trainval+2012_trainval"
