"""Trains twenty steps on the folder of every labelling tool, and evaluates."""

import dataclasses

import exports
import numpy as np
import pytest
import tiny
from fasterrcnn_jax.scripts.train import train_stages
from PIL import Image

from fasterrcnn_jax.config import TrainConfig

RECORDS = tuple(
    exports.Labelled(f"image {index}", (96, 64), ((exports.CLASSES[index % 2], (8 + index, 10, 48 + index, 50)),))
    for index in range(10)
)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compilation(), tiny.restored_logging():
        yield


def paint(folder):
    """Gives every image other pixels: images with the same pixels would all be on one side of a division."""
    for path in sorted(folder.rglob("*.png")):
        seed = int(path.name.split()[1].split(".")[0])
        box = (8 + seed, 10, 48 + seed, 50)
        Image.fromarray(tiny.rectangle_image((64, 96), box, seed=seed)).save(path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", exports.WRITERS)
def test_a_folder_of_every_tool_is_recognised_trained_on_and_evaluated(layout, tmp_path, capsys):
    root = tmp_path / "my set"
    exports.WRITERS[layout](root, records=RECORDS)
    paint(root)
    whole = tiny.config(tmp_path)
    config = dataclasses.replace(
        whole,
        data=dataclasses.replace(whole.data, root=root, layout="auto", split="auto", class_names=()),
        train=TrainConfig(steps=20, batch_size=4, learning_rate=0.01, checkpoint_every=20),
    )
    outcome = train_stages(config)
    assert outcome is not None and np.isfinite(outcome.values["AP50"])
    printed = capsys.readouterr().out
    assert f"data       {root}" in printed and "classes    2" in printed
    assert (config.run / "best").is_dir() and outcome.lines[0].startswith("class ")
