"""Tests the recognition of layouts: the same images through the layout of every labelling tool give the same boxes."""

import dataclasses
import shutil
import unicodedata
from urllib.parse import quote

import exports
import fuzz_readers
import numpy as np
import pytest
from PIL import Image

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import sources
from fasterrcnn_jax.data.images import GREY_16
from fasterrcnn_jax.errors import InputError

# layout -> (data.layout, splits, whether it has fractions of pixels)
LAYOUTS = {
    "PASCAL VOC": ("voc", ("train", "test"), False),
    "VOCdevkit": ("vocdevkit", ("2007_train", "2007_test"), False),
    "labelImg": ("voc", ("all",), False),
    "labelImg in folders": ("voc", ("all",), False),
    "Kaggle": ("voc", ("all",), False),
    "Label Studio VOC": ("voc", ("all",), False),
    "CVAT VOC": ("voc", ("default",), True),
    "CVAT VOC in folders": ("voc", ("default",), True),
    "Roboflow VOC": ("voc", ("train", "valid", "test"), False),
    "VOC in folders of splits": ("voc", ("train", "val"), False),
    "VoTT": ("voc", ("train", "val"), False),
    "XML named after the image file": ("voc", ("all",), False),
    "COCO": ("coco", ("train2017", "val2017"), True),
    "COCO with train.json": ("coco", ("train", "val"), True),
    "Roboflow COCO": ("coco", ("train", "valid", "test"), True),
    "CVAT COCO": ("coco", ("default",), True),
    "Label Studio COCO": ("coco", ("result",), True),
    "Label Studio COCO on Windows": ("coco", ("result",), True),
    "COCO of any name": ("coco", ("my labels",), True),
    "COCO with absolute paths": ("coco", ("train", "val"), True),
    "COCO beside the images": ("coco", ("train", "valid"), True),
    "VIA": ("coco", ("via_export_coco",), True),
    "YOLO": ("yolo", ("train", "val"), False),
    "LabelMe": ("labelme", ("all",), True),
    "csv": ("csv", ("train", "test"), True),
}
# Corners in whole pixels, which every layout can write.
WHOLE_PIXELS = tuple(
    record._replace(objects=tuple((name, tuple(map(round, box))) for name, box in record.objects))
    for record in exports.RECORDS
)


def stem(record):
    return record.path.name.split(".")[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_images_through_every_layout_give_the_same_boxes(layout, tmp_path):
    (name, splits, keeps_fractions), write = LAYOUTS[layout], exports.WRITERS[layout]
    records = exports.RECORDS if keeps_fractions else WHOLE_PIXELS
    write(tmp_path / "my set", records=records)
    recognised = sources.recognise(tmp_path / "my set")
    assert (recognised.data.layout, recognised.splits) == (name, splits), recognised
    assert set(recognised.data.class_names) == set(exports.CLASSES)
    data = dataclasses.replace(recognised.data, class_names=exports.CLASSES)
    for split in splits:
        dataset = sources.read(data, split)
        assert not any(finding.is_fault for finding in dataset.findings)
        got = {stem(record): record for record in dataset.records}
        assert {record.name for record in records} == set(got) and len(dataset.records) == len(records)
        for record in records:
            boxes = np.float32([box for _, box in record.objects]).reshape(-1, 4)
            assert got[record.name].image_hw == record.size[::-1]
            np.testing.assert_array_equal(
                got[record.name].labels, [exports.CLASSES.index(name) + 1 for name, _ in record.objects]
            )
            if layout == "YOLO":  # writes fractions of the image
                np.testing.assert_allclose(got[record.name].boxes, boxes, atol=1e-5)
            else:
                np.testing.assert_array_equal(got[record.name].boxes, boxes)


def test_spoiled_folders_are_recognised_or_refused_in_one_sentence(tmp_path):
    """A short version of `python tests/fuzz_readers.py --of layouts --minutes 10`."""
    fuzz_readers.prepare_layouts(tmp_path)
    assert 50 < sum(fuzz_readers.attempt_layout(tmp_path, seed) for seed in range(60, 120))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_auto_reads_what_is_recognised(layout, tmp_path):
    (name, splits, _), write = LAYOUTS[layout], exports.WRITERS[layout]
    write(tmp_path, records=WHOLE_PIXELS)
    data = sources.with_class_names(DataConfig(root=tmp_path, layout="auto"))
    assert data.layout == name and set(data.class_names) == set(exports.CLASSES)
    assert data.train_split in splits and sources.with_layout(data) is data
    assert len(sources.read(data, data.train_split).records) == 3
    # A folder without a second split has no test split.
    assert (data.test_split in splits) == (len(splits) > 1)


@pytest.mark.parametrize("layout", ["labelImg", "PASCAL VOC", "Roboflow COCO", "YOLO", "CVAT COCO"])
def test_a_folder_that_holds_only_the_folder_of_the_data_is_taken_for_it(layout, tmp_path):
    splits = LAYOUTS[layout][1]
    exports.WRITERS[layout](tmp_path / "set/set", records=WHOLE_PIXELS)
    (tmp_path / "set/.DS_Store").touch()
    (tmp_path / "set/README.roboflow.txt").touch()
    recognised = sources.recognise(tmp_path / "set")
    assert recognised.data.root == tmp_path / "set/set" and recognised.splits == splits
    assert recognised.notes[0] == f"{tmp_path / 'set'} contains only the folder set, which is read"


def test_splits_that_are_not_there_are_replaced_only_where_they_are_the_defaults(tmp_path):
    exports.write_voc_roboflow(tmp_path, records=WHOLE_PIXELS)
    shutil.rmtree(tmp_path / "test")
    auto = DataConfig(root=tmp_path, layout="auto")
    assert sources.with_layout(auto).test_split == "valid"
    assert sources.with_layout(dataclasses.replace(auto, test_split="tset")).test_split == "tset"
    with pytest.raises(InputError, match="existing splits are: train, valid; name one, for example --data.test_split"):
        sources.read(dataclasses.replace(auto, test_split="tset"), "tset")


def test_classes_that_are_given_stay_with_auto(tmp_path):
    exports.write_coco(tmp_path)
    data = sources.with_class_names(DataConfig(root=tmp_path, layout="auto", class_names=("disc",)))
    assert data.class_names == ("disc",) and data.coco_images == "{split}"


def test_two_layouts_in_a_folder_are_said(tmp_path):
    exports.write_voc_flat(tmp_path, records=WHOLE_PIXELS)
    exports.write_yolo_labels(tmp_path / "labels", WHOLE_PIXELS)
    (tmp_path / "classes.txt").write_text("square\ndisc\n")
    recognised = sources.recognise(tmp_path)
    assert recognised.data.layout == "voc"
    assert "the folder could also be read as YOLO with --data.layout yolo" in recognised.notes


FOUND = {
    "nothing": (lambda root: None, "the folder contains no file"),
    "images": (lambda root: exports.write_images(root), "contains 3 of .png, and no annotations"),
    "XML without images": (
        lambda root: (exports.write_voc_flat(root), shutil.rmtree(root / "images")),
        "contains 3 of .xml; the nearest layout is PASCAL VOC, which needs an image for each XML file",
    ),
    "XML of other images": (
        lambda root: (exports.write_voc_flat(root), [path.rename(path.with_stem(f"other {path.stem}"))
                                                     for path in (root / "images").iterdir()]),
        "the nearest layout is PASCAL VOC, whose XML files have the root <annotation> and are named like their images",
    ),
    "json of another kind": (
        lambda root: (exports.write_images(root), (root / "a.json").write_text('{"regions": []}')),
        "the nearest layout is COCO, whose json has the lists images, annotations and categories",
    ),
    "two data sets": (
        lambda root: (exports.write_voc_flat(root / "one"), exports.write_voc_flat(root / "two")),
        "did you mean {root}/one or {root}/two",
    ),
    "a data.yaml without train": (
        lambda root: (exports.write_images(root / "images"),
                      (root / "data.yaml").write_text("train: ../pictures\nnames: [a]\n")),
        "data.yaml, train: '../pictures'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_what_is_found_is_said_where_no_layout_is(case, tmp_path):
    write, said = FOUND[case]
    root = tmp_path / "set"
    root.mkdir()
    write(root)
    with pytest.raises(InputError) as caught:
        sources.recognise(root)
    assert said.format(root=root) in str(caught.value) and str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        sources.recognise(tmp_path / "nowhere")


def test_other_folders_and_files_are_no_splits(tmp_path):
    exports.write_voc_roboflow(tmp_path, records=WHOLE_PIXELS)
    (tmp_path / "README.roboflow.txt").touch()
    (tmp_path / "docs").mkdir()
    assert sources.recognise(tmp_path).splits == ("train", "valid", "test")


def test_xml_files_of_another_kind_are_passed_over(tmp_path):
    exports.write_voc_flat(tmp_path, records=WHOLE_PIXELS)
    (tmp_path / "annotations.xml").write_text("<annotations><image/></annotations>")
    data = sources.recognise(tmp_path).data
    assert (data.voc_annotations, data.voc_images) == ("annotations", "images")


def test_a_folder_that_all_images_share_stays_in_the_ids_of_a_list(tmp_path):
    exports.write_images(tmp_path / "JPEGImages/day 1", WHOLE_PIXELS)
    exports.write_xml(tmp_path / "Annotations/day 1", WHOLE_PIXELS)
    exports.write_list(tmp_path, "default", [f"day 1/{record.name}" for record in WHOLE_PIXELS])
    dataset = sources.read(sources.recognise(tmp_path).data, "default")
    assert [record.id for record in dataset.records] == ["day 1/a", "day 1/b", "day 1/c"] and dataset.notes == ()


def test_maps_of_segments_are_not_taken_for_the_images(tmp_path):
    exports.write_voc(tmp_path, records=WHOLE_PIXELS)
    exports.write_images(tmp_path / "SegmentationClass", WHOLE_PIXELS)
    assert sources.recognise(tmp_path).data.voc_images == "JPEGImages"


def test_images_without_xml_are_no_split_and_are_left_out(tmp_path):
    exports.write_voc_beside(tmp_path, records=WHOLE_PIXELS)
    (tmp_path / "b.xml").unlink()
    dataset = sources.read(sources.recognise(tmp_path).data, "all")
    assert [stem(record) for record in dataset.records] == ["a", "c"]
    assert "Images without an XML file were left out: 1" in dataset.notes[0]


def test_a_file_name_too_long_for_the_file_system_hides_no_layout(tmp_path):
    """A fuzzer's finding."""
    exports.write_coco_label_studio(tmp_path)
    path = tmp_path / "result.json"
    path.write_text(path.read_text().replace("images/a.png", "a" * 300))
    assert sources.recognise(tmp_path).splits == ("result",)


def test_a_grouping_category_that_one_split_uses_is_a_class(tmp_path):
    exports.write_coco_roboflow(tmp_path)
    path = tmp_path / "test/_annotations.coco.json"
    path.write_text(path.read_text().replace('"category_id": 1', '"category_id": 0'))
    recognised = sources.recognise(tmp_path)
    assert set(recognised.data.class_names) == {"square", "disc", "shapes"}


def test_a_link_out_of_the_folder_is_refused_unless_links_are_followed(tmp_path):
    exports.write_voc_beside(tmp_path / "set", records=WHOLE_PIXELS)
    (tmp_path / "set/a.xml").rename(tmp_path / "a.xml")
    (tmp_path / "set/a.xml").symlink_to(tmp_path / "a.xml")
    with pytest.raises(InputError, match="data.follow_links = True allows it"):
        sources.recognise(tmp_path / "set")
    data = sources.with_layout(DataConfig(root=tmp_path / "set", layout="auto", follow_links=True))
    assert len(sources.read(data, "all").records) == 3


@pytest.mark.parametrize("layout", ["PASCAL VOC", "COCO", "YOLO", "csv", "Kaggle", "CVAT COCO"])
def test_a_linked_folder_of_images_is_read_where_links_are_followed(layout, tmp_path):
    exports.WRITERS[layout](tmp_path / "set", records=WHOLE_PIXELS)
    folder = next(
        tmp_path / "set" / name for name in ("JPEGImages", "train2017", "images") if (tmp_path / "set" / name).is_dir()
    )
    folder.rename(tmp_path / "pictures")
    folder.symlink_to(tmp_path / "pictures")
    data = sources.with_class_names(DataConfig(root=tmp_path / "set", layout="auto", follow_links=True))
    assert len(sources.read(data, data.train_split).records) == 3


@pytest.mark.parametrize("layout", ["LabelMe", "csv", "labelImg", "Kaggle"])
def test_a_linked_folder_of_labels_is_left_out_unless_links_are_followed(layout, tmp_path):
    """The folder of the data holds a link to the folder of the tables, json files or XML files, and nothing else."""
    exports.WRITERS[layout](tmp_path / "set", records=WHOLE_PIXELS)
    if layout == "csv":
        (tmp_path / "set/annotations").mkdir()
        for path in (tmp_path / "set").glob("*.csv"):
            path.rename(tmp_path / "set/annotations" / path.name)
        linked = "annotations"
    elif layout == "Kaggle":
        linked = "annotations"
    else:
        (tmp_path / "set").rename(tmp_path / "day1")
        (tmp_path / "set").mkdir()
        (tmp_path / "day1").rename(tmp_path / "set/day1")
        (tmp_path / "set/notes.csv").touch()
        linked = "day1"
    (tmp_path / "set" / linked).rename(tmp_path / "outside")
    (tmp_path / "set" / linked).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="no known layout of labelled images"):
        sources.recognise(tmp_path / "set")
    data = sources.with_class_names(DataConfig(root=tmp_path / "set", layout="auto", follow_links=True))
    dataset = sources.read(data, data.train_split)
    assert sum(len(record.boxes) for record in dataset.records) == 4


def test_a_linked_table_is_refused_unless_links_are_followed(tmp_path):
    exports.write_csv(tmp_path / "set", records=WHOLE_PIXELS)
    table = tmp_path / "set/train_labels.csv"
    table.rename(tmp_path / "table.csv")
    table.symlink_to(tmp_path / "table.csv")
    with pytest.raises(InputError, match="train_labels.csv: must lie inside .* is reached by a link"):
        sources.recognise(tmp_path / "set")
    for named in ("auto", "csv"):
        data = sources.with_class_names(DataConfig(root=tmp_path / "set", layout=named, follow_links=True))
        assert len(sources.read(data, "train").records) == 3


@pytest.mark.parametrize("layout", ["labelImg", "CVAT COCO", "YOLO", "LabelMe", "csv"])
def test_grey_images_of_16_bits_are_counted_in_every_layout(layout, tmp_path):
    exports.WRITERS[layout](tmp_path, records=WHOLE_PIXELS)
    for path in tmp_path.rglob("a.png"):
        Image.fromarray(np.full((64, 96), 300, np.uint16)).save(path)
    data = sources.with_class_names(DataConfig(root=tmp_path, layout="auto"))
    notes = [note for note in sources.read(data, data.train_split).notes if note.startswith(GREY_16)]
    assert len(notes) == 1 and notes[0].startswith(f"{GREY_16}: 1, the first in ") and "a.png" in notes[0]


@pytest.mark.parametrize("layout", ["labelImg", "Kaggle", "COCO with train.json", "YOLO", "LabelMe", "csv"])
def test_names_with_accents_are_the_same_composed_and_decomposed(layout, tmp_path):
    """macOS writes ä as two characters into names of files, other systems and annotations as one."""
    names = ["bäd é", "ok"]
    composed, decomposed = (
        [
            record._replace(name=unicodedata.normalize(form, name))
            for name, record in zip(names, WHOLE_PIXELS, strict=False)
        ]
        for form in ("NFC", "NFD")
    )
    exports.WRITERS[layout](tmp_path, records=composed)
    for path in [path for path in tmp_path.rglob("*") if path.suffix == ".png"]:
        path.unlink()
        written = unicodedata.normalize("NFD", path.stem)
        exports.write_images(path.parent, [record for record in decomposed if record.name == written])
    data = sources.with_class_names(DataConfig(root=tmp_path, layout="auto"))
    dataset = sources.read(data, data.train_split)
    assert sorted(unicodedata.normalize("NFC", stem(record)) for record in dataset.records) == names
    assert [len(record.boxes) for record in dataset.records] == [2, 2]


def test_class_names_with_accents_are_one_class(tmp_path):
    exports.write_voc_beside(tmp_path, records=WHOLE_PIXELS)
    for name, form in (("a", "NFC"), ("b", "NFD")):
        path = tmp_path / f"{name}.xml"
        path.write_text(path.read_text().replace("disc", unicodedata.normalize(form, "Löwe")), encoding="utf-8")
    data = DataConfig(root=tmp_path, layout="auto")
    assert sources.with_class_names(data).class_names == ("Löwe", "square")
    given = dataclasses.replace(data, class_names=(unicodedata.normalize("NFD", "Löwe"),))
    assert sum(len(record.boxes) for record in sources.read(sources.with_class_names(given), "all").records) == 3


@pytest.mark.parametrize("layout", ["Roboflow VOC", "Roboflow COCO", "YOLO", "LabelMe", "csv", "PASCAL VOC"])
def test_splits_and_labels_are_found_in_any_letter_case(layout, tmp_path):
    if layout == "LabelMe":
        for split in ("train", "valid"):
            exports.write_labelme(tmp_path / split, records=WHOLE_PIXELS)
    else:
        exports.WRITERS[layout](tmp_path, records=WHOLE_PIXELS)
    # Deepest first, so that the path of each stays valid.
    for path in sorted(tmp_path.rglob("*"), key=lambda path: -len(path.parts)):
        if path.suffix != ".yaml" and path.suffix.lower() not in (".png", ".xml") and path.stem != "_annotations.coco":
            path.rename(path.with_name(path.name.title().replace(".Png", ".png")))
    data = sources.with_class_names(DataConfig(root=tmp_path, layout="auto"))
    assert data.train_split.lower() == "train" and data.test_split.lower() in ("test", "val", "valid")
    for split in (data.train_split, data.test_split):
        assert sum(len(record.boxes) for record in sources.read(data, split).records) == 4


def test_the_test_split_is_preferred_for_the_report(tmp_path):
    exports.write_voc_roboflow(tmp_path, records=WHOLE_PIXELS)
    (tmp_path / "test").rename(tmp_path / "Testing")
    data = sources.with_layout(DataConfig(root=tmp_path, layout="auto"))
    assert (data.train_split, data.test_split) == ("train", "Testing")


@pytest.mark.parametrize("layout", ["labelImg", "LabelMe", "YOLO", "Kaggle", "CVAT COCO"])
def test_the_images_of_a_run_folder_are_no_data(layout, tmp_path):
    exports.WRITERS[layout](tmp_path, records=WHOLE_PIXELS)
    before = sources.recognise(tmp_path)
    run = tmp_path / "runs/set"
    exports.write_images(run / "images", [record._replace(name=f"run {record.name}") for record in WHOLE_PIXELS])
    (run / "checkpoints/4").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    after = sources.recognise(tmp_path)
    assert (after.splits, after.why) == (before.splits, before.why)
    found = sources.read(after.data, after.splits[0])
    assert len(found.records) == 3 and found.notes == sources.read(before.data, before.splits[0]).notes


@pytest.mark.parametrize("name, way", [("set.zip", "unpack it"), ("data.yaml", "give the folder that holds it")])
def test_a_file_in_place_of_the_folder_is_refused_with_the_way(name, way, tmp_path):
    (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match=f"{name}: must be the folder of the data set, but is a file; {way}"):
        sources.recognise(tmp_path / name)


def test_the_reason_why_no_class_is_found_is_said(tmp_path):
    exports.write_voc_beside(tmp_path, records=WHOLE_PIXELS)
    for path in tmp_path.glob("*.xml"):
        path.write_text('<?xml version="1.0" encoding="utf-16"?>' + path.read_text())
    with pytest.raises(InputError, match="a.xml: the file is not well-formed XML"):
        sources.with_class_names(DataConfig(root=tmp_path, layout="auto"))


def test_label_files_with_the_names_of_a_url_belong_to_their_images(tmp_path):
    """Label Studio writes labels/Capture_d%C3%A9cran.txt for images/Capture_décran.png (its issue 1266)."""
    records = [record._replace(name=f"bild é {record.name}") for record in WHOLE_PIXELS]
    exports.write_yolo(tmp_path, records=records)
    for path in (tmp_path / "labels").rglob("*.txt"):
        path.rename(path.with_name(quote(path.name)))
    dataset = sources.read(sources.recognise(tmp_path).data, "train")
    assert sum(len(record.boxes) for record in dataset.records) == 4 and dataset.notes == ()


def test_lists_beside_the_folders_are_the_splits(tmp_path):
    """The layout of PaddleDetection: a line names the image and its XML file."""
    exports.write_voc_flat(tmp_path, records=WHOLE_PIXELS)
    for split, names in (("train", "ab"), ("val", "c")):
        lines = "".join(f"./images/{name}.png ./annotations/{name}.xml\n" for name in names)
        (tmp_path / f"{split}.txt").write_text(lines)
    (tmp_path / "label_list.txt").write_text("square\ndisc\n")
    recognised = sources.recognise(tmp_path)
    assert recognised.splits == ("train", "val")
    assert [len(sources.read(recognised.data, split).records) for split in recognised.splits] == [2, 1]
