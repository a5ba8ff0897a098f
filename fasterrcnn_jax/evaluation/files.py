"""Writes detections as result files of COCO and VOC, and as label files that labelling tools and our readers open.

Boxes are xyxy in continuous pixels of the original image; labels are 1..K.
"""

import json
import math
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.data.records import Dataset, ImageDetections
from fasterrcnn_jax.evaluation.detections import check_detections
from fasterrcnn_jax.printing import printable

# Header of a table of boxes, as `data.csv_table` and TensorFlow's tutorials read it; they ignore the score.
CSV_HEADER = ("filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax", "score")


def write_coco_json(path: str | Path, detections: Sequence[ImageDetections], dataset: Dataset) -> None:
    """Writes the COCO result format, https://cocodataset.org/#format-results: one object per detection.

    `image_id` is the record's id: an integer if the integer has the same text (`139`), otherwise a string
    (`000005`, `2008_000008`). `category_id` is the class's id in `dataset.category_ids`; `bbox` is
    [x, y, width, height]. The file is written completely or not at all.

    Raises:
      InputError: the file cannot be written.
      ValueError: detections that do not fit the data set.
    """
    check_detections(detections, dataset)
    entries = []
    for found, record in zip(detections, dataset.records, strict=True):
        entries += coco_entries(found, record.id, dataset.category_ids)
    write_atomically(Path(path), json.dumps(entries, allow_nan=False))


def coco_entries(
    found: ImageDetections, record_id: str, category_ids: Sequence[int]
) -> Iterator[dict[str, int | str | float | list[float]]]:
    """Yields the detections of one image as objects of COCO's result format; see `write_coco_json`."""
    image_id = _coco_image_id(record_id)
    for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
        x1, y1, x2, y2 = (float(side) for side in box)
        yield {
            "image_id": image_id,
            "category_id": category_ids[int(label) - 1],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": float(score),
        }


def csv_rows(
    found: ImageDetections, record_id: str, image_hw: tuple[int, int], class_names: Sequence[str]
) -> Iterator[list[Any]]:
    """Yields the detections of one image as rows of a table with `CSV_HEADER`; corners are continuous pixels."""
    height, width = image_hw
    for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
        name = printable(class_names[int(label) - 1])
        yield [printable(record_id), width, height, name, *map(shortest, box), shortest(score)]


def yolo_text(found: ImageDetections, image_hw: tuple[int, int]) -> str:
    """Returns the label file of one image in YOLO's layout: a line `class x y width height confidence` per detection.

    Classes count from 0; centre, width and height are fractions of the image. Ultralytics writes the same columns for
    `save_txt` with `save_conf`.
    """
    height, width = image_hw
    lines = []
    for box, score, label in zip(found.boxes.astype(np.float64), found.scores, found.labels, strict=True):
        x1, y1, x2, y2 = box
        numbers = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
        lines.append(f"{int(label) - 1} {' '.join(f'{number:.9f}' for number in numbers)} {float(score):.6f}\n")
    return "".join(lines)


def voc_xml(found: ImageDetections, path: str, image_hw: tuple[int, int], class_names: Sequence[str]) -> str:
    """Returns the annotation of one image in PASCAL VOC's layout, as labelImg writes it, with the scores.

    VOC's pixels are whole, count from 1 and include both ends; a box becomes the pixels that it covers by half or more,
    at least one. Characters of names that XML cannot hold are escaped.

    Args:
      path: path of the image file.
    """
    height, width = image_hw
    root = ElementTree.Element("annotation")
    _add(root, folder=Path(path).parent.name, filename=Path(path).name, path=path)
    _add(_add(root, source=None), database="Unknown")
    _add(_add(root, size=None), width=width, height=height, depth=3)
    _add(root, segmented=0)
    for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
        (xmin, xmax), (ymin, ymax) = (
            _whole_pixels(float(box[axis]), float(box[axis + 2]), side) for axis, side in ((0, width), (1, height))
        )
        element = _add(root, object=None)
        _add(element, name=class_names[int(label) - 1], pose="Unspecified", truncated=0, difficult=0)
        _add(element, confidence=shortest(score))
        _add(_add(element, bndbox=None), xmin=xmin, ymin=ymin, xmax=xmax, ymax=ymax)
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _add(parent: ElementTree.Element, **children: object) -> ElementTree.Element:
    """Appends elements with their texts, and returns the last one."""
    last = parent
    for tag, text in children.items():
        last = ElementTree.SubElement(parent, tag)
        if text is not None:
            last.text = printable(text)
    return last


def _whole_pixels(low: float, high: float, side: int) -> tuple[int, int]:
    """Returns the first and last pixel, counted from 1, of continuous coordinates within 0..`side`."""
    first = min(math.floor(low + 0.5) + 1, side)
    return first, min(max(math.floor(high + 0.5), first), side)


def shortest(value: np.float32) -> float:
    """Returns the number with the fewest digits that is this float32."""
    return float(str(np.float32(value)))


def write_voc_files(
    folder: str | Path, detections: Sequence[ImageDetections], dataset: Dataset, *, split: str
) -> tuple[str, ...]:
    """Writes `comp4_det_SPLIT_CLASS.txt` for each class, in the format of the VOC development kit.

    A line is `id score xmin ymin xmax ymax`. The kit's pixels count from 1 and include both ends, so our box
    is written as (x1 + 1, y1 + 1, x2, y2). Each file is written completely or not at all.

    Returns:
      One sentence about each kind of name that the format cannot hold, and that is left out: image ids with white
      space, class names that cannot be part of a file name. With such a split name, nothing is written.

    Raises:
      InputError: a file cannot be written.
      ValueError: detections that do not fit the data set.
    """
    check_detections(detections, dataset)
    if not fits_a_file_name(split):
        return (f"{dataset.name}: VOC result files are not written: split {split!r} cannot be part of a file name",)
    lines = {label: [] for label in range(1, len(dataset.class_names) + 1)}
    for found, record in zip(detections, dataset.records, strict=True):
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
            x1, y1, x2, y2 = (float(side) for side in box)
            if _is_one_word(record.id):
                corners = f"{x1 + 1:.1f} {y1 + 1:.1f} {x2:.1f} {y2:.1f}"
                lines[int(label)].append(f"{record.id} {float(score):.6f} {corners}\n")
    for label, name in enumerate(dataset.class_names, start=1):
        if fits_a_file_name(name):
            write_atomically(Path(folder) / f"comp4_det_{split}_{name}.txt", "".join(lines[label]))
    left_out = {
        "images whose id has white space": [record.id for record in dataset.records if not _is_one_word(record.id)],
        "classes whose name cannot be part of a file name": [
            name for name in dataset.class_names if not fits_a_file_name(name)
        ],
    }
    return tuple(
        f"{dataset.name}: VOC result files lack {len(names)} {what}, for example {names[0]!r}; detections.json has all"
        for what, names in left_out.items()
        if names
    )


def _is_one_word(record_id: str) -> bool:
    return record_id.split() == [record_id]


def fits_a_file_name(name: str) -> bool:
    """Returns whether a name can be part of a file name on every system."""
    # Both separators are refused on every system, because the files may be used on another system. Control
    # characters and lone surrogates are refused, because they are hostile or no file system takes them.
    return bool(name) and not any(c in "/\\" or unicodedata.category(c) in ("Cc", "Cs") for c in name)


def _coco_image_id(record_id: str) -> int | str:
    """Returns the id as an integer if the integer has the same text, otherwise as a string."""
    number = record_id.isascii() and record_id.isdigit() and (record_id == "0" or record_id[0] != "0")
    return int(record_id) if number else record_id
