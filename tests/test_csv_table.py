"""Tests the reader of csv tables: headers, places of images, exact boxes, and one sentence for every fault."""

import fuzz_readers
import numpy as np
import pytest
from exports import CLASSES, RECORDS, csv_lines, write_csv, write_images
from PIL import Image
from test_yolo import boxes_by_name, expected, sentences

from fasterrcnn_jax.data import csv_table
from fasterrcnn_jax.data.csv_table import class_names_in, read_csv, recognise, splits
from fasterrcnn_jax.data.faults import FAULTY_OBJECT, OTHER_CLASS
from fasterrcnn_jax.data.file_names import MOVED
from fasterrcnn_jax.data.objects import CLIPPED, EMPTY
from fasterrcnn_jax.errors import InputError

HEADER = csv_lines()[0]


@pytest.fixture
def folder(tmp_path):
    write_csv(tmp_path)
    return tmp_path


def table(folder, lines, name="train_labels.csv"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n")


def test_boxes_are_those_that_were_written_to_the_bit(folder):
    dataset = read_csv(folder, "train", CLASSES)
    assert boxes_by_name(dataset) == expected()
    assert [record.id for record in dataset.records] == [f"images/train/{name}.png" for name in "abc"]
    assert dataset.notes == ()


def tutorial(folder):
    write_csv(folder)


def raccoon(folder):
    write_images(folder / "images")
    for name in ("train_labels", "test_labels", "raccoon_labels"):
        table(folder, csv_lines(), f"data/{name}.csv")


def one_table(folder):
    write_images(folder)
    table(folder, csv_lines(), "annotations.csv")


def roboflow(folder):
    for split in ("train", "valid", "test"):
        write_images(folder / split)
        table(folder, csv_lines(), f"{split}/_annotations.csv")


def retinanet(folder):
    write_images(folder / "images")
    lines = [f"images/{r.name}.png,{','.join(map(str, box))},{name}" for r in RECORDS for name, box in r.objects]
    table(folder, [*lines, "images/c.png,,,,,"], "train.csv")
    table(folder, ["images/c.png,,,,,", *lines], "val.csv")
    table(folder, ["square,0", "disc,1"], "classes.csv")


def of_another_machine(folder):
    write_images(folder / "images/train")
    table(folder, [line.replace(".png", ".png", 1) for line in csv_lines()], "train.csv")
    text = (folder / "train.csv").read_text()
    for name in "abc":
        text = text.replace(f"\n{name}.png", f"\nC:\\data\\images\\train\\{name}.png")
    (folder / "train.csv").write_text(text)


def other_names(folder):
    write_images(folder / "images")
    lines = [line.split(",") for line in csv_lines()[1:]]
    order = (0, 4, 5, 6, 7, 3)
    rows = [[str(n), *(line[place] for place in order)] for n, line in enumerate(lines)]
    header = ["", "image_path", "x_min", "y_min", "x_max", "y_max", "Label"]
    table(folder, [";".join(row) for row in (header, *rows)], "boxes.csv")


def from_windows(folder):
    write_images(folder)
    quoted = "\r\n".join(",".join(f'"{field}"' for field in line.split(",")) for line in csv_lines())
    (folder / "train.csv").write_bytes(b"\xef\xbb\xbf" + quoted.encode() + b"\r\n\r\n")


def tabs_in_utf16(folder):
    write_images(folder)
    (folder / "train.csv").write_bytes("\n".join(csv_lines()).replace(",", "\t").encode("utf-16"))


WRITERS = {
    tutorial: ("train", "test"),
    raccoon: ("train", "test", "raccoon_labels"),
    one_table: ("all",),
    roboflow: ("train", "valid", "test"),
    retinanet: ("train", "val"),
    of_another_machine: ("train",),
    other_names: ("all",),
    from_windows: ("train",),
    tabs_in_utf16: ("train",),
}


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_table_is_recognised_and_gives_the_same_boxes(tmp_path, write):
    write(tmp_path)
    layout = recognise(tmp_path)
    assert layout is not None and (layout.name, layout.splits) == ("csv", WRITERS[write])
    assert layout.data.layout == "csv" and set(layout.data.class_names) == set(CLASSES)
    assert layout.splits == splits(tmp_path)
    for split in layout.splits:
        dataset = read_csv(tmp_path, split, CLASSES)
        assert boxes_by_name(dataset) == expected()
        assert set(sentences(dataset)) == ({MOVED} if write is of_another_machine else set())


def test_a_folder_without_a_table_of_boxes_is_not_recognised(tmp_path):
    write_images(tmp_path)
    table(tmp_path, ["image_id,label", "a.png,1"], "labels.csv")
    table(tmp_path, ["filename,x,y,width,height,class", "a.png,1,2,3,4,cat"], "other.csv")
    assert recognise(tmp_path) is None and recognise(tmp_path / "absent") is None


def test_class_names_are_in_the_order_of_a_class_file_and_else_sorted(tmp_path):
    retinanet(tmp_path)
    assert class_names_in(tmp_path, "train") == CLASSES
    (tmp_path / "classes.csv").unlink()
    assert class_names_in(tmp_path, "train") == ("disc", "square")


def test_a_subset_of_the_classes_is_a_choice_and_counted(folder):
    dataset = read_csv(folder, "train", ("disc",))
    assert sum(len(record.boxes) for record in dataset.records) == 3 and sentences(dataset) == [OTHER_CLASS]
    assert not dataset.findings[0].is_fault


# Lines of train_labels.csv behind a healthy one -> boxes of those lines and the notes.
READ = {
    "a blank line": (["", "a.png,96,64,disc,52,8,88,40"], [(52, 8, 88, 40)], []),
    "blanks": ([" a.png , 96,64, disc ,52, 8,88,40"], [(52, 8, 88, 40)], []),
    "a header": ([HEADER, "a.png,96,64,disc,52,8,88,40"], [(52, 8, 88, 40)], [csv_table.REPEATED_HEADER]),
    "an empty line of the image": (["a.png,96,64,,,,,"], [], []),
    "decimals": (["a.png,96,64,disc,52.25,8.5,88.0,4e1"], [(52.25, 8.5, 88, 40)], []),
    "outside": (["a.png,96,64,disc,-1,8,97,40"], [(0, 8, 96, 40)], [CLIPPED]),
    "no height": (["a.png,96,64,disc,52,8,88,8"], [], [EMPTY]),
    "a path": (["images/train/a.png,96,64,disc,52,8,88,40"], [(52, 8, 88, 40)], []),
    "without extension": (["a,96,64,disc,52,8,88,40"], [(52, 8, 88, 40)], []),
}


@pytest.mark.parametrize("case", READ)
def test_what_has_one_meaning_is_read_and_noted(folder, case):
    lines, boxes, notes = READ[case]
    table(folder, [HEADER, "a.png,96,64,square,10,12,40,44", *lines])
    dataset = read_csv(folder, "train", CLASSES)
    assert dataset.records[0].boxes.tolist() == np.array([(10, 12, 40, 44), *boxes], float).tolist()
    assert sentences(dataset) == notes and len(dataset.records) == 1


def test_a_size_of_zero_or_none_is_that_of_the_image(folder):
    table(folder, [HEADER, "a.png,0,0,disc,52,8,88,40", "b.png,,,disc,0,0,61,83"])
    dataset = read_csv(folder, "train", CLASSES)
    assert [record.image_hw for record in dataset.records] == [(64, 96), (83, 61)]
    assert sentences(dataset) == [csv_table.NO_SIZE] * 2


def test_an_image_of_other_letters_or_format_is_found_by_its_name(folder):
    table(folder, [HEADER, "old/A.PNG,96,64,disc,52,8,88,40", "old/b.bmp,61,83,disc,0,0,61,83"])
    for name in "ab":
        (folder / f"images/test/{name}.png").unlink()
    dataset = read_csv(folder, "train", CLASSES)
    assert [record.id for record in dataset.records] == ["images/train/a.png", "images/train/b.png"]
    assert sentences(dataset) == [MOVED] * 2


FAULTS = {
    "too few fields": ("a.png,96,64,disc,52,8,88", ["line 3", "8 fields", "7"]),
    "no number": ("a.png,96,64,disc,52,eight,88,40", ["line 3, ymin", "'eight'"]),
    "a missing corner": ("a.png,96,64,disc,52,,88,40", ["line 3, ymin", "''"]),
    "not finite": ("a.png,96,64,disc,52,8,inf,40", ["line 3, xmax", "'inf'"]),
    "corners in another order": ("a.png,96,64,disc,88,8,52,40", ["line 3", "smaller x 88", "larger x 52"]),
    "outside the image": ("a.png,96,64,disc,152,8,188,40", ["line 3", "outside the image (96 pixels)"]),
    "no class": ("a.png,96,64,,52,8,88,40", ["line 3, class", "''"]),
    "no image": ("z.png,96,64,disc,52,8,88,40", ["line 3, filename", "no image file 'z.png'"]),
    "no name": (",96,64,disc,52,8,88,40", ["line 3, filename", "path of a file"]),
    "a path out of the folder": ("../../z.png,96,64,disc,52,8,88,40", ["line 3, filename", "no image file"]),
    "a zero": ("a\0.png,96,64,disc,52,8,88,40", ["train_labels.csv"]),
    "another size": ("a.png,97,64,disc,52,8,88,40", ["line 3, width and height", "97", "96", "line 2"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_line_is_one_sentence_and_is_skipped(folder, case):
    line, parts = FAULTS[case]
    table(folder, [HEADER, "a.png,96,64,square,10,12,40,44", line, "b.png,61,83,disc,0,0,61,83"])
    with pytest.raises(InputError) as error:
        read_csv(folder, "train", CLASSES)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
    dataset = read_csv(folder, "train", CLASSES, faults="skip")
    assert [len(record.boxes) for record in dataset.records] == [1, 1] and sentences(dataset) == [FAULTY_OBJECT]


TABLE_FAULTS = {
    "fractions": ([HEADER, "a.png,96,64,disc,0.1,0.2,0.3,0.95"], ["pixels", "largest is 0.95", "multiply"]),
    "an open quote": ([HEADER, 'a.png,96,64,"disc,52,8,88,40'], ["not a csv table"]),
    "a column twice": (["filename,class,xmin,ymin,xmax,ymax,xmin", "a.png,disc,1,2,3,4,5"], ["xmin", "more than once"]),
}


@pytest.mark.parametrize("case", TABLE_FAULTS)
def test_a_faulty_table_is_one_sentence_in_both_modes(folder, case):
    lines, parts = TABLE_FAULTS[case]
    table(folder, lines)
    for faults in ("error", "skip"):
        with pytest.raises(InputError) as error:
            read_csv(folder, "train", CLASSES, faults=faults)
        assert all(part in str(error.value) for part in ("train_labels.csv", *parts))


def test_open_images_is_refused_because_its_corners_are_fractions(tmp_path):
    write_images(tmp_path)
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded"
    table(tmp_path, [header, "a,xclick,/m/01,1,0.1,0.4,0.2,0.9,0"], "train.csv")
    with pytest.raises(InputError, match=r"train.csv: the corners must be pixels, but the largest is 0.9"):
        read_csv(tmp_path, "train", ("/m/01",))


def test_a_split_that_no_table_has_and_two_tables_of_one_split_are_refused(folder):
    with pytest.raises(InputError, match="named 'val'; the existing splits are: train, test"):
        read_csv(folder, "val", CLASSES)
    table(folder, csv_lines(), "data/train.csv")
    with pytest.raises(InputError, match=r"data/train.csv: split train is also in .*train_labels.csv"):
        read_csv(folder, "train", CLASSES)


def test_the_width_and_height_say_whether_exif_turned_the_image(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 96)).save(folder / "images/train/a.jpg", exif=exif)
    (folder / "images/train/a.png").unlink()
    table(folder, [HEADER, "a.jpg,96,64,square,10,12,40,44"])
    record = read_csv(folder, "train", CLASSES).records[0]
    assert (record.image_hw, record.upright) == ((64, 96), True)


def test_random_changes_of_csv_tables_give_records_or_our_error(tmp_path):
    """A short version of `python tests/fuzz_readers.py --of csv --minutes 10`."""
    fuzz_readers.prepare_exports(tmp_path)
    assert 50 < sum(fuzz_readers.attempt_export(tmp_path, seed, "csv") for seed in range(120)) < 120
