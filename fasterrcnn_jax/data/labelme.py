"""Reads LabelMe annotations: one json file per image with a list of shapes, https://github.com/wkentaro/labelme.

Points are continuous pixels. A shape is read as its extent: rectangles, polygons, circles, and masks. Points and lines
have no extent of an object and are ignored.

An annotation that makes no sense raises InputError, or is skipped with `faults` "skip". Irregularities that are common
in real data sets and have one sensible meaning are read with that meaning. `Dataset.notes` counts both.
"""

import contextlib
import json
import math
import posixpath
from collections import defaultdict
from pathlib import Path
from typing import Any

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
from fasterrcnn_jax.data.file_names import (
    Files,
    clean_path,
    files_below,
    image_named,
    lines_of,
    read_text,
    without_extension,
)
from fasterrcnn_jax.data.images import annotated_frame
from fasterrcnn_jax.data.layouts import WHOLE, Layout, composed, in_order, names_below, no_such_split, split_among
from fasterrcnn_jax.data.objects import MAX_COORDINATE, MAX_NAME, Object, check_inside, is_unknown, record_of
from fasterrcnn_jax.data.records import Dataset, check_class_names, labels_of
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.regular_files import check_regular

# Shapes that are read, with the smallest number of points. The last two are of programs with the same format.
POINTS = {"rectangle": 2, "polygon": 3, "circle": 2, "mask": 2, "oriented_rectangle": 3, "rotation": 3}
WITHOUT_EXTENT = ("point", "points", "line", "linestrip")

# Names in labels.txt that are no classes.
NO_CLASSES = ("__ignore__", "_background_")

NO_FILE = "Images without a json file were read as images without objects"
NO_SIZE = "Missing widths and heights were replaced by those of the image file"
NO_SHAPES = "Files that are not LabelMe annotations were ignored"
OTHER_IMAGE = "An imagePath that names another image was ignored"
OUTSIDE_SPLITS = "Files outside the folders of the splits were left out"
IGNORED_SHAPE = "Points and lines were ignored"
JOINED = "Outlines of one group were joined to one object"


def recognise(root: Path, *, within: Path | None = None) -> Layout | None:
    """Returns the layout if `root` holds LabelMe annotations; looks at the ends of a few files to find out."""
    if not root.is_dir():
        return None
    names = [name for name in names_below(root, follow_links=within is None) if name.lower().endswith(".json")]
    taken = next((name for name in names[:20] if _seems_annotation(root / name)), None)
    if taken is None:
        return None
    of_root = splits(root, within=within)
    class_names = _in_declared_order(
        {name for split in of_root for name in class_names_in(root, split, within=within)}, root
    )
    data = DataConfig(root=root, layout="labelme", class_names=class_names)
    return Layout("LabelMe", f"{taken} has the shapes of one image", data, of_root)


def splits(root: Path | str, *, within: Path | None = None) -> tuple[str, ...]:
    """Returns the names of the splits, in the order train, valid or val, test; "all" without folders of such names."""
    return in_order(set(_annotations(files_below(Path(root), within), defaultdict(list))))


def class_names_in(root: Path | str, split: str, *, within: Path | None = None) -> tuple[str, ...]:
    """Returns the class names of the objects of one split: those of labels.txt in its order, then others, sorted."""
    root = Path(root)
    names = set()
    for name in _annotations(files_below(root, within), defaultdict(list)).get(split, ()):
        with contextlib.suppress(InputError):
            for shape in _shapes(_load(root / name), str(name)) or ():
                with contextlib.suppress(InputError):
                    if _kind(shape, "") not in WITHOUT_EXTENT:
                        names.add(_label(shape, ""))
    return _in_declared_order(names, root)


def read_labelme(
    root: Path | str,
    split: str,
    class_names: tuple[str, ...],
    *,
    faults: Faults = "error",
    max_pixels: int = DataConfig.max_pixels,
    within: Path | None = None,
) -> Dataset:
    """Returns the records of one split, sorted by the path of the image below `root`, which is the id of the record.

    Every annotation and the header of every image is read; pixels are not decoded, also not those in imageData. An
    image without a json file has no objects. Boxes of any positive size are kept. Polygons, circles and masks of one
    label and one group_id are parts of one object.

    Args:
      root: folder of the data set; no file outside it is opened.
      split: a name of `splits`.
      class_names: label k is class_names[k - 1]; names are compared exactly, without surrounding blanks. Objects of
        other classes are ignored and counted.
      faults: "skip" skips the image or the object with a fault.
      max_pixels: an image with more pixels is a fault.
      within: folder that no symbolic link may lead out of; None: links are followed.

    Raises:
      InputError: one sentence with the file, field and value of the first fault.
    """
    root = Path(root)
    check_class_names(class_names)
    name, found = f"{root} ({split})", defaultdict(list)
    label_of = labels_of(class_names)
    files = files_below(root, within)
    annotations = _annotations(files, found)
    if split not in annotations:
        raise no_such_split(f"{root}: no split is named {quoted(split)}", in_order(set(annotations)))

    records, owner = {}, {}
    for path in watched(annotations[split], f"reading {name}", len(annotations[split])):
        with skipping(FAULTY_IMAGE, found, faults):
            content = _load(root / path)
            shapes = _shapes(content, str(root / path))
            if shapes is None:
                found[NO_SHAPES].append(str(root / path))
                continue
            image = _image(content, path, files, found)
            if image in owner:
                raise InputError(f"{root / path}: {image} is also the image of {owner[image]}")
            owner[image] = path
            frame = _frame(content, root / image, str(root / path), found, max_pixels)
            objects, groups = [], {}
            for number, shape in enumerate(shapes):
                where = f"{root / path}, shapes[{number}]"
                with skipping(FAULTY_OBJECT, found, faults):
                    kind = _kind(shape, where)
                    if kind in WITHOUT_EXTENT:
                        found[IGNORED_SHAPE].append(f"{where}: {kind}")
                        continue
                    class_name, box = _label(shape, where), _extent(shape, kind, where)
                    check_inside(box, frame[0], where)
                    if class_name not in label_of:
                        found[OTHER_CLASS].append(f"{where}, label: {quoted(class_name)}")
                        continue
                    group = shape.get("group_id")
                    key = (class_name, quoted(group)) if group is not None and kind != "rectangle" else len(objects)
                    if key in groups:
                        found[JOINED].append(f"{where}, group_id: {quoted(group)}")
                        other = objects[groups[key]]
                        box = (*map(min, box[:2], other.box[:2]), *map(max, box[2:], other.box[2:]))
                        objects[groups[key]] = other._replace(box=box)
                    else:
                        groups[key] = len(objects)
                        objects.append(Object(box, label_of[class_name], f"{where}, points: {quoted(shape['points'])}"))
            records[image] = record_of(image, root / image, frame, objects, found)
    for image in files.images:
        # An image whose annotation was skipped is skipped with it.
        if _split_of(image, annotations) == split and image not in owner and not _json_of(image, files):
            with skipping(FAULTY_IMAGE, found, faults):
                found[NO_FILE].append(str(root / image))
                records[image] = record_of(
                    image,
                    root / image,
                    annotated_frame(root / image, None, "", found, max_pixels=max_pixels),
                    [],
                    found,
                )
    ordered = tuple(records[image] for image in sorted(records))
    return dataset_of(name, class_names, ordered, found)


def _seems_annotation(path: Path) -> bool:
    """Returns whether the first or the last 4096 bytes have keys of LabelMe; imageData can be long."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            text = file.read(4096)
            file.seek(max(0, path.stat().st_size - 4096))
            text += file.read(4096)
    except OSError:
        return False
    return b'"shapes"' in text and (b'"imagePath"' in text or b'"shape_type"' in text or b'"imageHeight"' in text)


def _annotations(files: Files, found: Found) -> dict[str, list[str]]:
    """Returns the json files of each split; "all" if no folder has the name of a split."""
    names = sorted(name for name in files.others.values() if name.lower().endswith(".json"))
    placed = defaultdict(list)
    for name in names:
        placed[_folder_split(name)].append(name)
    if len(placed) > 1:
        found[OUTSIDE_SPLITS] += [str(files.root / name) for name in placed.pop(WHOLE, ())]
    return dict(placed)


def _folder_split(name: str) -> str:
    return split_among(name.split("/")[:-1]) or WHOLE


def _split_of(image: str, annotations: dict[str, list[str]]) -> str:
    return WHOLE if WHOLE in annotations else _folder_split(image)


def _json_of(image: str, files: Files) -> bool:
    return files.other(composed(f"{without_extension(image)}.json")) is not None


def _load(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: the file is not JSON: {error}") from None


def _shapes(content: Any, field: str) -> list[dict[str, Any]] | None:
    """Returns the shapes of an annotation; None if the file is not an annotation."""
    if not isinstance(content, dict) or "shapes" not in content:
        return None
    shapes = content["shapes"]
    if shapes is None:
        return []
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise InputError(f"{field}, shapes: must be a list of objects, got {quoted(shapes)}")
    return shapes


def _image(content: dict[str, Any], path: str, files: Files, found: Found) -> str:
    """Returns the image of an annotation: the one of the same name beside it, else the one that imagePath names."""
    beside = files.by_place.get(composed(without_extension(path)))
    given, field = content.get("imagePath"), f"{files.root / path}, imagePath"
    if given is not None and not isinstance(given, str):
        raise InputError(f"{field}: must be the path of an image, got {quoted(given)}")
    if beside is not None:
        stem = posixpath.basename(without_extension(path))
        if given and without_extension(posixpath.basename(clean_path(given, field))) != stem:
            found[OTHER_IMAGE].append(f"{field}: {quoted(given)}")
        return beside
    if not given:
        raise InputError(f"{field}: is missing, and no image beside the file has its name")
    try:
        return image_named(given, files, (posixpath.dirname(path),), field, found)
    except InputError as error:
        if content.get("imageData"):
            raise InputError(
                f"{error}; the pixels are in imageData, write them to an image file beside the json file"
            ) from None
        raise


def _frame(
    content: dict[str, Any], path: Path, field: str, found: Found, max_pixels: int
) -> tuple[tuple[int, int], bool]:
    """Returns the (height, width) that the shapes refer to, and whether it is that of the upright image."""
    sides: tuple[Any, Any] = content.get("imageHeight"), content.get("imageWidth")
    if any(is_unknown(side) or (_is_number(side) and float(side) in (0, -1)) for side in sides):
        found[NO_SIZE].append(field)
        return annotated_frame(path, None, field, found, max_pixels=max_pixels)
    for key, side in zip(("imageHeight", "imageWidth"), sides, strict=True):
        if not _is_number(side):
            raise InputError(f"{field}, {key}: must be a number, got {quoted(side)}")
    stated = float(sides[0]), float(sides[1])
    return annotated_frame(path, stated, f"{field}, imageWidth and imageHeight", found, max_pixels=max_pixels)


def _kind(shape: dict[str, Any], where: str) -> str:
    """Returns the shape_type; the first versions drew polygons only and did not write it."""
    kind = shape.get("shape_type") or "polygon"
    kind = kind.lower() if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in (*POINTS, *WITHOUT_EXTENT):
        raise InputError(
            f"{where}, shape_type: must be one of {', '.join((*POINTS, *WITHOUT_EXTENT))}, got {quoted(kind)}"
        )
    return kind


def _label(shape: dict[str, Any], where: str) -> str:
    label = shape.get("label")
    if isinstance(label, int | float) and _is_number(label):
        label = f"{label:g}" if isinstance(label, float) else str(label)
    if not isinstance(label, str) or not 0 < len(label.strip()) <= MAX_NAME:
        raise InputError(f"{where}, label: must be a name of at most {MAX_NAME} characters, got {quoted(label)}")
    return composed(label.strip())


def _extent(shape: dict[str, Any], kind: str, where: str) -> tuple[float, float, float, float]:
    points = shape.get("points")
    if not isinstance(points, list) or not all(
        isinstance(point, list) and len(point) == 2 and all(map(_is_number, point)) for point in points
    ):
        raise InputError(f"{where}, points: must be a list of points [x, y], got {quoted(points)}")
    if len(points) < POINTS[kind] or (kind == "circle" and len(points) != 2):
        number = "two" if kind == "circle" else f"at least {POINTS[kind]}"
        raise InputError(f"{where}, points: a {kind} must have {number} points, got {quoted(points)}")
    xs, ys = [float(x) for x, _ in points], [float(y) for _, y in points]
    if kind == "circle":  # the centre and a point on the edge
        radius = math.hypot(xs[1] - xs[0], ys[1] - ys[0])
        return xs[0] - radius, ys[0] - radius, xs[0] + radius, ys[0] + radius
    # A mask's points are its first and last pixel, both included.
    last = 1.0 if kind == "mask" else 0.0
    return min(xs), min(ys), max(xs) + last, max(ys) + last


def _is_number(value: Any) -> bool:
    # A number may be written as text. The comparison also rejects NaN and integers too long for a float.
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_COORDINATE


def _declared(root: Path) -> list[str]:
    """Returns the class names in labels.txt, which is LabelMe's own list; empty without one."""
    path = root / "labels.txt"
    if not path.is_file():
        return []
    return [line for _, line in lines_of(path) if line not in NO_CLASSES]


def _in_declared_order(names: set[str], root: Path) -> tuple[str, ...]:
    declared = [name for name in dict.fromkeys(_declared(root)) if name in names]
    return (*declared, *sorted(names.difference(declared, NO_CLASSES)))
