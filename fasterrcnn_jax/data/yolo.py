"""Reads YOLO detection labels: one text file per image, with a line `class x y width height` for each object.

The numbers are fractions of the image: centre, width and height of the box. With more numbers, the line is the outline
x1 y1 x2 y2 ... of a segmentation or of a turned box, and its extent is read. A data.yaml (Ultralytics, Roboflow, CVAT),
an obj.data (darknet, CVAT), or a list of names beside the labels (labelImg, Label Studio) gives the classes; the first
two also give the splits. https://docs.ultralytics.com/datasets/detect/

Images are read upright, as EXIF says, because the programs that train on these labels do so.

A label that makes no sense raises InputError, or is skipped with `faults` "skip". Irregularities that are common in
real data sets and have one sensible meaning are read with that meaning. `Dataset.notes` counts both.
"""

import contextlib
import math
import posixpath
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data.faults import (
    FAULTY_IMAGE,
    FAULTY_OBJECT,
    OTHER_CLASS,
    Faults,
    Found,
    dataset_of,
    findings_of,
    notes_of,
    skipping,
    watched,
)
from fasterrcnn_jax.data.file_names import (
    Files,
    clean_path,
    ends,
    files_below,
    first_line,
    image_named,
    lines_of,
    read_text,
    without_extension,
)
from fasterrcnn_jax.data.images import image_size
from fasterrcnn_jax.data.layouts import SPLIT_NAMES, WHOLE, Layout, composed, in_order, no_such_split, split_among
from fasterrcnn_jax.data.objects import MAX_NAME, Object, check_inside, number, record_of
from fasterrcnn_jax.data.records import Dataset, check_class_names, labels_of
from fasterrcnn_jax.errors import InputError, quoted

# Files that hold one class name per line: labelImg, Label Studio; darknet, CVAT; Roboflow; makesense.
NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt")

# The longest description: the 1203 names of LVIS take 40 KB. PyYAML reads about 100 KB in a second.
MAX_YAML_CHARACTERS, MAX_YAML_DEPTH = 100_000, 20

MAX_CLASSES = 10_000

# A number may leave 0..1 by so much, for objects that are cut by the border of the image.
MARGIN = 0.1

# The numbers usually have six decimals, and an edge is the sum of two of them.
SLACK = 1e-6

NO_LABELS = "Images without a label file were read as images without objects"
NO_NAMES = "The data declares no class names; the class numbers are used as names"
REPEATED_IMAGE = "Repeated images of a list were ignored"
CONFIDENCE = "The sixth number of a line was ignored"
OUTLINE = "Outlines were replaced by their extent"
KEYPOINTS = "Keypoints were ignored"
OTHER_PLACE = "Paths of splits that do not exist were read as the longest end of the path that exists in the folder"
NO_PLACE = "Splits whose images are not in the folder were left out"
OUTSIDE_SPLITS = "Images outside the folders of the splits were left out"


class _Description(NamedTuple):
    """What the files of a data set declare."""

    source: str  # the file that declares the classes, for messages
    names: dict[int, str]  # empty: the data declares no class names
    splits: dict[str, tuple[str, ...]]  # folders, lists of images, and images, relative to the root
    keypoint_numbers: int  # numbers in a line behind those of the box
    files: Files


def recognise(root: Path, *, within: Path | None = None) -> Layout | None:
    """Returns the layout if `root` holds YOLO labels.

    Raises:
      InputError: a file that describes the data set has a fault.
    """
    why = _sign(root, within)
    if why is None:
        return None
    found = defaultdict(list)
    description = _describe(root, found, within)
    if not description.splits:
        return None
    names = in_order(set(description.splits))
    class_names = tuple(dict.fromkeys(name for split in names for name in _class_names(description, split)))
    if not description.names:
        found[NO_NAMES].append(str(root))
    data = DataConfig(root=root, layout="yolo", class_names=class_names)
    return Layout("YOLO", why, data, names, notes_of(findings_of(found)))


def splits(root: Path | str, *, within: Path | None = None) -> tuple[str, ...]:
    """Returns the names of the splits, in the order train, valid or val, test, others; "all" if there are none."""
    return in_order(set(_describe(Path(root), defaultdict(list), within).splits))


def class_names_in(root: Path | str, split: str, *, within: Path | None = None) -> tuple[str, ...]:
    """Returns the declared class names in their order; without any, the class numbers of one split as names."""
    return _class_names(_describe(Path(root), defaultdict(list), within), split)


def read_yolo(
    root: Path | str,
    split: str,
    class_names: tuple[str, ...],
    *,
    faults: Faults = "error",
    max_pixels: int = DataConfig.max_pixels,
    within: Path | None = None,
) -> Dataset:
    """Returns the records of one split, in the order of its list or of the file names.

    Every label and the header of every image is read; pixels are not decoded. The id of a record is the path of its
    image below `root`. An image without a label file has no objects. Boxes of any positive size are kept.

    Args:
      root: folder of the data set; no file outside it is opened.
      split: a name of `splits`.
      class_names: label k is class_names[k - 1]; objects of other classes are ignored and counted. If the data
        declares no class names, class_names are the names of the class numbers from 0, or some of the numbers.
      faults: "skip" skips the image or the object with a fault. A fault of the files that describe the data set is
        always an error.
      max_pixels: an image with more pixels is a fault.
      within: folder that no symbolic link may lead out of; None: links are followed.

    Raises:
      InputError: one sentence with the file, field and value of the first fault.
    """
    root = Path(root)
    check_class_names(class_names)
    name, found = f"{root} ({split})", defaultdict(list)
    description = _describe(root, found, within)
    if not description.names and all(re.fullmatch("[0-9]+", class_name) for class_name in class_names):
        found[NO_NAMES].append(str(root))
    elif not description.names:
        description = description._replace(names=dict(enumerate(class_names)), source="class_names")
    label_of = labels_of(class_names)

    records = []
    images = _images_of(description, split, found, faults)
    for image in watched(images, f"reading {name}", len(images)):
        with skipping(FAULTY_IMAGE, found, faults):
            image_hw = image_size(root / image, upright=True, max_pixels=max_pixels, found=found)
            objects, label_path = [], _label_path(image, description.files)
            if label_path is None:
                found[NO_LABELS].append(str(root / image))
            path = root / (label_path or image)
            for line_number, line in () if label_path is None else lines_of(path):
                where = f"{path} line {line_number}"
                with skipping(FAULTY_OBJECT, found, faults):
                    class_name, box = _object(line, where, description, image_hw, found)
                    if class_name in label_of:
                        objects.append(Object(box, label_of[class_name], f"{where}: {quoted(line)}"))
                    else:
                        found[OTHER_CLASS].append(f"{where}: {quoted(class_name)}")
            records.append(record_of(image, root / image, (image_hw, True), objects, found, slack=SLACK))
    return dataset_of(name, class_names, records, found)


def _sign(root: Path, within: Path | None) -> str | None:
    """Returns what shows that a folder holds YOLO labels; looks at names, and at the first lines of some files."""
    if not root.is_dir():
        return None
    for path in _yaml_files(root):
        content = _load_yaml(path)
        if isinstance(content, dict) and ("names" in content or ("train" in content and "nc" in content)):
            return f"{path.name} describes a YOLO data set"
    for path in sorted(root.glob("*.data")):
        if {"train", "names"} <= _load_data_file(path).keys():
            return f"{path.name} names the lists and the classes"
    files = files_below(root, within)
    labels = [label for image in files.images if (label := _label_path(image, files)) is not None]
    taken = next((label for label in labels[:20] if _is_label(root / label)), None)
    return None if taken is None else f"{taken} is the YOLO label of an image"


def _is_label(path: Path) -> bool:
    """Returns whether the first line is a class number with at least four numbers."""
    return re.match(r"\d+(\.0*)?([\s,;]+-?\d*\.?\d+(e-?\d+)?){4}", first_line(path), re.IGNORECASE) is not None


def _describe(root: Path, found: Found, within: Path | None) -> _Description:
    files = files_below(root, within)
    source, names, places, keypoint_numbers = str(root), {}, {}, 0
    for path in _yaml_files(root):
        content = _load_yaml(path)
        if isinstance(content, dict) and ("names" in content or "train" in content):
            source, names = str(path), _names(content, path)
            places = _yaml_places(content, path, files, found)
            keypoint_numbers = _keypoint_numbers(content, path)
            break
    else:
        for path in sorted(root.glob("*.data")):
            content = _load_data_file(path)
            if "train" in content:
                places = _existing(
                    {key: [content[key]] for key in SPLIT_NAMES if content.get(key)}, "", path, files, found
                )
                if "names" in content:
                    field = f"{path}, names"
                    place = _place(content["names"], "", files, field)
                    if place is None or place[0] not in files.others.values():
                        raise InputError(f"{field}: no file {quoted(content['names'])} in {root}")
                    source, names = str(root / place[0]), _read_names(root / place[0])
                break
    if not names:
        source, names = _names_beside(files) or (source, {})
    return _Description(source, names, places or _folder_places(files, found), keypoint_numbers, files)


def _yaml_files(root: Path) -> list[Path]:
    """Returns the YAML files of the folder, those with a usual name first."""
    usual = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
    paths = sorted(path for path in root.glob("*.y*ml") if path.suffix in (".yaml", ".yml") and path.name[0] != ".")
    return sorted(paths, key=lambda path: usual.index(path.name) if path.name in usual else len(usual))


def _load_yaml(path: Path) -> Any:
    """Returns the content of a YAML file; every scalar is the text as it is written, so a class may be named `no`."""
    import yaml

    text = read_text(path)
    if len(text) > MAX_YAML_CHARACTERS:
        raise InputError(f"{path}: must have at most {MAX_YAML_CHARACTERS} characters, got {len(text)}")
    try:
        depth = 0
        for event in yaml.parse(text, yaml.BaseLoader):
            # A few nested aliases can stand for billions of values.
            if isinstance(event, yaml.AliasEvent):
                raise InputError(f"{path}: the file is refused because it has aliases; write the values in full")
            # PyYAML's time grows with the square of the depth.
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_YAML_DEPTH:
                raise InputError(f"{path}: the file is refused because of more than {MAX_YAML_DEPTH} nested lists")
        return yaml.load(text, yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" line {error.problem_mark.line + 1}"
        raise InputError(f"{path}{line}: the file is not YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        raise InputError(f"{path}: the file is not YAML: {error.reason} at character {error.position}") from None


def _load_data_file(path: Path) -> dict[str, str]:
    """Returns the lines `key = value` of darknet's obj.data."""
    pairs = (line.partition("=") for _, line in lines_of(path))
    return {key.strip(): value.strip() for key, _, value in pairs if value.strip()}


def _names(content: dict[str, Any], path: Path) -> dict[int, str]:
    """Returns the class names by their numbers; empty without names."""
    given = content.get("names", [])
    if isinstance(given, str):
        given = [] if given in _NOTHING else given.strip("[]").split(",")
    names = {}
    for key, name in given.items() if isinstance(given, dict) else enumerate(given):
        field = f"{path}, names[{quoted(key)[:40]}]"
        if isinstance(key, str) and not re.fullmatch("[0-9]{1,5}", key):
            raise InputError(f"{field}: must be a number, the class number of the labels, got {quoted(key)}")
        names[int(key)] = _checked_name(name, field)
    if names and max(names) >= MAX_CLASSES:
        raise InputError(f"{path}, names: class numbers must be below {MAX_CLASSES}, got {max(names)}")
    count = content.get("nc", "")
    if names and count != "" and not re.fullmatch(rf"\+?0*{len(names)}(\.0*)?", str(count).strip()):
        raise InputError(f"{path}, nc: must be the number of names, {len(names)}, got {quoted(count)}")
    return names


# As PyYAML's BaseLoader gives the values that YAML calls null.
_NOTHING = ("", "~", "null", "Null", "NULL", "None")


def _checked_name(name: Any, field: str) -> str:
    if not isinstance(name, str) or not 0 < len(name.strip()) <= MAX_NAME:
        raise InputError(f"{field}: must be a name of at most {MAX_NAME} characters, got {quoted(name)}")
    return composed(name.strip())


def _keypoint_numbers(content: dict[str, Any], path: Path) -> int:
    """Returns how many numbers of keypoints follow the box in each line: kpt_shape is [keypoints, numbers of each]."""
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or not all(isinstance(n, str) and re.fullmatch("[0-9]{1,4}", n) for n in shape):
        raise InputError(f"{path}, kpt_shape: must be two numbers, got {quoted(shape)}")
    return math.prod(map(int, shape))


def _yaml_places(content: dict[str, Any], path: Path, files: Files, found: Found) -> dict[str, tuple[str, ...]]:
    given = {}
    for split in SPLIT_NAMES:
        value = content.get(split, "")
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}, {split}: must be a path or a list of paths, got {quoted(value)}")
        texts = [text for text in texts if text not in _NOTHING]
        if texts:
            given[split] = texts
    base = content.get("path", "")
    if not isinstance(base, str):
        raise InputError(f"{path}, path: must be a folder, got {quoted(base)}")
    return _existing(given, "" if base in _NOTHING else base, path, files, found)


def _existing(
    given: dict[str, list[str]], base: str, path: Path, files: Files, found: Found
) -> dict[str, tuple[str, ...]]:
    """Returns the places of each split whose places all exist.

    Args:
      given: paths of each split as the file at `path` gives them, relative to `base`.

    Raises:
      InputError: no split exists, or two paths stand for one place.
    """
    places, text_of, absent = {}, {}, []
    for split, texts in given.items():
        field = f"{path}, {split}"
        taken = {text: place for text in texts if (place := _place(text, base, files, field)) is not None}
        missing = [text for text in texts if text not in taken]
        if missing:
            absent.append(f"{field}: {quoted(missing[0])}")
            continue
        for text, (place, is_whole) in taken.items():
            if text_of.setdefault(place, text) != text:
                raise InputError(
                    f"{field}: {quoted(text)} and {quoted(text_of[place])} are different paths, but of both only "
                    f"{quoted(place)} exists in {files.root}"
                )
            if not is_whole:
                found[OTHER_PLACE].append(f"{field}: {quoted(text)} as {quoted(place)}")
        places[split] = tuple(place for place, _ in taken.values())
    if absent and not places:
        raise InputError(
            f"{absent[0]} is no folder with images and no list in {files.root}; paths in {path.name} must be relative "
            "to its folder"
        )
    found[NO_PLACE] += absent
    return places


def _place(text: str, base: str, files: Files, field: str) -> tuple[str, bool] | None:
    """Returns the longest end of a path that exists in the folder, and whether it is the whole path.

    Roboflow writes ../train/images for train/images, and many files hold absolute paths of another machine, so leading
    parts may be wrong. The result never leads outside of the folder.
    """
    path = clean_path(text, field)
    whole = path if path.startswith("/") or not base else posixpath.join(clean_path(base, f"{field}, path"), path)
    parts = [part for part in posixpath.normpath(whole).split("/") if part not in ("", ".", "..")]
    for end in ends(parts) if parts else ("",):
        place = files.other(end) or files.folder(end)
        if place is not None:
            return place, place == "/".join(parts)
    return None


def _names_beside(files: Files) -> tuple[str, dict[int, str]] | None:
    """Returns the longest list of class names below the folder; None without one.

    labelImg writes a list into each folder of labels; a later list may have more names.

    Raises:
      InputError: two lists contradict each other.
    """
    lists = sorted(name for name in files.others.values() if posixpath.basename(name) in NAME_FILES)
    taken = None
    for name in lists:
        names = _read_names(files.root / name)
        if taken is not None and any(names[k] != taken[1][k] for k in names.keys() & taken[1].keys()):
            raise InputError(f"{files.root / name}: the class names differ from those in {taken[0]}")
        if taken is None or len(names) > len(taken[1]):
            taken = str(files.root / name), names
    return taken


def _read_names(path: Path) -> dict[int, str]:
    lines = lines_of(path)
    for expected, (line_number, _) in enumerate(lines, start=1):
        if line_number != expected:
            raise InputError(f"{path} line {expected}: must be the name of class {expected - 1}, but is empty")
    if not 0 < len(lines) <= MAX_CLASSES:
        raise InputError(f"{path}: must contain 1 to {MAX_CLASSES} class names, got {len(lines)}")
    return {row - 1: _checked_name(line, f"{path} line {row}") for row, line in lines}


def _folder_places(files: Files, found: Found) -> dict[str, tuple[str, ...]]:
    """Returns the images of each split by their folders: images/train or train/images; without such folders, of all."""
    inside = [name for name in files.images if "images" in name.lower().split("/")[:-1]]
    images = inside or files.images  # not the images that a training wrote into the folder
    places = defaultdict(list)
    for name in images:
        places[split_among(name.split("/")[:-1]) or WHOLE].append(name)
    if len(places) > 1:
        found[OUTSIDE_SPLITS] += [str(files.root / name) for name in places.pop(WHOLE, ())]
    return {split: tuple(names) for split, names in places.items()}


def _images_of(description: _Description, split: str, found: Found, faults: Faults) -> list[str]:
    """Returns the images of a split without repetitions."""
    files = description.files
    if split not in description.splits:
        raise no_such_split(f"{files.root}: no split is named {quoted(split)}", in_order(set(description.splits)))
    images = {}
    for place in description.splits[split]:
        if place in files.others.values():
            for number, line in lines_of(files.root / place):
                field = f"{files.root / place} line {number}"
                with skipping(FAULTY_IMAGE, found, faults):
                    name = image_named(line, files, (posixpath.dirname(place), ""), field, found)
                    if name in images:
                        found[REPEATED_IMAGE].append(f"{field}: {quoted(line)}")
                    images[name] = None
        elif place in files.folders:
            images.update(dict.fromkeys(n for n in files.images if n.startswith(place and f"{place}/")))
        else:
            images[place] = None
    if not images:
        raise InputError(f"{files.root}: split {split} contains no image")
    return list(images)


def _label_path(image: str, files: Files) -> str | None:
    """Returns the label file of an image: images/a/b.jpg has labels/a/b.txt; else the file is beside the image."""
    label = composed(f"{without_extension(image)}.txt")
    parts = label.split("/")
    places = [place for place, part in enumerate(parts[:-1]) if part.lower() in ("images", "jpegimages")]
    apart = ["/".join((*parts[: places[-1]], "labels", *parts[places[-1] + 1 :]))] if places else []
    return next((name for place in (*apart, label) if (name := files.other(place)) is not None), None)


def _class_names(description: _Description, split: str) -> tuple[str, ...]:
    if description.names:
        return tuple(dict.fromkeys(description.names[number] for number in sorted(description.names)))
    numbers = set()
    for image in _images_of(description, split, defaultdict(list), "skip"):
        label_path = _label_path(image, description.files)
        with contextlib.suppress(InputError):
            for _, line in () if label_path is None else lines_of(description.files.root / label_path):
                with contextlib.suppress(InputError):
                    numbers.add(_class_number(_columns(line)[0], ""))
    return tuple(map(str, sorted(numbers)))


def _columns(line: str) -> list[str]:
    # Commas separate only where all gaps have one; otherwise they would be decimal commas, which are refused.
    columns = re.split(r"\s*[,;]\s*", line)
    return columns if not re.search(r"\s", "".join(columns)) and len(columns) > 1 else line.split()


def _class_number(text: str, where: str) -> int:
    value = number(text, f"{where}, class")
    if value != int(value) or not 0 <= value < MAX_CLASSES:
        raise InputError(f"{where}, class: must be a whole number from 0 to {MAX_CLASSES - 1}, got {quoted(text)}")
    return int(value)


def _object(
    line: str, where: str, description: _Description, image_hw: tuple[int, int], found: Found
) -> tuple[str, tuple[float, float, float, float]]:
    """Returns the class name and the box (x1, y1, x2, y2) in pixels, not clipped."""
    first, *others = _columns(line)
    class_number, names = _class_number(first, where), description.names
    if names and class_number not in names:
        raise InputError(
            f"{where}, class: {class_number} is not one of the {len(names)} class numbers of {description.source}"
        )
    class_name = names.get(class_number, str(class_number))
    if description.keypoint_numbers and len(others) == 4 + description.keypoint_numbers:
        found[KEYPOINTS].append(where)
        others = others[:4]
    if len(others) == 5:
        found[CONFIDENCE].append(f"{where}: {quoted(line)}")
        others = others[:4]
    if len(others) != 4 and (len(others) < 6 or len(others) % 2):
        raise InputError(
            f"{where}: must be a class number and x y width height, or at least three points, got {quoted(line)}"
        )
    values = [_fraction(text, where) for text in others]
    if len(values) == 4:
        x, y, width, height = values
        if width < 0 or height < 0:
            raise InputError(f"{where}: width and height must not be negative, got {quoted(line)}")
        sides = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    else:
        found[OUTLINE].append(where)
        sides = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    image_height, image_width = image_hw
    box = sides[0] * image_width, sides[1] * image_height, sides[2] * image_width, sides[3] * image_height
    check_inside(box, image_hw, where)
    return class_name, box


def _fraction(text: str, where: str) -> float:
    value = number(text, where)
    if not -MARGIN <= value <= 1 + MARGIN:
        raise InputError(
            f"{where}: must be a fraction of the image from 0 to 1, got {quoted(text)}; divide pixels by the width or "
            "height of the image"
        )
    return value
