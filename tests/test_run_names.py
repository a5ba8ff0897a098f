"""The run folder that a training takes when its path names the data: runs/{data}."""

import dataclasses
from pathlib import Path

import pytest
import tiny

from fasterrcnn_jax.config.text import with_fields
from fasterrcnn_jax.training import run_folder
from fasterrcnn_jax.training.preparation import prepare


@pytest.fixture
def folder_of(tmp_path):
    """Returns a function: other values of fields -> the run folder of a training, which then has a first checkpoint."""
    tiny.write_voc(tmp_path / "voc", train=3, test=2)
    config = dataclasses.replace(tiny.config(tmp_path), run=tmp_path / "runs" / "{data}")

    def prepared(**fields):
        found = prepare(with_fields(config, fields)).config
        run_folder.write_config(found, found.run)
        run_folder.checkpoint_folder(found.run, 2).mkdir(parents=True, exist_ok=True)
        return str(found.run.relative_to(tmp_path))

    return prepared


def test_the_same_data_and_settings_continue_a_run_and_others_take_the_next_name(folder_of):
    assert folder_of() == folder_of() == "runs/voc"
    assert folder_of(learning_rate=0.5) == "runs/voc-2"
    assert folder_of(learning_rate=0.25) == "runs/voc-3"
    assert folder_of(learning_rate=0.5) == "runs/voc-2"
    assert folder_of() == "runs/voc"


def test_other_weights_to_start_from_are_another_run(folder_of):
    assert folder_of() == "runs/voc"
    assert folder_of(init=Path("weights.pth")) == folder_of(init=Path("weights.pth")) == "runs/voc-2"


def test_more_steps_make_the_same_run_longer(folder_of):
    assert folder_of(steps=6) == folder_of(steps=9) == "runs/voc"
    assert folder_of(steps=6) == "runs/voc-2"
