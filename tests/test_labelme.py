"""Tests the reader of LabelMe's json files: places of images, shapes, exact boxes, and one sentence for every fault."""

import json
import shutil

import fuzz_readers
import numpy as np
import pytest
from exports import CLASSES, RECORDS, labelme_json, shape, write_images, write_labelme
from PIL import Image
from test_yolo import boxes_by_name, expected, sentences

from fasterrcnn_jax.data import labelme
from fasterrcnn_jax.data.faults import FAULTY_IMAGE, FAULTY_OBJECT, OTHER_CLASS
from fasterrcnn_jax.data.file_names import MOVED
from fasterrcnn_jax.data.labelme import class_names_in, read_labelme, recognise, splits
from fasterrcnn_jax.data.objects import CLIPPED, EMPTY
from fasterrcnn_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
    write_labelme(tmp_path)
    return tmp_path


def change(folder, **fields):
    """Gives fields of a.json other values; a field ... is removed."""
    content = json.loads((folder / "a.json").read_text()) | fields
    content = {key: value for key, value in content.items() if value is not ...}
    (folder / "a.json").write_text(json.dumps(content))


def test_boxes_are_those_that_were_written_to_the_bit(folder):
    dataset = read_labelme(folder, "all", CLASSES)
    assert boxes_by_name(dataset) == expected()
    assert [record.id for record in dataset.records] == ["a.png", "b.png", "c.png"] and dataset.notes == ()


def beside(folder):
    write_labelme(folder)


def in_two_folders(folder):
    write_images(folder / "images")
    (folder / "json").mkdir()
    for record in RECORDS:
        content = labelme_json(record) | {"imagePath": f"..\\images\\{record.name}.png"}
        (folder / f"json/{record.name}.json").write_text(json.dumps(content))


def in_two_folders_of_another_machine(folder):
    in_two_folders(folder)
    for record in RECORDS:
        path = folder / f"json/{record.name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"imagePath": f"D:\\pets\\{record.name}.png"}))


def with_the_pixels_first(folder):
    write_labelme(folder)
    for record in RECORDS:
        content = {"imageData": "A" * 30_000} | labelme_json(record)
        (folder / f"{record.name}.json").write_text(json.dumps(content | {"imageData": "A" * 30_000}))


def with_a_mark_and_windows_lines(folder):
    write_labelme(folder)
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def in_splits(folder):
    for split in ("train", "val", "test"):
        write_labelme(folder / split)


def in_splits_of_two_folders(folder):
    for split in ("train", "val", "test"):
        in_two_folders(folder / "data" / split)


def in_folders_of_splits(folder):
    for split in ("train", "val", "test"):
        write_images(folder / "images" / split)
        (folder / "labels" / split).mkdir(parents=True)
        for record in RECORDS:
            content = labelme_json(record) | {"imagePath": f"../../images/{split}/{record.name}.png"}
            (folder / "labels" / split / f"{record.name}.json").write_text(json.dumps(content))


THREE = ("train", "val", "test")
WRITERS = {
    beside: ("all",),
    in_two_folders: ("all",),
    in_two_folders_of_another_machine: ("all",),
    with_the_pixels_first: ("all",),
    with_a_mark_and_windows_lines: ("all",),
    in_splits: THREE,
    in_splits_of_two_folders: THREE,
    in_folders_of_splits: THREE,
}


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_place_of_the_files_is_recognised_and_gives_the_same_boxes(tmp_path, write):
    write(tmp_path)
    layout = recognise(tmp_path)
    assert layout is not None and (layout.name, layout.splits) == ("LabelMe", WRITERS[write])
    assert layout.data.layout == "labelme" and set(layout.data.class_names) == set(CLASSES)
    assert layout.splits == splits(tmp_path)
    dataset = read_labelme(tmp_path, layout.splits[0], CLASSES)
    assert boxes_by_name(dataset) == expected()
    assert set(sentences(dataset)) == ({MOVED} if write is in_two_folders_of_another_machine else set())


def test_a_folder_without_annotations_is_not_recognised(tmp_path):
    write_images(tmp_path)
    (tmp_path / "settings.json").write_text('{"shapes_of_cats": []}')
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": [], "categories": []}')
    assert recognise(tmp_path) is None and recognise(tmp_path / "absent") is None


def test_class_names_are_in_the_order_of_labels_txt_and_else_sorted(folder):
    assert class_names_in(folder, "all") == ("disc", "square")
    (folder / "labels.txt").write_text("__ignore__\n_background_\nsquare\ndisc\ntriangle\n")
    assert class_names_in(folder, "all") == CLASSES


def test_a_subset_of_the_classes_is_a_choice_and_counted(folder):
    dataset = read_labelme(folder, "all", ("disc",))
    assert sum(len(record.boxes) for record in dataset.records) == 3 and sentences(dataset) == [OTHER_CLASS]
    assert not dataset.findings[0].is_fault


SQUARE = [[10, 12], [40, 44]]
# The shapes of a.json -> its boxes and the notes.
READ = {
    "corners in another order": ([shape("square", [[40, 12], [10, 44]])], [(10, 12, 40, 44)], []),
    "four corners": ([shape("square", [[10, 12], [40, 12], [40, 44], [10, 44]])], [(10, 12, 40, 44)], []),
    "a polygon": ([shape("disc", [[10, 20], [30.5, 5], [40, 44]], "polygon")], [(10, 5, 40, 44)], []),
    "a polygon of the first versions": ([{"label": "disc", "points": [[1, 2], [3, 9], [7, 4]]}], [(1, 2, 7, 9)], []),
    "a circle": ([shape("disc", [[48, 32], [51, 36]], "circle")], [(43, 27, 53, 37)], []),
    "a mask": ([shape("disc", [[48, 32], [51, 36]], "mask", mask="iVBO")], [(48, 32, 52, 37)], []),
    "points and lines": (
        [shape("disc", [[1, 1], [9, 9]], kind) for kind in ("point", "points", "line", "linestrip")],
        [],
        [labelme.IGNORED_SHAPE] * 4,
    ),
    "blanks around the label": ([shape(" square ", SQUARE)], [(10, 12, 40, 44)], []),
    "no shapes": (None, [], []),
    "outside": ([shape("disc", [[-3, 12], [40, 90]])], [(0, 12, 40, 64)], [CLIPPED]),
    "no width": ([shape("disc", [[10, 12], [10, 44]])], [], [EMPTY]),
    "outlines of one group": (
        [
            shape("disc", [[10, 10], [20, 10], [15, 20]], "polygon", group_id=1),
            shape("square", [[0, 0], [9, 0], [5, 9]], "polygon", group_id=1),
            shape("disc", [[40, 30], [50, 30], [45, 40]], "polygon", group_id=1),
            shape("disc", [[60, 30], [70, 30], [65, 40]], "polygon", group_id=2),
        ],
        [(10, 10, 50, 40), (0, 0, 9, 9), (60, 30, 70, 40)],
        [labelme.JOINED],
    ),
    "rectangles of one group": (
        [shape("disc", [[10, 10], [20, 20]], group_id=1), shape("disc", [[40, 30], [50, 40]], group_id=1)],
        [(10, 10, 20, 20), (40, 30, 50, 40)],
        [],
    ),
}


@pytest.mark.parametrize("case", READ)
def test_shapes_are_read_by_their_extent(folder, case):
    shapes, boxes, notes = READ[case]
    change(folder, shapes=shapes)
    dataset = read_labelme(folder, "all", CLASSES)
    assert dataset.records[0].boxes.tolist() == np.array(boxes, float).reshape(-1, 4).tolist()
    assert sentences(dataset) == notes


def test_a_label_that_is_a_number_is_its_digits(folder):
    change(folder, shapes=[shape(7, SQUARE)])
    assert class_names_in(folder, "all") == ("7", "disc")
    assert len(read_labelme(folder, "all", ("7",)).records[0].boxes) == 1


SHAPE_FAULTS = {
    "one point": (shape("square", [[1, 2]]), ["points", "at least 2", "[[1, 2]]"]),
    "a polygon of two points": (shape("square", SQUARE, "polygon"), ["points", "at least 3"]),
    "a circle of three points": (shape("square", [[1, 2], [3, 4], [5, 6]], "circle"), ["points", "two points"]),
    "a point of three numbers": (shape("square", [[1, 2, 3], [4, 5, 6]]), ["points", "[x, y]"]),
    "text": (shape("square", [["one", 2], [4, 5]]), ["points", "'one'"]),
    "true": (shape("square", [[True, 2], [4, 5]]), ["points", "True"]),
    "not finite": (shape("square", [[float("nan"), 2], [4, 5]]), ["points", "nan"]),
    "huge": (shape("square", [[10**400, 2], [4, 5]]), ["points"]),
    "no points": ({"label": "square", "shape_type": "rectangle"}, ["points", "None"]),
    "no label": ({"points": SQUARE, "shape_type": "rectangle"}, ["label", "None"]),
    "a blank label": (shape(" ", SQUARE), ["label", "' '"]),
    "an unknown shape": (shape("square", SQUARE, "cuboid"), ["shape_type", "'cuboid'", "rectangle"]),
    "a shape that is a list": (shape("square", SQUARE, ["rectangle"]), ["shape_type", "['rectangle']"]),
    "outside the image": (shape("square", [[100, 2], [140, 5]]), ["x 100 to 140", "outside the image (96 pixels)"]),
}


@pytest.mark.parametrize("case", SHAPE_FAULTS)
def test_a_faulty_shape_is_one_sentence_and_is_skipped_alone(folder, case):
    faulty, parts = SHAPE_FAULTS[case]
    change(folder, shapes=[shape("disc", SQUARE), faulty])
    with pytest.raises(InputError) as error:
        read_labelme(folder, "all", CLASSES)
    message = str(error.value)
    assert all(part in message for part in ("a.json, shapes[1]", *parts)) and "\n" not in message
    dataset = read_labelme(folder, "all", CLASSES, faults="skip")
    assert [len(record.boxes) for record in dataset.records] == [1, 2, 0] and sentences(dataset) == [FAULTY_OBJECT]


def content(text):
    return lambda folder: (folder / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())


FILE_FAULTS = {
    "cut": (content('{"shapes": ['), ["a.json", "not JSON"]),
    "deep": (content("[" * 100_000), ["a.json", "not JSON"]),
    "not text": (content(b'{"shapes": "\xff"}'), ["a.json", "UTF-8"]),
    "shapes that are a number": (lambda folder: change(folder, shapes=3), ["a.json, shapes", "3"]),
    "shapes of numbers": (lambda folder: change(folder, shapes=[3]), ["a.json, shapes", "[3]"]),
    "another size": (lambda folder: change(folder, imageWidth=64, imageHeight=96), ["64 x 96", "96 x 64"]),
    "a size that is text": (lambda folder: change(folder, imageWidth="wide"), ["a.json, imageWidth", "'wide'"]),
    "a path that is a number": (lambda folder: change(folder, imagePath=3), ["a.json, imagePath", "3"]),
    "a path with a zero": (
        lambda folder: (shutil.move(folder / "a.png", folder / "z.png"), change(folder, imagePath="a\0.png")),
        ["a.json, imagePath", "path"],
    ),
    "no image": (lambda folder: (folder / "a.png").unlink(), ["a.json, imagePath", "no image file 'a.png'"]),
    "no path": (
        lambda folder: (shutil.move(folder / "a.png", folder / "z.png"), change(folder, imagePath=...)),
        ["a.json, imagePath", "missing"],
    ),
    "pixels in the file only": (
        lambda folder: ((folder / "a.png").unlink(), change(folder, imageData="iVBO")),
        ["a.json, imagePath", "no image file 'a.png'", "imageData", "write them to an image file"],
    ),
    "the image of another file": (
        lambda folder: (
            (shutil.move(folder / "a.json", folder / "z.json"), (folder / "a.png").unlink())
            and change_path(folder, "z.json", "b.png")
        ),
        ["z.json", "b.png is also the image of b.json"],
    ),
}


def change_path(folder, name, image):
    fields = {"imagePath": image, "imageHeight": 83, "imageWidth": 61}
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))


@pytest.mark.parametrize("case", FILE_FAULTS)
def test_a_faulty_file_is_one_sentence_and_its_image_is_skipped(folder, case):
    spoil, parts = FILE_FAULTS[case]
    spoil(folder)
    with pytest.raises(InputError) as error:
        read_labelme(folder, "all", CLASSES)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
    dataset = read_labelme(folder, "all", CLASSES, faults="skip")
    assert {"b.png", "c.png"} <= {record.id for record in dataset.records}
    assert sum(finding.is_fault for finding in dataset.findings) == 1 and FAULTY_IMAGE in sentences(dataset)


def test_images_without_a_file_have_no_objects_and_other_json_files_are_ignored(folder):
    (folder / "b.json").unlink()
    (folder / "project.json").write_text('{"classes": ["square"]}')
    dataset = read_labelme(folder, "all", CLASSES)
    assert [len(record.boxes) for record in dataset.records] == [2, 0, 0]
    assert sentences(dataset) == [labelme.NO_SHAPES, labelme.NO_FILE]


def test_the_image_beside_the_file_is_taken_where_image_path_names_another(folder):
    change(folder, imagePath="b.png")
    dataset = read_labelme(folder, "all", CLASSES)
    assert boxes_by_name(dataset) == expected() and sentences(dataset) == [labelme.OTHER_IMAGE]


@pytest.mark.parametrize("side", [..., None, "", 0, -1, "-1", "0.0"])
def test_a_missing_size_is_that_of_the_image(folder, side):
    change(folder, imageHeight=side, imageWidth=side)
    dataset = read_labelme(folder, "all", CLASSES)
    assert boxes_by_name(dataset) == expected() and sentences(dataset) == [labelme.NO_SIZE]


def test_a_size_turned_by_exif_makes_the_image_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 96)).save(folder / "a.jpg", exif=exif)
    (folder / "a.png").unlink()
    record = read_labelme(folder, "all", CLASSES).records[0]
    assert (record.id, record.image_hw, record.upright) == ("a.jpg", (64, 96), True)


def test_files_outside_the_folders_of_the_splits_are_left_out_and_counted(tmp_path):
    in_splits(tmp_path)
    (tmp_path / "extra.json").write_text(json.dumps(labelme_json(RECORDS[0])))
    assert splits(tmp_path) == THREE
    assert sentences(read_labelme(tmp_path, "train", CLASSES)) == [labelme.OUTSIDE_SPLITS]
    with pytest.raises(InputError, match=r"no split is named 'all'; the existing splits are: train, val, test"):
        read_labelme(tmp_path, "all", CLASSES)


def test_no_path_leads_out_of_the_folder(tmp_path):
    inside = tmp_path / "in"
    write_labelme(inside, RECORDS[:1])
    Image.new("RGB", (96, 64)).save(tmp_path / "only.png")
    shutil.move(inside / "a.png", inside / "z.png")
    for path in ("../only.png", str(tmp_path / "only.png")):
        change(inside, imagePath=path)
        with pytest.raises(InputError, match="no image file"):
            read_labelme(inside, "all", CLASSES)


def test_random_changes_of_labelme_files_give_records_or_our_error(tmp_path):
    """A short version of `python tests/fuzz_readers.py --of labelme --minutes 10`."""
    fuzz_readers.prepare_exports(tmp_path)
    # A fault of one file leaves the other images.
    assert all(fuzz_readers.attempt_export(tmp_path, seed, "labelme") for seed in range(150))
