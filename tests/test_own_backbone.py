"""A user's own backbone: the class of docs/backbone.md, trained, stored and loaded by the real scripts."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import fasterrcnn_jax
from fasterrcnn_jax.config import BackboneConfig
from fasterrcnn_jax.config.text import to_json
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import backbone_class
from fasterrcnn_jax.scripts import train

TEXT = (Path(__file__).parents[1] / "docs" / "backbone.md").read_text()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The example of the documentation as a module that can be imported."""
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "my_nets.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_nets:Tiny"
    sys.modules.pop("my_nets", None)


def test_a_run_with_the_backbone_of_the_documentation(tmp_path, module):
    tiny.write_voc(tmp_path / "voc", train=4, test=2)
    config = tiny.config(tmp_path, steps=2, batch_size=4)
    model = dataclasses.replace(
        config.model,
        backbone=dataclasses.replace(config.model.backbone, own=module),
        box_head=dataclasses.replace(config.model.box_head, channels=16, dropout=0.0),
    )
    config = dataclasses.replace(config, model=model)
    path = tmp_path / "own.py"
    path.write_text(
        f"from fasterrcnn_jax.config.text import from_json\nconfig = from_json({to_json(config)!r}, 'test')\n"
    )
    with tiny.restored_logging(), tiny.quick_compilation():
        train.main(["--config", str(path)])
    model = fasterrcnn_jax.load(config.run)
    assert (type(model.backbone).__name__, model.config) == ("Tiny", config.model)
    kernel = model.backbone.stages[0].kernel[...]
    assert kernel.shape == (3, 3, 3, 32)
    # The first of its stages was fixed, the second has moved.
    started = fasterrcnn_jax.create(model.config, model.class_names, seed=config.train.seed).backbone
    np.testing.assert_array_equal(kernel, started.stages[0].kernel[...])
    assert np.any(np.asarray(model.backbone.stages[1].kernel[...] != started.stages[1].kernel[...]))

    # Gone from where the checkpoint says it is, but given by hand.
    example = type(model.backbone)
    sys.modules.pop("my_nets")
    (tmp_path / "my_nets.py").unlink()
    with pytest.raises(InputError, match="model.backbone.own = my_nets:Tiny: No module named 'my_nets'"):
        fasterrcnn_jax.load(config.run)
    again = fasterrcnn_jax.load(config.run, backbone=example)
    np.testing.assert_array_equal(again.backbone.stages[0].kernel[...], kernel)


def test_a_class_that_is_not_there_is_named(module):
    with pytest.raises(InputError, match="my_nets:Large: module 'my_nets' has no attribute 'Large'"):
        backbone_class(BackboneConfig(own="my_nets:Large"))


def test_what_is_no_import_path_is_refused():
    with pytest.raises(ValueError, match="own must be MODULE:CLASS, got 'my_nets.Tiny'"):
        BackboneConfig(own="my_nets.Tiny")


def test_the_class_alone_is_enough_and_its_stride_is_checked(module):
    """Without an import path in the configuration; a map of another stride would misplace every box."""
    example = backbone_class(BackboneConfig(own=module))
    images, pair = jax.ShapeDtypeStruct((1, 64, 96, 3), np.float32), jax.ShapeDtypeStruct((1, 2), np.float32)
    model = jax.eval_shape(lambda: fasterrcnn_jax.create(tiny.MODEL, ("a",), backbone=example))
    assert jax.eval_shape(fasterrcnn_jax.detect, model, images, pair, pair).boxes.shape == (1, 6, 4)
    config = dataclasses.replace(tiny.MODEL, backbone=dataclasses.replace(tiny.MODEL.backbone, stride=8))
    model = jax.eval_shape(lambda: fasterrcnn_jax.create(config, ("a",), backbone=example))
    with pytest.raises(ValueError, match="a map of 4 x 6 cells .* 64 x 96 has not the configured stride 8"):
        jax.eval_shape(fasterrcnn_jax.detect, model, images, pair, pair)
