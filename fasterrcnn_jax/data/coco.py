"""Reads COCO detection annotations, https://cocodataset.org/#format-data: one JSON file and a folder of images.

COCO writes [x, y, width, height] in continuous pixels, so the corners of our box are (x, y, x + width, y + height).
Classes are matched by name; the category ids of the file are used again only in result files.

Labelling tools write the same file with other conventions: numbers as text, paths of another machine, categories that
group others. Where such a value has one meaning, it is read and counted.

An annotation that makes no sense raises InputError, or is skipped with `faults` "skip". Irregularities that are common
in real data sets and have one sensible meaning are read with that meaning. `Dataset.notes` counts both.
"""

import contextlib
import json
import math
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data.faults import (
    FAULTY_IMAGE,
    FAULTY_OBJECT,
    OTHER_CLASS,
    Faults,
    Found,
    dataset_of,
    skipping,
    watched,
)
from fasterrcnn_jax.data.file_names import Files, files_below, image_named
from fasterrcnn_jax.data.images import annotated_frame
from fasterrcnn_jax.data.layouts import SPLIT_NAMES, Layout, composed, in_order, names_below
from fasterrcnn_jax.data.links import Guard, link_guard
from fasterrcnn_jax.data.objects import flag, is_unknown
from fasterrcnn_jax.data.records import Dataset, ImageRecord, box_areas, check_class_names, labels_of
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
NO_ID = "Annotations without an id were read"
TEXT = "Numbers written as text were read as numbers"
EXTENT = "Missing boxes were replaced by the extent of the outline"
IGNORED = "Objects marked ignore are used like crowds: they are not trained on"
GROUPING = "Categories that no annotation uses and that are the supercategory of others were left out"
REPEATED = "Repeated categories and images were read once"
SEPARATOR = "A file_name of Windows was read with / as separator and without drive"

Id = int | str


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
    size are kept, because COCO's metric counts them. Objects of other classes than `class_names` are left out and
    counted; a class that the file does not declare has no object.

    Args:
      annotation_path: instances_SPLIT.json, with its images, annotations and categories.
      image_folder: folder that every file_name is relative to; no file outside it is opened.
      class_names: label k is class_names[k - 1]; names are compared exactly, without surrounding blanks.
      faults: "skip" skips the image or the annotation with a fault. A fault of the whole file is always an error.
      max_pixels: an image with more pixels is a fault.
      within: folder that no symbolic link may lead out of; None: links are followed.

    Raises:
      InputError: one sentence with the file, field and value of the first fault.
    """
    path, folder, guard = Path(annotation_path), Path(image_folder), link_guard(within)
    check_class_names(class_names)
    content, found = _load(path, guard), defaultdict(list)
    name_of = _categories(path, content, found)
    label_of_name = labels_of(class_names)
    label_of = {key: label_of_name[name] for key, name in name_of.items() if name in label_of_name}

    listed = _list(path, content, "images")
    if not listed:
        raise InputError(f"{path}: the list of images is empty")
    places = {}
    for number, item in enumerate(listed):
        with skipping(FAULTY_IMAGE, found, faults):
            image_id = _id(item, "id", f"{path}, images[{number}]", found)
            places.setdefault(image_id, []).append(item)
    paths = _image_paths(path, folder, places, found, faults, within)
    images = {}
    for image_id, image_path in watched(paths.items(), f"reading {path}", len(paths)):
        field = f"{path}, image {image_id}"
        with skipping(FAULTY_IMAGE, found, faults):
            guard(image_path)
            images[image_id] = (image_path, *_frame(places[image_id][0], image_path, field, found, max_pixels))
    objects = {image_id: [] for image_id in places}
    seen = set()
    for number, item in enumerate(_list(path, content, "annotations")):
        with skipping(FAULTY_OBJECT, found, faults):
            field = f"{path}, annotations[{number}]"
            if item.get("id") is None:
                found[NO_ID].append(field)
            else:
                annotation_id = _id(item, "id", field, found)
                if annotation_id in seen:
                    raise InputError(f"{path}, annotations: id {annotation_id} appears twice")
                seen.add(annotation_id)
                field = f"{path}, annotation {annotation_id}"
            image_id = _id(item, "image_id", field, found)
            if image_id not in places:
                raise InputError(f"{field}, image_id: the file has no image with id {image_id}")
            # Annotations of a skipped image are skipped with it.
            if image_id in images:
                label = _label(item, field, label_of, name_of, found)
                row = None if label is None else _object(item, field, label, images[image_id][1], found)
                if row is not None:
                    objects[image_id].append(row)

    records = []
    # Sorted by image id, so that equal scores are ranked as in the official metric; ids that are text follow.
    for image_id in sorted(images, key=lambda image_id: (isinstance(image_id, str), image_id)):
        rows, (image_path, image_hw, upright) = objects[image_id], images[image_id]
        boxes = np.array([row.box for row in rows], np.float32).reshape(-1, 4)
        labels = np.array([row.label for row in rows], np.int32)
        crowd, difficult = np.array([row.crowd for row in rows], bool), np.zeros(len(rows), bool)
        area = np.array([row.area for row in rows], np.float64)
        area = np.where(np.isnan(area), box_areas(boxes), area)
        arrays = boxes, labels, difficult, crowd, area
        records.append(ImageRecord(str(image_id), image_path, image_hw, *arrays, upright=upright))
    ids = _result_ids(class_names, {name: key for key, name in name_of.items()})
    return dataset_of(str(path), class_names, records, found, category_ids=ids)


def category_names(annotation_path: Path | str, *, within: Path | None = None) -> tuple[str, ...]:
    """Returns the names of the file's categories in the order of their ids, without those that only group others.

    Args:
      within: as in `read_coco`.
    """
    path = Path(annotation_path)
    names = _categories(path, _load(path, link_guard(within)), defaultdict(list))
    return tuple(names[category_id] for category_id in sorted(names))


def recognise(root: Path, *, within: Path | None = None) -> Layout | None:
    """Returns the layout of a folder with COCO annotations, or None. Reads the json files, but no image."""
    by_folder = defaultdict(list)
    for name in names_below(root, follow_links=within is None):
        if name.lower().endswith(".json") and name.count("/") <= 3:
            by_folder[name.rpartition("/")[0]].append(name)
    # A folder of LabelMe files has one json per image; its first ones tell.
    names = [name for folder in by_folder.values() for name in folder[:20] if _is_coco(root / name)]
    if not names:
        return None
    instances = [name for name in names if name.rpartition("/")[2].startswith("instances")]
    pattern, splits = _pattern(instances or names)
    files = {split: root / pattern.replace("{split}", split) for split in splits}
    class_names, grouping, listed = {}, {}, {}
    for split, path in files.items():
        # What is wrong with a file is said when it is read.
        with contextlib.suppress(InputError):
            content, found = _load(path, link_guard(within)), defaultdict(list)
            in_file = _categories(path, content, found)
            class_names |= dict.fromkeys(in_file[key] for key in sorted(in_file))
            grouping |= dict.fromkeys(place.rpartition(", ")[2] for place in found[GROUPING])
            listed[split] = [item.get("file_name") for item in _list(path, content, "images")]
    images = _folder_of(root, pattern, listed)
    notes = [f"{name} is left out: no annotation uses it, and it is the supercategory of others" for name in grouping]
    others = [name for name in names if root / name not in files.values()]
    if others:
        notes.append(f"other files with the keys of COCO are not used: {', '.join(others[:5])}")
    name = "COCO"
    if pattern.endswith("_annotations.coco.json"):
        name = "COCO as Roboflow writes it"
    elif pattern == "{split}.json" and splits == ("result",):
        name = "COCO as Label Studio writes it"
    shown = pattern.replace("{split}", "SPLIT" if len(splits) > 1 else next(iter(splits)))
    where = "the folder" if images == "." else images.replace("{split}", "SPLIT") + "/"
    why = f"{shown} has the keys images, annotations and categories, and the images are in {where}"
    data = DataConfig(
        root=root, layout="coco", coco_annotations=pattern, coco_images=images, class_names=tuple(class_names)
    )
    return Layout(name, why, data, splits, tuple(notes))


def _is_coco(path: Path) -> bool:
    """Returns whether the beginning of a json file has a list that COCO has."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (InputError, OSError):
        return False
    return head.startswith(b"{") and re.search(rb'"(images|annotations|categories)"\s*:\s*\[', head) is not None


def _pattern(names: list[str]) -> tuple[str, tuple[str, ...]]:
    """Returns the pattern of the annotation files and their splits: of the folder with the most files."""
    patterns = defaultdict(set)
    for name in names:
        *folders, file = name.split("/")
        stem = file[: -len(".json")]
        named = stem.removeprefix("instances_")
        split = next((part for part in (*folders, named) if part.lower() in SPLIT_NAMES), None)
        if split is None:  # any name stands for itself
            split = next((word for word in re.split(r"[_.-]", stem) if word.lower() in SPLIT_NAMES), named)
        file = file.replace(split, "{split}", 1) if split in file else file
        patterns["/".join("{split}" if part == split else part for part in folders) + "/" + file].add(split)
    pattern = max(patterns, key=lambda pattern: (len(patterns[pattern]), -pattern.count("/")))
    return pattern.strip("/"), in_order(patterns[pattern])


def _folder_of(root: Path, pattern: str, listed: dict[str, list[Any]]) -> str:
    """Returns the folder, perhaps with {split}, where most of the listed files are."""
    beside = pattern.rpartition("/")[0]
    near = (beside, f"{beside}/images", f"{beside}/images/{{split}}", f"{beside}/{{split}}") if beside else ()
    own = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    usual = ("{split}", "images/{split}", "{split}/images", "images", "JPEGImages", ".", *near, *own)
    counts = Counter()
    for split, names in listed.items():
        sample = [name.replace("\\", "/") for name in names[:: max(1, len(names) // 30)] if isinstance(name, str)]
        inside = [name for name in sample if not name.startswith("/") and ".." not in name.split("/")]
        for folder in dict.fromkeys(usual):
            counts[folder] += sum(os.path.exists(root / folder.replace("{split}", split) / name) for name in inside)
        if not any(counts.values()):
            # Paths of another machine: the last part must be somewhere below the folder.
            wanted = {name.rpartition("/")[2].lower() for name in sample}
            for folder in dict.fromkeys(usual):
                below = names_below(root / folder.replace("{split}", split))
                counts[folder] += len(wanted & {name.rpartition("/")[2].lower() for name in below})
    return max(dict.fromkeys(usual), key=lambda folder: counts[folder]) if any(counts.values()) else "."


def _result_ids(class_names: tuple[str, ...], id_of: dict[str, int]) -> tuple[int, ...]:
    """Returns the category id of each class; a class that the file does not declare gets one that is free."""
    free = iter(range(max([0, *id_of.values()]) + 1, 2**62))
    return tuple(id_of[name] if name in id_of else next(free) for name in class_names)


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


def _categories(path: Path, content: dict[str, Any], found: Found) -> dict[int, str]:
    """Returns {category id: name}, without repetitions and without categories that only group others."""
    names, parents = {}, defaultdict(set)
    for number, item in enumerate(_list(path, content, "categories")):
        field = f"{path}, categories[{number}]"
        category_id, name = _id(item, "id", field, found), item.get("name")
        if not isinstance(category_id, int):
            raise InputError(f"{field}, id: must be an integer, {_got(item, 'id')}")
        if isinstance(name, int | float) and _is_number(name):
            name = f"{name:g}" if isinstance(name, float) else str(name)
        name = composed(name.strip()) if isinstance(name, str) else ""
        # JSON can contain unpaired surrogates, which cannot be written to a file or a terminal.
        if not 0 < len(name) <= MAX_NAME or re.search(r"[\ud800-\udfff]", name):
            raise InputError(f"{field}, name: must be text of at most {MAX_NAME} characters, {_got(item, 'name')}")
        if names.get(category_id) == name:
            found[REPEATED].append(field)
        elif category_id in names:
            raise InputError(f"{field}: id {category_id} stands for {names[category_id]!r} and for {name!r}")
        names[category_id] = name
        parents[str(item.get("supercategory")).strip()].add(category_id)
    grouping = {key for key, name in names.items() if parents.get(name, set()) - {key}}
    counts = Counter(names.values())
    doubled = {key for key, name in names.items() if counts[name] > 1}
    if grouping | doubled:
        used = {_plain_id(item.get("category_id")) for item in _list(path, content, "annotations")}
        for key in sorted((grouping | doubled) - used):
            if len(names) > 1:
                found[GROUPING].append(f"{path}, category {key} {names.pop(key)!r}")
    twice = next((name for name, count in Counter(names.values()).items() if count > 1), None)
    if twice is not None:
        ids = [key for key, name in names.items() if name == twice]
        raise InputError(f"{path}, categories: the name {twice!r} stands for the ids {ids[0]} and {ids[1]}")
    return names


def _image_paths(
    path: Path,
    folder: Path,
    places: dict[Id, list[dict[str, Any]]],
    found: Found,
    faults: Faults,
    within: Path | None,
) -> dict[Id, Path]:
    """Returns the file of each image; where file_name does not exist, the only file below the folder that fits it."""
    paths, elsewhere = {}, {}
    for image_id, items in places.items():
        field = f"{path}, image {image_id}"
        with skipping(FAULTY_IMAGE, found, faults):
            if any(item != items[0] for item in items):
                raise InputError(f"{path}, images: id {image_id} appears twice")
            if len(items) > 1:
                found[REPEATED].append(field)
            name = items[0].get("file_name")
            text = name if isinstance(name, str) else ""
            # os.path takes names that are too long for the file system; Path does not.
            if not 0 < len(text) <= MAX_PATH or "\0" in text or os.path.isdir(folder / text):
                raise InputError(
                    f"{field}, file_name: must be a path inside the image folder, {_got(items[0], 'file_name')}"
                )
            # Separators and drives are read alike on every system, because the file may come from another system.
            inside = re.sub(r"^[A-Za-z]:", "", text.replace("\\", "/"))
            if inside.startswith("/") or ".." in inside.split("/") or not os.path.exists(folder / inside):
                elsewhere[image_id] = inside
            else:
                if inside != text:
                    found[SEPARATOR].append(f"{field}, file_name: {quoted(name)}")
                paths[image_id] = folder / inside
    if elsewhere:
        paths |= _searched(path, files_below(folder, within), elsewhere, set(paths.values()), found, faults)
    # In the order of the file, so that findings are too.
    return {image_id: paths[image_id] for image_id in places if image_id in paths}


def _searched(
    path: Path, files: Files, names: dict[Id, str], taken: set[Path], found: Found, faults: Faults
) -> dict[Id, Path]:
    """Returns the only file that fits each name; a file that fits several images is a fault of each of them."""
    fitting = {}
    for image_id, name in names.items():
        field = f"{path}, image {image_id}, file_name"
        with skipping(FAULTY_IMAGE, found, faults):
            fitting[image_id] = files.root / image_named(name, files, (), field, found)
    counts = Counter(fitting.values())
    for image_id, file in list(fitting.items()):
        with skipping(FAULTY_IMAGE, found, faults):
            if counts[file] > 1 or file in taken:
                del fitting[image_id]
                raise InputError(
                    f"{path}, image {image_id}, file_name: {quoted(names[image_id])} does not exist, and the only file "
                    f"that fits, {file}, is that of another image"
                )
    return fitting


def _frame(item: dict[str, Any], path: Path, field: str, found: Found, max_pixels: int) -> tuple[tuple[int, int], bool]:
    """Returns the (height, width) that the boxes refer to, and whether it is that of the upright image."""
    sides = [0.0 if is_unknown(item.get(key)) else _number(item, key, field, found) for key in ("height", "width")]
    if any(side in (0, -1) for side in sides):
        found[NO_SIZE].append(field)
        return annotated_frame(path, None, field, found, max_pixels=max_pixels)
    return annotated_frame(path, (sides[0], sides[1]), field, found, max_pixels=max_pixels)


def _label(
    item: dict[str, Any], field: str, label_of: dict[int, int], name_of: dict[int, str], found: Found
) -> int | None:
    """Returns the label, or None for an object of another class."""
    category_id = _id(item, "category_id", field, found)
    if category_id not in name_of:
        raise InputError(f"{field}, category_id: the file has no category with id {category_id}")
    if category_id not in label_of:
        found[OTHER_CLASS].append(f"{field}, category_id: {category_id} ({quoted(name_of[category_id])})")
    return label_of.get(category_id)


def _object(item: dict[str, Any], field: str, label: int, image_hw: tuple[int, int], found: Found) -> _Object | None:
    """Returns an annotation with its box clipped to the image, or None if the clipped box is empty."""
    x, y, width, height = sides = _sides(item, field, found)
    if width < 0 or height < 0:
        raise InputError(f"{field}, bbox: width and height must not be negative, got {_words(sides)}")
    crowd = _flag(item, "iscrowd", field)
    if _flag(item, "ignore", field):
        found[IGNORED].append(field)
        crowd = True
    area = math.nan if is_unknown(item.get("area")) else _number(item, "area", field, found)
    if area < 0:
        raise InputError(f"{field}, area: must not be negative, got {area:g}")
    if x > image_hw[1] or y > image_hw[0] or x + width < 0 or y + height < 0:
        size = f"{image_hw[1]} x {image_hw[0]}"
        raise InputError(f"{field}, bbox: {_words(sides)} lies outside the image of {size} pixels (width x height)")
    # Rounded to float32 first, otherwise the rounding error of x + width would count as a box outside the image.
    box = np.array([x, y, x + width, y + height], np.float32)
    inside = np.clip(box, 0, np.array([*image_hw[::-1]] * 2, np.float32))
    if (inside[2:] <= inside[:2]).any():
        found[EMPTY].append(f"{field}, bbox: {_words(sides)}")
        return None
    if (inside != box).any():
        found[CLIPPED].append(f"{field}, bbox: {_words(sides)}")
    if math.isnan(area):
        found[NO_AREA].append(field)
    return _Object(tuple(inside.tolist()), label, crowd, area)


def _sides(item: dict[str, Any], field: str, found: Found) -> list[float]:
    """Returns (x, y, width, height): of bbox, or of the outline where bbox is missing or empty."""
    sides = item.get("bbox")
    if isinstance(sides, str) and not is_unknown(sides):  # a list as text
        sides = [side for side in sides.strip("[]() ").split(",") if side.strip()]
        found[TEXT].append(f"{field}, bbox: {quoted(item['bbox'])}")
    missing = is_unknown(sides) or sides == [0, 0, 0, 0] or (isinstance(sides, list) and all(map(is_unknown, sides)))
    outline = _outline(item.get("segmentation")) if missing else []
    if outline:
        found[EXTENT].append(field)
        (x1, x2), (y1, y2) = ((min(axis), max(axis)) for axis in (outline[::2], outline[1::2]))
        return [x1, y1, x2 - x1, y2 - y1]
    if not isinstance(sides, list) or len(sides) != 4 or not all(_is_number(_as_number(side)) for side in sides):
        raise InputError(f"{field}, bbox: must be four finite numbers, {_got(item, 'bbox')}")
    if any(isinstance(side, str) for side in item["bbox"]) and not isinstance(item["bbox"], str):
        found[TEXT].append(f"{field}, bbox: {quoted(sides)}")
    return [float(side) for side in sides]


def _outline(segmentation: Any) -> list[float]:
    """Returns the coordinates x, y, x, y ... of all polygons, or [] where the segmentation has no usable polygon."""
    if not isinstance(segmentation, list):
        return []
    polygons = segmentation if all(isinstance(part, list) for part in segmentation) else [segmentation]
    values = [_as_number(value) for polygon in polygons for value in polygon]
    if any(len(polygon) % 2 for polygon in polygons) or not all(_is_number(value) for value in values):
        return []
    return [float(value) for value in values]


def _words(sides: list[float]) -> str:
    return f"[{', '.join(f'{side:g}' for side in sides)}]"


def _flag(item: dict[str, Any], key: str, field: str) -> bool:
    value = flag(item.get(key))
    if value is None:
        raise InputError(f"{field}, {key}: must be 0 or 1, {_got(item, key)}")
    return value


def _id(item: dict[str, Any], key: str, field: str, found: Found) -> Id:
    value = _plain_id(item.get(key))
    if value is None:
        raise InputError(f"{field}, {key}: must be an integer of at most 64 bits or text, {_got(item, key)}")
    if isinstance(item[key], str) and isinstance(value, int):
        found[TEXT].append(f"{field}, {key}: {quoted(item[key])}")
    return value


def _plain_id(value: Any) -> Id | None:
    """Returns an id; 7, 7.0 and "7" are one id, because writers mix them within a file. None: not an id."""
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(r"[+-]?[0-9]{1,18}(\.0+)?", text):
            return int(text.partition(".")[0])
        printable = 0 < len(text) <= MAX_NAME and not re.search(r"[\ud800-\udfff\0-\x1f]", text)
        return text if printable else None
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        return int(value)
    # A bool is also an int. Longer integers can be chosen so that all have one hash value, and no dict is fast then.
    return value if type(value) is int and abs(value) < 2**63 else None


def _number(item: dict[str, Any], key: str, field: str, found: Found) -> float:
    value = _as_number(item.get(key))
    if not _is_number(value):
        raise InputError(f"{field}, {key}: must be a finite number, {_got(item, key)}")
    if isinstance(item[key], str):
        found[TEXT].append(f"{field}, {key}: {quoted(item[key])}")
    return float(value)


def _as_number(value: Any) -> Any:
    """Returns the number that a text contains; other values as they are."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _is_number(value: Any) -> bool:
    # No image is near 1e12 pixels wide; the comparison also rejects NaN and integers too long for a float.
    return type(value) in (int, float) and abs(value) < 1e12


def _got(item: dict[str, Any], key: str) -> str:
    return f"got {quoted(item[key])}" if key in item else "but it is missing"
