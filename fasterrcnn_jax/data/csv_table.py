"""Reads tables of boxes: csv files with one line per box, as the tutorials of TensorFlow's detection API write them.

The header is `filename,width,height,class,xmin,ymin,xmax,ymax`, in any order and with the usual other names; width and
height may be absent. The headerless tables of keras-retinanet, `path,x1,y1,x2,y2,class`, are read too.

Corners are continuous pixels, because the programs that read these tables take them so: they divide xmin and xmax by
the width. Tables that were copied from PASCAL VOC keep its indices, which count from 1, so their boxes begin one pixel
late; read the XML files instead.

A line that makes no sense raises InputError, or is skipped with `faults` "skip". Irregularities that are common in real
data sets and have one sensible meaning are read with that meaning. `Dataset.notes` counts both.
"""

import contextlib
import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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
from fasterrcnn_jax.data.file_names import files_below, first_line, image_named, read_text
from fasterrcnn_jax.data.images import annotated_frame
from fasterrcnn_jax.data.layouts import SPLIT_NAMES, WHOLE, Layout, composed, in_order, no_such_split, split_among
from fasterrcnn_jax.data.objects import MAX_NAME, Object, check_inside, is_unknown, number, record_of
from fasterrcnn_jax.data.records import Dataset, check_class_names, labels_of
from fasterrcnn_jax.errors import InputError, quoted

# Our name of a column -> its names in headers, in small letters, without blanks and punctuation.
COLUMNS = {
    "filename": (
        "filename",
        "file",
        "image",
        "imagepath",
        "path",
        "filepath",
        "imagename",
        "imagefile",
        "img",
        "imageid",
    ),
    "class": ("class", "label", "classname", "labelname", "category", "categoryname", "name", "object", "classid"),
    "xmin": ("xmin", "x1", "left", "bboxxmin", "minx"),
    "ymin": ("ymin", "y1", "top", "bboxymin", "miny"),
    "xmax": ("xmax", "x2", "right", "bboxxmax", "maxx"),
    "ymax": ("ymax", "y2", "bottom", "bboxymax", "maxy"),
    "width": ("width", "imagewidth", "imgwidth"),
    "height": ("height", "imageheight", "imgheight"),
}
CORNERS = ("xmin", "ymin", "xmax", "ymax")
REQUIRED = ("filename", "class", *CORNERS)
HEADERLESS = ("filename", "xmin", "ymin", "xmax", "ymax", "class")

# Folders, relative to the folder of the data set, that a table may lie in.
FOLDERS = ("", "annotations", "data", "labels", "images", *SPLIT_NAMES)

NO_SIZE = "Missing widths and heights were replaced by those of the image file"
REPEATED_HEADER = "Repeated headers were ignored"


class _Table(NamedTuple):
    path: Path
    columns: dict[str, int]  # our name of a column -> its place
    length: int  # number of fields in a line
    lines: list[tuple[int, list[str]]]  # line number and fields of each line that is not blank


def recognise(root: Path, *, within: Path | None = None) -> Layout | None:
    """Returns the layout if `root` holds tables of boxes; looks at the first lines of csv files to find out."""
    tables = _tables(root, within) if root.is_dir() else {}
    if not tables:
        return None
    path = next(iter(tables.values()))
    names = tuple(tables)
    class_names = tuple(dict.fromkeys(name for split in names for name in class_names_in(root, split, within=within)))
    data = DataConfig(root=root, layout="csv", class_names=class_names)
    return Layout("csv", f"{path.relative_to(root).as_posix()} has one line per box", data, names)


def splits(root: Path | str, *, within: Path | None = None) -> tuple[str, ...]:
    """Returns the names of the splits, in the order train, valid or val, test, others.

    A split is named after the table or its folder: train for train.csv, train_labels.csv and train/_annotations.csv. A
    single table without such a name is the split "all".
    """
    return tuple(_tables(Path(root), within))


def class_names_in(root: Path | str, split: str, *, within: Path | None = None) -> tuple[str, ...]:
    """Returns the class names of one split: those of a class file by their numbers, then others, sorted."""
    root = Path(root)
    files_below(root, within)  # refuses links
    table = _read_table(_table_path(root, split, within))
    place, corners = table.columns["class"], [table.columns[column] for column in CORNERS]
    names = {
        composed(fields[place].strip())
        for _, fields in table.lines
        if len(fields) == table.length and not all(is_unknown(fields[corner]) for corner in corners)
    }
    declared = _declared(root, within)
    return (*declared, *sorted(names.difference(declared, ("",))))


def read_csv(
    root: Path | str,
    split: str,
    class_names: tuple[str, ...],
    *,
    faults: Faults = "error",
    max_pixels: int = DataConfig.max_pixels,
    within: Path | None = None,
) -> Dataset:
    """Returns the records of one table, in the order in which it names the images first.

    Every line and the header of every image is read; pixels are not decoded. The id of a record is the path of its
    image below `root`. A line whose corners are empty names an image without objects. Boxes of any positive size are
    kept.

    Args:
      root: folder of the data set; no file outside it is opened.
      split: a name of `splits`.
      class_names: label k is class_names[k - 1]; names are compared exactly, without surrounding blanks. Objects of
        other classes are ignored and counted.
      faults: "skip" skips the image or the line with a fault. A fault of the table itself is always an error.
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
    path = _table_path(root, split, within)
    table = _read_table(path)
    _check_pixels(table)
    folder = path.parent.relative_to(root).as_posix()
    folders = (folder, f"{folder}/images", f"images/{split}", split, f"{split}/images", "images", "")

    image_of, lines_of_image = {}, defaultdict(list)
    for line, fields in table.lines:
        where = f"{path} line {line}"
        with skipping(FAULTY_OBJECT, found, faults):
            if len(fields) != table.length:
                raise InputError(f"{where}: must have {table.length} fields, got {len(fields)}")
            row = {column: fields[place].strip() for column, place in table.columns.items()}
            if all(_plain(row[column]) in COLUMNS[column] for column in CORNERS):
                found[REPEATED_HEADER].append(where)
                continue
            if row["filename"] not in image_of:
                field = f"{where}, filename"
                image_of[row["filename"]] = image_named(row["filename"], files, folders, field, found)
            lines_of_image[image_of[row["filename"]]].append((where, row))

    records = []
    for image, rows in watched(lines_of_image.items(), f"reading {name}", len(lines_of_image)):
        with skipping(FAULTY_IMAGE, found, faults):
            (first, first_row), objects = rows[0], []
            first_size, field = _size(first_row), f"{first}, width and height"
            frame = annotated_frame(
                root / image,
                _stated(first_size, "width" in table.columns, field, found),
                field,
                found,
                max_pixels=max_pixels,
            )
            for where, row in rows:
                with skipping(FAULTY_OBJECT, found, faults):
                    if (size := _size(row)) != first_size:
                        raise InputError(
                            f"{where}, width and height: {quoted(size)} differs from {quoted(first_size)} in {first}"
                        )
                    if all(is_unknown(row[column]) for column in CORNERS):
                        continue
                    x1, y1, x2, y2 = (number(row[column], f"{where}, {column}") for column in CORNERS)
                    box = x1, y1, x2, y2
                    check_inside(box, frame[0], where)
                    class_name = composed(row["class"])
                    if not 0 < len(class_name) <= MAX_NAME:
                        raise InputError(
                            f"{where}, class: must be a name of at most {MAX_NAME} characters, got {quoted(class_name)}"
                        )
                    if class_name in label_of:
                        objects.append(Object(box, label_of[class_name], f"{where}: {quoted(box)}"))
                    else:
                        found[OTHER_CLASS].append(f"{where}, class: {quoted(class_name)}")
            records.append(record_of(image, root / image, frame, objects, found))
    return dataset_of(name, class_names, records, found)


def _plain(text: str) -> str:
    """Returns the letters and digits of a name in a header, in small letters."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _tables(root: Path, within: Path | None) -> dict[str, Path]:
    """Returns the table of each split, in the order of the splits; looks at the first lines of each csv file."""
    paths = [path for path in _csv_files(root, within) if _seems_table(path)]
    tables = {}
    for path in paths:
        parts = (*re.split("[^a-z]+", path.stem.lower()), path.parent.name if path.parent != root else "")
        split = split_among(parts) or (path.stem if len(paths) > 1 else WHOLE)
        if split in tables:
            raise InputError(f"{path}: split {split} is also in {tables[split]}; keep one of the tables")
        tables[split] = path
    return {split: tables[split] for split in in_order(set(tables))}


def _csv_files(root: Path, within: Path | None) -> list[Path]:
    # A linked folder can lead out of the data set.
    folders = [root / folder for folder in FOLDERS if within is None or not (folder and (root / folder).is_symlink())]
    found = (path for folder in folders for path in sorted(folder.glob("*.[cC][sS][vV]")))
    return [path for path in found if not path.name.startswith(".") and path.is_file()]


def _seems_table(path: Path) -> bool:
    with contextlib.suppress(InputError):
        return any(_columns(fields) is not None for _, fields in _rows(first_line(path), path))
    return False


def _table_path(root: Path, split: str, within: Path | None) -> Path:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    tables = _tables(root, within)
    if split not in tables:
        raise no_such_split(f"{root}: no table of boxes is named {quoted(split)}", tuple(tables))
    return tables[split]


def _read_table(path: Path) -> _Table:
    lines = list(_rows(read_text(path), path))
    columns = _columns(lines[0][1]) if lines else None
    if columns is None:
        got = quoted(lines[0][1]) if lines else "an empty file"
        raise InputError(f"{path}: the header must have the columns {', '.join(REQUIRED)}, got {got}")
    headers = [_plain(field) for field in lines[0][1]]
    has_header = headers[columns["xmin"]] in COLUMNS["xmin"]
    repeated = [headers[place] for place in columns.values() if headers.count(headers[place]) > 1]
    if has_header and repeated:
        raise InputError(f"{path}: the header has the column {repeated[0]} more than once")
    return _Table(path, columns, len(headers), lines[1:] if has_header else lines)


def _rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the line number and the fields of each line that is not blank."""
    first = re.search(r"\S[^\r\n]*", text)
    delimiter = max(",;\t|", key=(first[0] if first else "").count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield reader.line_num, fields
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: the file is not a csv table: {error}") from None


def _columns(first: list[str]) -> dict[str, int] | None:
    """Returns the places of our columns by the first line of a table; None if it is no table of boxes."""
    headers = [_plain(field) for field in first]
    columns = {}
    for column, names in COLUMNS.items():
        taken = next((name for name in names if name in headers), None)
        if taken is not None:
            columns[column] = headers.index(taken)
    if columns.keys() >= set(REQUIRED):
        return columns
    # keras-retinanet: no header; all corners are empty in the line of an image without objects.
    corners = [field.strip() for field in first[1:5]]
    if len(first) == len(HEADERLESS) and first[0].strip() and (all(map(_is_number, corners)) or not any(corners)):
        return {column: place for place, column in enumerate(HEADERLESS)}
    return None


def _is_number(text: str) -> bool:
    with contextlib.suppress(InputError):
        number(text, "")
        return True
    return False


def _check_pixels(table: _Table) -> None:
    """Raises InputError if the corners are fractions of the image, as in OpenImages."""
    places = [table.columns[column] for column in CORNERS]
    texts = (fields[place] for _, fields in table.lines if len(fields) == table.length for place in places)
    largest = None
    for value in (number(text, "") for text in texts if _is_number(text)):
        if value > 1:
            return
        largest = value if largest is None else max(largest, value)
    if largest is not None:
        raise InputError(
            f"{table.path}: the corners must be pixels, but the largest is {largest:g}; multiply fractions by the "
            "width or height of the image"
        )


def _size(row: dict[str, str]) -> tuple[str, str]:
    return row.get("width", ""), row.get("height", "")


def _stated(size: tuple[str, str], has_columns: bool, field: str, found: Found) -> tuple[float, float] | None:
    """Returns the (height, width) of a line; None if it gives none."""
    if not has_columns:
        return None
    width, height = (0.0 if is_unknown(text) else number(text, field) for text in size)
    if width in (0, -1) or height in (0, -1):
        found[NO_SIZE].append(field)
        return None
    return height, width


def _declared(root: Path, within: Path | None) -> tuple[str, ...]:
    """Returns the class names of a class file of keras-retinanet, lines `name,number`, by their numbers."""
    for path in _csv_files(root, within):
        if "class" in path.stem.lower() and not _seems_table(path):
            with contextlib.suppress(InputError):
                lines = [fields for _, fields in _rows(read_text(path), path)]
                if lines and all(len(fields) == 2 and fields[1].strip().isdecimal() for fields in lines):
                    return tuple(dict.fromkeys(fields[0].strip() for fields in sorted(lines, key=lambda f: int(f[1]))))
    return ()
