"""Tests detectors by name: their settings, the files that fit them, and their preprocessing."""

import dataclasses
import hashlib
import sys

import jax
import numpy as np
import published_names
import pytest
import safetensors.numpy
import tiny
from published_names import by_rule
from test_weights import CHANNELS, FC, WIDTH, thin

import fasterrcnn_jax
from fasterrcnn_jax import __main__ as entry
from fasterrcnn_jax import zoo
from fasterrcnn_jax.config.families import resnet_fpn
from fasterrcnn_jax.data import coco
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.models.faster_rcnn import detect
from fasterrcnn_jax.models.resnet import ResNet
from fasterrcnn_jax.scripts import train
from fasterrcnn_jax.training import checkpoint
from fasterrcnn_jax.training.optimizer import create_optimizer
from fasterrcnn_jax.training.stages import stages_of
from fasterrcnn_jax.training.step import create_state
from fasterrcnn_jax.weights import files


def names_and_values(model):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def assert_equal(one, other):
    one, other = names_and_values(one), names_and_values(other)
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


@pytest.fixture
def thin_zoo(monkeypatch):
    """Returns the zoo with few channels and two classes in each model."""
    models = {
        name: info._replace(config=thin(info.config), class_names=("ring", "disc")) for name, info in zoo.MODELS.items()
    }
    monkeypatch.setattr(zoo, "MODELS", models)
    return models


def file_of(tmp_path, version, classes=2, name="weights.safetensors"):
    shapes = published_names.torchvision_fpn(50, WIDTH, version=version, channels=CHANNELS, fc=FC, classes=classes)
    safetensors.numpy.save_file(by_rule(shapes), tmp_path / name)
    return tmp_path / name


def test_every_model_says_what_it_is_and_detects():
    assert fasterrcnn_jax.list_models() == list(zoo.MODELS) and "resnet50_fpn" in zoo.MODELS
    for name in fasterrcnn_jax.list_models():
        info = fasterrcnn_jax.model_info(name)
        assert info.name == name and info.source and "AP" in info.published
        assert (info.file is None) == (info.sha256 is None) and (info.file is None or info.sha256 in info.file)
        model = jax.eval_shape(lambda name=name: fasterrcnn_jax.create(name))
        assert model.class_names == info.class_names and model.config == info.config
        height, width = info.config.image.canvases[0]
        images = jax.ShapeDtypeStruct((1, height, width, 3), np.float32)
        pair = jax.ShapeDtypeStruct((1, 2), np.float32)
        found = jax.eval_shape(detect, model, images, pair, pair)
        assert found.boxes.shape == (1, info.config.postprocess.max_detections, 4)


def test_torchvisions_classes_are_category_ids():
    names = fasterrcnn_jax.model_info("resnet50_fpn").class_names
    assert len(names) == 90 and len(set(names)) == 90
    by_id = dict(enumerate(names, start=1))
    assert (by_id[1], by_id[13], by_id[18], by_id[44], by_id[90]) == (
        "person", "stop sign", "dog", "bottle", "toothbrush",
    )  # fmt: skip
    assert tuple(name for name in names if not name.startswith("unused")) == coco.CLASS_NAMES


def test_a_model_is_made_for_so_many_classes_or_for_named_ones(thin_zoo):
    make = fasterrcnn_jax.create
    assert make("resnet50_fpn").class_names == ("ring", "disc")
    assert make("resnet50_fpn", num_classes=2).class_names == ("ring", "disc")
    assert make("resnet50_fpn", num_classes=3).class_names == ("class 1", "class 2", "class 3")
    assert make("resnet50_fpn", ("a", "b", "c")).class_names == ("a", "b", "c")
    assert make(tiny.MODEL, num_classes=1).class_names == ("class 1",)
    assert make(tiny.MODEL, ("a",), seed=3).config == tiny.MODEL


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (("resnet50",), {}, InputError, "no model is named 'resnet50'; the models are resnet50_fpn, resnet50_fpn_v2"),
        (("vgg16_voc", ("a",)), dict(num_classes=1), ValueError, "not both"),
        (("vgg16_voc",), dict(num_classes=0), ValueError, "at least 1, got 0"),
        ((tiny.MODEL,), {}, ValueError, "needs class_names or num_classes"),
    ],
)
def test_invalid_arguments_are_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fasterrcnn_jax.create(*arguments, **options)


def test_weights_are_loaded_as_by_load_weights(thin_zoo, tmp_path):
    path = file_of(tmp_path, version=1)
    made = fasterrcnn_jax.create("resnet50_fpn", weights=path)
    assert_equal(made, fasterrcnn_jax.load_weights(fasterrcnn_jax.create("resnet50_fpn"), path))
    other = fasterrcnn_jax.create("resnet50_fpn", num_classes=5, weights=path, seed=1)
    np.testing.assert_array_equal(other.rpn_head.deltas.kernel[...], made.rpn_head.deltas.kernel[...])
    assert other.box_head.class_logits.kernel.shape[1] == 6


@pytest.mark.parametrize("version, name", [(1, "resnet50_fpn"), (2, "resnet50_fpn_v2")])
@pytest.mark.parametrize("classes", [2, 4])
def test_a_file_finds_its_model_by_what_it_holds(thin_zoo, tmp_path, version, name, classes):
    path = file_of(tmp_path, version, classes)
    model = fasterrcnn_jax.load(path)
    assert model.config == thin_zoo[name].config
    assert model.class_names == (("ring", "disc") if classes == 2 else tuple(f"class {i}" for i in range(1, 5)))
    assert_equal(model, fasterrcnn_jax.create(name, num_classes=classes, weights=path))


def test_a_file_of_no_model_is_refused(tmp_path):
    """The weights have few channels, the models of the zoo do not."""
    with pytest.raises(InputError, match="weights.safetensors: the file fits none of the models resnet50_fpn, "):
        fasterrcnn_jax.load(file_of(tmp_path, version=1))


@pytest.fixture
def trained(tmp_path):
    """Returns a function that writes a run folder with one checkpoint of a model, and the run's configuration."""

    def write(model, names=tiny.CLASS_NAMES, seed=1):
        config = tiny.config(tmp_path)
        data = dataclasses.replace(config.data, class_names=names)
        config = dataclasses.replace(config, model=model, data=data)
        made = zoo.create(model, names, seed=seed)
        _, state = create_state(made, create_optimizer(config.train), seed=0)
        with checkpoint.open_checkpoints(config.run, keep=1) as checkpoints:
            checkpoint.save(checkpoints, **checkpoint.snapshot(state, config=config, iterator_state={})._asdict())
        return config, made

    return write


def test_a_run_folder_is_loaded(trained):
    config, model = trained(tiny.MODEL)
    assert_equal(fasterrcnn_jax.load(config.run), model)


def test_a_new_model_starts_from_a_run_or_a_checkpoint(trained, caplog):
    config, model = trained(tiny.MODEL)
    started = dataclasses.replace(config, init=config.run)
    (stage,) = stages_of(config)
    caplog.clear()
    with caplog.at_level("INFO", "fasterrcnn_jax"):
        assert_equal(train.first_model(started, stage, fresh=True), model)
    count = len(jax.tree.leaves(model))
    (report,) = [record.getMessage() for record in caplog.records if record.name.startswith("fasterrcnn_jax")]
    assert report.endswith(f"checkpoints/0: {count} weights, format run folder")
    assert_equal(fasterrcnn_jax.create(tiny.MODEL, tiny.CLASS_NAMES, weights=config.run / "checkpoints" / "0"), model)
    # A run that continues has its own weights.
    other = train.first_model(started, stage, fresh=False)
    assert_equal(other, zoo.create(tiny.MODEL, tiny.CLASS_NAMES, seed=config.train.seed))


def test_with_other_classes_the_last_two_layers_keep_their_random_weights(trained, caplog):
    config, model = trained(tiny.MODEL)
    fresh = zoo.create(tiny.MODEL, ("a", "b", "c"), seed=7)
    loaded = names_and_values(fasterrcnn_jax.load_weights(fresh, config.run))
    stored, before = names_and_values(model), names_and_values(fresh)
    for name, values in loaded.items():
        is_last = "class_logits" in name or "box_head.deltas" in name
        np.testing.assert_array_equal(values, (before if is_last else stored)[name], err_msg=name)
    assert "the run has 2 classes, the model 3: box_head.class_logits and box_head.deltas are not loaded" in caplog.text


def test_other_class_names_and_other_anchors_are_a_warning(trained, caplog):
    config, model = trained(tiny.MODEL)
    anchors = dataclasses.replace(tiny.MODEL, rpn=dataclasses.replace(tiny.MODEL.rpn, anchor_scales=(1.0, 4.0)))
    loaded = fasterrcnn_jax.create(anchors, ("disc", "ring"), weights=config.run)
    assert_equal(loaded, model)
    assert "the classes of the run are ring, disc, those of the model disc, ring" in caplog.text
    assert "trained with model.rpn.anchor_scales = (1.0, 2.0), but the model has (1.0, 4.0)" in caplog.text
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len([record for record in warnings if record.name.startswith("fasterrcnn_jax")]) == 2


def part(name, /, **fields):
    return dataclasses.replace(tiny.MODEL, **{name: dataclasses.replace(getattr(tiny.MODEL, name), **fields)})


@pytest.mark.parametrize(
    "model, said",
    [
        (part("backbone", width=16), "backbone/.* the run has model.backbone.width = 8, and the model has 16"),
        (part("backbone", name="resnet34"), "backbone.name = resnet18, and the model has resnet34"),
        (part("rpn", channels=16), r"rpn_head/.* has shape \(.*\), but shape .*rpn.channels = 8, and .* has 16"),
        (part("rpn", anchor_scales=(1.0,)), r"model.rpn.anchor_scales = \(1.0, 2.0\), and the model has \(1.0,\)"),
        (tiny.FPN, r"is missing, .*; the run has model.fpn = None, and the model has FpnConfig\(channels=16"),
    ],
)
def test_a_run_of_another_network_is_refused_with_the_first_different_field(trained, model, said):
    config, _ = trained(tiny.MODEL)
    with pytest.raises(InputError, match=f"checkpoints/0: .*{said}") as caught:
        fasterrcnn_jax.create(model, tiny.CLASS_NAMES, weights=config.run)
    assert "\n" not in str(caught.value)


def test_a_backbone_class_that_a_run_names_is_not_imported(trained, tmp_path, monkeypatch):
    (tmp_path / "strange_nets.py").write_text("from fasterrcnn_jax.models.resnet import ResNet as Tiny\n")
    monkeypatch.syspath_prepend(tmp_path)
    config, model = trained(part("backbone", own="strange_nets:Tiny"))
    sys.modules.pop("strange_nets")
    (tmp_path / "strange_nets.py").write_text("raise AssertionError('imported')")
    with pytest.raises(InputError, match="which is not imported because a file names it"):
        fasterrcnn_jax.load(config.run)
    # The user's own class makes the layers, and the run gives only the values.
    own = part("backbone", own="my_nets:Mine")
    mine = fasterrcnn_jax.create(own, tiny.CLASS_NAMES, weights=config.run, backbone=ResNet)
    assert_equal(mine, model)
    assert "strange_nets" not in sys.modules


def test_a_folder_without_a_checkpoint_and_a_format_for_a_run_are_refused(trained, tmp_path):
    config, model = trained(tiny.MODEL)
    with pytest.raises(InputError, match="format must be None for a run folder, got torchvision"):
        fasterrcnn_jax.load_weights(model, config.run, format="torchvision")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: contains no checkpoint; give a run folder"):
        fasterrcnn_jax.load_weights(model, tmp_path / "empty")


def test_a_published_name_comes_with_its_checksum(thin_zoo, tmp_path, monkeypatch):
    published = "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    path = file_of(tmp_path, version=1, name=published)
    model = fasterrcnn_jax.create("resnet50_fpn")
    for use in (fasterrcnn_jax.load, lambda path: fasterrcnn_jax.load_weights(model, path)):
        with pytest.raises(InputError, match=f"{published}: the SHA-256 must start with 258fb6c6"):
            use(path)
    # The digits of a model that we do not know are no checksum to us: a date, for instance.
    dated = path.rename(tmp_path / "mine-20261124.pth")
    assert fasterrcnn_jax.load(dated).config == thin_zoo["resnet50_fpn"].config
    digits = hashlib.sha256(dated.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(files, "DIGITS", {digits})
    right = dated.rename(tmp_path / f"fasterrcnn-{digits}.pth")
    assert fasterrcnn_jax.load(right).config == thin_zoo["resnet50_fpn"].config


def test_the_model_brings_its_own_preprocessing():
    """torchvision's weights get normalised RGB, Caffe's get BGR minus means; the user sets neither."""
    red = np.full((600, 800, 3), (250, 20, 20), np.uint8)
    for name, first, last in (("resnet50_fpn", 2.16, -1.46), ("resnet101_c4_voc", -82.98, 127.23)):
        config = fasterrcnn_jax.model_info(name).config
        images, _, _ = fasterrcnn_jax.preprocess(red, config.image)
        np.testing.assert_allclose(images[0, 300, 300, [0, 2]], [first, last], atol=0.01)
    assert resnet_fpn(50).image.channel_order == "rgb" and isinstance(zoo.create(tiny.MODEL, ("a",)), Detector)


@pytest.mark.parametrize("name", ["resnet50_fpn_detectron2", "resnet50_fpn_v2"])
def test_a_saved_detector_is_loaded_as_the_same_detector(thin_zoo, tmp_path, name):
    """Also the configuration and class names, if they were changed, and after `weights convert`."""
    config = thin_zoo[name].config
    config = dataclasses.replace(config, image=dataclasses.replace(config.image, short_side=600))
    model = fasterrcnn_jax.create(config, ("a", "b", "c"), seed=4)
    fasterrcnn_jax.save_weights(model, tmp_path / "one.safetensors")
    assert entry.main(["weights", "convert", str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors")]) == 0
    for file in ("one", "two"):
        again = fasterrcnn_jax.load(tmp_path / f"{file}.safetensors")
        assert (again.config, again.class_names) == (config, ("a", "b", "c"))
        assert_equal(again, model)


def test_a_file_of_another_program_is_a_model_of_that_program(tmp_path, monkeypatch):
    """detectron2's weights would also fit torchvision's detector, but with the wrong preprocessing."""
    shapes = published_names.detectron2_fpn(50, WIDTH, channels=CHANNELS, fc=FC, classes=2)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(by_rule(shapes), path)
    models = {name: info._replace(config=thin(info.config)) for name, info in zoo.MODELS.items()}
    monkeypatch.setattr(zoo, "MODELS", models)
    assert fasterrcnn_jax.load(path).config == models["resnet50_fpn_detectron2"].config


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing.pth: no such file or folder"):
        fasterrcnn_jax.load(tmp_path / "nothing.pth")
