"""Writes the detections of a data set as result files of COCO and VOC.

Boxes are xyxy in continuous pixels of the original image; labels are 1..K.
"""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.data.records import Dataset, ImageDetections
from fasterrcnn_jax.evaluation.detections import check_detections


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
        image_id = _coco_image_id(record.id)
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
            x1, y1, x2, y2 = (float(side) for side in box)
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": dataset.category_ids[int(label) - 1],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": float(score),
                }
            )
    write_atomically(Path(path), json.dumps(entries, allow_nan=False))


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
    if not _fits_a_file_name(split):
        return (f"{dataset.name}: VOC result files are not written: split {split!r} cannot be part of a file name",)
    lines = {label: [] for label in range(1, len(dataset.class_names) + 1)}
    for found, record in zip(detections, dataset.records, strict=True):
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
            x1, y1, x2, y2 = (float(side) for side in box)
            if _is_one_word(record.id):
                corners = f"{x1 + 1:.1f} {y1 + 1:.1f} {x2:.1f} {y2:.1f}"
                lines[int(label)].append(f"{record.id} {float(score):.6f} {corners}\n")
    for label, name in enumerate(dataset.class_names, start=1):
        if _fits_a_file_name(name):
            write_atomically(Path(folder) / f"comp4_det_{split}_{name}.txt", "".join(lines[label]))
    left_out = {
        "images whose id has white space": [record.id for record in dataset.records if not _is_one_word(record.id)],
        "classes whose name cannot be part of a file name": [
            name for name in dataset.class_names if not _fits_a_file_name(name)
        ],
    }
    return tuple(
        f"{dataset.name}: VOC result files lack {len(names)} {what}, for example {names[0]!r}; detections.json has all"
        for what, names in left_out.items()
        if names
    )


def _is_one_word(record_id: str) -> bool:
    return record_id.split() == [record_id]


def _fits_a_file_name(name: str) -> bool:
    # Both separators are refused on every system, because the files may be used on another system. Control
    # characters and lone surrogates are refused, because they are hostile or no file system takes them.
    return bool(name) and not any(c in "/\\" or unicodedata.category(c) in ("Cc", "Cs") for c in name)


def _coco_image_id(record_id: str) -> int | str:
    """Returns the id as an integer if the integer has the same text, otherwise as a string."""
    number = record_id.isascii() and record_id.isdigit() and (record_id == "0" or record_id[0] != "0")
    return int(record_id) if number else record_id
