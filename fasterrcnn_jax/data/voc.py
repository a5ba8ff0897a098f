"""Reader of folders in PASCAL VOC layout: JPEGImages, Annotations, ImageSets/Main/SPLIT.txt.

VOC writes 1-based inclusive pixel indices. They are converted here and nowhere else:
(xmin, ymin, xmax, ymax) becomes [xmin - 1, xmax) x [ymin - 1, ymax) in continuous pixels.

Whatever cannot be meant raises InputError, or is skipped where that is asked for. What real sets are full
of and what has one sensible reading is read that way. Both are counted in `Dataset.notes`.
"""

import contextlib
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

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
from fasterrcnn_jax.data.records import MIN_SIDE, Dataset, ImageRecord, box_areas, check_class_names
from fasterrcnn_jax.errors import InputError, quoted

# The objects of VOC2007 and VOC2012, in the order of the challenge.
CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# Tried in this order when <filename> does not tell.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")

# What file systems allow.
MAX_NAME = 255

# No JPEG is wider. The value itself is what is left of 0 - 1 in the 16 bits that some writers use.
MAX_COORDINATE = 65535

SMALL = "Boxes under two pixels on a side were dropped"
CLIPPED = "Boxes reaching outside their image were clipped"
REPEATED_LINE = "Repeated lines of the list were left out"
SECOND_COLUMN = "A second column in lines of the list was left out"
OTHER_IMAGE = "A <filename> naming another image was left aside"
NO_SIZE = "For a <size> of 0 x 0 the image's own was used"


def read_voc(root: Path | str, split: str, class_names: tuple[str, ...], *, faults: Faults = "error") -> Dataset:
    """Returns the records of one split, in the order of its list.

    Every annotation is parsed and the header of every image is read; pixels are not decoded. An image
    without objects is kept, with boxes [0, 4]; so is an object marked difficult, with its flag.

    Args:
      root: the folder that holds JPEGImages, Annotations and ImageSets/Main.
      split: name of a list in ImageSets/Main, without ".txt".
      class_names: label k is class_names[k - 1]; names are compared exactly, surrounding blanks aside.
      faults: "skip" leaves out the image or the object with a fault. What is wrong with the list or the
        folders is an error all the same.

    Raises:
      InputError: one sentence naming file, field and value of the first fault found.
    """
    root = Path(root)
    check_class_names(class_names)
    label_of = {name: label for label, name in enumerate(class_names, start=1)}
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    list_path = _list_path(root, split)
    # Two listings are quicker than looking for each file under several names, and compare letter case everywhere.
    images, annotations = _file_names(root / "JPEGImages"), _file_names(root / "Annotations")

    name, found, records = f"{root} ({split})", defaultdict(list), []
    listed = _read_list(list_path, images, annotations, found)
    for image_id, where in watched(listed, f"reading {name}", len(listed)):
        xml_path = root / "Annotations" / f"{image_id}.xml"
        with skipping(FAULTY_IMAGE, found, faults):
            if xml_path.name not in annotations:
                raise InputError(f"{xml_path}: no such annotation file, though {where} lists it")
            annotation = _parse(xml_path)
            image_path = _image_path(root / "JPEGImages", image_id, images, annotation, xml_path, where, found)
            image_hw, upright = _frame(annotation, xml_path, image_path, found)
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
            flags = np.array(difficult, bool), np.zeros(len(boxes), bool)  # VOC knows no crowds
            arrays = boxes, np.array(labels, np.int32), *flags, box_areas(boxes)
            records.append(ImageRecord(image_id, image_path, image_hw, *arrays, upright=upright))
    findings = findings_of(found)
    return Dataset(name, tuple(class_names), tuple(records), notes_of(findings), tuple(label_of.values()), findings)


def splits(root: Path | str) -> tuple[str, ...]:
    """Returns the names of the lists, without VOC's lists per class beside each (cat_train beside train)."""
    folder = Path(root) / "ImageSets" / "Main"
    names = sorted(path.stem for path in folder.glob("*.txt")) if folder.is_dir() else []
    return tuple(name for name in names if "_" not in name or name.rpartition("_")[2] not in names)


def class_names_in(root: Path | str, split: str) -> tuple[str, ...]:
    """Returns the names that the objects of one split carry, sorted; for a message, so faults are passed over."""
    root = Path(root)
    names = set()
    images, annotations = _file_names(root / "JPEGImages"), _file_names(root / "Annotations")
    for image_id, _ in _read_list(_list_path(root, split), images, annotations, defaultdict(list)):
        with contextlib.suppress(InputError):
            if f"{image_id}.xml" in annotations:
                annotation = _parse(root / "Annotations" / f"{image_id}.xml")
                names.update((element.findtext("name") or "").strip() for element in annotation.findall("object"))
    return tuple(sorted(names - {""}))


def _list_path(root: Path, split: str) -> Path:
    folder = root / "ImageSets" / "Main"
    path = folder / f"{split}.txt"
    if not split or re.search(r"[/\\\0]", split):
        raise InputError(f"split must be the name of a list in {folder}, got {split!r}")
    if not path.is_file():
        raise InputError(f"{path}: no such list; the splits that exist are: {', '.join(splits(root)) or 'none'}")
    return path


def _file_names(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a VOC folder holds JPEGImages, Annotations and ImageSets/Main")
    return {path.name for path in folder.iterdir()}


def _read_list(path: Path, images: set[str], annotations: set[str], found) -> list[tuple[str, str]]:
    """Returns (id, "FILE line N") for each image listed, each once."""
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
        # The longest reading that exists wins: names may hold blanks and dots, or end in " 1".
        first_column = re.sub(r"\s+[+-]?[01]$", "", line)
        readings = [line, _without_extension(line), first_column, _without_extension(first_column)]
        exists = [r for r in readings if f"{r}.xml" in annotations or any(r + e in images for e in EXTENSIONS)]
        image_id = exists[0] if exists else readings[-1]
        if re.search(r"[/\\\0]", image_id) or image_id in (".", "..") or len(image_id) > MAX_NAME:
            raise InputError(f"{where}: the id must be the name of a file without its folder, got {quoted(image_id)}")
        if image_id not in (line, _without_extension(line)):
            found[SECOND_COLUMN].append(where)
        if image_id in ids:
            found[REPEATED_LINE].append(f"{where}: {image_id}")
        else:
            ids[image_id] = where
    if not ids:
        raise InputError(f"{path}: split {path.stem} lists 0 images")
    return list(ids.items())


def _without_extension(name: str) -> str:
    stem, dot, extension = name.rpartition(".")
    return stem if stem and (dot + extension).lower() in EXTENSIONS else name


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(path: Path) -> ElementTree.Element:
    content = _read_bytes(path)
    # Annotations need no document type; entities are declared there, to read other files or to grow without
    # bound. Without its zero bytes UTF-16 text reads as ASCII.
    if re.search(rb"<!(DOCTYPE|ENTITY)", content.replace(b"\0", b""), re.IGNORECASE):
        raise InputError(f"{path}: refused because it declares a document type or entities")
    try:
        # Bytes, not text: the encoding is what the file itself declares.
        annotation = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{path}: not well-formed XML: {error}") from None
    if annotation.tag != "annotation":
        raise InputError(f"{path}: not a VOC annotation: the root is <{annotation.tag[:80]}>, not <annotation>")
    return annotation


def _image_path(folder, image_id, images, annotation, xml_path, where, found) -> Path:
    """Returns the image of an id; <filename> may tell its extension, never its place or stem."""
    hint = re.split(r"[/\\]", (annotation.findtext("filename") or "").strip())[-1]
    stem, dot, extension = hint.rpartition(".")
    if hint and image_id not in (hint, stem):
        found[OTHER_IMAGE].append(f"{xml_path}, filename: {quoted(annotation.findtext('filename').strip())}")
    candidates = [image_id + e for e in EXTENSIONS]
    if stem == image_id:
        candidates.insert(0, image_id + dot + extension)
    for name in candidates:
        if name in images:
            return folder / name
    raise InputError(f"{folder / candidates[0]}: no such image file, nor with {' '.join(EXTENSIONS)}; {where} lists it")


def _frame(annotation, xml_path, image_path, found) -> tuple[tuple[int, int], bool]:
    """Returns (height, width) of the frame that the boxes are in, and whether it is the upright one."""
    field = f"{xml_path}, size"
    size = _child(annotation, "size", field, required=False)
    stated = None
    if size is not None:
        stated = tuple(_number(size, axis, f"{field}, {axis}") for axis in ("height", "width"))
        if stated == (0, 0):
            found[NO_SIZE].append(str(xml_path))
            stated = None
    return annotated_frame(image_path, stated, field, found)


def _label(element, field, label_of) -> int:
    name = (_child(element, "name", f"{field}, name").text or "").strip()
    if name not in label_of:
        raise InputError(f"{field}, name: {quoted(name)} is not one of the classes {', '.join(label_of)}")
    return label_of[name]


def _difficult(element, field) -> bool:
    child = _child(element, "difficult", f"{field}, difficult", required=False)
    text = "0" if child is None else (child.text or "").strip()
    if text not in ("0", "1"):
        raise InputError(f"{field}, difficult: must be 0 or 1, got {quoted(text)}")
    return text == "1"


def _box(element, field, height, width, found) -> tuple[float, float, float, float] | None:
    """Returns (x1, y1, x2, y2) in continuous pixels, clipped to the image; None where too little is left."""
    # The direct child: the boxes of a person's parts are <bndbox> too, and may come first.
    bndbox = _child(element, "bndbox", f"{field}, bndbox")
    edges = {}
    for low, high, side in (("xmin", "xmax", width), ("ymin", "ymax", height)):
        first, last = (_number(bndbox, tag, f"{field}, {tag}") for tag in (low, high))
        if last < first:
            raise InputError(f"{field}: {low} {first:g} is greater than {high} {last:g}")
        # Index 0 is still inside for a set that counts from 0.
        if first > side or last < 0:
            raise InputError(f"{field}: {low} {first:g}, {high} {last:g} lies outside the image of {side} pixels")
        edges[low], edges[high] = first - 1.0, last
    box = tuple(edges[tag] for tag in ("xmin", "ymin", "xmax", "ymax"))
    x1, y1, x2, y2 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))
    if min(x2 - x1, y2 - y1) < MIN_SIDE:
        found[SMALL].append(field)
        return None
    if (x1, y1, x2, y2) != box:
        found[CLIPPED].append(f"{field}: {_describe(bndbox)}")
    return x1, y1, x2, y2


def _describe(bndbox) -> str:
    return ", ".join(f"{tag} {bndbox.findtext(tag).strip()}" for tag in ("xmin", "ymin", "xmax", "ymax"))


def _number(parent, tag, field) -> float:
    text = (_child(parent, tag, field).text or "").strip()
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{field}: must be a number, got {quoted(text)}") from None
    if not math.isfinite(value) or abs(value) >= MAX_COORDINATE:
        raise InputError(f"{field}: must be a finite number below {MAX_COORDINATE}, got {quoted(text)}")
    return value


def _child(parent, tag, field, *, required=True) -> ElementTree.Element | None:
    """Returns the direct child of that tag; two of them would leave it open which one is meant."""
    children = parent.findall(tag)
    if len(children) > 1 or (required and not children):
        number = "one" if required else "at most one"
        raise InputError(f"{field}: <{parent.tag}> must hold {number} <{tag}>, got {len(children)}")
    return children[0] if children else None
