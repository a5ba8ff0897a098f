"""Parameters, cost and shapes of a model, against counts made by hand and against published ones."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from fasterrcnn_jax import __main__ as entry
from fasterrcnn_jax.config import BackboneConfig, FpnConfig, ModelConfig
from fasterrcnn_jax.config.families import resnet_fpn, vgg16
from fasterrcnn_jax.config.text import load_config
from fasterrcnn_jax.models.detector import create_detector, split
from fasterrcnn_jax.models.summary import format_summary, summarize
from fasterrcnn_jax.ops.anchors import anchors_of

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("[!_]*.py"))


@pytest.mark.parametrize(
    "config, classes, published, counts_norms",
    [(resnet_fpn(50), 90, 41_755_286, False), (resnet_fpn(50, version=2), 90, 43_712_278, True)],
    ids=["resnet50_fpn", "resnet50_fpn_v2"],
)
def test_parameters_are_the_published_ones(config, classes, published, counts_norms):
    """torchvision counts scale and bias of trainable batch norms and never their statistics."""
    summary = summarize(config, classes)
    model = jax.eval_shape(lambda: create_detector(config, ("a",) * classes, seed=0))
    total = sum(part.trained + part.fixed for part in summary.parts)
    assert total == sum(leaf.size for leaf in jax.tree.leaves(model))
    norms = sum(leaf.size for leaf in jax.tree.leaves(split(model)[2]))
    fixed_convs = 64 * 3 * 49 + sum(
        np.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(split(model)[2])
        if "kernel" in jax.tree_util.keystr(path) and "'stages'" in jax.tree_util.keystr(path)
    )
    assert total - (norms - fixed_convs) * (1 - counts_norms / 2) == published


def test_vgg16_has_its_published_parameters():
    """The classifier has 138,357,544 parameters, 4,097,000 of them in its last layer."""
    summary = summarize(vgg16(), 20)
    predictors = 4096 * 21 + 21 + 4096 * 84 + 84
    backbone, _, box_head = summary.parts
    assert backbone.trained + backbone.fixed + box_head.trained - predictors == 138_357_544 - 4_097_000
    # conv1_1 to conv2_2 are fixed.
    assert backbone.fixed == 260_160


def test_flops_are_two_per_multiplication():
    """VGG16 at stride 16: convolutions on the canvas, on half the canvas and so on, and fc6 and fc7 on 300 regions."""
    config = vgg16()
    summary = summarize(config, 20)
    height, width = summary.canvas
    sizes, inputs, expected = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 3, 0
    for stage, (channels, convs) in enumerate(sizes):
        for _ in range(convs):
            expected += 2 * 9 * inputs * channels * (height >> stage) * (width >> stage)
            inputs = channels
    assert summary.parts[0].flops == pytest.approx(expected, rel=0.01)
    expected = 2 * 300 * (512 * 49 * 4096 + 4096 * 4096 + 4096 * 105)
    assert summary.parts[2].flops == pytest.approx(expected, rel=0.01)


def test_activations_are_what_the_backward_pass_keeps():
    """They are about half as large in bfloat16 and never smaller than the output of the stem."""
    backbone = dataclasses.replace(tiny.FPN.backbone, norm="frozen_batch", mask_padding=False, fixed_stages=0)
    config = dataclasses.replace(tiny.FPN, backbone=backbone, fpn=FpnConfig(channels=16))
    wide, narrow = (
        summarize(dataclasses.replace(config, compute_dtype=dtype), 2).parts for dtype in ("float32", "bfloat16")
    )
    for one, other in zip(wide, narrow, strict=True):
        assert 0.4 < other.activations / one.activations < 0.7
    height, width = config.image.canvases[0]
    assert wide[0].activations > 4 * 8 * height * width // 4
    # Weights, which the backward pass also reads, are not counted: here they are larger than all activations.
    assert wide[0].activations < 4 * wide[0].trained


def test_recomputed_stages_keep_little_of_backbone_and_head():
    kept, again = (
        summarize(
            dataclasses.replace(tiny.MODEL, backbone=dataclasses.replace(tiny.MODEL.backbone, remat=remat)), 2
        ).parts
        for remat in (False, True)
    )
    for part in (0, 2):
        assert again[part].activations < 0.5 * kept[part].activations


def test_a_part_that_is_fixed_keeps_nothing():
    def activations(fixed):
        backbone = BackboneConfig(name="resnet18", width=8, fixed_stages=fixed)
        return summarize(dataclasses.replace(ModelConfig(), backbone=backbone), 2).parts[0].activations

    assert activations(3) < activations(1) / 4


def test_shapes_are_those_of_the_model():
    summary = summarize(tiny.FPN, 2)
    assert summary.levels == [
        (4, (1, 16, 24, 16)), (8, (1, 8, 12, 16)), (16, (1, 4, 6, 16)), (32, (1, 2, 3, 16)), (64, (1, 1, 2, 16)),
    ]  # fmt: skip
    assert summary.anchors == len(anchors_of(tiny.FPN, ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2))).anchors)
    assert summary.detections == {"boxes": (1, 6, 4), "scores": (1, 6), "labels": (1, 6), "valid": (1, 6)}


# One of each family by default; tracing a whole detector takes seconds.
QUICK = {"voc", "voc_vgg16", "coco_resnet50_fpn_v2", "shapes"}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem in QUICK else pytest.mark.slow, id=path.stem) for path in CONFIGS],
)
def test_every_shipped_configuration_is_summarised(path, capsys):
    entry.main(["summary", str(path), "--data.class_names", "a", "b"])
    printed = capsys.readouterr().out
    config = load_config(path)
    summary = summarize(config.model, 2)
    assert printed == format_summary(summary) + "\n"
    total = sum(part.trained for part in summary.parts)
    assert f"{total:,}" in printed and f"anchors             {summary.anchors:,}" in printed
