"""A run folder that an earlier version wrote is loaded, continued, and continued to the same numbers."""

import json
import shutil

import numpy as np
import pytest
import tiny

import fasterrcnn_jax
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.scripts import train
from fasterrcnn_jax.training import checkpoint


@pytest.fixture
def run(small_run, tmp_path):
    """A copy that a test may change, with its data set beside it."""
    tiny.write_voc(tmp_path / "voc", train=6, test=2)
    (tmp_path / "config.py").write_text(
        "from fasterrcnn_jax.config.text import from_json\n"
        f"config = from_json({(small_run / 'config.json').read_text()!r}, 'test')\n"
    )
    return shutil.copytree(small_run, tmp_path / "run")


def losses_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "gradient_norm" in line}


def test_a_run_of_version_0_1_0_continues_to_the_numbers_that_it_had(run, monkeypatch, capsys):
    recorded = losses_of(run)
    monkeypatch.chdir(run.parent)
    with tiny.restored_logging(), tiny.quick_compilation():
        train.main(["--config", "config.py"])
    assert "continuing run from step 2" in capsys.readouterr().out
    continued = losses_of(run)
    assert sorted(continued) == [1, 2, 3, 4]
    for step in (3, 4):
        for name in ("rpn_objectness", "rpn_box", "box_class", "box_delta", "gradient_norm", "parameter_norm"):
            np.testing.assert_allclose(continued[step][name], recorded[step][name], rtol=1e-3, err_msg=name)
    # The checkpoint that it wrote now states its version.
    assert fasterrcnn_jax.load(run).class_names == tiny.CLASS_NAMES
    assert meta_of(run / "checkpoints" / "4")["version"] == str(checkpoint.VERSION)


def test_a_run_of_version_0_1_0_detects(run):
    assert "version" not in meta_of(run / "checkpoints" / "2")
    model = fasterrcnn_jax.load(run)
    found = fasterrcnn_jax.predict(model, np.zeros((48, 72, 3), np.uint8))
    assert found.boxes.shape == (len(found.scores), 4)


def test_a_checkpoint_of_a_newer_format_is_refused_with_both_versions(run, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 0)
    with pytest.raises(InputError, match="has format version 1; this release reads versions up to 0"):
        fasterrcnn_jax.load(run)


def meta_of(folder):
    return checkpoint._read(folder, ())["meta"]
