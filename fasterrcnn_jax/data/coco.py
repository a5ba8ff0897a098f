"""Reader of COCO detection annotations, https://cocodataset.org/#format-data: one JSON file and a folder of images.

COCO writes [x, y, width, height] in continuous pixels, so (x, y, x + width, y + height) are our corners.
Classes are found by name; the file's own numbers for them come back only in result files.

Whatever cannot be meant raises InputError, or is skipped where that is asked for. What real sets are full
of and what has one sensible reading is read that way. Both are counted in `Dataset.notes`.
"""

import json
import math
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from fasterrcnn_jax.data.faults import (
    FAULTY_IMAGE,
    FAULTY_OBJECT,
    Faults,
    findings_of,
    notes_of,
    skipping,
    watched,
)
from fasterrcnn_jax.data.images import annotated_frame
from fasterrcnn_jax.data.records import Dataset, ImageRecord, box_areas, check_class_names
from fasterrcnn_jax.errors import InputError, quoted

# The 80 objects of COCO detection, in the order of their category ids, which reach to 90.
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

# Category ids up to 90 that name no object.
UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}

MAX_NAME = 255
MAX_PATH = 1024

EMPTY = "Boxes without a width or height were dropped"
CLIPPED = "Boxes reaching outside their image were clipped"
NO_AREA = "For an absent area the box's own was used"
NO_SIZE = "For an absent width and height the image's own were used"


class _Object(NamedTuple):
    box: tuple[float, ...]
    label: int
    crowd: bool
    area: float  # NaN where the file gives none


def read_coco(
    annotation_path: Path | str,
    image_folder: Path | str,
    class_names: tuple[str, ...],
    *,
    faults: Faults = "error",
) -> Dataset:
    """Returns the records of one annotation file, in the order of the images' ids, which are the records'.

    Every annotation is checked and the header of every image is read; pixels are not decoded. An image
    without annotations is kept, with boxes [0, 4]; so is a crowd, with its flag. Boxes of any positive
    size are kept, because COCO's metric counts them.

    Args:
      annotation_path: instances_SPLIT.json, with its images, annotations and categories.
      image_folder: what file_name is relative to; no file outside it is opened.
      class_names: label k is class_names[k - 1]; names are compared exactly.
      faults: "skip" leaves out the image or the annotation with a fault. What is wrong with the file as a
        whole, an image id that stands there twice, and a file_name outside the folder are errors all the same.

    Raises:
      InputError: one sentence naming file, field and value of the first fault found.
    """
    path, folder = Path(annotation_path), Path(image_folder)
    check_class_names(class_names)
    content = _load(path)
    name_of = _categories(path, content)
    id_of = {name: category_id for category_id, name in name_of.items()}
    absent = [name for name in class_names if name not in id_of]
    if absent:
        raise InputError(f"{path}, categories: none is named {absent[0]!r}; there are {', '.join(id_of)}")
    label_of = {id_of[name]: label for label, name in enumerate(class_names, start=1)}

    found = defaultdict(list)
    listed = _list(path, content, "images")
    if not listed:
        raise InputError(f"{path}: lists 0 images")
    places = {}
    for number, item in enumerate(listed):
        with skipping(FAULTY_IMAGE, found, faults):
            image_id = _id(item, "id", f"{path}, images[{number}]")
            places.setdefault(image_id, []).append(item)
    images = {}
    for image_id, items in watched(places.items(), f"reading {path}", len(places)):
        if len(items) > 1:
            raise InputError(f"{path}, images: id {image_id} stands there twice")
        field = f"{path}, image {image_id}"
        image_path = _image_path(items[0], folder, field)
        with skipping(FAULTY_IMAGE, found, faults):
            images[image_id] = (image_path, *_frame(items[0], image_path, field, found))
    objects = {image_id: [] for image_id in places}
    seen = set()
    for number, item in enumerate(_list(path, content, "annotations")):
        with skipping(FAULTY_OBJECT, found, faults):
            annotation_id = _id(item, "id", f"{path}, annotations[{number}]")
            if annotation_id in seen:
                raise InputError(f"{path}, annotations: id {annotation_id} stands there twice")
            seen.add(annotation_id)
            field = f"{path}, annotation {annotation_id}"
            image_id = _id(item, "image_id", field)
            if image_id not in places:
                raise InputError(f"{field}, image_id: there is no image {image_id}")
            # Those of a skipped image go with it.
            if image_id in images:
                label = _label(item, field, label_of, name_of)
                row = _object(item, field, label, images[image_id][1], found)
                if row is not None:
                    objects[image_id].append(row)

    records = []
    # Sorted, so that equal scores are ranked as in the official metric.
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


def category_names(annotation_path: Path | str) -> tuple[str, ...]:
    """Returns the names of the file's categories in the order of their ids."""
    names = _categories(Path(annotation_path), _load(Path(annotation_path)))
    return tuple(names[category_id] for category_id in sorted(names))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON in UTF-8: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold an object with images and annotations, got a {type(content).__name__}")
    return content


def _list(path: Path, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    items = content.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{path}, {key}: must be a list of objects, {_got(content, key)}")
    return items


def _categories(path: Path, content: dict[str, Any]) -> dict[int, str]:
    names = {}
    for number, item in enumerate(_list(path, content, "categories")):
        field = f"{path}, categories[{number}]"
        category_id, name = _id(item, "id", field), item.get("name")
        # JSON can spell halves of characters, which no file or terminal takes.
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or re.search(r"[\ud800-\udfff]", name):
            raise InputError(f"{field}, name: must be text of at most {MAX_NAME} characters, {_got(item, 'name')}")
        if category_id in names or name in names.values():
            raise InputError(f"{field}: id {category_id} or name {name!r} stands there before")
        names[category_id] = name
    return names


def _image_path(item, folder: Path, field: str) -> Path:
    name = item.get("file_name")
    # Both separators and a drive letter on every system: the file may come from another.
    outside = not isinstance(name, str) or re.search(r"[\\\0]|^/|^[A-Za-z]:", name) or ".." in name.split("/")
    if outside or not PurePosixPath(name).name or len(name) > MAX_PATH:
        raise InputError(f"{field}, file_name: must be a path inside the image folder, {_got(item, 'file_name')}")
    return folder / name


def _frame(item, path: Path, field: str, found) -> tuple[tuple[int, int], bool]:
    """Returns (height, width) of the frame that the boxes are in, and whether it is the upright one."""
    if "width" not in item and "height" not in item:
        found[NO_SIZE].append(field)
        return annotated_frame(path, None, field, found)
    return annotated_frame(path, (_number(item, "height", field), _number(item, "width", field)), field, found)


def _label(item, field: str, label_of: dict[int, int], name_of: dict[int, str]) -> int:
    category_id = _id(item, "category_id", field)
    if category_id not in name_of:
        raise InputError(f"{field}, category_id: there is no category {category_id}")
    if category_id not in label_of:
        known = ", ".join(name_of[known_id] for known_id in label_of)
        raise InputError(
            f"{field}, category_id: {category_id} ({name_of[category_id]!r}) is not one of the classes {known}"
        )
    return label_of[category_id]


def _object(item, field: str, label: int, image_hw: tuple[int, int], found) -> _Object | None:
    """Returns an annotation with its box clipped to the image; None where nothing is left."""
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
        raise InputError(f"{field}, bbox: {sides} lies outside the image of {size} pixels")
    # Rounded as it is kept, or the noise in x + width would count as reaching outside.
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


def _id(item, key: str, field: str) -> int:
    if type(item.get(key)) is not int:  # a bool is an int, too
        raise InputError(f"{field}, {key}: must be an integer, {_got(item, key)}")
    return item[key]


def _number(item, key: str, field: str) -> float:
    if not _is_number(item.get(key)):
        raise InputError(f"{field}, {key}: must be a finite number, {_got(item, key)}")
    return float(item[key])


def _is_number(value: Any) -> bool:
    # No image comes near 1e12, NaN is not below it, and a long integer would not even become a float.
    return type(value) in (int, float) and abs(value) < 1e12


def _got(item: dict[str, Any], key: str) -> str:
    return f"got {quoted(item[key])}" if key in item else "but it is absent"
