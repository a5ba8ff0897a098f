"""Opens the labelled images that a configuration names, and folders of images without labels."""

import dataclasses
import logging
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import coco, tfds, voc
from fasterrcnn_jax.data.faults import (
    FAULTY_IMAGE,
    Faults,
    findings_of,
    notes_of,
    skip_undecodable,
    skipping,
    watched,
)
from fasterrcnn_jax.data.images import image_size, read_image
from fasterrcnn_jax.data.records import Dataset, ImageRecord
from fasterrcnn_jax.data.shapes import make_shapes
from fasterrcnn_jax.errors import InputError

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

_VOC_ARCHIVES = {
    "2007": "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar",
    "2012": "VOCtrainval_11-May-2012.tar",
}


def open_split(data: DataConfig, split: str) -> Dataset:
    """Returns the records of `split`, or of several splits one after another where + joins their names.

    Draws the embedded data set first if asked to.

    Raises:
      InputError: no class names are given, the data is absent or holds a fault, or joined splits share an image.
    """
    if data.shapes is not None:
        shapes = data.shapes
        make_shapes(data.root, seed=shapes.seed, num_train=shapes.num_train, num_test=shapes.num_test)
    dataset = read(data, split)
    if data.faults == "skip":
        dataset = skip_undecodable(dataset)
    logger.info("%s: %d images", dataset.name, len(dataset.records))
    for note in dataset.notes:
        logger.warning("%s", note)
    return dataset


def read(data: DataConfig, split: str) -> Dataset:
    """Returns what `open_split` does, before any image is decoded and anything is logged."""
    names = split.split("+")
    if not data.class_names:
        found = ", ".join(sorted({class_name for name in names for class_name in _class_names(data, name)}))
        raise InputError(f"data.class_names is empty; the objects in {data.root} are named: {found}")
    return _joined([read_split(data, name) for name in names])


def read_split(data: DataConfig, name: str) -> Dataset:
    """Returns the records of one split; pixels are not decoded."""
    if data.layout == "tfds":
        return tfds.read_tfds(data.root, data.tfds_name, name, data.class_names, faults=data.faults)
    if data.layout == "coco":
        return coco.read_coco(*_coco_place(data, name), data.class_names, faults=data.faults)
    return voc.read_voc(*_voc_place(data, name), data.class_names, faults=data.faults)


def with_class_names(data: DataConfig) -> DataConfig:
    """Returns `data` with the classes that its set declares, where it names none; a VOC folder declares none.

    Raises:
      InputError: the set of the training split cannot be read.
    """
    if data.class_names or data.layout not in ("coco", "tfds"):
        return data
    return dataclasses.replace(data, class_names=_class_names(data, data.train_split.split("+")[0]))


def _class_names(data: DataConfig, name: str) -> tuple[str, ...]:
    if data.layout == "tfds":
        return tfds.class_names_of(data.root, data.tfds_name)
    if data.layout == "coco":
        return coco.category_names(_coco_place(data, name)[0])
    return voc.class_names_in(*_voc_place(data, name))


def open_images(folder: Path, class_names: tuple[str, ...], *, faults: Faults = "error") -> Dataset:
    """Returns the images of a folder in the order of their names, which are their ids, without objects.

    They are read as viewers show them, turned as EXIF says. Files without the extension of an image, and folders
    within the folder, are passed over with a note.

    Args:
      class_names: of the detector that is to look at them.
      faults: "skip" leaves out what cannot be decoded; every image is then decoded once to know.

    Raises:
      InputError: the folder is absent or holds no image, or a file with the extension of one is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found, records, none = defaultdict(list), [], np.zeros(0)
    paths = sorted(folder.iterdir())
    for path in watched(paths, f"reading {folder}", len(paths)):
        if path.suffix.lower() not in IMAGE_EXTENSIONS or path.is_dir():
            found["What has no extension of an image was passed over"].append(str(path))
            continue
        with skipping(FAULTY_IMAGE, found, faults):
            if faults == "skip":
                read_image(path)
            arrays = (
                np.zeros((0, 4), np.float32),
                none.astype(np.int32),
                none.astype(bool),
                none.astype(bool),
                none,
            )
            records.append(ImageRecord(path.name, path, image_size(path, upright=True), *arrays, upright=True))
    findings = findings_of(found)
    ids = tuple(range(1, len(class_names) + 1))
    notes = notes_of(findings)
    for note in notes:
        logger.warning("%s", note)
    if not records:
        raise InputError(f"{folder}: holds no image that can be read, of {' '.join(IMAGE_EXTENSIONS)}")
    return Dataset(str(folder), class_names, tuple(records), notes, ids, findings)


def _joined(datasets: list[Dataset]) -> Dataset:
    """Returns one data set of all records; a result file must tell its images and classes apart."""
    first, *others = datasets
    place = {record.id: first.name for record in first.records}
    for dataset in others:
        for record in dataset.records:
            if record.id in place:
                raise InputError(f"{dataset.name}: image id {record.id} is also in {place[record.id]}, joined by +")
            place[record.id] = dataset.name
        if dataset.category_ids != first.category_ids:
            raise InputError(
                f"{dataset.name}: its categories have the ids {dataset.category_ids}, "
                f"where {first.name}, joined by +, has {first.category_ids}"
            )
    return first._replace(
        name=" + ".join(dataset.name for dataset in datasets),
        records=tuple(record for dataset in datasets for record in dataset.records),
        notes=tuple(note for dataset in datasets for note in dataset.notes),
        findings=tuple(finding for dataset in datasets for finding in dataset.findings),
    )


def _voc_place(data: DataConfig, name: str) -> tuple[Path, str]:
    """Returns the folder that holds JPEGImages, and the name of the list."""
    if data.layout == "voc":
        if not data.root.is_dir():
            raise InputError(
                f"{data.root}: no such folder; it is where JPEGImages, Annotations and ImageSets are looked for, "
                "give another one with --data.root"
            )
        return data.root, name
    match = re.fullmatch(r"(\d{4})_(.+)", name)
    if match is None:
        raise InputError(f"split {name!r}: in a VOCdevkit it must be YEAR_NAME, as 2007_trainval")
    year, list_name = match.groups()
    folder = data.root / f"VOC{year}"
    absent = folder
    if folder.is_dir():
        absent = folder / "ImageSets" / "Main" / f"{list_name}.txt"
    # The lists of 2007 come in two archives, one of which may have been forgotten.
    incomplete = year == "2007" and list_name in ("train", "val", "trainval", "test") and not absent.exists()
    if not folder.is_dir() or incomplete:
        archives = _VOC_ARCHIVES.get(year, "the archives of that year")
        raise InputError(
            f"{absent}: not found; unpack {archives} from http://host.robots.ox.ac.uk/pascal/VOC/, "
            "which make a folder VOCdevkit, or give another one with --data.root"
        )
    return folder, list_name


def _coco_place(data: DataConfig, name: str) -> tuple[Path, Path]:
    """Returns the annotation file and the folder of the images."""
    if not name or re.search(r"[/\\\0]", name) or name in (".", ".."):
        raise InputError(f"split must be part of a file name, got {name!r}")
    annotations, images = (
        data.root / pattern.replace("{split}", name) for pattern in (data.coco_annotations, data.coco_images)
    )
    for path, exists in ((annotations, annotations.is_file()), (images, images.is_dir())):
        if not exists:
            raise InputError(
                f"{path}: not found; get images and annotations from https://cocodataset.org/#download, "
                "or give another folder with --data.root, data.coco_annotations and data.coco_images"
            )
    return annotations, images


# Where COCO's images lie beside their annotations: as published, and as others lay them out.
_IMAGE_FOLDERS = ("{split}", "images/{split}", "images", "JPEGImages", ".")


def guess(root: Path) -> tuple[DataConfig, tuple[str, ...]]:
    """Returns the configuration of the data in `root` and the names of its splits.

    The classes are those that the file declares or the objects of all splits have.

    Raises:
      InputError: it is laid out in none of the ways that are known.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder or configuration")
    years = sorted(path for path in root.glob("VOC[0-9][0-9][0-9][0-9]") if voc.splits(path))
    if voc.splits(root):
        places = {name: (root, name) for name in voc.splits(root)}
        return DataConfig(root=root, class_names=_names(places)), tuple(places)
    if years:
        places = {f"{path.name[3:]}_{name}": (path, name) for path in years for name in voc.splits(path)}
        return DataConfig(root=root, layout="vocdevkit", class_names=_names(places)), tuple(places)
    files = sorted(root.glob("annotations/instances*.json")) or sorted(root.glob("instances*.json"))
    if not files:
        raise InputError(
            f"{root}: holds neither ImageSets/Main with JPEGImages and Annotations, nor VOC2007 or another year, "
            "nor annotations/instances_SPLIT.json"
        )
    prefix = "annotations/" if files[0].parent.name == "annotations" else ""
    pattern = f"{prefix}instances_{{split}}.json"
    splits = tuple(path.stem.removeprefix("instances_") for path in files if "_" in path.stem)
    if not splits:
        pattern, splits = f"{prefix}{files[0].name}", (files[0].stem,)
    images = next(
        folder
        for folder in _IMAGE_FOLDERS
        if all((root / folder.replace("{split}", split)).is_dir() for split in splits)
    )
    names = coco.category_names(root / pattern.replace("{split}", splits[0]))
    data = DataConfig(root=root, layout="coco", coco_annotations=pattern, coco_images=images, class_names=names)
    return data, splits


def _names(places: dict[str, tuple[Path, str]]) -> tuple[str, ...]:
    names = {name for place in places.values() for name in voc.class_names_in(*place)}
    if not names:
        raise InputError(f"{next(iter(places.values()))[0]}: no list of it names an object")
    return tuple(sorted(names))
