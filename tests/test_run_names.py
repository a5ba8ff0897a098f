"""The run folder that a training takes when its path names the data: runs/{data}."""

import dataclasses
import json
from pathlib import Path

import exports
import numpy as np
import pytest
import tiny
from PIL import Image

from fasterrcnn_jax.config.text import load_config, with_fields
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.training import run_folder
from fasterrcnn_jax.training.preparation import prepare, write_division


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


def write_labelimg(root, names):
    for number, name in enumerate(names):
        record = exports.Labelled(name, (96, 64), (("disc", (10, 10, 40 + number, 40)),))
        exports.write_xml(root, [record])
        pixels = np.random.default_rng([number, len(name)]).integers(0, 255, (8, 12, 3)).astype(np.uint8)
        Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), np.uint8))).save(root / f"{name}.png")


@pytest.fixture
def started(tmp_path):
    """Returns a function: data folder, other values of fields -> the prepared run, which then has started."""
    config = dataclasses.replace(load_config(cli.RANDOM), run=tmp_path / "runs" / "{data}")

    def start(root, **fields):
        prepared = prepare(with_fields(config, {"root": str(root), **fields}))
        write_division(prepared)
        run_folder.write_config(prepared.config, prepared.config.run)
        return prepared

    return start


def test_another_data_folder_of_the_same_name_takes_the_next_name_and_leaves_the_first_run_alone(tmp_path, started):
    write_labelimg(tmp_path / "a/photos", [f"a{i}" for i in range(6)])
    write_labelimg(tmp_path / "b/photos", [f"b{i}" for i in range(6)])
    first = started(tmp_path / "a/photos", split=[1.0])
    assert started(tmp_path / "b/photos").config.run.name == "photos-2"
    assert not run_folder.division_path(first.config.run).exists()


def test_a_run_that_continues_keeps_its_fitted_values_and_its_division(tmp_path, started):
    write_labelimg(tmp_path / "set", [f"x{i}" for i in range(8)])
    first = started(tmp_path / "set")
    # One box is corrected, which would move the anchors.
    path = tmp_path / "set/x1.xml"
    path.write_text(path.read_text().replace("<xmax>41", "<xmax>81"))
    again = started(tmp_path / "set", accept_changed=True)
    assert again.config.run == first.config.run and again.config.model == first.config.model
    assert again.config.train == first.config.train and again.division == first.division


def test_images_that_are_added_are_another_run_or_are_refused_by_a_named_one(tmp_path, started):
    write_labelimg(tmp_path / "set", [f"x{i}" for i in range(8)])
    run = started(tmp_path / "set").config.run
    write_labelimg(tmp_path / "set", [f"y{i}" for i in range(3)])
    assert started(tmp_path / "set").config.run.name == "set-2"
    with pytest.raises(InputError, match="has changed since it was divided: 3 images are new and 0 are gone"):
        started(tmp_path / "set", run=str(run))
    kept = started(tmp_path / "set", run=str(run), accept_changed=True)
    assert sum(map(len, kept.division.values())) == 8


def test_a_division_that_a_killed_start_left_is_made_again(tmp_path, started):
    write_labelimg(tmp_path / "set", [f"x{i}" for i in range(8)])
    first = started(tmp_path / "set", split=[0.75])
    run_folder.config_path(first.config.run).unlink()
    again = started(tmp_path / "set", split=[0.5])
    assert again.config.run == first.config.run and len(again.division["train"]) == 4
    assert json.loads(run_folder.division_path(again.config.run).read_text())["train"] == list(again.division["train"])


def test_links_are_followed_where_asked(tmp_path, started):
    write_labelimg(tmp_path / "elsewhere", ["x0", "x1"])
    (tmp_path / "set").mkdir()
    for path in (tmp_path / "elsewhere").iterdir():
        (tmp_path / "set" / path.name).symlink_to(path)
    with pytest.raises(InputError, match="data.follow_links = True allows it"):
        started(tmp_path / "set")
    assert started(tmp_path / "set", follow_links=True).config.data.follow_links
