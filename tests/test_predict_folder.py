"""The script `predict` on a folder of images, with an untrained detector."""

import csv
import errno
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tiny
from filelock import FileLock
from PIL import Image
from pycocotools.coco import COCO

from fasterrcnn_jax.atomic_write import whole_file
from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data.csv_table import read_csv
from fasterrcnn_jax.data.records import ImageDetections
from fasterrcnn_jax.data.voc import Places, read_voc
from fasterrcnn_jax.data.yolo import CONFIDENCE, read_yolo
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference.drawing import draw
from fasterrcnn_jax.inference.prediction import predict
from fasterrcnn_jax.inference.results import json_fields
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.scripts import predict as script


@pytest.fixture(scope="module")
def model(random_weights):
    return tiny.quick_model(random_weights)[0]


def lines(out):
    """Returns the objects in detections.jsonl."""
    return [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]


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
        paths = "--ckpt", tmp_path / "run", "--out", tmp_path / "out", "--images", images
        with tiny.restored_logging(), tiny.quick_compilation():
            script.main([str(argument) for argument in (*paths, *more)])
        return tmp_path / "out"

    return run


def test_a_class_name_with_a_line_break_is_one_line_of_the_list(call, model, monkeypatch):
    nothing = ImageDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    monkeypatch.setattr(script.ModelRunner, "detect", lambda runner, parts: [nothing] * len(parts))
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


def test_a_file_that_cannot_be_read_stops_nothing_and_is_named_counted_and_in_the_exit_status(call, tmp_path, capsys):
    (tmp_path / "images/a2.jpg").write_bytes(b"no image")
    (tmp_path / "images/c.png").write_bytes((tmp_path / "images/b 1.png").read_bytes()[:-200])
    with pytest.raises(SystemExit) as ended:
        call("--batch_size", 2)
    out, said = tmp_path / "out", capsys.readouterr().out
    assert ended.value.code == script.UNREADABLE_STATUS == 3
    assert "images     2\n" in said and "unreadable 2, listed in" in said
    assert "c.png: the image cannot be decoded" in said
    listed = (out / "unreadable.txt").read_text().splitlines()
    assert len(listed) == 2 and "a2.jpg: not an image" in listed[0] and "c.png" in listed[1]
    assert [line["image"] for line in lines(out)] == ["a.png", "b 1.png"]
    assert len([*(out / "images").iterdir()]) == 2
    # Repaired files are read by the same command, and the others are not read again.
    Image.new("RGB", (72, 48)).save(tmp_path / "images/a2.jpg")
    (tmp_path / "images/c.png").unlink()
    call("--batch_size", 2)
    assert "images     3, of which 2 were done before" in capsys.readouterr().out
    assert not (out / "unreadable.txt").exists()


def test_a_faulty_image_stops_the_script_where_that_is_asked_for(call, tmp_path, capsys):
    (tmp_path / "images/c.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stopped:
        call("--batch_size", 2, "--faults", "error")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "c.jpg" in said and "Traceback" not in said
    assert not (tmp_path / "out/detections.json").exists()


def test_an_image_above_max_pixels_is_refused_or_skipped(call, tmp_path, capsys):
    Image.new("RGB", (73, 48)).save(tmp_path / "images/c.webp")
    with pytest.raises(SystemExit) as stopped:
        call("--max_pixels", 72 * 48, "--faults", "error")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "c.webp: the image is refused because it is too large: 73 x 48" in said
    with pytest.raises(SystemExit) as ended:
        call("--max_pixels", 72 * 48)
    assert ended.value.code == 3 and len([*(tmp_path / "out/images").iterdir()]) == 2
    with pytest.raises(SystemExit):
        call("--max_pixels", 0)
    assert "--max_pixels must be positive, got 0" in capsys.readouterr().err


def test_windows_raise_the_limit_of_pixels_and_say_so(call, tmp_path, capsys, monkeypatch):
    """Pillow's own limit, which refuses this TIFF, is raised while the script runs."""
    monkeypatch.setattr(DataConfig, "max_pixels", 72 * 48)
    monkeypatch.setattr(script, "TILED_MAX_PIXELS", 80 * 60)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (80, 60)).save(tmp_path / "images/c.tif")
    with pytest.raises(SystemExit) as ended:
        call("--batch_size", 2)
    assert ended.value.code == 3 and "c.tif: the image is refused because it is too large" in capsys.readouterr().out
    out = call("--batch_size", 2, "--tile", 64)
    assert "windows    64 pixels, images of at most 4,800 pixels" in capsys.readouterr().out
    assert [line["image"] for line in lines(out)] == ["a.png", "b 1.png", "c.tif"]
    assert Image.MAX_IMAGE_PIXELS == 1000
    Image.new("RGB", (81, 60)).save(tmp_path / "images/d.png")
    with pytest.raises(SystemExit) as ended:
        call("--batch_size", 2, "--tile", 64)
    assert ended.value.code == 3 and "d.png" in capsys.readouterr().out


def test_a_batch_size_of_zero_is_refused(call, capsys):
    with pytest.raises(SystemExit):
        call("--batch_size", 0)
    assert "--batch_size must be positive, got 0" in capsys.readouterr().err


def test_every_format_is_read_back_with_the_same_boxes(call, tmp_path):
    """Through our own readers, through pycocotools, and through labelImg's way to read XML."""
    out = call("--batch_size", 2, "--score_threshold", 0.1, "--formats", "coco", "csv", "yolo", "voc")
    found = {line["image"]: line for line in lines(out)}
    data = tmp_path / "read"
    data.mkdir()
    for name in ("images", "labels", "annotations"):
        # Labels of an upright image: the stored pixels of a.png stand upside down.
        source = tmp_path / "images" if name == "images" else out / name
        (data / name).symlink_to(source)
    (data / "classes.txt").write_bytes((out / "classes.txt").read_bytes())
    (data / "detections.csv").write_bytes((out / "detections.csv").read_bytes())

    yolo = read_yolo(data, "all", tiny.CLASS_NAMES)
    voc = read_voc(data, "all", tiny.CLASS_NAMES, Places("images", "annotations", None))
    table = read_csv(data, "all", tiny.CLASS_NAMES)
    assert any(note.startswith(CONFIDENCE) for note in yolo.notes), yolo.notes
    total = 0
    for dataset, tolerance in ((yolo, 1e-4), (table, 1e-4), (voc, 0.501)):
        assert len(dataset.records) == 2
        for record in dataset.records:
            line = found[Path(record.path).name]
            kept = np.array(line["scores"]) >= 0.1
            assert record.image_hw == (line["height"], line["width"]) == (48, 72) and kept.any()
            np.testing.assert_allclose(record.boxes, np.array(line["boxes"])[kept], atol=tolerance)
            np.testing.assert_array_equal(record.labels, np.array(line["labels"])[kept])
            total += len(record.boxes)
    # The sixth number of YOLO's lines and the last column of the table are the scores.
    scores = [float(line.split()[5]) for line in (out / "labels/a.txt").read_text().splitlines()]
    expected = [score for score in found["a.png"]["scores"] if score >= 0.1]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    rows = list(csv.DictReader(io.StringIO((out / "detections.csv").read_text())))
    np.testing.assert_allclose([float(row["score"]) for row in rows if row["filename"] == "a.png"], expected)

    # labelImg takes these elements of each object, and int() of each corner.
    root = ElementTree.parse(out / "annotations/a.xml").getroot()
    assert root.findtext("filename") == "a.png" and root.findtext("path") == str(tmp_path / "images/a.png")
    for element in root.iter("object"):
        corners = [int(element.find("bndbox").find(tag).text) for tag in ("xmin", "ymin", "xmax", "ymax")]
        assert 1 <= corners[0] <= corners[2] <= 72 and 1 <= corners[1] <= corners[3] <= 48
        assert element.find("name").text in tiny.CLASS_NAMES and int(element.find("difficult").text) == 0

    # pycocotools takes the results of the images that it knows; all detections are there.
    truth = COCO()
    truth.dataset = {
        "images": [{"id": name, "width": 72, "height": 48} for name in found],
        "annotations": [],
        "categories": [{"id": label, "name": name} for label, name in enumerate(tiny.CLASS_NAMES, start=1)],
    }
    truth.createIndex()
    results = truth.loadRes(str(out / "detections.json"))
    assert len(results.anns) == sum(len(line["scores"]) for line in found.values()) > total // 3


def test_classes_crops_and_kinds_of_pictures(call, tmp_path):
    out = call("--batch_size", 2, "--score_threshold", 0, "--classes", "disc", "--crops", "--pictures", "jpeg")
    assert {name for line in lines(out) for name in line["class_names"]} == {"disc"}
    assert {item["category_id"] for item in json.loads((out / "detections.json").read_text())} == {2}
    assert sorted(path.name for path in (out / "images").iterdir()) == ["a.png.jpg", "b 1.png.jpg"]
    with Image.open(out / "images/a.png.jpg") as image:
        assert image.format == "JPEG" and image.size == (72, 48)
    assert [path.name for path in (out / "crops").iterdir()] == ["disc"]
    (first,) = (line for line in lines(out) if line["image"] == "b 1.png")
    assert len(list((out / "crops/disc").glob("b 1.png.*.jpg"))) == len(first["boxes"])
    out = call("--batch_size", 2, "--score_threshold", 0, "--classes", "disc", "--crops", "--pictures", "none")
    stored = np.asarray(Image.open(tmp_path / "images/b 1.png"))
    for number, (x1, y1, x2, y2) in enumerate(first["boxes"], start=1):
        cut = stored[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))]
        np.testing.assert_array_equal(np.asarray(Image.open(out / f"crops/disc/b 1.png.{number}.png")), cut)


def test_a_class_that_the_model_lacks_is_refused(call, capsys):
    with pytest.raises(SystemExit):
        call("--classes", "cat")
    assert "--classes: the model has no class 'cat'; its classes are ring, disc" in capsys.readouterr().err


def test_without_pictures_no_image_is_written(call):
    out = call("--batch_size", 2, "--pictures", "none", "--formats", "csv")
    names = {path.name for path in out.iterdir()}
    assert names == {".lock", "job.json", "classes.txt", "detections.jsonl", "detections.csv"}


def test_the_same_job_reads_only_what_is_new_or_changed(call, tmp_path, capsys):
    out = call("--batch_size", 2, "--pictures", "none")
    first = {line["image"]: line for line in lines(out)}
    Image.new("RGB", (72, 48)).save(tmp_path / "images/c.png")
    Image.new("RGB", (72, 48), "red").save(tmp_path / "images/b 1.png")
    with open(out / "detections.jsonl", "a") as file:  # a process was killed while it wrote
        file.write('{"image": "c.png", "file": "/')
    call("--batch_size", 2, "--pictures", "none", "--formats", "coco", "yolo")
    assert "images     3, of which 1 were done before" in capsys.readouterr().out
    second = {line["image"]: line for line in lines(out)}
    assert set(second) == {"a.png", "b 1.png", "c.png"} and len(lines(out)) == 3
    assert second["a.png"] == first["a.png"] and second["b 1.png"]["scores"] != first["b 1.png"]["scores"]
    # Labels of what was done before are written too.
    assert {path.name for path in (out / "labels").iterdir()} == {"a.txt", "b 1.txt", "c.txt"}


def test_other_settings_replace_the_results(call, capsys):
    call("--batch_size", 2)
    out = call("--batch_size", 2, "--classes", "ring")
    said = capsys.readouterr()
    assert "results of another model or of other settings are replaced" in said.err
    assert "were done before" not in said.out
    assert {name for line in lines(out) for name in line["class_names"]} == {"ring"}


ALL = "--score_threshold", 0, "--crops", "--formats", "coco", "csv", "yolo", "voc", "--pictures"


def files_below(out):
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def test_other_settings_remove_the_files_of_the_earlier_job(call, tmp_path):
    out = call("--batch_size", 2, *ALL, "jpeg")
    assert {"images/a.png.jpg", "labels/a.txt", "annotations/a.xml", "detections.csv"} <= files_below(out)
    (out / "labels/mine.txt").write_text("a file that the job did not write")
    call("--batch_size", 2, "--classes", "ring", "--pictures", "none", "--formats", "coco")
    kept = {".lock", "job.json", "classes.txt", "detections.jsonl", "detections.json", "labels/mine.txt"}
    assert files_below(out) == kept
    assert not (out / "crops").exists()


def test_files_of_an_image_that_changed_or_is_not_given_now_are_removed(call, tmp_path):
    out = call("--batch_size", 2, *ALL, "png")
    (tmp_path / "images/a.png").unlink()
    Image.new("RGB", (72, 48), "red").save(tmp_path / "images/b 1.png")
    call("--batch_size", 2, *ALL, "jpeg")
    ((first,)) = lines(out)
    assert not any(name.split("/")[-1].startswith("a.") for name in files_below(out))
    crops = [name for name in files_below(out) if name.startswith("crops/")]
    assert len(crops) == len(first["boxes"]) and all(name.endswith(".jpg") for name in crops)
    assert {name for name in files_below(out) if name.startswith("images/")} == {"images/b 1.png.jpg"}


def test_results_in_the_folder_of_images_are_not_read_as_images(call, tmp_path, capsys):
    for _ in range(2):
        out = call(tmp_path, "--recursive", "--batch_size", 2, "--score_threshold", 0, "--crops")
        assert [line["image"] for line in lines(out)] == ["a.png", "b 1.png"]
    assert "images     2, of which 2 were done before" in capsys.readouterr().out
    # A pattern looks into every folder. What an earlier command drew is no input of one that draws nothing.
    for more in (("--crops",), ("--pictures", "none")):
        call(tmp_path / "**/*.png", "--batch_size", 2, "--score_threshold", 0, *more)
        assert [line["image"] for line in lines(out)] == ["a.png", "b 1.png"]


def test_images_may_lie_in_out_where_nothing_is_drawn(call, tmp_path, capsys):
    paths = ["--images", tmp_path / "images", "--ckpt", tmp_path / "run", "--out", tmp_path, "--batch_size", 2]
    with tiny.restored_logging(), tiny.quick_compilation():
        with pytest.raises(SystemExit) as ended:
            script.main(list(map(str, paths)))
        assert ended.value.code == 2 and "--out writes images into this folder" in capsys.readouterr().err
        script.main(list(map(str, [*paths, "--pictures", "none"])))
    assert len(lines(tmp_path)) == 2


def test_no_two_images_share_a_label_file(call, tmp_path, capsys):
    for name in ("a.webp", "a.png.png", "c.png"):
        Image.new("RGB", (72, 48)).save(tmp_path / "images" / name)
    out = call("--batch_size", 2, "--pictures", "none", "--formats", "yolo", "voc")
    names = {"a.png", "a.webp", "a.png.png", "b 1", "c"}
    assert {path.name for path in (out / "labels").iterdir()} == {f"{name}.txt" for name in names}
    assert {path.name for path in (out / "annotations").iterdir()} == {f"{name}.xml" for name in names}
    assert "3 images share their name without the extension with others: a.png, a.png.png, a.webp" in " ".join(
        capsys.readouterr().err.split()
    )


def test_temporary_files_of_other_programs_stay(call, tmp_path):
    for name in ("labels", "other"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / ".a.txt.1.tmp").touch()
    out = call("--batch_size", 2, "--pictures", "none")
    assert not (out / "labels/.a.txt.1.tmp").exists() and (out / "other/.a.txt.1.tmp").exists()


def test_unreadable_files_are_reported_while_the_stream_is_read(model):
    """They do not wait for the next good image."""
    taken = []

    def images():
        for number in range(1000):
            taken.append(number)
            yield number

    def pixels(number):
        raise InputError(f"{number}: no image")

    runner = script.ModelRunner(model, batch_size=1)
    found = script.detect_stream(images(), pixels, runner, threads=2)
    assert next(found).item == 0 and len(taken) < 20
    assert [one.item for one in found] == list(range(1, 1000))


def test_an_image_that_changes_between_detection_and_drawing_is_unreadable(call, monkeypatch, capsys):
    read, calls = script.read_image, []

    def changing(path, **options):
        calls.append(path)
        pixels = read(path, **options)
        return pixels[:-1] if path.name == "a.png" and calls.count(path) == 2 else pixels

    monkeypatch.setattr(script, "read_image", changing)
    with pytest.raises(SystemExit) as ended:
        call("--batch_size", 2)
    assert ended.value.code == 3 and "a.png: the image was changed while it was read" in capsys.readouterr().out


def test_a_list_of_unreadable_files_that_cannot_be_written_is_one_sentence(tmp_path):
    unreadable = script._UnreadableFiles(tmp_path / "list")
    (tmp_path / "list").mkdir()  # as on a full disk, `open` raises OSError
    with pytest.raises(InputError, match="list cannot be written"):
        unreadable.add(InputError("a.png: no image"))


def test_a_fault_of_the_file_that_is_read_is_not_one_of_the_file_that_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="source"), whole_file(tmp_path / "target"):
        (tmp_path / "source").read_bytes()
    with pytest.raises(InputError, match="target cannot be written: No space"), whole_file(tmp_path / "target"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not any(tmp_path.iterdir())


def test_two_processes_do_not_write_into_one_folder(call, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"), pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == 2 and "another process writes into this folder" in capsys.readouterr().err


def test_a_list_on_standard_input(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "load_model", lambda path, backbone: model)
    Image.new("RGB", (72, 48)).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{tmp_path / 'gone.png'}\n{tmp_path / 'a.png'}\n"))
    with tiny.restored_logging(), tiny.quick_compilation(), pytest.raises(SystemExit) as ended:
        script.main(["-", "--ckpt", "weights", "--out", str(tmp_path / "out"), "--batch_size", "2"])
    assert ended.value.code == 3 and "gone.png: no such image file" in capsys.readouterr().out
    assert [line["image"] for line in lines(tmp_path / "out")] == ["a.png"]


@pytest.fixture
def video(tmp_path):
    """Writes five grey frames of 72 x 48 pixels, ten in a second."""
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 72, 48, "yuv420p"
        for index in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((48, 72, 3), 20 + 40 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_frames_of_a_video_have_their_index_and_time_and_continue(call, video, tmp_path, capsys):
    out = call(video, "--batch_size", 2)
    frames = [line for line in lines(out) if "frame" in line]
    assert [(line["image"], line["frame"]) for line in frames] == [(f"clip.mp4/{k:06d}", k) for k in range(5)]
    np.testing.assert_allclose([line["time"] for line in frames], np.arange(5) / 10)
    for index in (0, 4):
        grey = np.asarray(Image.open(out / f"images/clip.mp4/{index:06d}.png"))[47, 0]
        np.testing.assert_allclose(grey, 20 + 40 * index, atol=4)
    journal = out / "detections.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-2]))
    capsys.readouterr()
    call(video, "--batch_size", 2)
    assert "images     7, of which 5 were done before" in capsys.readouterr().out
    assert sorted(line["image"] for line in lines(out) if "frame" in line) == [line["image"] for line in frames]


def test_a_video_is_turned_as_it_says_and_a_damaged_one_is_unreadable(video, tmp_path):
    from fasterrcnn_jax.data.video import read_frames

    content = bytearray(video.read_bytes())
    matrix = content.index(b"tkhd") + 44  # ISO 14496-12, 8.3.2
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(content)
    assert [frame.pixels.shape for frame in read_frames(turned)] == [(72, 48, 3)] * 5
    with pytest.raises(InputError, match="its frames are too large: 72 x 48"):
        next(read_frames(video, max_pixels=72 * 48 - 1))
    # The extension decides the container: a playlist, which could open other files, is no video.
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"ffconcat version 1.0\nfile {video.name}\n")
    with pytest.raises(InputError, match="list.mp4: the video cannot be decoded"):
        next(read_frames(playlist))


def test_a_frame_that_is_larger_than_the_first_ones_is_refused_too(tmp_path):
    av = pytest.importorskip("av")
    from fasterrcnn_jax.data.video import read_frames

    path = tmp_path / "grows.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 72, 48, "yuvj420p"
        for index, size in enumerate(((72, 48), (144, 96))):
            content = io.BytesIO()
            Image.new("RGB", size).save(content, "JPEG")
            packet = av.Packet(content.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, Fraction(1, 10)
            container.mux(packet)
    assert [frame.pixels.shape for frame in read_frames(path)] == [(48, 72, 3), (96, 144, 3)]
    frames = read_frames(path, max_pixels=72 * 48)
    assert next(frames).pixels.shape == (48, 72, 3)
    with pytest.raises(InputError, match="its frames are too large: 144 x 96"):
        next(frames)


# The network of `tiny.quick_model` has no weights file.
COMMAND = """
import tiny
from fasterrcnn_jax.scripts import cli, predict
cli.load_model = lambda path, backbone: tiny.quick_model()[0]
cli.run_as_program(predict.main)
"""


def test_a_killed_job_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    """kill -9 in the middle; the second process ends with the results, to the bit, of an undisturbed one."""
    rng = np.random.default_rng(3)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        pixels = rng.integers(0, 255, (320, 480, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number:02d}.png", compress_level=0)
    monkeypatch.setattr(cli, "load_model", lambda path, backbone: tiny.quick_model()[0])

    def arguments(out):
        return [str(images), "--ckpt", "weights", "--out", str(tmp_path / out), "--formats", "coco", "yolo"]

    def in_this_process(out):
        with tiny.restored_logging(), tiny.quick_compilation():
            script.main(arguments(out))
        return tmp_path / out

    whole = in_this_process("whole")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parent))),
        "JAX_COMPILATION_CACHE_DIR": os.environ["FASTERRCNN_TEST_CACHE"],
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *arguments("killed")], env=environment)
    journal = tmp_path / "killed/detections.jsonl"
    try:
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = journal.read_bytes().count(b"\n")
    (tmp_path / "killed/labels/.39.txt.1.tmp").write_text("0 0.5")  # as if it had been writing this file
    assert 3 <= done < 40 and not (tmp_path / "killed/detections.json").exists()
    capsys.readouterr()
    killed = in_this_process("killed")
    assert f"images     40, of which {done} were done before" in capsys.readouterr().out
    assert (killed / "detections.jsonl").read_bytes() == (whole / "detections.jsonl").read_bytes()
    assert (killed / "detections.json").read_bytes() == (whole / "detections.json").read_bytes()
    for folder in ("images", "labels"):
        names = sorted(path.name for path in (whole / folder).iterdir())
        assert len(names) == 40 and names == sorted(path.name for path in (killed / folder).iterdir())
        for name in names:
            assert (killed / folder / name).read_bytes() == (whole / folder / name).read_bytes()


def test_the_fields_for_json_have_the_size_in_pixels_and_the_class_of_each_label():
    boxes = np.float32([[1.25, 2, 30.5, 40], [0, 0, 7, 8]])
    found = ImageDetections(boxes, np.float32([0.75, 0.1]), np.int32([2, 1]))
    assert json_fields((48, 64), found, ("cat", "dog")) == {
        "width": 64,
        "height": 48,
        "boxes": [[1.25, 2.0, 30.5, 40.0], [0.0, 0.0, 7.0, 8.0]],
        "scores": [0.75, 0.1],
        "labels": [2, 1],
        "class_names": ["dog", "cat"],
    }
