"""Reads folders in PASCAL VOC layout: JPEGImages, Annotations, ImageSets/Main/SPLIT.txt.

VOC writes 1-based inclusive pixel indices. This module converts them to continuous pixels:
(xmin, ymin, xmax, ymax) becomes [xmin - 1, xmax) x [ymin - 1, ymax).

An annotation that makes no sense raises InputError, or is skipped with `faults` "skip". Irregularities that are common
in real data sets and have one sensible meaning are read with that meaning. `Dataset.notes` counts both.
"""

import contextlib
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path
from typing import Literal, overload

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
from fasterrcnn_jax.data.records import MIN_SIDE, Dataset, ImageRecord, box_areas, check_class_names, joined_names
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.regular_files import check_regular

# The classes of VOC2007 and VOC2012, in the order of the challenge.
CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# Tried in this order if <filename> does not give the extension.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")

# The longest file name that file systems allow.
MAX_NAME = 255

# No JPEG is wider. The value 65535 itself is not allowed: it is 0 - 1 in the unsigned 16 bits that some writers use.
MAX_COORDINATE = 65535

SMALL = "Boxes under two pixels on a side were dropped"
CLIPPED = "Boxes reaching outside their image were clipped"
REPEATED_LINE = "Repeated lines of the list were ignored"
SECOND_COLUMN = "The second column of a line in the list was ignored"
OTHER_IMAGE = "A <filename> that names another image was ignored"
NO_SIZE = "A <size> of 0 x 0 was replaced by the size of the image file"


def read_voc(
    root: Path | str,
    split: str,
    class_names: tuple[str, ...],
    *,
    faults: Faults = "error",
    max_pixels: int = DataConfig.max_pixels,
    within: Path | None = None,
) -> Dataset:
    """Returns the records of one split, in the order of its list.

    Every annotation is parsed and the header of every image is read; pixels are not decoded. An image
    without objects is kept, with boxes [0, 4]. Difficult objects are kept and flagged.

    Args:
      root: the folder that holds JPEGImages, Annotations and ImageSets/Main.
      split: name of a list in ImageSets/Main, without ".txt".
      class_names: label k is class_names[k - 1]; names are compared exactly, without surrounding blanks.
      faults: "skip" skips the image or the object with a fault. A fault of the list or of the folders is
        always an error.
      max_pixels: an image with more pixels is a fault.
      within: folder that no symbolic link may lead out of; None: links are followed.

    Raises:
      InputError: one sentence with the file, field and value of the first fault.
    """
    root = Path(root)
    check_class_names(class_names)
    label_of = {name: label for label, name in enumerate(class_names, start=1)}
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    guard = link_guard(within)
    list_path = _list_path(root, split, guard)
    # Listing both folders once is faster than testing several names per image, and it compares upper and lower case
    # on every file system.
    images, annotations = _file_names(root / "JPEGImages"), _file_names(root / "Annotations")

    name, found, records = f"{root} ({split})", defaultdict(list), []
    listed = _read_list(list_path, images, annotations, found)
    for image_id, where in watched(listed, f"reading {name}", len(listed)):
        xml_path = root / "Annotations" / f"{image_id}.xml"
        with skipping(FAULTY_IMAGE, found, faults):
            if xml_path.name not in annotations:
                raise InputError(f"{xml_path}: no such annotation file, but {where} lists it")
            guard(xml_path)
            annotation = _parse(xml_path)
            image_path = _image_path(root / "JPEGImages", image_id, images, annotation, xml_path, where, found)
            guard(image_path)
            image_hw, upright = _frame(annotation, xml_path, image_path, found, max_pixels)
            boxes, labels, difficult = [], [], []
            for number, element in enumerate(annotation.findall("object"), start=1):
                field = f"{xml_path}, object {number}"
                with skipping(FAULTY_OBJECT, found, faults):
                    label, is_difficult = _label(element, field, label_of), _difficult(element, field)
                    box = _box(element, field, *image_hw, found)
                    if box is not None:
                        boxes.append(box)
                        labels.append(label)
                        difficult.append(is_difficult)
            boxes = np.array(boxes, np.float32).reshape(-1, 4)
            flags = np.array(difficult, bool), np.zeros(len(boxes), bool)  # VOC has no crowds
            arrays = boxes, np.array(labels, np.int32), *flags, box_areas(boxes)
            records.append(ImageRecord(image_id, image_path, image_hw, *arrays, upright=upright))
    findings = findings_of(found)
    return Dataset(name, tuple(class_names), tuple(records), notes_of(findings), tuple(label_of.values()), findings)


def splits(root: Path | str) -> tuple[str, ...]:
    """Returns the names of the lists, without VOC's lists of one class (cat_train if there is also train)."""
    folder = Path(root) / "ImageSets" / "Main"
    names = sorted(path.stem for path in folder.glob("*.txt")) if folder.is_dir() else []
    known = set(names)
    return tuple(name for name in names if "_" not in name or name.rpartition("_")[2] not in known)


def class_names_in(root: Path | str, split: str, *, within: Path | None = None) -> tuple[str, ...]:
    """Returns the sorted class names of the objects of one split; for a message, so faults are ignored.

    Args:
      within: as in `read_voc`.
    """
    root, guard = Path(root), link_guard(within)
    names = set()
    images, annotations = _file_names(root / "JPEGImages"), _file_names(root / "Annotations")
    for image_id, _ in _read_list(_list_path(root, split, guard), images, annotations, defaultdict(list)):
        with contextlib.suppress(InputError):
            if f"{image_id}.xml" in annotations:
                path = root / "Annotations" / f"{image_id}.xml"
                guard(path)
                annotation = _parse(path)
                names.update((element.findtext("name") or "").strip() for element in annotation.findall("object"))
    return tuple(sorted(names - {""}))


def _list_path(root: Path, split: str, guard: Guard) -> Path:
    folder = root / "ImageSets" / "Main"
    path = folder / f"{split}.txt"
    if not split or re.search(r"[/\\\0]", split):
        raise InputError(f"split must be the name of a list in {folder}, got {split!r}")
    if not path.is_file():
        raise InputError(f"{path}: no such list; the existing splits are: {joined_names(splits(root)) or 'none'}")
    guard(path)
    return path


def _file_names(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a VOC folder contains JPEGImages, Annotations and ImageSets/Main")
    return {path.name for path in folder.iterdir()}


# What VOC's lists of one class say about an image.
_SECOND_COLUMNS = ("0", "1", "-0", "-1", "+0", "+1")


def _read_list(path: Path, images: set[str], annotations: set[str], found: Found) -> list[tuple[str, str]]:
    """Returns (id, "FILE line N") for each listed image, without repetitions."""
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the list is not UTF-8 text: {error}") from None
    ids = {}
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        line = line.strip()
        if not line:
            continue
        where = f"{path} line {number}"
        # The longest reading that names an existing file is used: names may contain blanks and dots, or end in " 1".
        first_column, second_column = (*line.rsplit(None, 1), "")[:2]
        if second_column not in _SECOND_COLUMNS:
            first_column = line
        readings = [line, _without_extension(line), first_column, _without_extension(first_column)]
        exists = [r for r in readings if f"{r}.xml" in annotations or any(r + e in images for e in EXTENSIONS)]
        image_id = exists[0] if exists else readings[-1]
        if re.search(r"[/\\\0]", image_id) or image_id in (".", "..") or len(image_id) > MAX_NAME:
            raise InputError(f"{where}: the id must be a file name without a folder, got {quoted(image_id)}")
        if image_id not in (line, _without_extension(line)):
            found[SECOND_COLUMN].append(where)
        if image_id in ids:
            found[REPEATED_LINE].append(f"{where}: {image_id}")
        else:
            ids[image_id] = where
    if not ids:
        raise InputError(f"{path}: the list of split {path.stem} is empty")
    return list(ids.items())


def _without_extension(name: str) -> str:
    stem, dot, extension = name.rpartition(".")
    return stem if stem and (dot + extension).lower() in EXTENSIONS else name


def _read_bytes(path: Path) -> bytes:
    check_regular(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read: {error.strerror}") from None


def _parse(path: Path) -> ElementTree.Element:
    content = _read_bytes(path)
    # Annotations need no document type. Entities are declared in it; they can read other files or expand without
    # bound. The zero bytes are removed so that the pattern also matches UTF-16 text.
    if re.search(rb"<!(DOCTYPE|ENTITY)", content.replace(b"\0", b""), re.IGNORECASE):
        raise InputError(f"{path}: the file is refused because it declares a document type or entities; remove them")
    try:
        # Parsed from bytes, because the file itself declares its encoding.
        annotation = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{path}: the file is not well-formed XML: {error}") from None
    if annotation.tag != "annotation":
        raise InputError(f"{path}: not a VOC annotation: the root must be <annotation>, got <{annotation.tag[:80]}>")
    return annotation


def _image_path(
    folder: Path,
    image_id: str,
    images: set[str],
    annotation: ElementTree.Element,
    xml_path: Path,
    where: str,
    found: Found,
) -> Path:
    """Returns the image file of an id; <filename> can only give the extension, not the folder or stem."""
    hint = re.split(r"[/\\]", (annotation.findtext("filename") or "").strip())[-1]
    stem, dot, extension = hint.rpartition(".")
    if hint and image_id not in (hint, stem):
        found[OTHER_IMAGE].append(f"{xml_path}, filename: {quoted(annotation.findtext('filename', '').strip())}")
    candidates = [image_id + e for e in EXTENSIONS]
    if stem == image_id:
        candidates.insert(0, image_id + dot + extension)
    for name in candidates:
        if name in images:
            return folder / name
    raise InputError(
        f"{folder / candidates[0]}: no such image file, also not with {' '.join(EXTENSIONS)}, but {where} lists it"
    )


def _frame(
    annotation: ElementTree.Element, xml_path: Path, image_path: Path, found: Found, max_pixels: int
) -> tuple[tuple[int, int], bool]:
    """Returns the (height, width) that the boxes refer to, and whether it is that of the upright image."""
    field = f"{xml_path}, size"
    size = _child(annotation, "size", field, required=False)
    stated = None
    if size is not None:
        stated = _number(size, "height", f"{field}, height"), _number(size, "width", f"{field}, width")
        if stated == (0, 0):
            found[NO_SIZE].append(str(xml_path))
            stated = None
    return annotated_frame(image_path, stated, field, found, max_pixels=max_pixels)


def _label(element: ElementTree.Element, field: str, label_of: dict[str, int]) -> int:
    name = (_child(element, "name", f"{field}, name").text or "").strip()
    if name not in label_of:
        raise InputError(f"{field}, name: {quoted(name)} is not one of the classes {joined_names(label_of)}")
    return label_of[name]


def _difficult(element: ElementTree.Element, field: str) -> bool:
    child = _child(element, "difficult", f"{field}, difficult", required=False)
    text = "0" if child is None else (child.text or "").strip()
    if text not in ("0", "1"):
        raise InputError(f"{field}, difficult: must be 0 or 1, got {quoted(text)}")
    return text == "1"


def _box(
    element: ElementTree.Element, field: str, height: int, width: int, found: Found
) -> tuple[float, float, float, float] | None:
    """Returns (x1, y1, x2, y2) in continuous pixels, clipped to the image; None if the rest is under two pixels."""
    # Only the direct child: the boxes of a person's parts are also <bndbox> and can come first.
    bndbox = _child(element, "bndbox", f"{field}, bndbox")
    edges = {}
    for low, high, side in (("xmin", "xmax", width), ("ymin", "ymax", height)):
        first, last = (_number(bndbox, tag, f"{field}, {tag}") for tag in (low, high))
        if last < first:
            raise InputError(f"{field}: {low} {first:g} is greater than {high} {last:g}")
        # Index 0 is accepted as inside, for data sets that count pixels from 0.
        if first > side or last < 0:
            raise InputError(f"{field}: {low} {first:g}, {high} {last:g} is outside the image ({side} pixels)")
        edges[low], edges[high] = first - 1.0, last
    box = tuple(edges[tag] for tag in ("xmin", "ymin", "xmax", "ymax"))
    x1, y1, x2, y2 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))
    if min(x2 - x1, y2 - y1) < MIN_SIDE:
        found[SMALL].append(field)
        return None
    if (x1, y1, x2, y2) != box:
        found[CLIPPED].append(f"{field}: {_describe(bndbox)}")
    return x1, y1, x2, y2


def _describe(bndbox: ElementTree.Element) -> str:
    return ", ".join(f"{tag} {bndbox.findtext(tag, '').strip()}" for tag in ("xmin", "ymin", "xmax", "ymax"))


def _number(parent: ElementTree.Element, tag: str, field: str) -> float:
    text = (_child(parent, tag, field).text or "").strip()
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{field}: must be a number, got {quoted(text)}") from None
    if not math.isfinite(value) or abs(value) >= MAX_COORDINATE:
        raise InputError(f"{field}: must be a finite number below {MAX_COORDINATE}, got {quoted(text)}")
    return value


@overload
def _child(parent: ElementTree.Element, tag: str, field: str) -> ElementTree.Element: ...


@overload
def _child(
    parent: ElementTree.Element, tag: str, field: str, *, required: Literal[False]
) -> ElementTree.Element | None: ...


def _child(parent: ElementTree.Element, tag: str, field: str, *, required: bool = True) -> ElementTree.Element | None:
    """Returns the direct child with that tag; two of them are an error, because they are ambiguous."""
    children = parent.findall(tag)
    if len(children) > 1 or (required and not children):
        number = "one" if required else "at most one"
        raise InputError(f"{field}: <{parent.tag}> must contain {number} <{tag}>, got {len(children)}")
    return children[0] if children else None
