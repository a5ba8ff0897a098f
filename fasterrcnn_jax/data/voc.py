"""Reads PASCAL VOC annotations: one XML file per image, in VOC's own folders or as labelling tools arrange them.

VOC writes 1-based inclusive pixel indices. This module converts them to continuous pixels:
(xmin, ymin, xmax, ymax) becomes [xmin - 1, xmax) x [ymin - 1, ymax). CVAT writes continuous pixels into the same
fields; `Places.counts_from` 0 takes the corners as they are.

An annotation that makes no sense raises InputError, or is skipped with `faults` "skip". Irregularities that are common
in real data sets and have one sensible meaning are read with that meaning. `Dataset.notes` counts both.
"""

import contextlib
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, overload

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
from fasterrcnn_jax.data.file_names import read_text
from fasterrcnn_jax.data.images import annotated_frame
from fasterrcnn_jax.data.layouts import (
    IMAGE_EXTENSIONS,
    SPLIT_NAMES,
    WHOLE,
    Layout,
    composed,
    names_below,
    no_such_split,
    part_of_a_name,
    splits_of,
)
from fasterrcnn_jax.data.links import Guard, link_guard
from fasterrcnn_jax.data.objects import flag, is_unknown
from fasterrcnn_jax.data.records import MIN_SIDE, Dataset, ImageRecord, box_areas, check_class_names, labels_of
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.regular_files import check_regular

# The classes of VOC2007 and VOC2012, in the order of the challenge.
CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# The longest path below a folder that an id may be.
MAX_PATH = 1024

# No JPEG is wider. The value 65535 itself is not allowed: it is 0 - 1 in the unsigned 16 bits that some writers use.
MAX_COORDINATE = 65535

SMALL = "Boxes under two pixels on a side were dropped"
CLIPPED = "Boxes reaching outside their image were clipped"
REPEATED_LINE = "Repeated lines of the list were ignored"
SECOND_COLUMN = "What follows the name in a line of the list was ignored"
COMMENT = "Comments in the list were ignored"
LINE_FOLDER = "A folder in a line of the list was ignored"
LETTER_CASE = "Names that differ in upper or lower case were read as the only file that fits"
OTHER_IMAGE = "A <filename> that names another image was ignored"
NO_XML = "Images without an XML file were left out"
NO_SIZE = "A <size> that is empty, 0 or -1 was replaced by the size of the image file"
NO_DIFFICULT = "A <difficult> that is no number was read as yes or no"
DECIMALS = (
    "Every corner has decimals, so the boxes are probably continuous coordinates as CVAT writes them; "
    "--data.voc_counts_from 0 reads them so"
)


class Places(NamedTuple):
    """Where the files of a split are, relative to the root and with / as separator; all may contain {split}."""

    images: str = "JPEGImages"
    annotations: str = "Annotations"
    lists: str | None = "ImageSets/Main/{split}.txt"  # None: every XML file in `annotations`
    counts_from: int = 1  # 0: the corners are continuous coordinates

    def of(self, split: str) -> "Places":
        """Returns the places of one split."""
        images, annotations = (part.replace("{split}", split) for part in (self.images, self.annotations))
        lists = None if self.lists is None else self.lists.replace("{split}", split)
        return Places(images, annotations, lists, self.counts_from)


OWN_PLACES = Places()


class _Files(NamedTuple):
    """The files of one kind below a folder; names are relative to it, stems are names without extension."""

    folder: Path
    guard: Guard
    of_stem: dict[str, list[str]]
    of_letters: dict[str, list[str]]  # the same with the stem in lower case

    def named(self, stem: str) -> list[str]:
        """Returns the files with that stem; without one, those of the only stem that differs in upper and lower case.

        Raises:
          InputError: the stem itself does not exist, and several stems differ from it in upper and lower case.
        """
        names = self.of_stem.get(stem) or self.of_letters.get(stem.lower(), [])
        if len({_stem(name) for name in names}) > 1:
            raise InputError(f"{self.folder / stem}: no such file, and several differ in letters only: {names[:3]}")
        return names


def read_voc(
    root: Path | str,
    split: str,
    class_names: tuple[str, ...],
    places: Places = OWN_PLACES,
    *,
    faults: Faults = "error",
    max_pixels: int = DataConfig.max_pixels,
    within: Path | None = None,
) -> Dataset:
    """Returns the records of one split, in the order of its list; without lists, sorted by name.

    Every annotation is parsed and the header of every image is read; pixels are not decoded. An image
    without objects is kept, with boxes [0, 4]. Difficult objects are kept and flagged. Objects of other classes than
    `class_names` are left out and counted. Without lists, an image without an XML file is left out and counted,
    because it was probably not labelled.

    Args:
      root: the folder that `places` are relative to.
      split: name of a list, without ".txt", or of the folder that stands for {split}.
      class_names: label k is class_names[k - 1]; names are compared exactly, without surrounding blanks.
      faults: "skip" skips the image or the object with a fault. A list or folder that is missing is always an error.
      max_pixels: an image with more pixels is a fault.
      within: folder that no symbolic link may lead out of; None: links are followed.

    Raises:
      InputError: one sentence with the file, field and value of the first fault.
    """
    root = Path(root)
    check_class_names(class_names)
    label_of = labels_of(class_names)
    images, annotations, listed = _open(root, split, places, within)

    name, found, records = f"{root} ({split})", defaultdict(list), []
    ids = _ids(listed, images, annotations, found, faults)
    objects = decimals = 0
    for image_id, where in watched(ids, f"reading {name}", len(ids)):
        with skipping(FAULTY_IMAGE, found, faults):
            xml_path = _xml_path(annotations, image_id, where, found)
            annotation = _parse(xml_path)
            image_path = _image_path(images, image_id, annotation, xml_path, where, found)
            images.guard(image_path)
            image_hw, upright = _frame(annotation, xml_path, image_path, found, max_pixels)
            boxes, labels, difficult = [], [], []
            for number, element in enumerate(annotation.findall("object"), start=1):
                field = f"{xml_path}, object {number}"
                with skipping(FAULTY_OBJECT, found, faults):
                    label, is_difficult = _label(element, field, label_of, found), _difficult(element, field, found)
                    if label is None:
                        continue
                    objects, decimals = objects + 1, decimals + _all_decimals(element)
                    box = _box(element, field, *image_hw, places.counts_from, found)
                    if box is not None:
                        boxes.append(box)
                        labels.append(label)
                        difficult.append(is_difficult)
            boxes = np.array(boxes, np.float32).reshape(-1, 4)
            flags = np.array(difficult, bool), np.zeros(len(boxes), bool)  # VOC has no crowds
            arrays = boxes, np.array(labels, np.int32), *flags, box_areas(boxes)
            records.append(ImageRecord(image_id, image_path, image_hw, *arrays, upright=upright))
    if places.counts_from == 1 and 0 < decimals == objects:
        found[DECIMALS].append(name)
    return dataset_of(name, class_names, records, found)


def splits(root: Path | str, places: Places = OWN_PLACES) -> tuple[str, ...]:
    """Returns the names of the splits: of the lists, without VOC's lists of one class (cat_train if there is train)."""
    root = Path(root)
    names = splits_of(root, places.lists or places.annotations)
    if names is None:
        return (WHOLE,)
    if places.lists is None:
        folders = {name: root / places.of(name).annotations for name in names}
        return tuple(name for name in names if any(map(_is_xml, names_below(folders[name]))))
    if "/" not in places.lists:  # other text files can be beside them
        return tuple(name for name in names if name.lower() in SPLIT_NAMES)
    known = set(names)
    return tuple(name for name in names if "_" not in name or name.rpartition("_")[2] not in known)


def class_names_in(
    root: Path | str,
    split: str,
    places: Places = OWN_PLACES,
    *,
    within: Path | None = None,
) -> tuple[str, ...]:
    """Returns the sorted class names of the objects of one split; faults are ignored.

    Args:
      within: as in `read_voc`.
    """
    images, annotations, listed = _open(Path(root), split, places, within)
    found, names = defaultdict(list), set()
    for image_id, where in _ids(listed, images, annotations, found, "skip"):
        with contextlib.suppress(InputError):
            names.update(_names(_parse(_xml_path(annotations, image_id, where, found))))
    return tuple(sorted(names))


def recognise(root: Path, *, within: Path | None = None) -> Layout | None:
    """Returns the layout of a folder with PASCAL VOC annotations, or None.

    Reads names, and a few XML files of each folder that has some.
    """
    names = names_below(root, follow_links=within is None)
    by_folder = defaultdict(list)
    for name in filter(_is_xml, names):
        by_folder[name.rpartition("/")[0]].append(name)
    # Folders with XML files of other kinds do not count.
    own = [xml for xml in by_folder.values() if any(_is_annotation(root / name) for name in _sample(xml, 5))]
    xml = [name for of_folder in own for name in of_folder]
    if not xml:
        return None
    annotations, folders = _pattern(name.rpartition("/")[0] for name in xml)
    images = _images_of(xml, annotations, folders, [name for name in names if _is_image(name)])
    if images is None:
        return None
    places, note = _with_lists(root, Places(images, annotations, None), names)
    counts_from = 0 if _counts_from_0(root, _sample(xml, 40)) else 1
    found = splits(root, places)
    voc_own = places[:3] == OWN_PLACES[:3]
    where = f"{len(xml)} XML files in {_shown(annotations)}, images of the same names in {_shown(images)}"
    if images == annotations:
        where = f"{len(xml)} XML files beside images of the same names in {_shown(images)}"
    lists = f", and {places.lists.replace('{split}', 'SPLIT')} for {', '.join(found)}" if places.lists else ""
    data = DataConfig(
        root=root,
        layout="voc",
        voc_images=places.images,
        voc_annotations=places.annotations,
        voc_lists=places.lists,
        voc_counts_from=counts_from,
    )
    notes = [] if note is None else [note]
    if counts_from == 0:
        notes.append("every corner has decimals, so corners are read as continuous coordinates, as CVAT writes them")
    kind = "PASCAL VOC" if voc_own else "PASCAL VOC, XML beside the images" if images == annotations else ""
    return Layout(kind or "PASCAL VOC in other folders", where + lists, data, found, tuple(notes))


def _shown(folder: str) -> str:
    return "the folder" if folder == "." else folder.replace("{split}", "SPLIT") + "/"


def _sample(items: list[str], count: int) -> list[str]:
    """Returns at most `count` items, evenly spread."""
    return [items[k * len(items) // min(count, len(items))] for k in range(min(count, len(items)))]


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS


def _is_xml(name: str) -> bool:
    return name.lower().endswith(".xml")


def _is_annotation(path: Path) -> bool:
    with contextlib.suppress(InputError):
        # The zero bytes are removed so that the pattern also matches UTF-16 text.
        return re.search(rb"<annotation[\s>]", _read_bytes(path)[:4000].replace(b"\0", b"")) is not None
    return False


def _pattern(folders: Iterator[str]) -> tuple[str, dict[str, str]]:
    """Returns the folder of all splits, with {split} for a part that names the split, and it for each given folder."""
    parts = {folder: tuple(filter(None, folder.split("/"))) for folder in folders}
    shortest = min(map(len, parts.values()))
    same = next((k for k in range(shortest) if len({p[k] for p in parts.values()}) > 1), shortest)
    at = next((k for k in range(shortest) if all(p[k].lower() in SPLIT_NAMES for p in parts.values())), None)
    if at is None or at > same:
        way = next(iter(parts.values()))[:same]
        return "/".join(way) or ".", dict.fromkeys(parts, "/".join(way) or ".")
    # Behind the split, only what all folders share belongs to the pattern: the rest is in the ids.
    tails = {p[at + 1 :] for p in parts.values()}
    tail = next(iter(tails)) if len(tails) == 1 else ()
    first = next(iter(parts.values()))[:at]
    return "/".join((*first, "{split}", *tail)), {
        folder: "/".join((*p[: at + 1], *tail)) for folder, p in parts.items()
    }


def _images_of(xml: list[str], annotations: str, folders: dict[str, str], images: list[str]) -> str | None:
    """Returns the folder, perhaps with {split}, that has images of the same names as most of the XML files."""
    at = defaultdict(list)
    for name in images:
        at[_stem(name).rpartition("/")[2].lower()].append(name)
    counts = Counter()
    for name in _sample(xml, 200):
        own = folders[name.rpartition("/")[0]]
        below = _stem(name) if own == "." else _stem(name)[len(composed(own)) + 1 :]
        stem = _stem(below) if _is_image(below) else below  # a.jpg.xml for a.jpg
        split = dict(zip(annotations.split("/"), own.split("/"), strict=False)).get("{split}")
        for image in at[stem.rpartition("/")[2].lower()]:
            if f"/{_stem(image)}".lower().endswith(f"/{stem}".lower()):
                folder = image.split("/")[: -1 - stem.count("/")]
                counts["/".join("{split}" if part == split else part for part in folder) or "."] += 1
    if not counts:
        return None
    usual = ("JPEGImages", "images", annotations)
    return max(counts, key=lambda folder: (counts[folder], folder in usual, folder))


def _with_lists(root: Path, places: Places, names: tuple[str, ...]) -> tuple[Places, str | None]:
    """Returns the places with the lists in ImageSets/Main, if there are any, and a note about them."""
    lists = [name for name in names if re.fullmatch(r"imagesets/(main/)?[^/]+\.txt", name.lower())]
    # PaddleDetection has train.txt beside the folders; others write ImageSets/train.txt, or other letters than VOC.
    lists = lists or [name for name in names if name.lower().endswith(".txt") and _stem(name).lower() in SPLIT_NAMES]
    if "{split}" in places.annotations or not lists:
        return places, None
    folder = max(dict.fromkeys(name.rpartition("/")[0] for name in lists), key=lambda name: name.count("/"))
    lists = [name for name in lists if name.rpartition("/")[0] == folder]
    pattern = f"{folder and f'{folder}/'}{{split}}{PurePosixPath(lists[0]).suffix}"
    images, annotations = places.images.split("/"), places.annotations.split("/")
    # The list has the folders that all images share.
    while min(len(images), len(annotations)) > 1 and images[-1] == annotations[-1]:
        images, annotations = images[:-1], annotations[:-1]
    own = Places("/".join(images), "/".join(annotations), pattern)
    stems = [_stem(name).rpartition("/")[2] for name in lists]
    # VoTT writes lists per class only: cat_train.txt has every training image, with 1 or -1.
    prefixes = {stem.rpartition("_")[0] for stem in stems}
    if all(stem.rpartition("_")[2] in SPLIT_NAMES and "_" in stem for stem in stems) and len(prefixes) > 1:
        lines = defaultdict(set)
        for name, stem in zip(lists, stems, strict=True):
            with contextlib.suppress(InputError):
                text = _read_bytes(root / name).decode("utf-8-sig", "replace")
                lines[stem.rpartition("_")[2]].add(
                    frozenset(_first_column(line.strip()) for line in text.splitlines() if line.strip())
                )
        if all(len(distinct) == 1 for distinct in lines.values()):
            own = own._replace(lists=pattern.replace("{split}", f"{min(prefixes)}_{{split}}"))
            return own, f"the lists of the classes name the same images, so {own.lists} is used"
    return own, None


def _counts_from_0(root: Path, xml: list[str]) -> bool:
    """Returns whether all corners in the files have a decimal point."""
    objects = []
    for name in xml:
        with contextlib.suppress(InputError):
            objects += _parse(root / name).findall("object")
    return bool(objects) and all(_all_decimals(element) for element in objects)


def _all_decimals(element: ElementTree.Element) -> bool:
    corners = [element.findtext(f"bndbox/{tag}") or "" for tag in ("xmin", "ymin", "xmax", "ymax")]
    return all("." in corner for corner in corners)


def object_names(
    root: Path | str,
    places: Places = OWN_PLACES,
    *,
    within: Path | None = None,
) -> Iterator[str]:
    """Yields the class names of the objects of every XML file, listed or not; faults are ignored.

    Args:
      within: as in `read_voc`.
    """
    for split in splits(root, places) if "{split}" in places.annotations else (WHOLE,):
        files = _files(Path(root) / places.of(split).annotations, (".xml",), within)
        for image_id in files.of_stem:
            with contextlib.suppress(InputError):
                yield from _names(_parse(_xml_path(files, image_id, "", defaultdict(list))))


def _names(annotation: ElementTree.Element) -> set[str]:
    names = {composed((element.findtext("name") or "").strip()) for element in annotation.findall("object")}
    return names - {""}


def _open(root: Path, split: str, places: Places, within: Path | None) -> tuple[_Files, _Files, Path | None]:
    """Returns the images and the XML files of a split, and its list.

    The folders are listed once, which is faster than testing several names per image, and which compares upper and
    lower case on every file system.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    if not part_of_a_name(split):
        lists = root / (places.lists or places.annotations)
        raise InputError(f"split must be the name of a list in {lists.parent}, got {split!r}")
    here, listed = places.of(split), None
    if here.lists is not None:
        listed = root / here.lists
        if not listed.is_file():
            raise no_such_split(f"{listed}: no such list", splits(root, places))
        link_guard(within)(listed)
    elif split not in splits(root, places):
        raise no_such_split(f"{root / here.annotations}: no such split", splits(root, places))
    images = _files(root / here.images, IMAGE_EXTENSIONS, within)
    return images, _files(root / here.annotations, (".xml",), within), listed


def _files(folder: Path, extensions: tuple[str, ...], within: Path | None) -> _Files:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; a VOC folder contains JPEGImages, Annotations and ImageSets/Main, "
            "or give other places with --data.voc_images, --data.voc_annotations and --data.voc_lists"
        )
    of_stem, of_letters = defaultdict(list), defaultdict(list)
    for name in names_below(folder, follow_links=within is None):
        if PurePosixPath(name).suffix.lower() in extensions:
            of_stem[_stem(name)].append(name)
            # No search needs more; without a limit, names in many letter cases would take time with their square.
            if len(of_letters[_stem(name).lower()]) < len(IMAGE_EXTENSIONS) * 2:
                of_letters[_stem(name).lower()].append(name)
    return _Files(folder, link_guard(within), dict(of_stem), dict(of_letters))


def _stem(name: str) -> str:
    name = composed(name)
    return name[: len(name) - len(PurePosixPath(name).suffix)]


def _ids(
    listed: Path | None, images: _Files, annotations: _Files, found: Found, faults: Faults
) -> list[tuple[str, str]]:
    """Returns (id, "FILE line N") for each image of the split, without repetitions; without list, for each XML file."""
    if listed is not None:
        return _read_list(listed, images, annotations, found, faults)
    labelled = {stem.lower() for stem in annotations.of_stem}
    for stem, names in images.of_stem.items():
        if not labelled & {stem.lower(), composed(names[0]).lower()}:
            found[NO_XML].append(str(images.folder / names[0]))
    if not annotations.of_stem:
        raise InputError(f"{annotations.folder}: the folder contains no XML file")
    return [(stem, str(annotations.folder)) for stem in sorted(annotations.of_stem)]


def _read_list(path: Path, images: _Files, annotations: _Files, found: Found, faults: Faults) -> list[tuple[str, str]]:
    text = composed(read_text(path))
    ids, empty = {}, True
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        line = line.strip()
        if not line:
            continue
        empty, where = False, f"{path} line {number}"
        with skipping(FAULTY_IMAGE, found, faults):
            image_id, is_second_column = _id_of_line(line, where, images, annotations, found)
            if is_second_column:
                found[SECOND_COLUMN].append(where)
            if image_id is None:
                continue
            if image_id in ids:
                found[REPEATED_LINE].append(f"{where}: {image_id}")
            else:
                ids[image_id] = where
    if empty:
        raise InputError(f"{path}: the list of split {path.stem} is empty")
    return list(ids.items())


def _id_of_line(line: str, where: str, images: _Files, annotations: _Files, found: Found) -> tuple[str | None, bool]:
    """Returns the id that a line of a list names, None for a comment, and whether more follows it in the line.

    The longest reading that names an existing file is used: names may contain blanks and dots, or end in " 1". Lists
    of other programs contain paths, so folders in front are left out until a file fits.
    """
    first_column = _first_column(line)
    readings = [
        (text, column != line)
        for column in (line, first_column, _word(line))
        for text in (column, _without_extension(column))
    ]
    for text, is_second_column in readings:
        # No data set is deeper; the limit keeps the time linear in the length of the line.
        parts = text.replace("\\", "/").split("/")[-20:]
        for k in range(len(parts)):
            image_id = "/".join(parts[k:])
            exact = image_id in annotations.of_stem or image_id in images.of_stem
            similar = [] if exact else [*_similar(annotations, image_id), *_similar(images, image_id)]
            if not exact and not similar:
                continue
            if k:
                found[LINE_FOLDER].append(f"{where}: {quoted(line)}")
            if len(set(similar)) == 1:
                found[LETTER_CASE].append(f"{where}: {image_id}, and the file is {similar[0]}")
                return similar[0], is_second_column
            return image_id, is_second_column
    if line.startswith("#"):
        found[COMMENT].append(where)
        return None, False
    image_id, is_second_column = readings[3]
    outside = re.search(r"\0|^/|^[A-Za-z]:", image_id) or {"..", "."} & set(re.split(r"[/\\]", image_id))
    if outside or len(image_id) > MAX_PATH:
        raise InputError(f"{where}: the id must name a file inside {images.folder}, got {quoted(image_id)}")
    return image_id, is_second_column


def _similar(files: _Files, stem: str) -> list[str]:
    return [_stem(name) for name in files.of_letters.get(stem.lower(), ())]


def _first_column(line: str) -> str:
    """Returns a line without VOC's second column, with which lists of one class say whether the image has the class."""
    first, second = (*line.rsplit(None, 1), "")[:2]
    return first if second in ("0", "1", "-0", "-1", "+0", "+1") else line


def _word(line: str) -> str:
    """Returns what stands before the first blank, comma or semicolon, without quotation marks."""
    return re.split(r"[\s,;]", line, maxsplit=1)[0].strip("\"'")


def _without_extension(name: str) -> str:
    stem, dot, extension = name.rpartition(".")
    return stem if stem and (dot + extension).lower() in (*IMAGE_EXTENSIONS, ".xml") else name


def _read_bytes(path: Path) -> bytes:
    check_regular(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read: {error.strerror}") from None


def _parse(path: Path) -> ElementTree.Element:
    content = _read_bytes(path)
    content = content.lstrip(b" \t\r\n")  # XML allows no blanks before its declaration
    # Entities are declared inside a document type; they can read other files or expand without bound. A document type
    # without declarations is only a name. The zero bytes are removed so that the pattern also matches UTF-16 text.
    if re.search(rb"<!ENTITY|<!DOCTYPE[^>]*\[", content.replace(b"\0", b""), re.IGNORECASE):
        raise InputError(f"{path}: the file is refused because its document type can declare entities; remove it")
    try:
        # Parsed from bytes, because the file itself declares its encoding.
        annotation = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{path}: the file is not well-formed XML: {error}") from None
    if annotation.tag != "annotation":
        raise InputError(f"{path}: not a VOC annotation: the root must be <annotation>, got <{annotation.tag[:80]}>")
    return annotation


def _xml_path(annotations: _Files, image_id: str, where: str, found: Found) -> Path:
    names = annotations.named(image_id)
    if not names:
        raise InputError(f"{annotations.folder / image_id}.xml: no such annotation file, but {where} lists it")
    if _stem(names[0]) != image_id:
        found[LETTER_CASE].append(f"{where}: {image_id}, and the file is {annotations.folder / names[0]}")
    annotations.guard(annotations.folder / names[0])
    return annotations.folder / names[0]


def _image_path(
    images: _Files, image_id: str, annotation: ElementTree.Element, xml_path: Path, where: str, found: Found
) -> Path:
    """Returns the image file of an id; <filename> can only give the extension, not the folder or stem."""
    stated = (annotation.findtext("filename") or "").strip()
    hint = composed(re.split(r"[/\\]", stated)[-1])
    own = image_id.rpartition("/")[2]
    if hint and own.lower() not in (hint.lower(), _stem(hint).lower()):
        found[OTHER_IMAGE].append(f"{xml_path}, filename: {quoted(stated)}")
    # a.jpg.xml belongs to a.jpg.
    names = images.named(image_id) or [name for name in images.named(_stem(image_id)) if composed(name) == image_id]
    if not names:
        hinted = PurePosixPath(hint).suffix if _stem(hint) == own else ""
        raise InputError(
            f"{images.folder / image_id}{hinted}: no such image file, also not with {' '.join(IMAGE_EXTENSIONS)}, "
            f"but {where} lists it"
        )
    # Several images may differ in their extension only.
    order = {extension: place for place, extension in enumerate(IMAGE_EXTENSIONS)}
    ranked = sorted(
        names, key=lambda name: (composed(name).rpartition("/")[2] != hint, order[PurePosixPath(name).suffix.lower()])
    )
    if image_id not in (_stem(ranked[0]), composed(ranked[0])):
        found[LETTER_CASE].append(f"{where}: {image_id}, and the file is {images.folder / ranked[0]}")
    return images.folder / ranked[0]


def _frame(
    annotation: ElementTree.Element, xml_path: Path, image_path: Path, found: Found, max_pixels: int
) -> tuple[tuple[int, int], bool]:
    """Returns the (height, width) that the boxes refer to, and whether it is that of the upright image."""
    field = f"{xml_path}, size"
    size = _child(annotation, "size", field, required=False)
    stated = None
    if size is not None:
        height, width = (_side(size, tag, f"{field}, {tag}") for tag in ("height", "width"))
        if height is None or width is None:
            found[NO_SIZE].append(str(xml_path))
        else:
            stated = height, width
    return annotated_frame(image_path, stated, field, found, max_pixels=max_pixels)


def _side(size: ElementTree.Element, tag: str, field: str) -> float | None:
    """Returns a side of the image, or None where the writer did not know it."""
    child = _child(size, tag, field, required=False)
    if child is None or is_unknown(child.text):
        return None
    side = _number(size, tag, field)
    return None if side in (0.0, -1.0) else side


def _label(element: ElementTree.Element, field: str, label_of: dict[str, int], found: Found) -> int | None:
    """Returns the label, or None for an object of another class."""
    name = composed((_child(element, "name", f"{field}, name").text or "").strip())
    if not name:
        raise InputError(f"{field}, name: must be the name of a class, got {quoted(name)}")
    if name not in label_of:
        found[OTHER_CLASS].append(f"{field}, name: {quoted(name)}")
    return label_of.get(name)


def _difficult(element: ElementTree.Element, field: str, found: Found) -> bool:
    child = _child(element, "difficult", f"{field}, difficult", required=False)
    text = "0" if child is None else (child.text or "").strip()
    is_difficult = flag(text)
    if is_difficult is None:
        raise InputError(f"{field}, difficult: must be 0 or 1, got {quoted(text)}")
    if not re.fullmatch(r"[01](\.0*)?", text):
        found[NO_DIFFICULT].append(f"{field}: {quoted(text)}")
    return is_difficult


def _box(
    element: ElementTree.Element, field: str, height: int, width: int, counts_from: int, found: Found
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
        edges[low], edges[high] = first - counts_from, last
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
