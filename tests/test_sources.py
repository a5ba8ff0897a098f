"""Tests opening data: layouts, joined splits, messages for missing data, and folders of images."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
import tiny

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data.faults import OTHER_CLASS
from fasterrcnn_jax.data.sources import OTHER_IDS, open_split, with_class_names
from fasterrcnn_jax.errors import InputError


@pytest.fixture
def voc(tmp_path):
    tiny.write_voc(tmp_path / "voc", train=3, test=2)
    return DataConfig(root=tmp_path / "voc", class_names=tiny.CLASS_NAMES)


@pytest.fixture
def devkit(tmp_path):
    """Writes VOC2007 with the lists trainval and test, and VOC2012 with trainval; ids contain the year."""
    for year, test in (("2007", 2), ("2012", 0)):
        folder = tmp_path / f"devkit/VOC{year}"
        tiny.write_voc(folder, train=3, test=test, seed=int(year))
        for path in [*folder.glob("Annotations/*"), *folder.glob("JPEGImages/*")]:
            path.rename(path.with_name(f"{year}_{path.name}"))
        for path in folder.glob("Annotations/*"):
            path.write_text(path.read_text().replace("<filename>", f"<filename>{year}_"))
        for path in folder.glob("ImageSets/Main/*.txt"):
            path.write_text("".join(f"{year}_{name}\n" for name in path.read_text().split()))
        (folder / "ImageSets/Main/train.txt").rename(folder / "ImageSets/Main/trainval.txt")
        if not test:
            (folder / "ImageSets/Main/test.txt").unlink()
    return DataConfig(root=tmp_path / "devkit", layout="vocdevkit", class_names=tiny.CLASS_NAMES)


@pytest.fixture
def coco(tmp_path):
    """Writes the splits a2017 with images 0, 1 and b2017 with images 2, 3; every image has one object."""
    root, box = tmp_path / "coco", (3, 4, 23, 28)
    (root / "annotations").mkdir(parents=True)
    for split, first in (("a2017", 0), ("b2017", 2)):
        dataset = tiny.dataset(root / split, [(tiny.rectangle_image((48, 72), box), [box], [1])] * 2)
        images = [
            {"id": first + n, "file_name": record.path.name, "height": 48, "width": 72}
            for n, record in enumerate(dataset.records)
        ]
        annotations = [
            {"id": n, "image_id": first + n, "category_id": 5, "bbox": [3, 4, 20, 24], "area": 300, "iscrowd": 0}
            for n in range(2)
        ]
        categories = [{"id": 5, "name": "ring"}, {"id": 9, "name": "disc"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return DataConfig(root=root, layout="coco", class_names=tiny.CLASS_NAMES)


def ids(dataset):
    return [record.id for record in dataset.records]


def one_sentence(data, split):
    with pytest.raises(InputError) as caught:
        open_split(data, split)
    assert "\n" not in str(caught.value) and ". " not in str(caught.value)
    return str(caught.value)


def test_voc_folder_is_opened_and_its_notes_are_logged(voc, caplog):
    (voc.root / "ImageSets/Main/train.txt").write_text("train0\ntrain1\ntrain1\n")
    with caplog.at_level(logging.INFO, logger="fasterrcnn_jax"):
        dataset = open_split(voc, "train")
    assert ids(dataset) == ["train0", "train1"] and dataset.category_ids == (1, 2)
    said = [(record.levelname, record.message) for record in caplog.records]
    assert said == [("INFO", f"{dataset.name}: 2 images"), ("WARNING", dataset.notes[0])]


def test_year_and_list_name_a_split_of_a_devkit(devkit):
    dataset = open_split(devkit, "2007_trainval")
    assert ids(dataset) == [f"2007_train{n}" for n in range(3)]
    assert dataset.records[0].path.parent == devkit.root / "VOC2007/JPEGImages"
    assert ids(open_split(devkit, "2007_test")) == ["2007_test0", "2007_test1"]


def test_joined_splits_follow_one_another(voc, devkit, coco):
    both = [f"{year}_train{n}" for year in (2007, 2012) for n in range(3)]
    assert ids(open_split(devkit, "2007_trainval+2012_trainval")) == both
    assert ids(open_split(devkit, "2012_trainval+2007_trainval")) == both[3:] + both[:3]
    assert ids(open_split(voc, "train+test")) == ["train0", "train1", "train2", "test0", "test1"]
    joined = open_split(coco, "a2017+b2017")
    assert ids(joined) == ["0", "1", "2", "3"] and joined.category_ids == (5, 9)
    assert [record.path.parent.name for record in joined.records] == ["a2017", "a2017", "b2017", "b2017"]
    assert "a2017" in joined.name and "b2017" in joined.name


def test_notes_of_joined_splits_are_joined(devkit):
    for year in ("2007", "2012"):
        path = devkit.root / f"VOC{year}/ImageSets/Main/trainval.txt"
        path.write_text(path.read_text() + f"{year}_train0\n")
    notes = open_split(devkit, "2007_trainval+2012_trainval").notes
    assert len(notes) == 2 and "VOC2007" in notes[0] and "VOC2012" in notes[1]


@pytest.mark.parametrize("split", ["train+train", "train+test"])
def test_an_image_in_two_joined_splits_is_named(voc, split):
    (voc.root / "ImageSets/Main/test.txt").write_text("test0\ntrain2\n")
    shared = "train0" if split == "train+train" else "train2"
    assert f"image id {shared} is also in" in one_sentence(voc, split)


def test_joined_files_that_number_the_classes_differently_get_ids_from_one(coco):
    path = coco.root / "annotations/instances_b2017.json"
    path.write_text(path.read_text().replace('"id": 9,', '"id": 8,'))
    joined = open_split(coco, "a2017+b2017")
    assert joined.category_ids == (1, 2) and joined.findings[-1].sentence == OTHER_IDS
    assert open_split(coco, "b2017").category_ids == (5, 8)


def test_images_of_joined_files_with_the_same_ids_are_told_apart_by_their_split(coco):
    path = coco.root / "annotations/instances_b2017.json"
    content = json.loads(path.read_text())
    content["images"] = [image | {"id": image["id"] - 2} for image in content["images"]]
    content["annotations"] = [item | {"image_id": item["image_id"] - 2} for item in content["annotations"]]
    path.write_text(json.dumps(content))
    joined = open_split(coco, "a2017+b2017")
    assert ids(joined) == ["a2017/0", "a2017/1", "b2017/0", "b2017/1"]
    assert [record.path.parent.name for record in joined.records] == ["a2017", "a2017", "b2017", "b2017"]


def test_joined_files_must_not_share_an_image_under_two_ids(coco):
    for split in ("a2017", "b2017"):
        for path in (coco.root / split).iterdir():
            (coco.root / "images").mkdir(exist_ok=True)
            path.replace(coco.root / "images" / path.name)
    assert "splits joined by + must not share images" in one_sentence(
        dataclasses.replace(coco, coco_images="images"), "a2017+b2017"
    )


def test_coco_folder_is_opened(coco):
    dataset = open_split(coco, "b2017")
    assert ids(dataset) == ["2", "3"] and dataset.category_ids == (5, 9)
    np.testing.assert_array_equal(dataset.records[0].boxes, [[3, 4, 23, 28]])


def test_coco_files_may_lie_elsewhere_below_the_root(coco):
    (coco.root / "annotations").rename(coco.root / "json")
    (coco.root / "a2017").rename(coco.root / "images")
    data = dataclasses.replace(coco, coco_annotations="json/instances_{split}.json", coco_images="images")
    assert open_split(data, "a2017").records[0].path.parent == coco.root / "images"


@pytest.mark.parametrize("split", ["", "..", "../a2017", "a\\b", "a2017+"])
def test_coco_split_must_be_part_of_a_file_name(coco, split):
    assert "split must be" in one_sentence(coco, split)


@pytest.mark.parametrize("split", ["trainval", "07_trainval", "2007", "2007_", "", "2007_trainval+"])
def test_devkit_split_without_year_or_list_is_refused(devkit, split):
    assert "YEAR_NAME, for example 2007_trainval" in one_sentence(devkit, split)


def test_devkit_list_that_is_no_plain_name_is_refused(devkit):
    assert "split must be" in one_sentence(devkit, "2007_../../train")


def test_unknown_devkit_list_names_the_existing_lists(devkit):
    assert "existing splits are: trainval, test" in one_sentence(devkit, "2007_mine")


VOC_SITE = "http://host.robots.ox.ac.uk/pascal/VOC/"


@pytest.mark.parametrize(
    "split, removed, looked_for, archives",
    [
        ("2007_trainval", "", "VOC2007", ["VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"]),
        ("2012_trainval", "VOC2012", "VOC2012", ["VOCtrainval_11-May-2012.tar"]),
        ("2007_trainval+2012_trainval", "VOC2012", "VOC2012", ["VOCtrainval_11-May-2012.tar"]),
        ("2007_test", "VOC2007/ImageSets/Main/test.txt", "test.txt", ["VOCtest_06-Nov-2007.tar"]),
        ("2010_train", "", "VOC2010", []),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_absent_devkit_says_where_it_is_looked_for_and_how_to_get_it(
    devkit, split, removed, looked_for, archives, named
):
    path = devkit.root / removed
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    message = one_sentence(devkit if named else dataclasses.replace(devkit, class_names=()), split)
    for part in (str(devkit.root), looked_for, "VOCdevkit", VOC_SITE, "--data.root", *archives):
        assert part in message


@pytest.mark.parametrize("removed", ["", "annotations/instances_a2017.json", "a2017"])
def test_absent_coco_says_where_it_is_looked_for_and_how_to_get_it(coco, removed):
    path = coco.root / removed
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    looked_for = coco.root / (removed or "annotations/instances_a2017.json")
    message = one_sentence(coco, "a2017")
    for part in (f"{looked_for}: not found", "https://cocodataset.org/#download", "--data.root"):
        assert part in message


def test_absent_voc_folder_says_where_it_is_looked_for(voc):
    shutil.rmtree(voc.root)
    message = one_sentence(voc, "train")
    assert message.startswith(f"{voc.root}: no such folder") and "--data.root" in message


def test_without_class_names_those_in_the_data_are_listed(voc, devkit, coco):
    for data, split in ((voc, "train+test"), (devkit, "2007_trainval+2012_trainval"), (coco, "a2017+b2017")):
        message = one_sentence(dataclasses.replace(data, class_names=()), split)
        assert message == (
            f"data.class_names is empty; give class names, the objects in {data.root} are named: disc, ring"
        )


def test_class_names_left_empty_are_those_that_the_file_declares_or_the_objects_sorted(voc, devkit, coco):
    empty = dataclasses.replace(coco, class_names=(), train_split="b2017+a2017")
    assert with_class_names(empty) == dataclasses.replace(empty, class_names=("ring", "disc"))
    chosen = dataclasses.replace(empty, class_names=("disc", "ring"))
    assert with_class_names(chosen) is chosen
    for data, split, test in ((voc, "train", "test"), (devkit, "2007_trainval+2012_trainval", "2007_test")):
        data = dataclasses.replace(data, class_names=(), train_split=split, test_split=test)
        assert with_class_names(data) == dataclasses.replace(data, class_names=("disc", "ring"))


@pytest.mark.parametrize("layout", ["voc", "devkit", "coco"])
def test_a_class_name_that_no_split_has_is_refused_with_the_near_ones(layout, request):
    data = dataclasses.replace(request.getfixturevalue(layout), class_names=("disc", "Rings"))
    with pytest.raises(InputError) as caught:
        with_class_names(data)
    assert str(caught.value) == (f"data.class_names: no object in {data.root} is named 'Rings'; did you mean 'ring'?")
    with pytest.raises(InputError, match="named 'cat'; they are named disc, ring$"):
        with_class_names(dataclasses.replace(data, class_names=("cat",)))


def test_a_class_that_only_another_split_has_is_no_error(voc):
    for path in (voc.root / "Annotations").glob("train*.xml"):
        path.write_text(path.read_text().replace("disc", "ring"))
    assert with_class_names(voc) is voc


@pytest.mark.parametrize("layout, split, other", [("voc", "train", "disc"), ("coco", "a2017", "ring")])
def test_a_subset_of_the_classes_is_a_choice(layout, split, other, request):
    data = request.getfixturevalue(layout)
    (kept,) = {*tiny.CLASS_NAMES} - {other}
    chosen = dataclasses.replace(data, class_names=(kept,), train_split=split, test_split=split)
    every, part = open_split(data, split), open_split(chosen, split)
    assert with_class_names(chosen) is chosen
    label = tiny.CLASS_NAMES.index(kept) + 1
    for one, of_part in zip(every.records, part.records, strict=True):
        np.testing.assert_array_equal(of_part.boxes, one.boxes[one.labels == label])
    left_out = sum(int((record.labels != label).sum()) for record in every.records)
    assert left_out and not every.findings and not any(finding.is_fault for finding in part.findings)
    (note,) = part.notes
    assert note.startswith(f"{OTHER_CLASS}: {left_out}, the first in ") and repr(other) in note
