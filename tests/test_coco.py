"""Tests the COCO reader: exact pixels, the official metric, and one clear sentence for every fault."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from bad_cases import (
    CLASSES,
    HEIGHT,
    WIDTH,
    changed,
    instances,
    of_annotation,
    of_image,
    twice,
    write_coco,
)
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fasterrcnn_jax.data.coco import CLASS_NAMES, category_names, read_coco
from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.records import ImageDetections
from fasterrcnn_jax.data.voc import read_voc
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.coco import coco_ap
from fasterrcnn_jax.evaluation.files import write_coco_json

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def folder(tmp_path):
    write_coco(tmp_path)
    return tmp_path


def read(folder, content, class_names=CLASSES):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "instances.json").write_bytes(text)
    return read_coco(folder / "instances.json", folder / "images", class_names)


FAULTS = {
    "cut": (json.dumps(instances()).encode()[:200], ["instances.json", "line 1 column"]),
    "not UTF-8": (json.dumps(instances()).encode("utf-16"), ["instances.json", "UTF-8"]),
    "nested without end": (b"[" * 100_000, ["instances.json"]),
    "results": ([{"image_id": 10}], ["instances.json", "list"]),
    "no images": (changed(("images",), None), ["images", "missing"]),
    "images are a number": (changed(("images",), 3), ["images", "got 3"]),
    "image is a number": (changed(("images", 0), 3), ["images", "list of objects"]),
    "0 images": ({"images": [], "annotations": [], "categories": instances()["categories"]}, ["images is empty"]),
    "no annotations": (changed(("annotations",), None), ["annotations", "missing"]),
    "no categories": (changed(("categories",), None), ["categories", "missing"]),
    "image twice": (twice("images"), ["images", "id 10", "twice"]),
    "annotation twice": (twice("annotations"), ["annotations", "id 1", "twice"]),
    "category twice": (twice("categories"), ["categories[2]", "id 3"]),
    "category name twice": (changed(("categories", 1, "name"), "square"), ["categories[1]", "'square'"]),
    "category without a name": (changed(("categories", 1, "name"), None), ["categories[1], name", "missing"]),
    "category name half a character": (changed(("categories", 1, "name"), "\ud800"), ["categories[1], name", "text"]),
    "category without an id": (changed(("categories", 1, "id"), None), ["categories[1], id", "missing"]),
    "image id is text": (of_image("id", "10"), ["images[0], id", "'10'"]),
    "image id is true": (of_image("id", True), ["images[0], id", "True"]),
    "no image id": (of_image("id", None), ["images[0], id", "missing"]),
    "no annotation id": (of_annotation("id", None), ["annotations[0], id", "missing"]),
    "no image_id": (of_annotation("image_id", None), ["annotation 1, image_id", "missing"]),
    "unknown image": (of_annotation("image_id", 999), ["annotation 1, image_id", "999"]),
    "image_id is text": (of_annotation("image_id", "10"), ["annotation 1, image_id", "'10'"]),
    "no category_id": (of_annotation("category_id", None), ["annotation 1, category_id", "missing"]),
    "unknown category": (of_annotation("category_id", 99), ["annotation 1, category_id", "99"]),
    "no bbox": (of_annotation("bbox", None), ["annotation 1, bbox", "missing"]),
    "three numbers": (of_annotation("bbox", [9, 9, 30]), ["annotation 1, bbox", "[9, 9, 30]"]),
    "numbers as text": (of_annotation("bbox", ["9", "9", "30", "30"]), ["annotation 1, bbox", "'9'"]),
    "nan": (of_annotation("bbox", [9, float("nan"), 30, 30]), ["annotation 1, bbox", "nan"]),
    "infinity": (of_annotation("bbox", [9, 9, float("inf"), 30]), ["annotation 1, bbox", "inf"]),
    "endless integer": (of_annotation("bbox", [9, 9, 10**400, 30]), ["annotation 1, bbox"]),
    "truth for a number": (of_annotation("bbox", [9, 9, True, 30]), ["annotation 1, bbox", "True"]),
    "negative width": (of_annotation("bbox", [9, 9, -30, 30]), ["annotation 1, bbox", "-30"]),
    "negative height": (of_annotation("bbox", [9, 9, 30, -30]), ["annotation 1, bbox", "-30"]),
    "right of the image": (of_annotation("bbox", [97, 9, 30, 30]), ["annotation 1, bbox", "outside", "96 x 64"]),
    "above the image": (of_annotation("bbox", [9, -40, 30, 30]), ["annotation 1, bbox", "outside", "96 x 64"]),
    "area is text": (of_annotation("area", "900"), ["annotation 1, area", "'900'"]),
    "area nan": (of_annotation("area", float("nan")), ["annotation 1, area", "nan"]),
    "area negative": (of_annotation("area", -1), ["annotation 1, area", "-1"]),
    "crowd not 0 or 1": (of_annotation("iscrowd", 2), ["annotation 1, iscrowd", "2"]),
    "crowd is text": (of_annotation("iscrowd", "1"), ["annotation 1, iscrowd", "'1'"]),
    "axes swapped": (
        instances() | {"images": [instances()["images"][0] | {"width": HEIGHT, "height": WIDTH}]},
        ["image 10", "64 x 96", "96 x 64", "10.png", "swapped"],
    ),
    "size wrong": (of_image("width", 97), ["image 10", "97 x 64", "96 x 64", "10.png"]),
    "size half there": (of_image("width", None), ["image 10, width", "missing"]),
    "size is text": (of_image("width", "96"), ["image 10, width", "'96'"]),
    "no file_name": (of_image("file_name", None), ["image 10, file_name", "missing"]),
    "file absent": (of_image("file_name", "12.png"), ["12.png", "no such image"]),
    "file_name outside": (of_image("file_name", "../outside.png"), ["image 10, file_name", "'../outside.png'"]),
    "file_name turns outside": (of_image("file_name", "a/../../outside.png"), ["image 10, file_name"]),
    "file_name absolute": (of_image("file_name", "/etc/passwd"), ["image 10, file_name", "'/etc/passwd'"]),
    "file_name with a drive": (of_image("file_name", "C:10.png"), ["image 10, file_name", "'C:10.png'"]),
    "file_name with backslash": (of_image("file_name", "..\\outside.png"), ["image 10, file_name"]),
    "file_name with zero": (of_image("file_name", "10.png\0"), ["image 10, file_name"]),
    "file_name empty": (of_image("file_name", ""), ["image 10, file_name"]),
    "file_name is a number": (of_image("file_name", 10), ["image 10, file_name", "got 10"]),
    # A fuzzer's findings: such messages were as long as the value.
    "file_name endless": (of_image("file_name", "a" * 5000), ["image 10, file_name", "a ..."]),
    "crowd endless": (of_annotation("iscrowd", "a" * 5000), ["annotation 1, iscrowd", "a ..."]),
    "category name endless": (changed(("categories", 1, "name"), "a" * 5000), ["categories[1], name", "a ..."]),
    "file_name is a folder": (of_image("file_name", "."), ["image 10, file_name"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_in_one_sentence(folder, fault):
    content, parts = FAULTS[fault]
    # The file that a careless join of paths would load exists.
    shutil.copy(folder / "images/10.png", folder / "outside.png")
    with pytest.raises(InputError) as caught:
        read(folder, content)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert str(folder) in message and "\n" not in message and len(message) < 500


def test_file_that_is_absent_or_a_folder_is_named(folder):
    for name, said in (("nowhere.json", "no such annotation file"), ("images", "the file cannot be read")):
        with pytest.raises(InputError, match=f"{name}: {said}"):
            read_coco(folder / name, folder / "images", CLASSES)


def test_healthy_file_is_read_to_the_pixel(folder):
    dataset = read(folder, instances())
    assert [r.id for r in dataset.records] == ["10", "11"] and dataset.notes == ()
    assert dataset.class_names == CLASSES and dataset.category_ids == (3, 7)
    first = dataset.records[0]
    assert first.path == folder / "images/10.png" and first.image_hw == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(first.boxes, np.float32([[9, 9, 39, 39], [51.25, 24, 83.25, 56]]))
    np.testing.assert_array_equal(first.area, [800.5, 700])
    np.testing.assert_array_equal(first.labels, [1, 2])
    assert not first.difficult.any() and not first.crowd.any() and not first.flipped


def test_arrays_have_the_stated_types_and_shapes(folder):
    content = instances()
    del content["annotations"][2:]
    for record, count in zip(read(folder, content).records, (2, 0), strict=True):
        shapes = [(field.dtype, field.shape) for field in record[3:8]]
        one = (count,)
        assert shapes == [
            (np.float32, (count, 4)), (np.int32, one), (bool, one), (bool, one), (np.float64, one)
        ]  # fmt: skip


def test_labels_follow_class_names_and_category_ids_come_along(folder):
    dataset = read(folder, instances(), CLASSES[::-1])
    np.testing.assert_array_equal(dataset.records[0].labels, [2, 1])
    assert dataset.category_ids == (7, 3)


def test_category_id_zero_is_not_background(folder):
    content = json.loads(json.dumps(instances()).replace('"id": 3, "name"', '"id": 0, "name"'))
    for item in content["annotations"]:
        item["category_id"] = {3: 0, 7: 7}[item["category_id"]]
    dataset = read(folder, content)
    np.testing.assert_array_equal(dataset.records[0].labels, [1, 2])
    assert dataset.category_ids == (0, 7)


def test_object_of_a_class_that_is_not_asked_for_is_named(folder):
    with pytest.raises(InputError, match=r"annotation 2, category_id: 7 \('disc'\) is not one of .* square$"):
        read(folder, instances(), ("square",))


def test_class_that_the_file_does_not_have_is_named(folder):
    with pytest.raises(InputError, match="categories: no category is named 'Disc'; the file has square, disc"):
        read(folder, instances(), ("square", "Disc"))


@pytest.mark.parametrize("class_names", [(), ("disc", "disc")])
def test_class_names_must_be_different_names(folder, class_names):
    with pytest.raises(InputError, match="class_names"):
        read(folder, instances(), class_names)


def test_names_for_the_message_are_in_the_order_of_their_ids(folder):
    content = instances()
    content["categories"].reverse()
    read(folder, content)
    assert category_names(folder / "instances.json") == CLASSES


# case -> (content, boxes and areas expected of image 10, parts of the one note expected or None for no note)
BOXES, AREAS = [[9, 9, 39, 39], [51.25, 24, 83.25, 56]], [800.5, 700]
READ_ANYWAY = {
    "with byte order mark": (b"\xef\xbb\xbf" + json.dumps(instances()).encode(), BOXES, AREAS, None),
    "other keys": (instances() | {"info": {}, "licenses": []}, BOXES, AREAS, None),
    "no iscrowd": (of_annotation("iscrowd", None), BOXES, AREAS, None),
    "outline as RLE": (of_annotation("segmentation", {"counts": [6144], "size": [64, 96]}), BOXES, AREAS, None),
    "no area": (of_annotation("area", None), BOXES, [900, 700], ["area", ": 1", "annotation 1"]),
    "no size": (
        {**instances(), "images": [{"id": n, "file_name": f"{n}.png"} for n in (10, 11)]},
        BOXES,
        AREAS,
        ["width", ": 2", "image 10"],
    ),
    "size with fractions": (of_image("width", 96.0), BOXES, AREAS, None),
    "partly outside": (
        of_annotation("bbox", [-5, 9, 44, 30]),
        [[0, 9, 39, 39], BOXES[1]],
        AREAS,
        ["clipped: 1", "annotation 1, bbox", "-5"],
    ),
    "beyond the far corner": (
        of_annotation("bbox", [60, 25, 80, 60]),
        [[60, 25, 96, 64], BOXES[1]],
        AREAS,
        ["clipped: 1", "annotation 1, bbox"],
    ),
    "outside by rounding": (of_annotation("bbox", [9.1, 9, 86.9000001, 30]), [[9.1, 9, 96, 39], BOXES[1]], AREAS, None),
    "no width": (of_annotation("bbox", [9, 9, 0, 30]), BOXES[1:], AREAS[1:], ["dropped: 1", "annotation 1, bbox"]),
    "at the border without a width": (
        of_annotation("bbox", [96, 9, 0, 30]),
        BOXES[1:],
        AREAS[1:],
        ["dropped: 1", "annotation 1, bbox"],
    ),  # fmt: skip
    "smaller than is trained on": (of_annotation("bbox", [9, 9, 0.5, 1]), [[9, 9, 9.5, 10], BOXES[1]], AREAS, None),
}


@pytest.mark.parametrize("case", READ_ANYWAY)
def test_oddity_is_read_as_stated(folder, case):
    content, boxes, areas, parts = READ_ANYWAY[case]
    dataset = read(folder, content)
    assert [r.id for r in dataset.records] == ["10", "11"]
    np.testing.assert_array_equal(dataset.records[0].boxes, np.float32(boxes))
    np.testing.assert_array_equal(dataset.records[0].area, areas)
    np.testing.assert_array_equal(dataset.records[0].labels, [1, 2][-len(boxes) :])
    if parts is None:
        assert dataset.notes == ()
    else:
        (note,) = dataset.notes
        assert [part for part in parts if part not in note] == [], note


def test_file_in_a_subfolder_is_read(folder):
    (folder / "images/sub").mkdir()
    (folder / "images/10.png").rename(folder / "images/sub/10.png")
    assert read(folder, of_image("file_name", "sub/10.png")).records[0].path == folder / "images/sub/10.png"


@pytest.mark.parametrize("stated", ["stored", "shown"])
def test_object_is_on_its_pixels_whichever_frame_of_an_exif_image_the_size_states(folder, stated):
    """White object in columns 20..49 and rows 12..40 of the image with the stated size; viewers rotate it clockwise."""
    height, width = (HEIGHT, WIDTH) if stated == "stored" else (WIDTH, HEIGHT)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[12:41, 20:50] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = pixels if stated == "stored" else np.rot90(pixels)
    Image.fromarray(np.ascontiguousarray(stored)).save(folder / "images/10.png", exif=exif)
    content = of_annotation("bbox", [20, 12, 30, 29])
    content["images"][0] |= {"width": width, "height": height}
    del content["annotations"][1]
    dataset = read(folder, content)
    record = dataset.records[0]
    assert record.image_hw == (height, width) and dataset.notes == ()
    x1, y1, x2, y2 = record.boxes[0].astype(int)
    white = record_pixels(record)[..., 0] == 255
    assert white[y1:y2, x1:x2].all() and white.sum() == (x2 - x1) * (y2 - y1)


def test_crowd_is_kept_with_its_flag(folder):
    np.testing.assert_array_equal(read(folder, of_annotation("iscrowd", 1)).records[0].crowd, [True, False])


def test_long_ids_are_not_truncated(folder):
    text = json.dumps(instances()).replace('_id": 10', f'_id": {2**40}').replace('"id": 10,', f'"id": {2**40},')
    dataset = read(folder, text.encode())
    assert [r.id for r in dataset.records] == ["11", str(2**40)]  # in the order of the ids
    assert len(dataset.records[1].boxes) == 2


def official(annotation_path, result_path):
    """Returns pycocotools' 12 numbers from two files, and precision by class."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_path))
        evaluation = COCOeval(truth, truth.loadRes(str(result_path)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
    return np.where(evaluation.stats < 0, np.nan, evaluation.stats), np.where(precision < 0, np.nan, precision)


def detections_near(dataset, seed=0):
    """Returns detections with typical errors: moved, missed, duplicate, of another class, inside crowds."""
    rng = np.random.default_rng(seed)
    result = []
    for record in dataset.records:
        boxes, labels = [], []
        for box, label, crowd in zip(record.boxes, record.labels, record.crowd):
            side = np.tile(box[2:] - box[:2], 2)
            for _ in range(rng.integers(0, 3) + 2 * crowd):
                moved = box + rng.normal(0, rng.choice([0.02, 0.08]), 4) * side
                if crowd:
                    moved = np.concatenate([box[:2], box[:2] + side[:2] * 0.3])
                boxes.append(np.concatenate([np.minimum(moved[:2], moved[2:]), np.maximum(moved[:2], moved[2:])]))
                labels.append(label if rng.random() < 0.9 else rng.integers(1, len(dataset.class_names) + 1))
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        scores = rng.integers(1, 9, len(boxes)) / 8  # with ties, over images too
        result.append(ImageDetections(boxes, scores.astype(np.float32), np.array(labels, np.int32)))
    return result


def assert_metric_is_official(dataset, annotation_path, tmp_path):
    detections = detections_near(dataset)
    write_coco_json(tmp_path / "results.json", detections, dataset)
    stats, class_ap = official(annotation_path, tmp_path / "results.json")
    got = coco_ap(detections, dataset)
    scalars = (got.ap, got.ap50, got.ap75, got.ap_small, got.ap_medium, got.ap_large, got.ar_100)
    np.testing.assert_allclose(scalars, stats[[0, 1, 2, 3, 4, 5, 8]], rtol=0, atol=1e-9)
    # pycocotools sorts the categories by their ids.
    np.testing.assert_allclose(got.class_ap[np.argsort(dataset.category_ids)], class_ap, rtol=0, atol=1e-9)
    return got


def test_metric_of_a_drawn_set_is_pycocotools_on_the_files(folder):
    """The set has crowds, areas on the other side of 32^2 than the box areas, and its own category ids."""
    rng = np.random.default_rng(3)
    content = instances() | {"annotations": []}
    for n in range(12, 30):
        shutil.copy(folder / "images/10.png", folder / f"images/{n}.png")
        content["images"].append({"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT})
    for n in range(1, 90):
        (x, y), (w, h) = rng.uniform(0, (60, 30)), rng.uniform(15, 34, 2)
        bbox, area = [round(float(side), 2) for side in (x, y, w, h)], float(w * h * rng.uniform(0.5, 1))
        ids = {"id": n, "image_id": int(rng.integers(10, 30)), "category_id": int(rng.choice([3, 7]))}
        content["annotations"].append(ids | {"bbox": bbox, "area": area * 4, "iscrowd": int(n % 7 == 0)})
    content["images"].reverse()
    dataset = read(folder, content, CLASSES[::-1])
    assert sum(record.crowd.sum() for record in dataset.records) == 12
    got = assert_metric_is_official(dataset, folder / "instances.json", folder)
    assert 0.1 < got.ap < 0.9 and got.ap_small > 0 and got.ap_medium > 0


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not in the folder {SHARED.parent.name} beside the repository")
    return SHARED / name


def test_metric_of_real_images_is_pycocotools_on_the_files(tmp_path):
    root = shared("coco_cc33")
    dataset = read_coco(root / "annotations/instances.json", root / "images", CLASS_NAMES)
    assert len(dataset.records) == 33 and sum(len(record.boxes) for record in dataset.records) == 246
    assert sum(record.crowd.sum() for record in dataset.records) == 3 and dataset.category_ids[-1] == 90
    assert category_names(root / "annotations/instances.json") == CLASS_NAMES
    got = assert_metric_is_official(dataset, root / "annotations/instances.json", tmp_path)
    assert min(got.ap, got.ap_small, got.ap_medium, got.ap_large) > 0.05


def test_cells_as_coco_are_the_cells_as_voc():
    annotations, names = shared("bccd_coco"), ("RBC", "WBC", "Platelets")
    coco = read_coco(annotations / "annotations/instances_test.json", shared("bccd/JPEGImages"), names)
    voc = read_voc(shared("bccd"), "test", names)
    assert coco.category_ids == (2, 3, 1)
    of_name = {record.path.name: record for record in coco.records}
    for record in voc.records:
        np.testing.assert_array_equal(of_name[record.path.name].boxes, record.boxes)
        np.testing.assert_array_equal(of_name[record.path.name].labels, record.labels)
