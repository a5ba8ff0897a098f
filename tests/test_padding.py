"""The effect of other images and of padding on detections of a trained model; `pytest -m slow -s` prints shares."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import fasterrcnn_jax
from fasterrcnn_jax.data.images import read_image
from fasterrcnn_jax.data.transforms import network_size, to_canvas

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
IMAGES = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns (model, held-out images) of a short run of the shipped configuration."""
    folder = tmp_path_factory.mktemp("shapes")
    fields = f"--run {folder}/run --data.root {folder}/data --data.shapes.num_train 200 " + (
        "--data.shapes.num_test 20 --train.steps 300 --train.checkpoint_every 300"
    )
    command = [sys.executable, ROOT / "train.py", "--config", ROOT / "configs/shapes.py", *fields.split()]
    subprocess.run(command, check=True, cwd=folder, env=os.environ | {"XLA_FLAGS": ""})
    paths = sorted((folder / "data/JPEGImages").glob("test*"))[:IMAGES]
    assert len(paths) == IMAGES
    return fasterrcnn_jax.load(folder / "run"), [read_image(path) for path in paths]


def detections(model, image, padding):
    """Detects `image` on a canvas that is `padding` pixels (rounded up to a multiple of 16) larger."""
    height, width = network_size(image.shape[:2], model.config.image)
    canvas = tuple(-(-(side + padding) // 16) * 16 for side in (height, width))
    pixels, image_hw, scale = to_canvas(image, canvas, model.config.image)
    return jax.device_get(jax.jit(fasterrcnn_jax.detect)(model, pixels[None], image_hw[None], scale[None]))


def test_share_of_equal_detections_under_32_and_224_pixels_of_padding(run):
    model, images = run
    equal = total = 0
    for image in images[:6]:
        little, much = (detections(model, image, padding) for padding in (32, 224))
        count = max(int(little.valid.sum()), int(much.valid.sum()))
        close = (
            (little.labels == much.labels)
            & (np.abs(little.boxes - much.boxes).max(axis=-1) < 0.05)
            & (np.abs(little.scores - much.scores) < 1e-3)
        )
        equal += int((close & little.valid & much.valid).sum())
        total += count
    print(f"\n{equal} of {total} detections equal under 32 and 224 pixels of padding")
    assert total >= 30
    assert equal / total >= 0.99


def test_a_trained_model_finds_the_same_bits_alone_and_in_a_batch(run):
    model, images = run
    together = fasterrcnn_jax.predict(model, images, batch_size=4)
    assert sum(len(found.scores) for found in together) >= 30
    for image, found in zip(images[:6], together, strict=False):
        alone = fasterrcnn_jax.predict(model, image, batch_size=4)
        for one, other in zip(alone[:3], found[:3], strict=True):
            np.testing.assert_array_equal(one, other)
