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
    with_items,
    write_coco,
)
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fasterrcnn_jax.data import coco
from fasterrcnn_jax.data.coco import CLASS_NAMES, category_names, read_coco
from fasterrcnn_jax.data.faults import OTHER_CLASS
from fasterrcnn_jax.data.file_names import MOVED
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
    "two images of one id": (of_image("id", 11), ["images", "id 11", "twice"]),
    "annotation twice": (twice("annotations"), ["annotations", "id 1", "twice"]),
    "category id twice": (changed(("categories", 1, "id"), 3), ["categories[1]", "id 3", "'square'", "'disc'"]),
    "category name twice": (changed(("categories", 1, "name"), "square"), ["categories", "'square'", "3 and 7"]),
    "category id is no number": (changed(("categories", 1, "id"), "disc"), ["categories[1], id", "integer"]),
    "category name is true": (changed(("categories", 1, "name"), True), ["categories[1], name", "True"]),
    "category name is blank": (changed(("categories", 1, "name"), "  "), ["categories[1], name"]),
    "category without a name": (changed(("categories", 1, "name"), None), ["categories[1], name", "missing"]),
    "category name half a character": (changed(("categories", 1, "name"), "\ud800"), ["categories[1], name", "text"]),
    "category without an id": (changed(("categories", 1, "id"), None), ["categories[1], id", "missing"]),
    "image id is true": (of_image("id", True), ["images[0], id", "True"]),
    "no image id": (of_image("id", None), ["images[0], id", "missing"]),
    "no image_id": (of_annotation("image_id", None), ["annotation 1, image_id", "missing"]),
    "unknown image": (of_annotation("image_id", 999), ["annotation 1, image_id", "999"]),
    "no category_id": (of_annotation("category_id", None), ["annotation 1, category_id", "missing"]),
    "unknown category": (of_annotation("category_id", 99), ["annotation 1, category_id", "99"]),
    "no bbox": (of_annotation("bbox", None), ["annotation 1, bbox", "missing"]),
    "three numbers": (of_annotation("bbox", [9, 9, 30]), ["annotation 1, bbox", "[9, 9, 30]"]),
    "nan": (of_annotation("bbox", [9, float("nan"), 30, 30]), ["annotation 1, bbox", "nan"]),
    "infinity": (of_annotation("bbox", [9, 9, float("inf"), 30]), ["annotation 1, bbox", "inf"]),
    "endless integer": (of_annotation("bbox", [9, 9, 10**400, 30]), ["annotation 1, bbox"]),
    "truth for a number": (of_annotation("bbox", [9, 9, True, 30]), ["annotation 1, bbox", "True"]),
    "negative width": (of_annotation("bbox", [9, 9, -30, 30]), ["annotation 1, bbox", "-30"]),
    "negative height": (of_annotation("bbox", [9, 9, 30, -30]), ["annotation 1, bbox", "-30"]),
    "right of the image": (of_annotation("bbox", [97, 9, 30, 30]), ["annotation 1, bbox", "outside", "96 x 64"]),
    "above the image": (of_annotation("bbox", [9, -40, 30, 30]), ["annotation 1, bbox", "outside", "96 x 64"]),
    "area is text": (of_annotation("area", "large"), ["annotation 1, area", "'large'"]),
    "area negative": (of_annotation("area", -1), ["annotation 1, area", "-1"]),
    "crowd not 0 or 1": (of_annotation("iscrowd", 2), ["annotation 1, iscrowd", "2"]),
    "crowd is text": (of_annotation("iscrowd", "many"), ["annotation 1, iscrowd", "'many'"]),
    "axes swapped": (
        instances() | {"images": [instances()["images"][0] | {"width": HEIGHT, "height": WIDTH}]},
        ["image 10", "64 x 96", "96 x 64", "10.png", "swapped"],
    ),
    "size wrong": (of_image("width", 97), ["image 10", "97 x 64", "96 x 64", "10.png"]),
    "size is a word": (of_image("width", "wide"), ["image 10, width", "'wide'"]),
    "text for a number": (of_annotation("bbox", ["9", "9", "30", "wide"]), ["annotation 1, bbox", "'wide'"]),
    "no file_name": (of_image("file_name", None), ["image 10, file_name", "missing"]),
    "file absent": (of_image("file_name", "12.png"), ["image 10, file_name", "no image file '12.png'"]),
    "file_name outside": (of_image("file_name", "../outside.png"), ["image 10, file_name", "'../outside.png'"]),
    "file_name turns outside": (of_image("file_name", "a/../../outside.png"), ["image 10, file_name"]),
    "file_name absolute": (of_image("file_name", "/etc/passwd"), ["image 10, file_name", "'/etc/passwd'"]),
    "file_name with backslash": (of_image("file_name", "..\\outside.png"), ["image 10, file_name"]),
    "file_name with zero": (of_image("file_name", "10.png\0"), ["image 10, file_name"]),
    "file_name empty": (of_image("file_name", ""), ["image 10, file_name"]),
    "file_name is a number": (of_image("file_name", 10), ["image 10, file_name", "got 10"]),
    # A fuzzer's findings: such messages were as long as the value.
    # A fuzzer's finding: longer than a name in a folder may be.
    "file_name long": (of_image("file_name", "a" * 300), ["image 10, file_name", "a ..."]),
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


POLYGON = [[9, 10, 39, 9, 30, 39]]


def without(item, *keys):
    return {key: value for key, value in item.items() if key not in keys}


def sizes(width, height):
    return with_items("images", lambda image: image | {"width": width, "height": height})


def polygons(**fields):
    return with_items("annotations", lambda a: without(a, "bbox") | {"segmentation": POLYGON, "area": 5, **fields})


FIRST = [[9, 9, 39, 39], [51.25, 24, 83.25, 56]]
# case -> (content, boxes expected of image 10, sentences of the notes)
VARIANTS = {
    "sizes null": (sizes(None, None), FIRST, [coco.NO_SIZE]),
    "sizes zero": (sizes(0, 0), FIRST, [coco.NO_SIZE]),
    "sizes minus one": (sizes(-1, -1.0), FIRST, [coco.NO_SIZE]),
    "sizes zero as text": (sizes("0", "0.0"), FIRST, [coco.TEXT, coco.NO_SIZE]),
    "sizes empty text": (sizes("", ""), FIRST, [coco.NO_SIZE]),
    "size half there": (of_image("width", None), FIRST, [coco.NO_SIZE]),
    "sizes as text": (sizes("96", "64.0"), FIRST, [coco.TEXT]),
    "sizes of words": (sizes("null", " NaN "), FIRST, [coco.NO_SIZE]),
    "area nan": (with_items("annotations", lambda a: a | {"area": float("nan")}), FIRST, [coco.NO_AREA]),
    "area of a word": (with_items("annotations", lambda a: a | {"area": " None"}), FIRST, [coco.NO_AREA]),
    "boxes as one text": (
        with_items("annotations", lambda a: a | {"bbox": str(a["bbox"])}), FIRST, [coco.TEXT]
    ),
    "area null": (with_items("annotations", lambda a: a | {"area": None}), FIRST, [coco.NO_AREA]),
    "area as text": (with_items("annotations", lambda a: a | {"area": str(a["area"])}), FIRST, [coco.TEXT]),
    "crowd false": (with_items("annotations", lambda a: a | {"iscrowd": False}), FIRST, []),
    "crowd null": (with_items("annotations", lambda a: a | {"iscrowd": None}), FIRST, []),
    "crowd as text": (with_items("annotations", lambda a: a | {"iscrowd": "0"}), FIRST, []),
    "boxes as text": (with_items("annotations", lambda a: a | {"bbox": [*map(str, a["bbox"])]}), FIRST, [coco.TEXT]),
    "image_ids as text": (
        with_items("annotations", lambda a: a | {"image_id": str(a["image_id"])}), FIRST, [coco.TEXT]
    ),
    "image ids as text": (with_items("images", lambda image: image | {"id": f"{image['id']}"}), FIRST, [coco.TEXT]),
    "image ids as fractions": (with_items("images", lambda image: image | {"id": float(image["id"])}), FIRST, []),
    "category ids as text": (
        with_items("categories", lambda c: c | {"id": str(c["id"])}), FIRST, [coco.TEXT]
    ),
    "no annotation ids": (with_items("annotations", lambda a: without(a, "id")), FIRST, [coco.NO_ID]),
    "annotation ids null": (with_items("annotations", lambda a: a | {"id": None}), FIRST, [coco.NO_ID]),
    "no boxes": (polygons(), [[9, 9, 39, 39]] * 2, [coco.EXTENT]),
    "boxes empty": (polygons(bbox=[]), [[9, 9, 39, 39]] * 2, [coco.EXTENT]),
    "boxes null": (polygons(bbox=None), [[9, 9, 39, 39]] * 2, [coco.EXTENT]),
    "boxes zero": (polygons(bbox=[0, 0, 0, 0]), [[9, 9, 39, 39]] * 2, [coco.EXTENT]),
    "polygons of two parts": (
        polygons(segmentation=[[9, 10, 20, 9, 20, 39], ["30", "9", "39", "12", "35", "30"]]),
        [[9, 9, 39, 39]] * 2,
        [coco.EXTENT],
    ),
    "polygon of points": (polygons(segmentation=[[9, 10], [39, 9], [30, 39]]), [[9, 9, 39, 39]] * 2, [coco.EXTENT]),
    "polygon not in a list": (polygons(segmentation=POLYGON[0]), [[9, 9, 39, 39]] * 2, [coco.EXTENT]),
    "ignored": (with_items("annotations", lambda a: a | {"ignore": 1}), FIRST, [coco.IGNORED]),
    "ignore 0": (with_items("annotations", lambda a: a | {"ignore": 0}), FIRST, []),
    "category names padded": (with_items("categories", lambda c: c | {"name": f" {c['name']} "}), FIRST, []),
    "categories once more per image": (
        instances() | {"categories": instances()["categories"] * 3}, FIRST, [coco.REPEATED]
    ),
    "an image twice": (twice("images"), FIRST, [coco.REPEATED]),
    "other class": (
        instances() | {"categories": [*instances()["categories"], {"id": 9, "name": "triangle"}],
                       "annotations": [*instances()["annotations"],
                                       instances()["annotations"][0] | {"id": 5, "category_id": 9}]},
        FIRST,
        [OTHER_CLASS],
    ),
    "category that groups": (
        instances() | {"categories": [{"id": 0, "name": "shapes", "supercategory": "none"},
                                      *(c | {"supercategory": "shapes"} for c in instances()["categories"])]},
        FIRST,
        [coco.GROUPING],
    ),
    "category that groups one of the same name": (
        instances() | {"categories": [{"id": 0, "name": "disc", "supercategory": "none"},
                                      *(c | {"supercategory": "disc"} for c in instances()["categories"])]},
        FIRST,
        [coco.GROUPING],
    ),
    "file_name of Windows": (of_image("file_name", ".\\10.png"), FIRST, [coco.SEPARATOR]),
    "file_name with a drive": (of_image("file_name", "C:10.png"), FIRST, [coco.SEPARATOR]),
    "file_name of another machine": (of_image("file_name", "/home/a/set/10.png"), FIRST, [MOVED]),
    "file_name of another Windows": (of_image("file_name", "D:\\set\\10.png"), FIRST, [MOVED]),
    "file_name of a Label Studio": (of_image("file_name", "..\\..\\media\\upload\\4\\10.png"), FIRST, [MOVED]),
    "file_name from the root": (of_image("file_name", "images/10.png"), FIRST, [MOVED]),
    "file_name in another format": (of_image("file_name", "10.jpg"), FIRST, [MOVED]),
    "file_name in other letters": (of_image("file_name", "10.PNG"), FIRST, [MOVED]),
}  # fmt: skip


@pytest.mark.parametrize("case", VARIANTS)
def test_a_value_with_one_meaning_is_read_and_noted(folder, case):
    content, boxes, sentences = VARIANTS[case]
    dataset = read(folder, content)
    assert [record.id for record in dataset.records] == ["10", "11"]
    np.testing.assert_array_equal(dataset.records[0].boxes, np.float32(boxes))
    np.testing.assert_array_equal(dataset.records[0].labels, [1, 2])
    assert list(dict.fromkeys(finding.sentence for finding in dataset.findings)) == sentences
    assert not any(finding.is_fault for finding in dataset.findings)
    assert dataset.records[0].path == folder / "images/10.png" and dataset.category_ids == (3, 7)
    assert dataset.records[0].crowd.all() == (case == "ignored")
    assert dataset.class_names == category_names(folder / "instances.json") or case == "other class"


@pytest.mark.parametrize("value", [True, "1", "True", 1.0])
def test_a_crowd_is_one_however_it_is_written(folder, value):
    assert read(folder, of_annotation("iscrowd", value)).records[0].crowd.tolist() == [True, False]


def test_names_that_are_numbers_are_classes(folder):
    content = instances() | {"categories": [{"id": 3, "name": 0}, {"id": 7, "name": 1.0}]}
    dataset = read(folder, content, ("0", "1"))
    np.testing.assert_array_equal(dataset.records[0].labels, [1, 2])
    assert category_names(folder / "instances.json") == ("0", "1")


def test_images_with_text_as_id_are_read_after_the_others(folder):
    content = json.loads(json.dumps(instances()).replace('"image_id": 10', '"image_id": "a 1"'))
    content["images"][0]["id"] = "a 1"
    assert [record.id for record in read(folder, content).records] == ["11", "a 1"]


def test_a_class_that_the_file_does_not_declare_has_no_object_and_a_free_id(folder):
    dataset = read(folder, instances(), ("cat", "disc", "dog"))
    assert dataset.category_ids == (8, 7, 9)
    np.testing.assert_array_equal(dataset.records[0].labels, [2])


def test_a_grouping_category_with_objects_is_a_class(folder):
    content = with_items("categories", lambda c: c | {"supercategory": "square"})
    assert read(folder, content).notes == () and category_names(folder / "instances.json") == CLASSES


@pytest.mark.parametrize("name", ["/home/a/10.png", "b/10.png", "10.PNG"])
def test_a_path_that_fits_several_files_or_the_file_of_another_image_is_a_fault(folder, name):
    (folder / "images/a").mkdir()
    (folder / "images/10.png").rename(folder / "images/a/10.png")
    content = of_image("file_name", name)
    assert read(folder, content).records[0].path == folder / "images/a/10.png"
    content["images"].append(content["images"][0] | {"id": 12, "file_name": "c/10.png"})
    with pytest.raises(InputError, match=r"image 1[02], file_name: .*10.png, is that of another image$"):
        read(folder, content)
    (folder / "images/z").mkdir()
    shutil.copy(folder / "images/11.png", folder / "images/z/10.png")
    with pytest.raises(
        InputError, match="image 1[02], file_name: .* 2 images in .*, for example a/10.png and z/10.png$"
    ):
        read(folder, content)


def test_the_file_that_shares_the_most_folders_fits(folder):
    for day in ("1", "2"):
        (folder / "images" / day).mkdir()
        shutil.copy(folder / "images/10.png", folder / "images" / day / "10.png")
    content = of_image("file_name", "/home/me/images/2/10.png")
    assert read(folder, content).records[0].path == folder / "images/2/10.png"


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
