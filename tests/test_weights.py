"""Tests weights of other programs: every array in its place, unused arrays listed, and an exact way back."""

import dataclasses
import functools
import logging
from pathlib import Path

import foreign_files
import jax
import jax.numpy as jnp
import numpy as np
import published_names
import pytest
import safetensors.numpy
import tiny
from published_names import by_rule, numbers_of_batches

import fasterrcnn_jax
from fasterrcnn_jax import __main__ as entry
from fasterrcnn_jax.config.families import (
    IMAGENET_RGB,
    detectron2_fpn,
    resnet_c4,
    resnet_fpn,
    vgg16,
)
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import create_detector
from fasterrcnn_jax.models.layers import EPSILON, FrozenBatchNorm
from fasterrcnn_jax.training import checkpoint
from fasterrcnn_jax.training.optimizer import create_optimizer
from fasterrcnn_jax.training.step import create_state
from fasterrcnn_jax.weights import files, layouts, load_weights, save_weights, tables
from fasterrcnn_jax.weights.load import Report, assign, formats_of, log

NAMES = ("ring", "disc")
WIDTH, CHANNELS, FC = 8, 16, 24
GOLDEN = Path(__file__).parent / "golden"


def thin(config):
    """Returns the detector with few channels; everything else is as published."""
    return dataclasses.replace(
        config,
        backbone=dataclasses.replace(config.backbone, width=WIDTH),
        fpn=config.fpn and dataclasses.replace(config.fpn, channels=CHANNELS),
        rpn=dataclasses.replace(config.rpn, channels=CHANNELS),
        box_head=dataclasses.replace(config.box_head, channels=FC),
    )


@functools.cache
def abstract(config, names=NAMES):
    """Returns a detector of shapes without arrays, so that arrays that were not loaded are visible."""
    return jax.eval_shape(lambda: create_detector(config, names, seed=0))


def c4_arrays(depth=50):
    return by_rule(published_names.faster_rcnn_pytorch_c4(depth, WIDTH, classes=2, anchors=9, rpn_channels=CHANNELS))


def fpn_arrays(version=1, *, classes=2, **options):
    shapes = published_names.torchvision_fpn(
        50, WIDTH, version=version, channels=CHANNELS, fc=FC, classes=classes, **options
    )
    return by_rule(shapes)


def vgg16_arrays(features, classifier, *, norm):
    shapes = published_names.vgg16(WIDTH, FC, features=features, classifier=classifier, norm=norm)
    if features == "RCNN_base":
        shapes |= published_names.faster_rcnn_pytorch_heads(8 * WIDTH, FC, 2, 9, CHANNELS)
    return by_rule(shapes)


def detectron2_arrays():
    return by_rule(published_names.detectron2_fpn(50, WIDTH, channels=CHANNELS, fc=FC, classes=2))


# Kinds of files: the model, the arrays, those that nothing of ours is made of, and for some of our names theirs.
CASES = {
    "torchvision": (
        resnet_fpn(50),
        by_rule(published_names.torchvision_resnet(50, WIDTH)),
        {"fc.weight": np.ones((5, 256), np.float32), "fc.bias": np.ones(5, np.float32)},
        {
            "backbone.stem.kernel": "conv1.weight",
            "backbone.stem_norm.var": "bn1.running_var",
            "backbone.stages.1.blocks.0.convs.2.kernel": "layer2.0.conv3.weight",
            "backbone.stages.3.blocks.2.norms.1.mean": "layer4.2.bn2.running_mean",
            "backbone.stages.0.blocks.0.shortcut.kernel": "layer1.0.downsample.0.weight",
            "backbone.stages.2.blocks.0.shortcut_norm.scale": "layer3.0.downsample.1.weight",
        },
    ),
    "torchvision, two convolutions per block": (
        resnet_fpn(18),
        by_rule(published_names.torchvision_resnet(18, WIDTH)),
        {},
        {"backbone.stages.1.blocks.1.convs.1.kernel": "layer2.1.conv2.weight"},
    ),
    "torchvision, vgg16_bn": (
        dataclasses.replace(vgg16(norm="frozen_batch"), image=tiny.IMAGE),
        vgg16_arrays("features", "classifier", norm=True),
        by_rule(published_names.with_bias("classifier.6", (5, FC))),
        {
            "backbone.stages.2.convs.1.kernel": "features.17.weight",
            "backbone.stages.4.norms.2.bias": "features.41.bias",
            "box_head.tail.fcs.1.kernel": "classifier.3.weight",
        },
    ),
    "caffe": (
        resnet_c4(50),
        by_rule(published_names.torchvision_resnet(50, WIDTH)),
        {"fc.weight": np.ones((5, 256), np.float32)},
        {
            "backbone.stages.2.blocks.5.convs.0.kernel": "layer3.5.conv1.weight",
            "box_head.tail.stage.blocks.1.convs.1.kernel": "layer4.1.conv2.weight",
            "box_head.tail.stage.blocks.0.shortcut_norm.bias": "layer4.0.downsample.1.bias",
        },
    ),
    "caffe, vgg16": (
        vgg16(),
        vgg16_arrays("features", "classifier", norm=False),
        by_rule(published_names.with_bias("classifier.6", (5, FC))),
        {
            "backbone.stages.0.convs.0.kernel": "features.0.weight",
            "backbone.stages.2.convs.0.bias": "features.10.bias",
            "backbone.stages.4.convs.2.kernel": "features.28.weight",
            "box_head.tail.fcs.0.bias": "classifier.0.bias",
        },
    ),
    "detectron": (
        detectron2_fpn(50),
        by_rule(published_names.detectron_backbone(50, WIDTH)),
        {"conv1_b": np.zeros(8, np.float32), "fc1000_w": np.ones((5, 256), np.float32)},
        {
            "backbone.stem.kernel": "conv1_w",
            "backbone.stem_norm.scale": "res_conv1_bn_s",
            "backbone.stages.0.blocks.2.convs.2.kernel": "res2_2_branch2c_w",
            "backbone.stages.3.blocks.0.norms.0.bias": "res5_0_branch2a_bn_b",
            "backbone.stages.1.blocks.0.shortcut.kernel": "res3_0_branch1_w",
            "backbone.stages.1.blocks.0.shortcut_norm.scale": "res3_0_branch1_bn_s",
        },
    ),
    "faster_rcnn_pytorch": (
        resnet_c4(50),
        c4_arrays(),
        {},
        {
            "backbone.stages.2.blocks.5.convs.0.kernel": "RCNN_base.6.5.conv1.weight",
            "box_head.tail.stage.blocks.2.norms.2.var": "RCNN_top.0.2.bn3.running_var",
            "rpn_head.convs.0.kernel": "RCNN_rpn.RPN_Conv.weight",
            "rpn_head.deltas.bias": "RCNN_rpn.RPN_bbox_pred.bias",
            "box_head.class_logits.kernel": "RCNN_cls_score.weight",
            "box_head.deltas.kernel": "RCNN_bbox_pred.weight",
        },
    ),
    "faster_rcnn_pytorch, vgg16": (
        vgg16(),
        vgg16_arrays("RCNN_base", "RCNN_top", norm=False),
        {},
        {
            "backbone.stages.3.convs.1.kernel": "RCNN_base.19.weight",
            "box_head.tail.fcs.1.kernel": "RCNN_top.3.weight",
        },
    ),
    "torchvision_fpn": (
        resnet_fpn(50),
        fpn_arrays(),
        {},
        {
            "backbone.stages.3.blocks.1.convs.1.kernel": "backbone.body.layer4.1.conv2.weight",
            "neck.lateral.1.kernel": "backbone.fpn.inner_blocks.1.0.weight",
            "neck.output.3.bias": "backbone.fpn.layer_blocks.3.0.bias",
            "rpn_head.convs.0.kernel": "rpn.head.conv.0.0.weight",
            "rpn_head.objectness.kernel": "rpn.head.cls_logits.weight",
            "rpn_head.deltas.bias": "rpn.head.bbox_pred.bias",
            "box_head.tail.fcs.1.kernel": "roi_heads.box_head.fc7.weight",
            "box_head.class_logits.bias": "roi_heads.box_predictor.cls_score.bias",
            "box_head.deltas.kernel": "roi_heads.box_predictor.bbox_pred.weight",
        },
    ),
    "torchvision_fpn, before 0.13": (
        resnet_fpn(50),
        fpn_arrays(before_0_13=True),
        {},
        {
            "neck.lateral.1.kernel": "backbone.fpn.inner_blocks.1.weight",
            "neck.output.3.bias": "backbone.fpn.layer_blocks.3.bias",
            "rpn_head.convs.0.kernel": "rpn.head.conv.weight",
        },
    ),
    "torchvision_fpn, second version": (
        resnet_fpn(50, version=2),
        fpn_arrays(2),
        {},
        {
            "neck.lateral_norms.2.mean": "backbone.fpn.inner_blocks.2.1.running_mean",
            "neck.output_norms.0.scale": "backbone.fpn.layer_blocks.0.1.weight",
            "rpn_head.convs.1.kernel": "rpn.head.conv.1.0.weight",
            "box_head.tail.convs.3.kernel": "roi_heads.box_head.3.0.weight",
            "box_head.tail.norms.2.var": "roi_heads.box_head.2.1.running_var",
            "box_head.tail.fcs.0.bias": "roi_heads.box_head.5.bias",
        },
    ),
    "detectron2_fpn": (
        detectron2_fpn(50),
        detectron2_arrays(),
        {
            "pixel_mean": np.ones((3, 1, 1), np.float32),
            "proposal_generator.anchor_generator.cell_anchors.0": np.ones((3, 4), np.float32),
        },
        {
            "backbone.stem_norm.mean": "backbone.bottom_up.stem.conv1.norm.running_mean",
            "backbone.stages.3.blocks.0.convs.1.kernel": "backbone.bottom_up.res5.0.conv2.weight",
            "backbone.stages.0.blocks.0.shortcut.kernel": "backbone.bottom_up.res2.0.shortcut.weight",
            "backbone.stages.1.blocks.0.shortcut_norm.var": "backbone.bottom_up.res3.0.shortcut.norm.running_var",
            "neck.lateral.0.kernel": "backbone.fpn_lateral2.weight",
            "neck.output.3.kernel": "backbone.fpn_output5.weight",
            "rpn_head.deltas.kernel": "proposal_generator.rpn_head.anchor_deltas.weight",
            "box_head.tail.fcs.1.kernel": "roi_heads.box_head.fc2.weight",
        },
    ),
}  # fmt: skip
WRITERS = {
    "safetensors": safetensors.numpy.save_file,
    "zip": lambda arrays, path: foreign_files.write_zip(path, {"model": arrays}),
    "legacy": lambda arrays, path: foreign_files.write_legacy(path, arrays),
    "pkl": lambda arrays, path: foreign_files.write_python2_pkl(path, arrays),
}


def write(path, arrays, container="safetensors"):
    WRITERS[container](arrays, path)
    return path


def array_at(model, name):
    part = model
    for step in name.split("."):
        part = part[int(step)] if step.isdigit() else getattr(part, step)
    return np.asarray(part[...])


def read_into(config, arrays, path, names=NAMES):
    """Returns (model, report) as in `load_weights`."""
    weights = files.read(write(path, arrays))
    return assign(abstract(config, names), weights, formats_of(weights)[0], where=str(path))


@pytest.mark.parametrize("case", CASES)
def test_every_array_goes_to_its_place_and_every_weight_has_a_source(case, tmp_path, caplog):
    config, arrays, others, pairs = CASES[case]
    config = thin(config)
    name = case.split(",")[0]
    if name != "detectron":
        others = others | numbers_of_batches(arrays)
    path = write(tmp_path / "in", arrays | others)
    with caplog.at_level(logging.INFO, "fasterrcnn_jax"):
        model = load_weights(abstract(config), path)
    assert f"format {name}" in caplog.text and "num_batches_tracked" not in caplog.text

    weights = files.read(path)
    (chosen,) = (known for known in tables.FORMATS if known.name == name)
    assert chosen in formats_of(weights)
    again, report = assign(abstract(config), weights, chosen, where="")
    assert set(report.unused) == others.keys()
    assert set(report.sources.values()) >= arrays.keys()
    # An ImageNet file has no detector's layers; of theirs nothing is touched, of all others nothing is left.
    heads = {"neck", "rpn_head", "box_head"} if chosen.absent else set()
    kept = {name.split("/")[0] for name in report.kept}
    assert kept <= heads and bool(kept) == bool(heads)
    assert not [name for name in report.kept if "tail/stage" in name or "vgg16" in case and "tail/fcs" in name]

    for ours, theirs in pairs.items():
        found, array = array_at(model, ours), arrays[theirs]
        expected = {4: lambda w: w.transpose(2, 3, 1, 0), 2: np.transpose, 1: np.array}[array.ndim](array)
        np.testing.assert_array_equal(found, expected, err_msg=ours, strict=True)
        np.testing.assert_array_equal(array_at(again, ours), found)


@pytest.mark.parametrize("container", WRITERS)
def test_the_container_does_not_matter(container, tmp_path):
    path = write(tmp_path / "in", fpn_arrays(), container)
    found = load_weights(abstract(thin(resnet_fpn(50))), path)
    expected, _ = read_into(thin(resnet_fpn(50)), fpn_arrays(), tmp_path / "plain")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("model_vgg16", vgg16()),
        ("model_res101", resnet_c4(101)),
        ("model_tv_r50fpn_91", resnet_fpn(50)),
    ],
)
def test_the_names_are_those_of_the_references_own_state(file, config):
    golden = np.load(GOLDEN / f"{file}.npz")
    format = tables.FASTER_RCNN_PYTORCH if config.fpn is None else tables.TORCHVISION_FPN
    rows, named = format.rows(config), set()
    for path, _ in jax.tree_util.tree_leaves_with_path(abstract(thin(config))):
        module, _, last = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value").rpartition("/")
        keys, _ = tables.find(rows, module)
        named.add(keys[0] + format.leaves[last])
    assert named == {str(key) for key in golden["state_keys"]}


def test_fully_connected_layers_see_the_same_cells():
    """The inputs are ordered by channel, row, column there and by row, column, channel here."""
    generator = np.random.default_rng(0)
    theirs, pooled = generator.standard_normal((5, 3 * 4)), generator.standard_normal((3, 2, 2))
    layout = layouts.after_pooling(2)
    ours = layout.ours(theirs)
    np.testing.assert_allclose(pooled.transpose(1, 2, 0).ravel() @ ours, theirs @ pooled.ravel(), rtol=1e-12)
    np.testing.assert_array_equal(layout.theirs(ours), theirs)


def test_every_format_reorders_the_first_layer_after_pooling(tmp_path):
    for config, arrays, key in (
        (vgg16(), vgg16_arrays("features", "classifier", norm=False), "classifier.0.weight"),
        (vgg16(), vgg16_arrays("RCNN_base", "RCNN_top", norm=False), "RCNN_top.0.weight"),
        (resnet_fpn(50), fpn_arrays(), "roi_heads.box_head.fc6.weight"),
        (resnet_fpn(50, version=2), fpn_arrays(2), "roi_heads.box_head.5.weight"),
        (detectron2_fpn(50), detectron2_arrays(), "roi_heads.box_head.fc1.weight"),
    ):
        model, _ = read_into(thin(config), arrays, tmp_path / "in")
        expected = arrays[key].reshape(FC, -1, 7, 7).transpose(2, 3, 1, 0).reshape(-1, FC)
        np.testing.assert_array_equal(array_at(model, "box_head.tail.fcs.0.kernel"), expected, err_msg=key)


def test_objectness_is_the_difference_of_two_logits(tmp_path):
    arrays = c4_arrays()
    model, _ = read_into(thin(resnet_c4(50)), arrays, tmp_path / "in")
    kernel, bias = (arrays[f"RCNN_rpn.RPN_cls_score.{end}"] for end in ("weight", "bias"))
    np.testing.assert_array_equal(
        array_at(model, "rpn_head.objectness.kernel"), (kernel[9:] - kernel[:9]).transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(array_at(model, "rpn_head.objectness.bias"), bias[9:] - bias[:9])
    # Written, it is the foreground's logit beside one of zero.
    save_weights(model, tmp_path / "out.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "out.safetensors")["RCNN_rpn.RPN_cls_score.weight"]
    assert not written[:9].any()
    np.testing.assert_array_equal(written[9:], kernel[9:] - kernel[:9])


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_detectron2s_background_is_its_last_class_and_ours_the_first(class_agnostic, tmp_path):
    arrays = detectron2_arrays()
    config = thin(detectron2_fpn(50))
    key = "roi_heads.box_predictor.bbox_pred"
    if class_agnostic:
        config = dataclasses.replace(config, box_head=dataclasses.replace(config.box_head, class_agnostic=True))
        arrays |= {f"{key}.{end}": arrays[f"{key}.{end}"][:4] for end in ("weight", "bias")}
    model, _ = read_into(config, arrays, tmp_path / "in")
    logits = arrays["roi_heads.box_predictor.cls_score.bias"]
    np.testing.assert_array_equal(array_at(model, "box_head.class_logits.bias"), logits[[2, 0, 1]])
    logits = arrays["roi_heads.box_predictor.cls_score.weight"]
    np.testing.assert_array_equal(array_at(model, "box_head.class_logits.kernel"), logits[[2, 0, 1]].T)
    deltas = array_at(model, "box_head.deltas.kernel")
    np.testing.assert_array_equal(deltas[:, 0 if class_agnostic else 4 :], arrays[f"{key}.weight"].T)
    assert class_agnostic or not deltas[:, :4].any()


def test_folded_batch_norm_is_its_factor_and_offset_exactly(tmp_path):
    arrays = by_rule(published_names.detectron_backbone(50, WIDTH))
    model, _ = read_into(thin(detectron2_fpn(50)), arrays, tmp_path / "in")
    x = np.random.default_rng(0).standard_normal((1, 2, 2, WIDTH)).astype(np.float32)
    expected = x * arrays["res_conv1_bn_s"] + arrays["res_conv1_bn_b"]
    np.testing.assert_array_equal(model.backbone.stem_norm(jnp.asarray(x)), expected)


def epsilon_0(arrays, path, monkeypatch):
    """Returns the model from a file that has the checksum of a published file."""
    write(path, arrays)
    monkeypatch.setitem(tables.PUBLISHED, files.read(path).sha256[:8], tables.TORCHVISION_FPN_EPSILON_0)
    return load_weights(abstract(thin(resnet_fpn(50))), path)


@pytest.mark.parametrize("how", ["its checksum", "format", "converted"])
def test_the_published_coco_weights_have_a_batch_norm_without_epsilon(how, tmp_path, monkeypatch):
    arrays = fpn_arrays()
    norm = "backbone.body.bn1"
    arrays[f"{norm}.running_var"] = np.geomspace(1e-12, 10, WIDTH).astype(np.float32)
    path = tmp_path / "in"
    if how == "format":
        model = load_weights(abstract(thin(resnet_fpn(50))), write(path, arrays), format="torchvision_fpn_epsilon_0")
    else:
        model = epsilon_0(arrays, path, monkeypatch)
    if how == "converted":
        entry.main(["weights", "convert", str(path), str(tmp_path / "out.safetensors")])
        model = load_weights(abstract(thin(resnet_fpn(50))), tmp_path / "out.safetensors")
    x = np.random.default_rng(0).standard_normal((1, 3, 3, WIDTH)).astype(np.float32)
    weight, bias, mean, var = (
        arrays[f"{norm}.{end}"].astype(np.float64) for end in ("weight", "bias", "running_mean", "running_var")
    )
    expected = (x - mean) / np.sqrt(var) * weight + bias
    np.testing.assert_allclose(model.backbone.stem_norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_the_epsilon_of_every_other_file_is_ours(tmp_path):
    model, _ = read_into(thin(resnet_fpn(50)), fpn_arrays(), tmp_path / "in")
    np.testing.assert_array_equal(array_at(model, "backbone.stem_norm.scale"), fpn_arrays()["backbone.body.bn1.weight"])
    assert EPSILON == 1e-5  # torch's


def test_a_variance_of_zero_without_epsilon_is_an_error(tmp_path):
    arrays = fpn_arrays()
    arrays["backbone.body.layer1.0.bn2.running_var"][3] = 0.0
    with pytest.raises(InputError, match=r"in: backbone\.body\.layer1\.0\.bn2\.running_var must be positive"):
        load_weights(abstract(thin(resnet_fpn(50))), write(tmp_path / "in", arrays), format="torchvision_fpn_epsilon_0")


@pytest.mark.parametrize("case", CASES)
def test_any_missing_array_is_named_with_what_it_is_for(case, tmp_path):
    config, arrays, _, pairs = CASES[case]
    ours, theirs = list(pairs.items())[-1]
    arrays = {name: array for name, array in arrays.items() if name != theirs}
    with pytest.raises(InputError, match=rf"in: .*{theirs}.* is missing, which {ours.replace('.', '/')} needs"):
        load_weights(abstract(thin(config)), write(tmp_path / "in", arrays))


@pytest.mark.parametrize("case", CASES)
def test_any_array_of_another_shape_is_named_with_both_shapes(case, tmp_path):
    config, arrays, _, pairs = CASES[case]
    ours, theirs = next((ours, theirs) for ours, theirs in pairs.items() if "kernel" in ours)
    wrong = arrays | {theirs: arrays[theirs][:-1].copy()}
    shape = str(wrong[theirs].shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(InputError, match=rf"in: {theirs} has shape {shape}.*{ours.replace('.', '/')} with shape \("):
        load_weights(abstract(thin(config)), write(tmp_path / "in", wrong))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (vgg16(), "RCNN_top.0.weight"),  # no multiple of 49
        (vgg16(), "RCNN_rpn.RPN_cls_score.bias"),  # an odd number of logits
    ],
)
def test_shapes_that_cannot_be_laid_out_are_named(config, key, tmp_path):
    arrays = vgg16_arrays("RCNN_base", "RCNN_top", norm=False)
    arrays[key] = arrays[key][..., :-1].copy()
    with pytest.raises(InputError, match=rf"in: {key} has shape"):
        load_weights(abstract(thin(config)), write(tmp_path / "in", arrays))


def test_integer_arrays_are_refused(tmp_path):
    arrays = fpn_arrays()
    arrays["rpn.head.conv.0.0.bias"] = np.zeros(CHANNELS, np.int64)
    with pytest.raises(InputError, match=r"in: rpn\.head\.conv\.0\.0\.bias must have a floating point .* got int64"):
        load_weights(abstract(thin(resnet_fpn(50))), write(tmp_path / "in", arrays))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Returns a file of a small detector of ours."""
    path = tmp_path_factory.mktemp("ours") / "ours.safetensors"
    save_weights(create_detector(tiny.MODEL, NAMES, seed=0), path)
    return path


LOADERS = {
    "load_weights": lambda path: load_weights(abstract(tiny.MODEL), path),
    "create": lambda path: fasterrcnn_jax.create(tiny.MODEL, NAMES, weights=path),
    "load": fasterrcnn_jax.load,
}


@pytest.mark.parametrize("load", LOADERS)
def test_numbers_that_are_not_finite_are_refused_with_the_name_of_their_tensor(load, ours, tmp_path):
    weights = files.read(ours)
    key = "RCNN_rpn.RPN_bbox_pred.bias"
    for value in (np.nan, np.inf, 1e300):  # the last one is beyond float32
        bad = np.zeros(weights.arrays[key].shape)
        bad[3:5] = value
        files.write(tmp_path / "bad.safetensors", weights.arrays | {key: bad}, weights.metadata)
        problem = rf"bad\.safetensors: {key} must be finite, but 2 of its {bad.size} numbers are NaN or infinite"
        with pytest.raises(InputError, match=problem):
            LOADERS[load](tmp_path / "bad.safetensors")


def test_a_batch_norm_of_nan_without_epsilon_is_an_error(tmp_path):
    arrays = fpn_arrays()
    arrays["backbone.body.layer1.0.bn2.running_var"][3] = np.nan
    with pytest.raises(InputError, match=r"in: backbone\.body\.layer1\.0\.bn2\.running_var must be positive"):
        load_weights(abstract(thin(resnet_fpn(50))), write(tmp_path / "in", arrays), format="torchvision_fpn_epsilon_0")


def test_a_checkpoint_of_lightning_loads_as_its_weights_do(tmp_path):
    arrays, config = fpn_arrays(), thin(resnet_fpn(50))
    plain, _ = read_into(config, arrays, tmp_path / "in")
    checkpoint = {"epoch": 1, "state_dict": {f"model.{name}": array for name, array in arrays.items()}}
    foreign_files.write_zip(tmp_path / "last.ckpt", checkpoint)
    jax.tree.map(np.testing.assert_array_equal, load_weights(abstract(config), tmp_path / "last.ckpt"), plain)


@pytest.mark.parametrize("names", ['"ring"', "[1, 2]", "{}", "[" * 100_000, "ring"])
def test_class_names_of_a_file_that_are_no_list_of_names_are_refused(names, ours, tmp_path):
    weights = files.read(ours)
    files.write(tmp_path / "bad.safetensors", weights.arrays, weights.metadata | {"class_names": names})
    with pytest.raises(InputError, match=r"bad\.safetensors: metadata class_names must be a JSON list of names"):
        fasterrcnn_jax.load(tmp_path / "bad.safetensors")


def test_half_precision_is_read_as_float32(tmp_path):
    arrays = {name: array.astype(jnp.bfloat16) for name, array in fpn_arrays().items()}
    model, _ = read_into(thin(resnet_fpn(50)), arrays, tmp_path / "in")
    bias = array_at(model, "rpn_head.deltas.bias")
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias, arrays["rpn.head.bbox_pred.bias"].astype(np.float32))


@pytest.mark.parametrize(
    ("config", "arrays", "problem"),
    [
        (resnet_fpn(18), "deeper", r"no place for layer1\.2\.bn1\.running_mean"),
        (resnet_fpn(50, norm="group"), "torchvision", r"no place for bn1\.running_mean"),
        (resnet_fpn(50), "torchvision_fpn, second version", r"roi_heads\.box_head\.fc6\.bias is missing"),
        (resnet_fpn(50, version=2), "torchvision_fpn", r"roi_heads\.box_head\.0\.0\.weight is missing"),
        (resnet_c4(50), "torchvision_fpn", "has shape|is missing|no place"),
        (resnet_fpn(50), "faster_rcnn_pytorch", "format faster_rcnn_pytorch has no name for box_head/tail/fcs/0/bias"),
        (vgg16(), "torchvision, vgg16_bn", r"features\.2\.bias is missing"),
        (vgg16(), "caffe", r"features\.0\.bias is missing"),
    ],
)
def test_another_network_is_refused(config, arrays, problem, tmp_path):
    if arrays == "deeper":
        arrays = by_rule(published_names.torchvision_resnet(18, WIDTH))
        arrays |= {name.replace("layer1.1", "layer1.2"): array for name, array in arrays.items()}
    else:
        arrays = CASES[arrays][1]
    with pytest.raises(InputError, match=problem):
        load_weights(abstract(thin(config)), write(tmp_path / "in", arrays))


def test_a_custom_backbone_has_no_names_in_these_files(tmp_path):
    model = create_detector(thin(resnet_fpn(50)), NAMES, seed=0)
    model.backbone.extra = FrozenBatchNorm(3)
    with pytest.raises(InputError, match="format torchvision has no name for backbone/extra/bias"):
        load_weights(model, write(tmp_path / "in", CASES["torchvision"][1]))


@pytest.mark.parametrize("case", ["torchvision_fpn", "faster_rcnn_pytorch", "detectron2_fpn"])
def test_other_classes_keep_everything_but_the_last_two_layers(case, tmp_path, caplog):
    config, arrays, _, _ = CASES[case]
    config, names = thin(config), ("one", "two", "three")
    fresh = create_detector(config, names, seed=5)
    with caplog.at_level(logging.INFO, "fasterrcnn_jax"):
        model = load_weights(fresh, write(tmp_path / "in", arrays))
    assert "the file has 2 classes, the model 3: box_head.class_logits and box_head.deltas are not" in caplog.text
    assert model.class_names == names
    whole = load_weights(create_detector(config, NAMES, seed=5), tmp_path / "in")
    for layer in ("class_logits", "deltas"):
        for leaf in ("kernel", "bias"):
            name = f"box_head.{layer}.{leaf}"
            np.testing.assert_array_equal(array_at(model, name), array_at(fresh, name))
    for part in ("backbone", "neck", "rpn_head"):
        jax.tree.map(np.testing.assert_array_equal, getattr(model, part), getattr(whole, part))
    jax.tree.map(np.testing.assert_array_equal, model.box_head.tail, whole.box_head.tail)

    _, report = read_into(config, arrays, tmp_path / "in", names)
    assert {name.rpartition("/")[0] for name in report.kept} == {"box_head/class_logits", "box_head/deltas"}
    assert len(report.kept) == len(report.unused) == 4


def test_the_given_model_does_not_change(tmp_path):
    model = create_detector(thin(resnet_fpn(50)), NAMES, seed=5)
    before = jax.tree.map(np.array, model)
    load_weights(model, write(tmp_path / "in", fpn_arrays()))
    jax.tree.map(np.testing.assert_array_equal, model, before)


def test_a_setting_that_differs_from_the_training_of_the_weights_is_warned_of(tmp_path, caplog):
    path = write(tmp_path / "in", CASES["caffe"][1])

    def warnings(config, **options):
        caplog.clear()
        load_weights(abstract(thin(config)), path, **options)
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    rgb = dataclasses.replace(resnet_c4(50).image, **IMAGENET_RGB)
    assert warnings(resnet_c4(50)) == []
    assert warnings(resnet_fpn(50)) == []
    found = warnings(dataclasses.replace(resnet_c4(50), image=rgb))
    assert [text for text in found if "model.backbone.stride_in = 3x3, but the model has 1x1" in text]
    assert len(found) == 2  # and the pooling
    found = warnings(resnet_c4(50), format="torchvision")
    assert [text for text in found if "model.image.channel_order = rgb, but the model has bgr" in text]
    assert len(found) == 5

    # Blocks of two convolutions have no 1x1 to stride in, VGG16 has no blocks.
    path = write(tmp_path / "in", CASES["torchvision, two convolutions per block"][1])
    caffe = dataclasses.replace(resnet_fpn(18), backbone=dataclasses.replace(resnet_fpn(18).backbone, stride_in="1x1"))
    assert warnings(caffe) == []
    path = write(tmp_path / "in", CASES["caffe, vgg16"][1])
    pooled = dataclasses.replace(vgg16().backbone, stem_pool="padded")
    assert warnings(dataclasses.replace(vgg16(), backbone=pooled)) == []


def test_formats_that_are_not_known_are_named(tmp_path):
    path = write(tmp_path / "in", {"a": np.ones(2, np.float32)})
    model = abstract(thin(resnet_fpn(50)))
    with pytest.raises(InputError, match=r"in: unknown format; .* are 'a' …, the known formats are torchvision, caffe"):
        load_weights(model, path)
    with pytest.raises(InputError, match="format must be one of torchvision, caffe.*, got torchvisoin"):
        load_weights(model, path, format="torchvisoin")


OURS = {
    "pyramid": resnet_fpn(50),
    "second version": resnet_fpn(50, version=2),
    "pyramid with group norm": resnet_fpn(18, norm="group"),
    "C4": resnet_c4(50),
    "VGG16": vgg16(),
    "VGG16 with batch norm": vgg16(norm="frozen_batch"),
    "tiny": tiny.MODEL,
}


@pytest.mark.parametrize("name", OURS)
def test_saving_and_loading_is_exact_and_without_a_warning(name, random_weights, tmp_path, caplog):
    config = OURS[name] if name == "tiny" else thin(OURS[name])
    model = random_weights(lambda: create_detector(config, NAMES, seed=0), seed=7)
    path = tmp_path / "out.safetensors"
    save_weights(model, path)
    found = load_weights(abstract(config), path)
    assert jax.tree.structure(found) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, found, model)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    # What the weights were trained with goes with them.
    other = dataclasses.replace(config, image=dataclasses.replace(config.image, std=(2.0, 2.0, 2.0)))
    load_weights(abstract(other), path)
    assert f"model.image.std = {config.image.std}, but the model has (2.0, 2.0, 2.0)" in caplog.text


@pytest.mark.parametrize("version", [1, 2])
def test_torchvisions_arrays_come_out_as_they_went_in(version, tmp_path):
    arrays = fpn_arrays(version)
    model, _ = read_into(thin(resnet_fpn(50, version=version)), arrays, tmp_path / "in")
    save_weights(model, tmp_path / "out.safetensors")
    found = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name, strict=True)


def test_names_from_before_0_13_are_written_as_current_names(tmp_path):
    old = fpn_arrays(before_0_13=True)
    model, _ = read_into(thin(resnet_fpn(50)), old, tmp_path / "in")
    save_weights(model, tmp_path / "out.safetensors")
    found = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert found.keys() == fpn_arrays().keys()
    np.testing.assert_array_equal(found["rpn.head.conv.0.0.bias"], old["rpn.head.conv.bias"])


def test_a_part_that_the_other_program_lacks_cannot_be_written(random_weights, tmp_path):
    config = thin(resnet_c4(50))
    config = dataclasses.replace(config, rpn=dataclasses.replace(config.rpn, convs=2))
    model = random_weights(lambda: create_detector(config, NAMES, seed=0))
    with pytest.raises(InputError, match="faster_rcnn_pytorch has no name for rpn_head/convs/1/bias"):
        save_weights(model, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def main(*argv):
    with tiny.restored_logging():
        return entry.main(["weights", *map(str, argv)])


def test_convert_keeps_names_and_arrays_of_another_program(tmp_path, capsys):
    arrays = c4_arrays() | {"epoch": np.array(3)}
    foreign_files.write_legacy(tmp_path / "in.pth", {"model": arrays, "optimizer": {"lr": 0.1}})
    assert main("convert", tmp_path / "in.pth", tmp_path / "out.safetensors") == 0
    assert "out.safetensors" in capsys.readouterr().out
    found = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_convert_writes_a_run_of_ours_for_other_programs(random_weights, tmp_path):
    config = tiny.config(tmp_path)
    model = random_weights(lambda: create_detector(config.model, tiny.CLASS_NAMES, seed=0), seed=3)
    _, state = create_state(model, create_optimizer(config.train), seed=0)
    with checkpoint.open_checkpoints(config.run, keep=1) as checkpoints:
        checkpoint.save(checkpoints, state=state, config=config, iterator_state={}, measured=None)
    assert main("convert", config.run, tmp_path / "out.safetensors") == 0
    found = load_weights(abstract(config.model, tiny.CLASS_NAMES), tmp_path / "out.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found, model)


def test_inspect_shows_format_and_arrays(tmp_path, capsys):
    assert main("inspect", write(tmp_path / "in", fpn_arrays(), "zip")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("format     torchvision_fpn  detectors of torchvision")
    assert lines[1] == f"arrays     {len(fpn_arrays())}"
    assert lines[2] == f"numbers    {sum(array.size for array in fpn_arrays().values()):,}"
    stem = next(line for line in lines if line.startswith("backbone.body.conv1.weight "))
    assert stem.split(maxsplit=1)[1] == "float32  8 x 3 x 7 x 7"

    main("inspect", write(tmp_path / "in", CASES["caffe"][1]))
    lines = capsys.readouterr().out.splitlines()
    assert "torchvision" in lines[0] and lines[1].startswith("or         caffe  ")
    main("inspect", write(tmp_path / "in", {"a": np.ones(2, np.float32)}))
    assert capsys.readouterr().out.startswith("format     unknown\n")


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("convert", "unknown", "out.safetensors"), "unknown: the format is unknown"),
        (("convert", "known", "out.pth"), "out.pth: the output file must end in .safetensors"),
        (("convert", "absent", "out.safetensors"), "absent: the file cannot be read"),
        (("inspect", "absent"), "absent: the file cannot be read"),
    ],
)
def test_faults_are_one_line_and_status_2(argv, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "unknown", {"a": np.ones(2, np.float32)})
    write(tmp_path / "known", CASES["caffe"][1])
    with pytest.raises(SystemExit) as exit:
        main(*argv)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {problem}")
    assert not (tmp_path / "out.pth").exists()


def test_the_log_names_a_whole_part_once_and_leaves_counters_of_training_out(caplog):
    report = Report(
        format="torchvision",
        sources={"backbone/stem/kernel": "conv1.weight", "box_head/tail/kernel": "layer4.weight"},
        unused=("bn1.num_batches_tracked", "fc.weight"),
        kept=("rpn_head/objectness/kernel", "rpn_head/objectness/bias", "box_head/deltas/kernel"),
        notes=(),
    )
    with caplog.at_level(logging.INFO, "fasterrcnn_jax"):
        log(report, "in.pth")
    assert caplog.messages[1:] == [
        "in.pth: not used from the file: 'fc.weight'",
        "in.pth: new, not from the file: 'rpn_head', 'box_head/deltas/kernel'",
    ]
