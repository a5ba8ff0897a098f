"""The scripts in examples/ run, with fewer steps than by themselves, and do what they say."""

import importlib.util
import re
from pathlib import Path

import jax
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
    *boxes, total = lines
    for line in boxes:
        assert re.fullmatch(r"(ring|disc) [01]\.\d\d \[.*\]", line)
    assert total == f"{sum(len(found.scores) for found in expected)} detections in the image and its mirror image"


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'example("{path.stem}")' in text or (Path(__file__).parent / f"test_{path.stem}.py").exists(), path.name


def run(script, capsys, *arguments, **options):
    """Returns the lines that an example prints, with JAX's own settings, as a user has them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        script.main(*arguments, **options)
    return capsys.readouterr().out.splitlines()


def test_operations_in_your_own_model(capsys):
    first, last, overlap = run(example("operations_in_your_model"), capsys, steps=60)
    assert loss(last) < 0.5 * loss(first)
    # Of the best anchor the IoU with a rectangle is about 0.7; of a random one it is about 0.05.
    assert float(overlap.split()[-1]) > 0.3


def test_saliency_is_drawn_over_the_image(small_run, tmp_path, capsys):
    pixels = tiny.rectangle_image((48, 72), (20, 10, 50, 40))
    Image.fromarray(pixels).save(tmp_path / "image.png")
    lines = run(example("saliency"), capsys, small_run, tmp_path / "image.png", tmp_path / "saliency.png")
    assert re.fullmatch(r"(ring|disc) [01]\.\d\d \[.*\]", lines[0])
    row, column = map(int, re.search(r"in row (\d+), column (\d+)$", lines[1]).groups())
    drawn = np.asarray(Image.open(tmp_path / "saliency.png")).astype(int)
    assert drawn.shape == pixels.shape
    # Fully red where the gradient is largest, and nearly grey in most places.
    assert drawn[row, column].tolist() == [255, 40, 0]
    assert np.median(np.ptp(drawn, axis=2)) < 60


def test_an_own_training_loop_learns(capsys):
    first, last, right = run(example("own_training_loop"), capsys, steps=12)
    names = ["rpn_objectness", "rpn_box", "box_class", "box_delta"]
    totals = [sum(float(re.search(rf"{name} ([\d.]+)", line)[1]) for name in names) for line in (first, last)]
    assert totals[1] < totals[0]
    assert re.fullmatch(r"best detection of 4 new images: [0-4] with the right class", right)


def test_own_data_from_arrays_becomes_batches(capsys):
    script = example("own_data_from_arrays")
    image = np.full((60, 120, 3), 9, np.uint8)
    nothing = np.zeros((0, 4))
    batch = script.to_batch(
        [image, image[:, :60]], [np.float32([[10, 20, 70, 50]]), nothing], [[2], []], script.CONFIG.image, first=7
    )
    # 60 x 120 pixels become 48 x 96: the long side is limited to 96.
    assert batch.image_hw.tolist() == [[48, 96], [64, 64]] and batch.image_index.tolist() == [7, 8]
    np.testing.assert_allclose(batch.ground_truth.boxes[0, 0], [8, 16, 56, 40], rtol=1e-6)
    assert batch.ground_truth.labels.tolist() == [[2, 0, 0], [0, 0, 0]]
    assert batch.ground_truth.valid.tolist() == [[True, False, False], [False] * 3]
    first, last, found = run(script, capsys, steps=8)
    assert loss(last) < loss(first)
    assert re.fullmatch(r"\d+ detections in a new image", found)


def loss(line):
    return float(re.search(r"loss ([\d.]+)", line)[1])
