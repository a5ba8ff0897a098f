"""Tests that symbolic links in a data set lead nowhere outside it, unless `data.follow_links` allows them."""

import dataclasses
import os

import bad_cases
import pytest

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import sources
from fasterrcnn_jax.data.links import link_guard
from fasterrcnn_jax.errors import InputError


@pytest.fixture(params=["voc", "vocdevkit", "coco"])
def data(request, tmp_path):
    """Writes a set into data/ and returns its configuration; outside/ is beside it."""
    root, split = tmp_path / "data", "train"
    (tmp_path / "outside").mkdir()
    if request.param == "coco":
        bad_cases.write_coco(root)
    else:
        bad_cases.write_voc(root if request.param == "voc" else root / "VOC2007")
        split = split if request.param == "voc" else "2007_train"
    return DataConfig(
        root=root, layout=request.param, class_names=bad_cases.CLASSES, train_split=split,
        coco_annotations="instances.json", coco_images="images",
    )  # fmt: skip


def parts(data):
    """Returns each kind of file and folder of the set."""
    if data.layout == "coco":
        return [data.root / name for name in ("images/10.png", "images", "instances.json")]
    folder = data.root if data.layout == "voc" else data.root / "VOC2007"
    names = ("JPEGImages/odd.png", "Annotations/odd.xml", "ImageSets/Main/train.txt", "JPEGImages", "Annotations")
    return [folder / name for name in names] + ([folder] if data.layout == "vocdevkit" else [])


def test_links_out_of_the_data_folder_are_refused_unless_allowed(data):
    healthy = sources.read(data, data.train_split)
    for number, path in enumerate(parts(data)):
        moved = data.root.parent / f"outside/{number}"
        path.rename(moved)
        path.symlink_to(moved)
        with pytest.raises(InputError, match=f"a link to .*outside/{number}.*; data.follow_links = True allows it"):
            sources.read(data, data.train_split)
        allowed = sources.read(dataclasses.replace(data, follow_links=True), data.train_split)
        assert [record.path for record in allowed.records] == [record.path for record in healthy.records]
        path.unlink()
        moved.rename(path)


def test_links_within_the_data_folder_and_to_the_data_folder_are_followed(data):
    healthy = sources.read(data, data.train_split)
    (data.root / "shared").mkdir()
    for number, path in enumerate(parts(data)):
        moved = data.root / f"shared/{number}"
        path.rename(moved)
        path.symlink_to(moved)
        assert len(sources.read(data, data.train_split).records) == len(healthy.records)
        path.unlink()
        moved.rename(path)
    data.root.rename(data.root.parent / "elsewhere")
    data.root.symlink_to(data.root.parent / "elsewhere")
    assert len(sources.read(data, data.train_split).records) == len(healthy.records)


def test_a_link_that_is_skipped_is_not_opened(data):
    """With `faults` "skip" the image behind the link is left out like any faulty one."""
    path = parts(data)[0]
    moved = data.root.parent / "outside/image"
    path.rename(moved)
    path.symlink_to(moved)
    (record,) = sources.read(dataclasses.replace(data, faults="skip"), data.train_split).records
    assert record.path != path


def test_the_check_of_50_000_images_resolves_their_folder_once(tmp_path, monkeypatch):
    """Resolving a path asks the file system about each of its parents, which takes seconds for so many images."""
    guard = link_guard(tmp_path)
    resolved = []
    resolve = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: resolved.append(path) or resolve(path))
    for number in range(50_000):
        guard(tmp_path / f"{number}.jpg")
    assert resolved == [tmp_path, tmp_path / "0.jpg"]
