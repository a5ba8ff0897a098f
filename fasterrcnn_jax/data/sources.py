"""Opens the data sets that a configuration names, and folders of images without labels."""

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
from fasterrcnn_jax.data.records import Dataset, ImageRecord, joined_names
from fasterrcnn_jax.data.shapes import make_shapes
from fasterrcnn_jax.errors import InputError

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

_VOC_ARCHIVES = {
    "2007": "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar",
    "2012": "VOCtrainval_11-May-2012.tar",
}


def open_split(data: DataConfig, split: str) -> Dataset:
    """Returns the records of `split`; of several splits one after another if their names are joined by +.

    With `data.shapes`, draws the shapes data set first.

    Raises:
      InputError: no class names are given, the data is missing or has a fault, or joined splits share an image.
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
    """Returns the same as `open_split`, but decodes no image and logs nothing."""
    names = split.split("+")
    if not data.class_names:
        found = joined_names(
            sorted({class_name for name in names for class_name in _class_names(data, name)}), most=1000
        )
        raise InputError(f"data.class_names is empty; give class names, the objects in {data.root} are named: {found}")
    return _joined([read_split(data, name) for name in names])


def read_split(data: DataConfig, name: str) -> Dataset:
    """Returns the records of one split; pixels are not decoded."""
    options = {"faults": data.faults, "max_pixels": data.max_pixels, "within": _within(data)}
    if data.tfds_name is not None:  # of layout tfds alone, and always
        return tfds.read_tfds(data.root, data.tfds_name, name, data.class_names, **options)
    if data.layout == "coco":
        return coco.read_coco(*_coco_place(data, name), data.class_names, **options)
    return voc.read_voc(*_voc_place(data, name), data.class_names, **options)


def _within(data: DataConfig) -> Path | None:
    """Returns the folder that symbolic links must not lead out of, or None."""
    return None if data.follow_links else data.root


def with_class_names(data: DataConfig) -> DataConfig:
    """Returns `data`; if it has no class names, with those of the data set. A VOC folder does not declare any.

    Raises:
      InputError: the training split cannot be read.
    """
    if data.class_names or data.layout not in ("coco", "tfds"):
        return data
    return dataclasses.replace(data, class_names=_class_names(data, data.train_split.split("+")[0]))


def _class_names(data: DataConfig, name: str) -> tuple[str, ...]:
    if data.tfds_name is not None:
        return tfds.class_names_of(data.root, data.tfds_name, within=_within(data))
    if data.layout == "coco":
        return coco.category_names(_coco_place(data, name)[0], within=_within(data))
    return voc.class_names_in(*_voc_place(data, name), within=_within(data))


def open_images(
    folder: Path,
    class_names: tuple[str, ...],
    *,
    faults: Faults = "error",
    max_pixels: int = DataConfig.max_pixels,
) -> Dataset:
    """Returns the images of a folder, sorted by name, without objects; the file name is the id.

    Images are turned as EXIF says, as image viewers show them. Files without an image extension and subfolders are
    ignored; a note counts them.

    Args:
      class_names: the class names of the detector that predicts on the images.
      faults: "skip" skips images that cannot be decoded; every image is then decoded once to find them.
      max_pixels: an image with more pixels is a fault.

    Raises:
      InputError: the folder is missing or has no image, or a file with an image extension is not an image.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found, records, none = defaultdict(list), [], np.zeros(0)
    paths = sorted(folder.iterdir())
    for path in watched(paths, f"reading {folder}", len(paths)):
        if path.suffix.lower() not in IMAGE_EXTENSIONS or path.is_dir():
            found["Subfolders and files without an image extension were ignored"].append(str(path))
            continue
        with skipping(FAULTY_IMAGE, found, faults):
            if faults == "skip":
                read_image(path, max_pixels=max_pixels)
            arrays = (
                np.zeros((0, 4), np.float32),
                none.astype(np.int32),
                none.astype(bool),
                none.astype(bool),
                none,
            )
            image_hw = image_size(path, upright=True, max_pixels=max_pixels)
            records.append(ImageRecord(path.name, path, image_hw, *arrays, upright=True))
    findings = findings_of(found)
    ids = tuple(range(1, len(class_names) + 1))
    notes = notes_of(findings)
    for note in notes:
        logger.warning("%s", note)
    if not records:
        raise InputError(f"{folder}: contains no readable image with an extension of {' '.join(IMAGE_EXTENSIONS)}")
    return Dataset(str(folder), class_names, tuple(records), notes, ids, findings)


def _joined(datasets: list[Dataset]) -> Dataset:
    """Returns one data set with all records; image ids and category ids must stay unique in result files."""
    first, *others = datasets
    place = {record.id: first.name for record in first.records}
    for dataset in others:
        for record in dataset.records:
            if record.id in place:
                raise InputError(
                    f"{dataset.name}: image id {record.id} is also in {place[record.id]}; "
                    "splits joined by + must not share image ids"
                )
            place[record.id] = dataset.name
        if dataset.category_ids != first.category_ids:
            raise InputError(
                f"{dataset.name}: category ids {dataset.category_ids} differ from {first.category_ids} of "
                f"{first.name}; splits joined by + must have the same category ids"
            )
    return first._replace(
        name=" + ".join(dataset.name for dataset in datasets),
        records=tuple(record for dataset in datasets for record in dataset.records),
        notes=tuple(note for dataset in datasets for note in dataset.notes),
        findings=tuple(finding for dataset in datasets for finding in dataset.findings),
    )


def _voc_place(data: DataConfig, name: str) -> tuple[Path, str]:
    """Returns the folder that contains JPEGImages, and the name of the list."""
    if data.layout == "voc":
        if not data.root.is_dir():
            raise InputError(
                f"{data.root}: no such folder; it must contain JPEGImages, Annotations and ImageSets, "
                "give another folder with --data.root"
            )
        return data.root, name
    match = re.fullmatch(r"(\d{4})_(.+)", name)
    if match is None:
        raise InputError(f"split {name!r}: in a VOCdevkit it must be YEAR_NAME, for example 2007_trainval")
    year, list_name = match.groups()
    folder = data.root / f"VOC{year}"
    absent = folder
    if folder.is_dir():
        absent = folder / "ImageSets" / "Main" / f"{list_name}.txt"
    # The lists of 2007 come in two archives; the user may have unpacked only one of them.
    incomplete = year == "2007" and list_name in ("train", "val", "trainval", "test") and not absent.exists()
    if not folder.is_dir() or incomplete:
        archives = _VOC_ARCHIVES.get(year, "the archives of that year")
        raise InputError(
            f"{absent}: not found; unpack {archives} from http://host.robots.ox.ac.uk/pascal/VOC/, "
            "which creates a folder VOCdevkit, or give another folder with --data.root"
        )
    return folder, list_name


def _coco_place(data: DataConfig, name: str) -> tuple[Path, Path]:
    """Returns the annotation file and the folder of the images."""
    if not name or re.search(r"[/\\\0]", name) or name in (".", ".."):
        raise InputError(f"split must be a part of a file name, without a folder, got {name!r}")
    annotations, images = (
        data.root / pattern.replace("{split}", name) for pattern in (data.coco_annotations, data.coco_images)
    )
    for path, exists in ((annotations, annotations.is_file()), (images, images.is_dir())):
        if not exists:
            raise InputError(
                f"{path}: not found; download images and annotations from https://cocodataset.org/#download, "
                "or give other paths with --data.root, --data.coco_annotations and --data.coco_images"
            )
    return annotations, images


# Folders of COCO's images relative to `data.root`: as published, and other common places.
_IMAGE_FOLDERS = ("{split}", "images/{split}", "images", "JPEGImages", ".")


def guess(root: Path) -> tuple[DataConfig, tuple[str, ...]]:
    """Returns the configuration of the data in `root` and the names of its splits.

    The class names are those that the annotation file declares; for VOC, those of the objects of all splits.

    Raises:
      InputError: the folder has no known layout.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder or configuration file")
    years = sorted(path for path in root.glob("VOC[0-9][0-9][0-9][0-9]") if voc.splits(path))
    if voc.splits(root):
        places = {name: (root, name) for name in voc.splits(root)}
        return DataConfig(root=root, class_names=_names(places, root)), tuple(places)
    if years:
        places = {f"{path.name[3:]}_{name}": (path, name) for path in years for name in voc.splits(path)}
        return DataConfig(root=root, layout="vocdevkit", class_names=_names(places, root)), tuple(places)
    files = sorted(root.glob("annotations/instances*.json")) or sorted(root.glob("instances*.json"))
    if not files:
        raise InputError(
            f"{root}: unknown layout; must contain ImageSets/Main with JPEGImages and Annotations, VOC2007 or another "
            "year, or annotations/instances_SPLIT.json"
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
    names = coco.category_names(root / pattern.replace("{split}", splits[0]), within=root)
    data = DataConfig(root=root, layout="coco", coco_annotations=pattern, coco_images=images, class_names=names)
    return data, splits


def _names(places: dict[str, tuple[Path, str]], root: Path) -> tuple[str, ...]:
    names = {name for place in places.values() for name in voc.class_names_in(*place, within=root)}
    if not names:
        raise InputError(f"{next(iter(places.values()))[0]}: no image in its lists has a named object")
    return tuple(sorted(names))
