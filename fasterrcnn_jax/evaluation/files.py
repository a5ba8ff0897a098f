"""Writes the detections of a data set as result files of COCO and VOC.

Boxes are xyxy in continuous pixels of the original image; labels are 1..K.
"""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.data.records import Dataset, ImageDetections
from fasterrcnn_jax.errors import InputError
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


def write_voc_files(folder: str | Path, detections: Sequence[ImageDetections], dataset: Dataset, *, split: str) -> None:
    """Writes `comp4_det_SPLIT_CLASS.txt` for every class, in the format of the VOC development kit.

    A line is `id score xmin ymin xmax ymax`. The kit's pixels count from 1 and include both ends, so our box
    is written as (x1 + 1, y1 + 1, x2, y2). Each file is written completely or not at all.

    Raises:
      InputError: a class or split name cannot be part of a file name, an image id has white space, or a file
        cannot be written. Names are checked before anything is written.
      ValueError: detections that do not fit the data set.
    """
    check_detections(detections, dataset)
    for field, name in [("split", split), *(("class", name) for name in dataset.class_names)]:
        # Both separators are refused on every system, because the files may be used on another system. Control
        # characters and lone surrogates are refused, because they are hostile or no file system takes them.
        if not name or any(character in "/\\" or unicodedata.category(character) in ("Cc", "Cs") for character in name):
            raise InputError(f"{dataset.name}: {field} {name!r} cannot be part of a file name; rename the {field}")
    lines = {label: [] for label in range(1, len(dataset.class_names) + 1)}
    for found, record in zip(detections, dataset.records, strict=True):
        if record.id.split() != [record.id]:
            raise InputError(f"{dataset.name}: image id {record.id!r} has white space, which VOC files do not allow")
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
            x1, y1, x2, y2 = (float(side) for side in box)
            lines[int(label)].append(f"{record.id} {float(score):.6f} {x1 + 1:.1f} {y1 + 1:.1f} {x2:.1f} {y2:.1f}\n")
    for label, name in enumerate(dataset.class_names, start=1):
        write_atomically(Path(folder) / f"comp4_det_{split}_{name}.txt", "".join(lines[label]))


def _coco_image_id(record_id: str) -> int | str:
    """Returns the id as an integer if the integer has the same text, otherwise as a string."""
    number = record_id.isascii() and record_id.isdigit() and (record_id == "0" or record_id[0] != "0")
    return int(record_id) if number else record_id
