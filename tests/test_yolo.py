"""Tests the reader of YOLO labels: the layouts that programs write, exact boxes, and one sentence for every fault."""

import shutil
from pathlib import Path

import fuzz_readers
import numpy as np
import pytest
from exports import CLASSES, RECORDS, write_images, write_yolo, write_yolo_labels
from PIL import Image

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import yolo
from fasterrcnn_jax.data.faults import FAULTY_IMAGE, FAULTY_OBJECT, OTHER_CLASS
from fasterrcnn_jax.data.file_names import MOVED
from fasterrcnn_jax.data.objects import CLIPPED, EMPTY
from fasterrcnn_jax.data.sources import with_class_names
from fasterrcnn_jax.data.yolo import class_names_in, read_yolo, recognise, splits
from fasterrcnn_jax.errors import InputError

LABEL = "labels/train/a.txt"


@pytest.fixture
def folder(tmp_path):
    write_yolo(tmp_path)
    return tmp_path


def yaml(folder, text):
    (folder / "data.yaml").write_text(text)


def boxes_by_name(dataset):
    """Returns {stem of the image: [(class name, box)]} as plain numbers."""
    return {
        Path(record.id).stem: [
            (dataset.class_names[label - 1], tuple(box)) for label, box in zip(record.labels, record.boxes.tolist())
        ]
        for record in dataset.records
    }


def expected(records=RECORDS):
    return {r.name: [(name, tuple(map(float, box))) for name, box in r.objects] for r in records}


def sentences(dataset):
    return [finding.sentence for finding in dataset.findings]


def test_boxes_are_those_that_were_written_to_the_bit(folder):
    dataset = read_yolo(folder, "train", CLASSES)
    assert boxes_by_name(dataset) == expected()
    assert [record.id for record in dataset.records] == [f"images/train/{name}.png" for name in "abc"]
    assert dataset.notes == () and all(record.boxes.dtype == np.float32 for record in dataset.records)


def test_six_decimals_give_the_boxes_to_their_rounding_and_no_note(folder):
    write_yolo_labels(folder / "labels/train", digits=6)
    dataset = read_yolo(folder, "train", CLASSES)
    for name, rows in boxes_by_name(dataset).items():
        np.testing.assert_allclose([b for _, b in rows], [b for _, b in expected()[name]], atol=1e-4)
    assert dataset.notes == ()


def roboflow(folder):
    for split in ("train", "valid", "test"):
        write_images(folder / split / "images")
        write_yolo_labels(folder / split / "labels")
    yaml(
        folder,
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['square', 'disc']\n\n"
        "roboflow:\n  workspace: w\n  url: https://universe.roboflow.com/w/p\n",
    )


def roboflow_by_program(folder):
    """The number of the classes is written with decimals."""
    roboflow(folder)
    yaml(
        folder,
        "names:\n- square\n- disc\nnc: 2.0\ntest: ../test/images\n"
        "train: Pets-1/train/images\nval: Pets-1/valid/images\n",
    )


def ultralytics(folder):
    write_yolo(folder, ("train", "val", "test"))


def ultralytics_elsewhere(folder):
    write_yolo(folder, ("train", "val", "test"))
    text = (folder / "data.yaml").read_text()
    yaml(folder, text.replace("path: .", "path: ../datasets/pets  # dataset root dir") + "download: |\n  exit 1\n")


def of_another_machine(folder):
    write_yolo(folder, ("train", "val", "test"))
    text = (folder / "data.yaml").read_text().replace("path: .\n", "")
    yaml(folder, text.replace(": images/", ": C:\\Users\\me\\pets\\images\\"))


def list_of_folders(folder):
    write_yolo(folder, ("one", "two", "val", "test"), RECORDS[:1])
    for split, record in (("one", RECORDS[1]), ("two", RECORDS[2])):
        write_images(folder / "images" / split, (record,))
        write_yolo_labels(folder / "labels" / split, (record,))
    (folder / "images/two/a.png").unlink()
    yaml(folder, "train:\n  - images/one\n  - images/two\nval: images/val\ntest: images/test\nnames: [square, disc]\n")


def cvat(folder):
    write_yolo(folder, ("train", "val", "test"))
    for split in ("train", "val", "test"):
        lines = "".join(f"images/{split}/{record.name}.png\n" for record in RECORDS)
        (folder / f"{split}.txt").write_text(lines)
    yaml(folder, "names:\n  0: square\n  1: disc\npath: .\ntrain: train.txt\nval: val.txt\ntest: test.txt\n")


def cvat_darknet(folder):
    for split in ("train", "valid", "test"):
        write_images(folder / f"obj_{split}_data")
        write_yolo_labels(folder / f"obj_{split}_data")
        (folder / f"{split}.txt").write_text("".join(f"data/obj_{split}_data/{r.name}.png\n" for r in RECORDS))
    (folder / "obj.names").write_text("square\ndisc\n")
    (folder / "obj.data").write_text(
        "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\ntest = data/test.txt\nnames = data/obj.names\n"
        "backup = backup/\n"
    )


def label_studio(folder):
    write_images(folder / "images")
    write_yolo_labels(folder / "labels")
    (folder / "classes.txt").write_text("square\ndisc")
    (folder / "notes.json").write_text('{"categories": [], "info": {}}')


def labelimg(folder):
    write_images(folder)
    write_yolo_labels(folder)
    (folder / "classes.txt").write_text("square\ndisc\n")


def labelimg_windows(folder):
    labelimg(folder)
    for path in folder.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def roboflow_darknet(folder):
    for split in ("train", "valid", "test"):
        write_images(folder / split)
        write_yolo_labels(folder / split)
        (folder / split / "_darknet.labels").write_text("square\ndisc\n")


THREE = ("train", "val", "test")
WRITERS = {
    roboflow: THREE,
    roboflow_by_program: THREE,
    ultralytics: THREE,
    ultralytics_elsewhere: THREE,
    of_another_machine: THREE,
    list_of_folders: THREE,
    cvat: THREE,
    cvat_darknet: ("train", "valid", "test"),
    label_studio: ("all",),
    labelimg: ("all",),
    labelimg_windows: ("all",),
    roboflow_darknet: ("train", "valid", "test"),
}


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_program_s_folder_is_recognised_and_gives_the_same_boxes(tmp_path, write):
    write(tmp_path)
    layout = recognise(tmp_path)
    assert layout is not None and (layout.name, layout.splits) == ("YOLO", WRITERS[write])
    assert (layout.data.layout, layout.data.root, layout.data.class_names) == ("yolo", tmp_path, CLASSES)
    assert layout.splits == splits(tmp_path) and class_names_in(tmp_path, layout.splits[0]) == CLASSES
    assert boxes_by_name(read_yolo(tmp_path, layout.splits[0], CLASSES)) == expected()


def test_a_folder_without_yolo_labels_is_not_recognised(tmp_path):
    write_images(tmp_path)
    (tmp_path / "a.txt").write_text("a red square\n")  # a caption
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("Car 0.00 0 -1.58 587.01 173.33 614.12 200.12 1.65\n")  # KITTI
    (tmp_path / "pipeline.yaml").write_text("steps: [1, 2]\n")
    assert recognise(tmp_path) is None and recognise(tmp_path / "absent") is None


def test_data_without_class_names_has_the_class_numbers_as_names(folder):
    (folder / "data.yaml").unlink()
    layout = recognise(folder)
    assert layout.data.class_names == ("0", "1") and layout.splits == ("train", "val")
    assert layout.notes[0].startswith(yolo.NO_NAMES)
    dataset = read_yolo(folder, "train", ("1",))
    assert len(dataset.records[0].boxes) == 1 and sentences(dataset).count(OTHER_CLASS) == 1
    assert sentences(dataset).count(yolo.NO_NAMES) == 1


def test_class_names_that_the_user_gives_name_the_class_numbers_of_data_without_names(folder):
    (folder / "data.yaml").unlink()
    assert boxes_by_name(read_yolo(folder, "train", CLASSES)) == expected()
    data = DataConfig(root=folder, layout="yolo", class_names=CLASSES, test_split="val")
    assert with_class_names(data) == data
    with pytest.raises(InputError, match=r"a.txt line 2, class: 1 is not one of the 1 class numbers of class_names"):
        read_yolo(folder, "train", ("square",))


def test_names_that_yaml_would_turn_into_other_values_stay_as_they_are_written(folder):
    yaml(folder, "train: images/train\nnames: [no, 007]\n")
    assert class_names_in(folder, "train") == ("no", "007")


def test_a_subset_of_the_classes_is_a_choice_and_counted(folder):
    dataset = read_yolo(folder, "train", ("disc",))
    assert sum(len(record.boxes) for record in dataset.records) == 3
    (note,) = dataset.notes
    assert note.startswith(f"{OTHER_CLASS}: 1,") and not dataset.findings[0].is_fault


def label(text):
    return lambda folder: (folder / LABEL).write_bytes(text if isinstance(text, bytes) else text.encode())


# What one label file holds -> the boxes that are read and the notes.
READ = {
    "a missing file": (lambda folder: (folder / LABEL).unlink(), [], yolo.NO_LABELS),
    "an empty file": (label(""), [], None),
    "blank lines": (label("\n \r\n0 0.5 0.5 0.5 0.5\n\n"), [(24, 16, 72, 48)], None),
    "a class number with a point": (label("0.0 0.5 0.5 0.5 0.5"), [(24, 16, 72, 48)], None),
    "commas": (label("0,0.5,0.5,0.5,0.5"), [(24, 16, 72, 48)], None),
    "commas and blanks": (label("0, 0.5, 0.5, 0.5, 0.5"), [(24, 16, 72, 48)], None),
    "tabs": (label("0\t0.5\t0.5\t0.5\t0.5"), [(24, 16, 72, 48)], None),
    "UTF-16": (label("0 0.5 0.5 0.5 0.5\r\n".encode("utf-16")), [(24, 16, 72, 48)], None),
    "a confidence": (label("0 0.5 0.5 0.5 0.5 0.93"), [(24, 16, 72, 48)], yolo.CONFIDENCE),
    "a polygon": (label("0 0.5 0.25 0.75 0.5 0.25 0.75"), [(24, 16, 72, 48)], yolo.OUTLINE),
    "a turned box": (label("0 0.5 0.25 0.75 0.5 0.5 0.75 0.25 0.5"), [(24, 16, 72, 48)], yolo.OUTLINE),
    "outside": (label("0 0.75 0.5 0.625 0.5"), [(42, 16, 96, 48)], CLIPPED),
    "just outside": (label("0 1.01 0.5 0.5 0.5"), [(72.96, 16, 96, 48)], CLIPPED),
    "rounded outside": (label("0 0.166666 0.5 0.333333 0.5"), [(0, 16, 31.99992, 48)], None),
    "no width": (label("0 0.5 0.5 0 0.5"), [], EMPTY),
    "an image in capitals": (
        lambda folder: shutil.move(folder / "images/train/a.png", folder / "images/train/a.PNG"),
        [(10, 12, 40, 44), (52, 8, 88, 40)],
        None,
    ),
    "files of systems": (
        lambda folder: [
            (folder / name).write_bytes(b"\0\xff")
            for name in ("labels/train.cache", "images/train/.DS_Store", "images/train/._a.png", "labels/train/._a.txt")
        ],
        [(10, 12, 40, 44), (52, 8, 88, 40)],
        None,
    ),
}


@pytest.mark.parametrize("case", READ)
def test_what_has_one_meaning_is_read_and_noted(folder, case):
    change, boxes, note = READ[case]
    change(folder)
    dataset = read_yolo(folder, "train", CLASSES)
    assert len(dataset.records) == 3
    np.testing.assert_allclose(dataset.records[0].boxes, np.array(boxes).reshape(-1, 4), rtol=1e-6)
    assert [line.split(":")[0] for line in dataset.notes] == ([] if note is None else [note])


FAULTS = {
    "pixels": ("0 25 28 30 32", ["a.txt line 1", "fraction", "'25'", "pixels"]),
    "four columns": ("0 0.5 0.5 0.5", ["a.txt line 1", "x y width height", "0 0.5 0.5 0.5"]),
    "eight columns": ("0 .1 .1 .2 .2 .3 .3 .4", ["a.txt line 1", "three points"]),
    "decimal commas": ("0 0,26 0,43 0,31 0,5", ["a.txt line 1", "number", "'0,26'"]),
    "no number": ("0 0.5 0.5 wide 0.5", ["a.txt line 1", "'wide'"]),
    "not finite": ("0 0.5 nan 0.5 0.5", ["a.txt line 1", "'nan'"]),
    "a class name": ("square 0.5 0.5 0.5 0.5", ["a.txt line 1, class", "'square'"]),
    "a class number beyond the names": (
        "1 .5 .5 .1 .1\n2 .5 .5 .1 .1",
        ["line 2, class", "2", "2 class numbers", "data.yaml"],
    ),
    "a negative class number": ("-1 0.5 0.5 0.5 0.5", ["line 1, class", "'-1'"]),
    "a broken class number": ("0.5 0.5 0.5 0.5 0.5", ["line 1, class", "'0.5'"]),
    "a huge class number": ("1e300 0.5 0.5 0.5 0.5", ["line 1, class", "'1e300'"]),
    "a negative width": ("0 0.5 0.5 -0.05 0.5", ["a.txt line 1", "negative"]),
    "outside the image": ("0 1.09 0.5 0.1 0.5", ["a.txt line 1", "outside the image (96 pixels)"]),
    "not text": (b"0 0.5 0.5 \xff 0.5", ["a.txt", "UTF-8"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_label_is_one_sentence_and_is_skipped_alone(folder, case):
    text, parts = FAULTS[case]
    label(text)(folder)
    with pytest.raises(InputError) as error:
        read_yolo(folder, "train", CLASSES)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
    dataset = read_yolo(folder, "train", CLASSES, faults="skip")
    assert boxes_by_name(dataset)["b"] == expected()["b"]
    assert sum(finding.is_fault for finding in dataset.findings) == 1
    assert {FAULTY_IMAGE if case == "not text" else FAULTY_OBJECT} <= set(sentences(dataset))


YAML_FAULTS = {
    "not YAML": ("train: [a\nnames: x: y", ["data.yaml line", "not YAML"]),
    "a tab": ("train:\n\t- a", ["data.yaml line 2", "not YAML"]),
    "a control character": ("train: \x07", ["data.yaml", "not YAML"]),
    "deep": ("a: " + "[" * 50_000, ["data.yaml", "20 nested lists"]),
    "long": ("train: a\nnames: [" + "a, " * 50_000 + "]", ["data.yaml", "at most", "characters"]),
    "a count that differs": ("train: images/train\nnc: 3\nnames: [a, b]", ["data.yaml, nc", "2", "'3'"]),
    "a count of other digits": ("train: images/train\nnc: 20\nnames: [a, b]", ["data.yaml, nc", "2", "'20'"]),
    "no name": ("train: images/train\nnames: [a, '']", ["data.yaml, names[1]", "''"]),
    "a name that is a list": ("train: images/train\nnames: [a, [b]]", ["data.yaml, names[1]", "['b']"]),
    "a key that is no number": ("train: images/train\nnames: {a: b}", ["data.yaml, names['a']", "class number"]),
    "a huge key": ("train: images/train\nnames: {99999: b}", ["data.yaml, names", "99999"]),
    "a path that is a mapping": ("train: {a: b}\nnames: [a]", ["data.yaml, train", "path"]),
    "no images": ("train: ../elsewhere\nnames: [a, b]", ["data.yaml, train", "'../elsewhere'", "relative"]),
    "two paths for one place": (
        "train: /a/images/train\nval: /b/images/train\nnames: [a, b]",
        ["data.yaml, val", "'/a/images/train'", "'/b/images/train'"],
    ),
    "keypoints": ("train: images/train\nnames: [a, b]\nkpt_shape: many", ["data.yaml, kpt_shape", "'many'"]),
}


@pytest.mark.parametrize("case", YAML_FAULTS)
def test_a_faulty_description_is_one_sentence(folder, case):
    text, parts = YAML_FAULTS[case]
    yaml(folder, text)
    for read in (lambda: read_yolo(folder, "train", CLASSES, faults="skip"), lambda: recognise(folder)):
        with pytest.raises(InputError) as error:
            read()
        assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
        assert len(str(error.value)) < 600 + len(str(folder))


def test_aliases_that_stand_for_billions_of_values_are_refused_at_once(folder):
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    yaml(folder, "\n".join([*lines, "names: *a39", "train: images/train"]))
    with pytest.raises(InputError, match="aliases"):
        read_yolo(folder, "train", CLASSES)


def test_objects_that_yaml_could_build_are_read_as_text(folder):
    yaml(
        folder,
        "train: !!python/object/apply:os.system ['exit 1']\nval: images/val\nnames: !!python/tuple [square, disc]\n",
    )
    with pytest.raises(InputError, match="no split is named 'train'; the existing splits are: val"):
        read_yolo(folder, "train", CLASSES)
    assert boxes_by_name(read_yolo(folder, "val", CLASSES)) == expected()


def test_a_split_whose_images_are_absent_is_left_out_and_said(folder):
    roboflow_text = "train: ../train/images\nval: images/val\ntest: ../test/images\nnames: [square, disc]\n"
    yaml(folder, roboflow_text.replace("../train/images", "../images/train"))
    layout = recognise(folder)
    assert layout.splits == ("train", "val") and layout.notes[0].startswith(yolo.NO_PLACE)
    assert "'../test/images'" in layout.notes[0]


def test_a_list_may_hold_paths_of_another_machine_and_every_repetition_is_counted(folder):
    (folder / "train.txt").write_text("C:\\old\\a.png\n/home/me/images/train/b.png\n./images/train/b.png\n")
    for name in ("images/val/a.png", "images/val/b.png"):
        (folder / name).unlink()
    yaml(folder, "train: train.txt\nnames: [square, disc]\n")
    dataset = read_yolo(folder, "train", CLASSES)
    assert [record.id for record in dataset.records] == ["images/train/a.png", "images/train/b.png"]
    assert sentences(dataset).count(MOVED) == 2 and sentences(dataset).count(yolo.REPEATED_IMAGE) == 1


def test_a_listed_image_that_is_absent_or_in_two_folders_is_a_fault_of_that_line(folder):
    (folder / "train.txt").write_text("images/train/a.png\nimages/train/z.png\nold/b.png\n")
    yaml(folder, "train: train.txt\nnames: [square, disc]\n")
    with pytest.raises(InputError, match=r"train.txt line 2: no image file 'images/train/z.png' in"):
        read_yolo(folder, "train", CLASSES)
    dataset = read_yolo(folder, "train", CLASSES, faults="skip")
    faults = [finding.where for finding in dataset.findings if finding.is_fault]
    assert len(dataset.records) == 1 and len(faults) == 2 and "2 images" in faults[1]


def test_no_path_leads_out_of_the_folder(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    write_yolo(inside)
    write_yolo(outside)
    for path in ("../out/images/val", str(outside / "images/val"), "images/../../out/images/val"):
        yaml(inside, f"train: {path}\nnames: [square, disc]\n")
        dataset = read_yolo(inside, "train", CLASSES)
        assert {record.path.relative_to(inside).parts[:2] for record in dataset.records} == {("images", "val")}
        assert yolo.OTHER_PLACE in sentences(dataset)
    (inside / "list.txt").write_text("../out/only.png\n")
    Image.new("RGB", (9, 9)).save(outside / "only.png")
    yaml(inside, "train: list.txt\nnames: [square, disc]\n")
    with pytest.raises(InputError, match="no image file '../out/only.png'"):
        read_yolo(inside, "train", CLASSES)


def test_the_last_folder_named_images_is_the_one_that_labels_replaces(tmp_path):
    root = tmp_path / "images"
    write_images(root / "images/day/images/train")
    write_yolo_labels(root / "images/day/labels/train")
    yaml(root, "train: images/day/images/train\nnames: [square, disc]\n")
    assert boxes_by_name(read_yolo(root, "train", CLASSES)) == expected()


def test_keypoints_behind_the_box_are_ignored_where_the_description_declares_them(folder):
    yaml(folder, "train: images/train\nkpt_shape: [2, 3]\nnames: [square, disc]\n")
    label("0 0.5 0.5 0.5 0.5 0.4 0.4 2 0 0 0")(folder)
    dataset = read_yolo(folder, "train", CLASSES)
    assert dataset.records[0].boxes.tolist() == [[24, 16, 72, 48]] and yolo.KEYPOINTS in sentences(dataset)


def test_lists_of_names_that_contradict_each_other_are_refused_and_a_shorter_one_is_not(tmp_path):
    label_studio(tmp_path)
    (tmp_path / "labels/classes.txt").write_text("square\n")
    assert class_names_in(tmp_path, "all") == CLASSES
    (tmp_path / "labels/classes.txt").write_text("disc\n")
    with pytest.raises(InputError, match=r"labels/classes.txt: the class names differ from those in .*classes.txt"):
        read_yolo(tmp_path, "all", CLASSES)
    (tmp_path / "labels/classes.txt").write_text("square\n\ndisc\n")
    with pytest.raises(InputError, match=r"classes.txt line 2: must be the name of class 1, but is empty"):
        read_yolo(tmp_path, "all", CLASSES)


def test_images_are_upright_because_the_labels_refer_to_upright_images(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 96)).save(folder / "images/train/a.jpg", exif=exif)
    (folder / "images/train/a.png").unlink()
    record = read_yolo(folder, "train", CLASSES).records[0]
    assert record.image_hw == (64, 96) and record.upright and record.boxes[0].tolist() == [10, 12, 40, 44]


def test_images_of_a_training_run_inside_the_folder_belong_to_no_split(folder):
    write_images(folder / "runs/detect/train")
    (folder / "data.yaml").write_text("names: [square, disc]\n")
    assert len(read_yolo(folder, "train", CLASSES).records) == 3


def test_random_changes_of_yolo_files_give_records_or_our_error(tmp_path):
    """A short version of `python tests/fuzz_readers.py --of yolo --minutes 10`."""
    fuzz_readers.prepare_exports(tmp_path)
    assert 20 < sum(fuzz_readers.attempt_export(tmp_path, seed, "yolo") for seed in range(50)) < 50
