"""Reads COCO detection annotations, https://cocodataset.org/#format-data: one JSON file and a folder of images.

COCO writes [x, y, width, height] in continuous pixels, so the corners of our box are (x, y, x + width, y + height).
Classes are matched by name; the category ids of the file are used again only in result files.

An annotation that makes no sense raises InputError, or is skipped with `faults` "skip". Irregularities that are common
in real data sets and have one sensible meaning are read with that meaning. `Dataset.notes` counts both.
"""

import json
import math
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data.faults import (
    FAULTY_IMAGE,
    FAULTY_OBJECT,
    Faults,
    Found,
    findings_of,
    notes_of,
    skipping,
    watched,
)
from fasterrcnn_jax.data.images import annotated_frame
from fasterrcnn_jax.data.links import Guard, link_guard
from fasterrcnn_jax.data.records import Dataset, ImageRecord, box_areas, check_class_names, joined_names
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.regular_files import check_regular

# The 80 classes of COCO detection, in the order of their category ids, which go up to 90.
CLASS_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip

# Category ids up to 90 that COCO does not use.
UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}

MAX_NAME = 255
MAX_PATH = 1024

EMPTY = "Boxes without a width or height were dropped"
CLIPPED = "Boxes reaching outside their image were clipped"
NO_AREA = "Missing areas were replaced by the area of the box"
NO_SIZE = "Missing widths and heights were replaced by those of the image file"


class _Object(NamedTuple):
    box: tuple[float, ...]
    label: int
    crowd: bool
    area: float  # NaN if the file gives no area


def read_coco(
    annotation_path: Path | str,
    image_folder: Path | str,
    class_names: tuple[str, ...],
    *,
    faults: Faults = "error",
    max_pixels: int = DataConfig.max_pixels,
    within: Path | None = None,
) -> Dataset:
    """Returns the records of one annotation file, sorted by image id; a record's id is the image id.

    Every annotation is checked and the header of every image is read; pixels are not decoded. An image
    without annotations is kept, with boxes [0, 4]. Crowds are kept and flagged. Boxes of any positive
    size are kept, because COCO's metric counts them.

    Args:
      annotation_path: instances_SPLIT.json, with its images, annotations and categories.
      image_folder: folder that every file_name is relative to; no file outside it is opened.
      class_names: label k is class_names[k - 1]; names are compared exactly.
      faults: "skip" skips the image or the annotation with a fault. A fault of the whole file, an image id
        that appears twice, and a file_name outside the folder are always errors.
      max_pixels: an image with more pixels is a fault.
      within: folder that no symbolic link may lead out of; None: links are followed.

    Raises:
      InputError: one sentence with the file, field and value of the first fault.
    """
    path, folder, guard = Path(annotation_path), Path(image_folder), link_guard(within)
    check_class_names(class_names)
    content = _load(path, guard)
    name_of = _categories(path, content)
    id_of = {name: category_id for category_id, name in name_of.items()}
    absent = [name for name in class_names if name not in id_of]
    if absent:
        raise InputError(f"{path}, categories: no category is named {absent[0]!r}; the file has {joined_names(id_of)}")
    label_of = {id_of[name]: label for label, name in enumerate(class_names, start=1)}

    found = defaultdict(list)
    listed = _list(path, content, "images")
    if not listed:
        raise InputError(f"{path}: the list of images is empty")
    places = {}
    for number, item in enumerate(listed):
        with skipping(FAULTY_IMAGE, found, faults):
            image_id = _id(item, "id", f"{path}, images[{number}]")
            places.setdefault(image_id, []).append(item)
    images = {}
    for image_id, items in watched(places.items(), f"reading {path}", len(places)):
        if len(items) > 1:
            raise InputError(f"{path}, images: id {image_id} appears twice")
        field = f"{path}, image {image_id}"
        image_path = _image_path(items[0], folder, field)
        with skipping(FAULTY_IMAGE, found, faults):
            guard(image_path)
            images[image_id] = (image_path, *_frame(items[0], image_path, field, found, max_pixels))
    objects = {image_id: [] for image_id in places}
    seen = set()
    for number, item in enumerate(_list(path, content, "annotations")):
        with skipping(FAULTY_OBJECT, found, faults):
            annotation_id = _id(item, "id", f"{path}, annotations[{number}]")
            if annotation_id in seen:
                raise InputError(f"{path}, annotations: id {annotation_id} appears twice")
            seen.add(annotation_id)
            field = f"{path}, annotation {annotation_id}"
            image_id = _id(item, "image_id", field)
            if image_id not in places:
                raise InputError(f"{field}, image_id: the file has no image with id {image_id}")
            # Annotations of a skipped image are skipped with it.
            if image_id in images:
                label = _label(item, field, label_of, name_of, class_names)
                row = _object(item, field, label, images[image_id][1], found)
                if row is not None:
                    objects[image_id].append(row)

    records = []
    # Sorted by image id, so that equal scores are ranked as in the official metric.
    for image_id, (image_path, image_hw, upright) in sorted(images.items()):
        rows = objects[image_id]
        boxes = np.array([row.box for row in rows], np.float32).reshape(-1, 4)
        labels = np.array([row.label for row in rows], np.int32)
        crowd, difficult = np.array([row.crowd for row in rows], bool), np.zeros(len(rows), bool)
        area = np.array([row.area for row in rows], np.float64)
        area = np.where(np.isnan(area), box_areas(boxes), area)
        arrays = boxes, labels, difficult, crowd, area
        records.append(ImageRecord(str(image_id), image_path, image_hw, *arrays, upright=upright))
    findings = findings_of(found)
    return Dataset(str(path), tuple(class_names), tuple(records), notes_of(findings), tuple(label_of), findings)


def category_names(annotation_path: Path | str, *, within: Path | None = None) -> tuple[str, ...]:
    """Returns the names of the file's categories in the order of their ids.

    Args:
      within: as in `read_coco`.
    """
    names = _categories(Path(annotation_path), _load(Path(annotation_path), link_guard(within)))
    return tuple(names[category_id] for category_id in sorted(names))


def _load(path: Path, guard: Guard) -> dict[str, Any]:
    guard(path)
    check_regular(path)
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the file is not JSON in UTF-8: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must contain an object with images and annotations, got a {type(content).__name__}")
    return content


def _list(path: Path, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    items = content.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{path}, {key}: must be a list of objects, {_got(content, key)}")
    return items


def _categories(path: Path, content: dict[str, Any]) -> dict[int, str]:
    names, used = {}, set()
    for number, item in enumerate(_list(path, content, "categories")):
        field = f"{path}, categories[{number}]"
        category_id, name = _id(item, "id", field), item.get("name")
        # JSON can contain unpaired surrogates, which cannot be written to a file or a terminal.
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or re.search(r"[\ud800-\udfff]", name):
            raise InputError(f"{field}, name: must be text of at most {MAX_NAME} characters, {_got(item, 'name')}")
        if category_id in names or name in used:
            raise InputError(f"{field}: id {category_id} or name {quoted(name)} appears twice in categories")
        names[category_id] = name
        used.add(name)
    return names


def _image_path(item: dict[str, Any], folder: Path, field: str) -> Path:
    name = item.get("file_name")
    # Both separators and a drive letter are refused on every system, because the file may come from another system.
    if (
        not isinstance(name, str)
        or re.search(r"[\\\0]|^/|^[A-Za-z]:", name)
        or ".." in name.split("/")
        or not PurePosixPath(name).name
        or len(name) > MAX_PATH
    ):
        raise InputError(f"{field}, file_name: must be a path inside the image folder, {_got(item, 'file_name')}")
    return folder / name


def _frame(item: dict[str, Any], path: Path, field: str, found: Found, max_pixels: int) -> tuple[tuple[int, int], bool]:
    """Returns the (height, width) that the boxes refer to, and whether it is that of the upright image."""
    if "width" not in item and "height" not in item:
        found[NO_SIZE].append(field)
        return annotated_frame(path, None, field, found, max_pixels=max_pixels)
    stated = _number(item, "height", field), _number(item, "width", field)
    return annotated_frame(path, stated, field, found, max_pixels=max_pixels)


def _label(
    item: dict[str, Any], field: str, label_of: dict[int, int], name_of: dict[int, str], class_names: tuple[str, ...]
) -> int:
    category_id = _id(item, "category_id", field)
    if category_id not in name_of:
        raise InputError(f"{field}, category_id: the file has no category with id {category_id}")
    if category_id not in label_of:
        raise InputError(
            f"{field}, category_id: {category_id} ({quoted(name_of[category_id])}) is not one of the classes "
            f"{joined_names(class_names)}"
        )
    return label_of[category_id]


def _object(item: dict[str, Any], field: str, label: int, image_hw: tuple[int, int], found: Found) -> _Object | None:
    """Returns an annotation with its box clipped to the image, or None if the clipped box is empty."""
    sides = item.get("bbox")
    if not isinstance(sides, list) or len(sides) != 4 or not all(_is_number(side) for side in sides):
        raise InputError(f"{field}, bbox: must be four finite numbers, {_got(item, 'bbox')}")
    x, y, width, height = (float(side) for side in sides)
    if width < 0 or height < 0:
        raise InputError(f"{field}, bbox: width and height must not be negative, got {sides}")
    crowd = item.get("iscrowd", 0)
    if not (_is_number(crowd) and crowd in (0, 1)):
        raise InputError(f"{field}, iscrowd: must be 0 or 1, got {quoted(crowd)}")
    area = _number(item, "area", field) if "area" in item else math.nan
    if area < 0:
        raise InputError(f"{field}, area: must not be negative, got {area:g}")
    if x > image_hw[1] or y > image_hw[0] or x + width < 0 or y + height < 0:
        size = f"{image_hw[1]} x {image_hw[0]}"
        raise InputError(f"{field}, bbox: {sides} lies outside the image of {size} pixels (width x height)")
    # Rounded to float32 first, otherwise the rounding error of x + width would count as a box outside the image.
    box = np.array([x, y, x + width, y + height], np.float32)
    inside = np.clip(box, 0, np.array([*image_hw[::-1]] * 2, np.float32))
    if (inside[2:] <= inside[:2]).any():
        found[EMPTY].append(f"{field}, bbox: {sides}")
        return None
    if (inside != box).any():
        found[CLIPPED].append(f"{field}, bbox: {sides}")
    if math.isnan(area):
        found[NO_AREA].append(field)
    return _Object(tuple(inside.tolist()), label, bool(crowd), area)


def _id(item: dict[str, Any], key: str, field: str) -> int:
    # A bool is also an int. Longer integers can be chosen so that all have one hash value, and no dict is fast then.
    if type(item.get(key)) is not int or abs(item[key]) >= 2**63:
        raise InputError(f"{field}, {key}: must be an integer of at most 64 bits, {_got(item, key)}")
    return item[key]


def _number(item: dict[str, Any], key: str, field: str) -> float:
    if not _is_number(item.get(key)):
        raise InputError(f"{field}, {key}: must be a finite number, {_got(item, key)}")
    return float(item[key])


def _is_number(value: Any) -> bool:
    # No image is near 1e12 pixels wide; the comparison also rejects NaN and integers too long for a float.
    return type(value) in (int, float) and abs(value) < 1e12


def _got(item: dict[str, Any], key: str) -> str:
    return f"got {quoted(item[key])}" if key in item else "but it is missing"
