"""Opens the labelled images that a configuration names."""

import logging
import re
from pathlib import Path

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import coco, voc
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.data.shapes import make_shapes
from fasterrcnn_jax.errors import InputError

logger = logging.getLogger(__name__)

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
    names = split.split("+")
    if not data.class_names:
        found = ", ".join(sorted({class_name for name in names for class_name in _class_names(data, name)}))
        raise InputError(f"data.class_names is empty; the objects in {data.root} are named: {found}")
    dataset = _joined([_open(data, name) for name in names])
    logger.info("%s: %d images", dataset.name, len(dataset.records))
    for note in dataset.notes:
        logger.warning("%s", note)
    return dataset


def _open(data: DataConfig, name: str) -> Dataset:
    if data.layout == "coco":
        return coco.read_coco(*_coco_place(data, name), data.class_names)
    return voc.read_voc(*_voc_place(data, name), data.class_names)


def _class_names(data: DataConfig, name: str) -> tuple[str, ...]:
    if data.layout == "coco":
        return coco.category_names(_coco_place(data, name)[0])
    return voc.class_names_in(*_voc_place(data, name))


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
