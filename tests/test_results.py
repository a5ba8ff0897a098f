"""Tests result files, the printed table, and the metrics for a log."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from pycocotools.coco import COCO

from fasterrcnn_jax.data.records import Dataset, ImageDetections, ImageRecord, box_areas
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.detections import object_counts
from fasterrcnn_jax.evaluation.files import write_coco_json, write_voc_files
from fasterrcnn_jax.evaluation.report import (
    evaluate_detections,
    format_table,
    metrics_dict,
)
from fasterrcnn_jax.inference import scoring
from fasterrcnn_jax.models.detector import create_detector

IDS = ("000005", "139", "2008_000008", "0")


CATEGORY_IDS = (3, 7, 90)  # with gaps, as COCO's


def dataset(ids=IDS, class_names=("cat", "traffic light", "ox")):
    """Returns a data set whose images each have a cat and a difficult traffic light, but no ox."""
    boxes = np.array([[10, 10, 60, 60], [100, 100, 150, 150]], np.float32)
    arrays = boxes, np.array([1, 2], np.int32), np.array([False, True]), np.zeros(2, bool), box_areas(boxes)
    records = tuple(ImageRecord(i, Path(f"{i}.jpg"), (300, 400), *arrays) for i in ids)
    return Dataset("hand made", class_names, records, (), CATEGORY_IDS)


def test_the_table_says_how_much_recall_a_detector_can_have(monkeypatch):
    """Ten cats in each image, of which a detector of tiny.MODEL returns 6."""
    ten = dataset()
    boxes = np.float32([[9 * k, 9, 9 * k + 8, 20] for k in range(10)])
    arrays = boxes, np.ones(10, np.int32), np.zeros(10, bool), np.zeros(10, bool), box_areas(boxes)
    crowded = ten._replace(records=tuple(ImageRecord(r.id, r.path, r.image_hw, *arrays) for r in ten.records))
    none = [ImageDetections(boxes[:0], np.zeros(0, np.float32), np.zeros(0, np.int32))] * len(IDS)
    monkeypatch.setattr(scoring, "detect_dataset", lambda *_, **__: none)
    model = create_detector(tiny.MODEL, ten.class_names, seed=0)
    lines = scoring.score(model, crowded, batch_size=1).table.splitlines()
    assert lines[0] == (
        "note: 4 of 4 images have more than 6 objects, up to 10, but a detector returns no more boxes than "
        "model.postprocess.max_detections = 6 and model.test_proposals.post_nms_top_n = 8; its recall is at most 0.600"
    )
    assert lines[-1] == "AP50 0.00"
    assert not scoring.score(model, ten, batch_size=1).table.startswith("note")


def random_detections(images=len(IDS), count=6):
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 200, (images, count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 100, (images, count, 2))], axis=2)
    scores, labels = rng.random((images, count)), rng.integers(1, 4, (images, count))
    return [
        ImageDetections(b.astype(np.float32), s.astype(np.float32), k.astype(np.int32))
        for b, s, k in zip(boxes, scores, labels)
    ]


def perfect_detections(data):
    scores = np.array([0.9, 0.8], np.float32)
    return [ImageDetections(record.boxes, scores, record.labels) for record in data.records]


NOTHING = ImageDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


def test_json_loads_as_coco_results_with_the_same_boxes(tmp_path):
    data, detections = dataset(), random_detections()
    write_coco_json(tmp_path / "new" / "results.json", detections, data)
    entries = json.loads((tmp_path / "new" / "results.json").read_text())
    numbers = {"000005": 1, 139: 2, "2008_000008": 3, 0: 4}
    assert {entry["image_id"] for entry in entries} == set(numbers)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in numbers.values()],
        "categories": [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, data.class_names)],
        "annotations": [],
    }
    coco.createIndex()
    loaded = coco.loadRes([entry | {"image_id": numbers[entry["image_id"]]} for entry in entries])
    for number, entry in enumerate(detections, start=1):
        rows = loaded.loadAnns(loaded.getAnnIds(imgIds=[number]))
        x, y, width, height = np.array([row["bbox"] for row in rows]).T
        np.testing.assert_allclose(np.stack([x, y, x + width, y + height], 1), entry.boxes, atol=1e-9)
        np.testing.assert_array_equal([row["score"] for row in rows], entry.scores)
        np.testing.assert_array_equal([row["category_id"] for row in rows], np.array(CATEGORY_IDS)[entry.labels - 1])


def test_crowds_are_not_among_the_objects_of_the_table():
    data = dataset()
    crowds = tuple(record._replace(crowd=np.array([True, False])) for record in data.records[:1])
    np.testing.assert_array_equal(object_counts(data._replace(records=crowds + data.records[1:])), [3, 0, 0])


def test_json_of_no_detections_is_an_empty_list(tmp_path):
    write_coco_json(tmp_path / "r.json", [NOTHING] * 4, dataset())
    assert json.loads((tmp_path / "r.json").read_text()) == []


@pytest.mark.parametrize(
    "record_id, image_id",
    (("0", 0), ("139", 139), ("000005", "000005"), ("2008_000008", "2008_000008"), ("٣", "٣"), ("-1", "-1")),
)
def test_json_image_id_is_a_number_only_if_nothing_is_lost(tmp_path, record_id, image_id):
    data = dataset(ids=(record_id,))
    write_coco_json(tmp_path / "r.json", perfect_detections(data), data)
    assert {entry["image_id"] for entry in json.loads((tmp_path / "r.json").read_text())} == {image_id}


def test_voc_lines_give_back_the_boxes_within_half_a_decimal(tmp_path):
    data, detections = dataset(), random_detections()
    write_voc_files(tmp_path / "new", detections, data, split="test")
    for label, name in enumerate(data.class_names, start=1):
        lines = (tmp_path / "new" / f"comp4_det_test_{name}.txt").read_text().splitlines()
        rows = [line.split(" ") for line in lines]
        wanted = [
            (record.id, score, box)
            for entry, record in zip(detections, data.records)
            for box, score, its_label in zip(*entry)
            if its_label == label
        ]
        assert [row[0] for row in rows] == [image_id for image_id, _, _ in wanted]
        numbers = np.array([row[1:] for row in rows], np.float64)
        np.testing.assert_allclose(numbers[:, 0], [score for _, score, _ in wanted], rtol=0, atol=0.5001e-6)
        # Inclusive, counted from 1: only the near corners move.
        boxes = numbers[:, 1:] - [1, 1, 0, 0]
        np.testing.assert_allclose(boxes, [box for _, _, box in wanted], rtol=0, atol=0.0501)


def test_voc_line_is_in_inclusive_pixels_from_one(tmp_path):
    data = dataset(ids=("000005",))
    write_voc_files(tmp_path, perfect_detections(data), data, split="val")
    assert (tmp_path / "comp4_det_val_cat.txt").read_text() == "000005 0.900000 11.0 11.0 60.0 60.0\n"


def test_voc_file_of_a_class_without_detections_is_there_and_empty(tmp_path):
    write_voc_files(tmp_path, [NOTHING] * 4, dataset(), split="test")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        f"comp4_det_test_{name}.txt": "" for name in ("cat", "traffic light", "ox")
    }


NO_FILE_NAMES = ("/../../escaped", "a/b", "a\\b", "", "a\0b", "a\nb", "a\x1bb", "a\ud800b")


@pytest.mark.parametrize("name", NO_FILE_NAMES)
def test_a_class_whose_name_is_no_file_name_is_left_out_and_said(tmp_path, name):
    data = dataset(class_names=("cat", "dog", name))
    (sentence,) = write_voc_files(tmp_path / "folder", random_detections(), data, split="test")
    assert "lack 1 classes whose name cannot be part of a file name" in sentence and repr(name) in sentence
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.txt"))
    assert written == ["folder/comp4_det_test_cat.txt", "folder/comp4_det_test_dog.txt"]


@pytest.mark.parametrize("split", NO_FILE_NAMES)
def test_a_split_whose_name_is_no_file_name_writes_nothing_and_is_said(tmp_path, split):
    (sentence,) = write_voc_files(tmp_path / "folder", random_detections(), dataset(), split=split)
    assert "VOC result files are not written" in sentence and repr(split) in sentence
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("image_id", ["my cat", " cat", "cat\u00a0", "a\tb"])
def test_images_whose_id_has_white_space_are_left_out_and_said(tmp_path, image_id):
    data = dataset(ids=(image_id, "000005"))
    (sentence,) = write_voc_files(tmp_path, perfect_detections(data), data, split="test")
    assert "lack 1 images whose id has white space" in sentence and repr(image_id) in sentence
    lines = (tmp_path / "comp4_det_test_cat.txt").read_text().splitlines()
    assert lines and all(line.startswith("000005 ") for line in lines)
    write_coco_json(tmp_path / "r.json", perfect_detections(data), data)
    assert {entry["image_id"] for entry in json.loads((tmp_path / "r.json").read_text())} == {image_id, "000005"}


def test_interrupted_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("old")

    def fail(source, target):
        assert Path(source).parent == tmp_path and Path(source) != path  # a rename within one folder
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="r.json cannot be written: No space left"):
        write_coco_json(path, random_detections(), dataset())
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"] and path.read_text() == "old"


def test_folder_that_is_a_file_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_voc_files(tmp_path / "file", random_detections(), dataset(), split="test")
    with pytest.raises(InputError, match="cannot be written"):
        write_coco_json(tmp_path / "file" / "r.json", random_detections(), dataset())


def test_table_shows_each_class_the_mean_and_ends_with_ap50():
    data = dataset()
    detections = perfect_detections(data)[:2] + [NOTHING] * 2
    metrics = evaluate_detections(detections, data)
    lines = format_table(data, metrics.voc07, metrics.voc_area, metrics.coco).splitlines()
    # Half of the cats found: recall 0, 0.1, ..., 0.5 of 11 points, 0, 0.01, ..., 0.5 of 101.
    numbers = ["0.545", "0.500", "0.505", "0.505"]
    assert lines[0].split() == ["class", "boxes", "VOC07", "VOC", "area", "AP50", "AP"]
    assert lines[1].split() == ["cat", "4", *numbers]
    assert lines[2].split() == ["traffic", "light", "0", "nan", "nan", "nan", "nan"]
    assert lines[3].split() == ["ox", "0", "nan", "nan", "nan", "nan"]
    assert lines[4].split() == ["mAP", "4", *numbers]
    assert lines[5:] == ["AP50 0.50"]
    assert len({len(line) for line in lines[:5]}) == 1  # columns line up


def test_the_last_row_of_the_table_counts_the_objects_of_all_classes():
    data = dataset()
    first, *rest = data.records
    data = data._replace(records=(first._replace(labels=first.labels[::-1]), *rest))
    metrics = evaluate_detections([NOTHING] * len(data.records), data)
    rows = format_table(data, metrics.voc07, metrics.voc_area, metrics.coco).splitlines()[1:5]
    assert [re.split("  +", row)[:2] for row in rows] == [
        ["cat", "3"],
        ["traffic light", "1"],
        ["ox", "0"],
        ["mAP", "4"],
    ]


def test_table_of_a_data_set_without_objects_ends_with_nan():
    data = dataset(ids=())
    metrics = evaluate_detections([], data)
    assert format_table(data, metrics.voc07, metrics.voc_area, metrics.coco).endswith("\nAP50 nan")


def test_metrics_are_json_with_null_for_the_undefined():
    data = dataset()
    values = metrics_dict(evaluate_detections(perfect_detections(data), data), data.class_names)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert all(value is None or type(value) is float for value in values.values())
    assert values["voc07_mAP"] == values["voc_area_mAP"] == values["AP50/cat"] == 1.0
    assert values["AP"] == pytest.approx(1.0) and values["AP_small"] is None
    assert values["voc07/ox"] is None and values["AP/traffic light"] is None


def test_metrics_with_another_number_of_class_names_are_an_error():
    with pytest.raises(ValueError):
        metrics_dict(evaluate_detections([NOTHING] * 4, dataset()), ("cat",))
