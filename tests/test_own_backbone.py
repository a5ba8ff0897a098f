"""A user's own backbone: the class of docs/backbone.md, trained, stored and loaded by the real scripts."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import fasterrcnn_jax
from fasterrcnn_jax.config import BackboneConfig
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import backbone_class
from fasterrcnn_jax.models.heads import FcTail
from fasterrcnn_jax.models.resnet import ResNet
from fasterrcnn_jax.models.vgg import Vgg16
from fasterrcnn_jax.scripts import evaluate, predict, train
from fasterrcnn_jax.scripts import weights as weights_script
from fasterrcnn_jax.weights import files
from fasterrcnn_jax.weights.load import CONFIG

TEXT = (Path(__file__).parents[1] / "docs" / "backbone.md").read_text()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes the example of the documentation a module that can be imported."""
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "my_nets.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_nets:Tiny"
    sys.modules.pop("my_nets", None)


def test_a_run_with_the_backbone_of_the_documentation(tmp_path, module, capsys):
    tiny.write_voc(tmp_path / "voc", train=4, test=2)
    config = tiny.config(tmp_path, steps=2, batch_size=4)
    model = dataclasses.replace(
        config.model,
        backbone=dataclasses.replace(config.model.backbone, own=module),
        box_head=dataclasses.replace(config.model.box_head, channels=16, dropout=0.0),
    )
    config = dataclasses.replace(config, model=model)
    path = tiny.write_config(tmp_path / "own.py", config)
    with tiny.restored_logging(), tiny.quick_compilation():
        train.main(["--config", str(path)])
    example = sys.modules["my_nets"].Tiny
    model = fasterrcnn_jax.load(config.run, backbone=example)
    assert (type(model.backbone).__name__, model.config) == ("Tiny", config.model)
    kernel = model.backbone.stages[0].kernel[...]
    assert kernel.shape == (3, 3, 3, 32)
    # The first of its stages was fixed, the second has moved.
    started = fasterrcnn_jax.create(model.config, model.class_names, seed=config.train.seed).backbone
    np.testing.assert_array_equal(kernel, started.stages[0].kernel[...])
    assert np.any(np.asarray(model.backbone.stages[1].kernel[...] != started.stages[1].kernel[...]))

    # A trained run that names a class is a stranger's file: nothing that it names is imported, by any verb.
    weights = tmp_path / "own.safetensors"
    weights_of_a_stranger(weights, model)
    sys.modules.pop("my_nets")
    source = (tmp_path / "my_nets.py").read_text()
    (tmp_path / "my_nets.py").write_text(f"open({str(tmp_path / 'payload')!r}, 'w').close()\n{source}")
    out = tmp_path / "out"
    verbs = {
        "evaluate": (evaluate.main, ["--ckpt", config.run, "--out", out]),
        "predict": (predict.main, ["--ckpt", config.run, "--images", config.data.root / "JPEGImages", "--out", out]),
        "weights": (weights_script.main, ["convert", config.run, tmp_path / "converted.safetensors"]),
    }
    says = "the model needs the backbone class 'my_nets:Tiny', which is not imported because a file names it"
    for path in (config.run, config.run / "checkpoints" / "2", weights):
        with pytest.raises(InputError, match=says):
            fasterrcnn_jax.load(path)
    with tiny.restored_logging():
        for main, argv in verbs.values():
            with pytest.raises(SystemExit) as ended:
                main([str(part) for part in argv])
            assert ended.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "payload").exists() and "my_nets" not in sys.modules

    # The class that the caller gives is used, and the one that the user names on the command line.
    again = fasterrcnn_jax.load(config.run, backbone=example)
    np.testing.assert_array_equal(again.backbone.stages[0].kernel[...], kernel)
    with tiny.restored_logging(), tiny.quick_compilation():
        main, argv = verbs["evaluate"]
        main([*(str(part) for part in argv), "--backbone", "my_nets:Tiny"])
        assert (tmp_path / "payload").exists() and "AP50" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            main([*(str(part) for part in argv), "--backbone", "my_nets:Absent"])
    assert "--backbone = my_nets:Absent: module 'my_nets' has no attribute 'Absent'" in capsys.readouterr().err


def weights_of_a_stranger(path, model):
    """Writes a weights file whose stored model names a backbone class."""
    plain = fasterrcnn_jax.create(dataclasses.replace(tiny.MODEL), model.class_names)
    fasterrcnn_jax.save_weights(plain, path)
    weights = files.read(path)
    config = json.loads(weights.metadata[CONFIG])
    config["backbone"]["own"] = "my_nets:Tiny"
    files.write(path, weights.arrays, weights.metadata | {CONFIG: json.dumps(config)})


def test_a_missing_class_is_named(module):
    with pytest.raises(InputError, match="my_nets:Large: module 'my_nets' has no attribute 'Large'"):
        backbone_class(BackboneConfig(own="my_nets:Large"))


def test_a_value_that_is_not_an_import_path_is_refused():
    with pytest.raises(ValueError, match="own must be MODULE:CLASS, got 'my_nets.Tiny'"):
        BackboneConfig(own="my_nets.Tiny")


def test_the_class_alone_is_enough_and_its_stride_is_checked(module):
    """The configuration has no import path. A map with another stride would put every box in a wrong place."""
    example = backbone_class(BackboneConfig(own=module))
    images, pair = jax.ShapeDtypeStruct((1, 64, 96, 3), np.float32), jax.ShapeDtypeStruct((1, 2), np.float32)
    model = jax.eval_shape(lambda: fasterrcnn_jax.create(tiny.MODEL, ("a",), backbone=example))
    assert jax.eval_shape(fasterrcnn_jax.detect, model, images, pair, pair).boxes.shape == (1, 6, 4)
    config = dataclasses.replace(tiny.MODEL, backbone=dataclasses.replace(tiny.MODEL.backbone, stride=8))
    model = jax.eval_shape(lambda: fasterrcnn_jax.create(config, ("a",), backbone=example))
    with pytest.raises(ValueError, match="map of 4 x 6 cells .* 64 x 96 pixels, which does not have .* stride 8"):
        jax.eval_shape(fasterrcnn_jax.detect, model, images, pair, pair)


class ThinResNet(ResNet):
    """A subclass without changes."""


def test_a_subclass_of_resnet_has_its_head_however_it_is_given(monkeypatch):
    """Its head runs stage 4 on each region, given by import path or as `backbone=`."""
    monkeypatch.setitem(sys.modules, "thin_nets", sys.modules[__name__])
    named = dataclasses.replace(tiny.MODEL.backbone, own="thin_nets:ThinResNet")
    by_path = fasterrcnn_jax.create(dataclasses.replace(tiny.MODEL, backbone=named), ("a",))
    by_class = fasterrcnn_jax.create(tiny.MODEL, ("a",), backbone=ThinResNet)
    plain = fasterrcnn_jax.create(tiny.MODEL, ("a",))
    shapes = [
        [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(model.box_head)]
        for model in (plain, by_path, by_class)
    ]
    assert "stage" in str(shapes[0]) and shapes[0] == shapes[1] == shapes[2]


def test_a_backbone_without_a_tail_gets_a_fully_connected_head(module):
    model = jax.eval_shape(lambda: fasterrcnn_jax.create(tiny.MODEL, ("a",), backbone=Vgg16))
    assert isinstance(model.box_head.tail, FcTail)
