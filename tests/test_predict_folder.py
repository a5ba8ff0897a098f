"""The script `predict` on a folder of images, with an untrained detector."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from fasterrcnn_jax.data.records import ImageDetections
from fasterrcnn_jax.inference.drawing import draw
from fasterrcnn_jax.inference.prediction import predict
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.scripts import predict as script


@pytest.fixture(scope="module")
def model(random_weights):
    rng = np.random.default_rng(0)
    return random_weights(lambda: Detector(tiny.MODEL, tiny.CLASS_NAMES, rng=rng))


@pytest.fixture
def call(model, tmp_path, monkeypatch):
    """Returns a function that runs the script on tmp_path/images with further arguments."""
    monkeypatch.setattr(cli, "load_model", lambda path, backbone: model if path.name == "run" else None)
    images = tmp_path / "images"
    images.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down, so the canvas stays the same and is compiled once
    pixels = np.random.default_rng(1).integers(0, 255, (48, 72, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / "b 1.png")
    Image.fromarray(pixels).save(images / "a.png", exif=exif)

    def run(*more):
        paths = "--ckpt", tmp_path / "run", "--images", images, "--out", tmp_path / "out"
        with tiny.restored_logging(), tiny.quick_compilation():
            script.main([str(argument) for argument in (*paths, *more)])
        return tmp_path / "out"

    return run


def test_a_class_name_with_a_line_break_is_one_line_of_the_list(call, model, monkeypatch):
    nothing = ImageDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    monkeypatch.setattr(script, "detect_dataset", lambda model, dataset, **_: [nothing] * len(dataset.records))
    monkeypatch.setattr(model, "class_names", ("ring\nerror: all is well\ud800", "disc"))
    assert (call() / "classes.txt").read_text() == "ring\\nerror: all is well\\ud800\ndisc\n"


def test_every_image_gets_its_detections_and_its_image(call, model, tmp_path, capsys):
    """Detections equal those of `predict` on the image rotated by EXIF; boxes with a high enough score are drawn."""
    out = call("--batch_size", 2, "--score_threshold", 0)
    content = json.loads((out / "detections.json").read_text())
    assert (out / "classes.txt").read_text().splitlines() == list(tiny.CLASS_NAMES)
    assert sorted(path.name for path in (out / "images").iterdir()) == ["a.png.png", "b 1.png.png"]
    stored = np.asarray(Image.open(tmp_path / "images/b 1.png"))
    for name, shown in (("a.png", stored[::-1, ::-1]), ("b 1.png", stored)):
        shown = np.ascontiguousarray(shown)
        with tiny.quick_compilation():
            expected = predict(model, shown, batch_size=2)
        found = [item for item in content if item["image_id"] == name]
        boxes = np.array([item["bbox"] for item in found])
        boxes[:, 2:] += boxes[:, :2]
        assert len(found) > 0
        np.testing.assert_allclose(boxes, expected.boxes, atol=1e-4)
        np.testing.assert_allclose([item["score"] for item in found], expected.scores, atol=1e-6)
        assert [item["category_id"] for item in found] == expected.labels.tolist()
        image = np.asarray(Image.open(out / f"images/{name}.png"))
        assert (image != shown).any()
        np.testing.assert_array_equal(image, draw(shown, expected, score_threshold=0.0))
    assert "images     2" in capsys.readouterr().out


def test_a_high_threshold_draws_nothing_and_keeps_the_detections(call, tmp_path):
    out = call("--batch_size", 2, "--score_threshold", 1.1)
    stored = np.asarray(Image.open(tmp_path / "images/b 1.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(out / "images/b 1.png.png")), stored)
    assert json.loads((out / "detections.json").read_text())


def test_a_faulty_image_stops_the_script_or_is_skipped(call, tmp_path, capsys):
    (tmp_path / "images/c.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stopped:
        call("--batch_size", 2)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "c.jpg" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
    out = call("--batch_size", 2, "--faults", "skip")
    assert len([*(out / "images").iterdir()]) == 2


def test_an_image_above_max_pixels_is_refused_or_skipped(call, tmp_path, capsys):
    Image.new("RGB", (73, 48)).save(tmp_path / "images/c.webp")
    with pytest.raises(SystemExit) as stopped:
        call("--max_pixels", 72 * 48)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "c.webp: the image is refused because it is too large: 73 x 48" in said
    out = call("--max_pixels", 72 * 48, "--faults", "skip")
    assert len([*(out / "images").iterdir()]) == 2
    with pytest.raises(SystemExit):
        call("--max_pixels", 0)
    assert "--max_pixels must be positive, got 0" in capsys.readouterr().err


def test_a_batch_size_of_zero_is_refused(call, capsys):
    with pytest.raises(SystemExit):
        call("--batch_size", 0)
    assert "--batch_size must be positive, got 0" in capsys.readouterr().err
