"""The scripts in examples/ run."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import tiny
from PIL import Image

import fasterrcnn_jax

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_detection_in_a_pipeline(small_run, tmp_path, capsys):
    pixels = tiny.rectangle_image((48, 72), (20, 10, 50, 40))
    Image.fromarray(pixels).save(tmp_path / "image.png")
    script = example("predict_in_a_pipeline")
    with tiny.quick_compilation():
        script.main(small_run, tmp_path / "image.png")
        lines = capsys.readouterr().out.splitlines()
        expected = fasterrcnn_jax.predict(fasterrcnn_jax.load(small_run), np.stack([pixels, pixels[:, ::-1]]))
    *boxes, total, last = lines
    for line in boxes:
        assert re.fullmatch(r"(ring|disc) [01]\.\d\d \[.*\]", line)
    assert total == f"{sum(len(found.scores) for found in expected)} detections in the image and its mirror image"
    row, column = map(int, re.fullmatch(r"the scores depend most on .* row (\d+), column (\d+)", last).groups())
    assert row < 48 and column < 72
