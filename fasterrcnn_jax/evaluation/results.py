"""Detections of a whole data set: what the metrics take, the files others read, the table we print.

Boxes are xyxy in continuous pixels of the stored image; labels are 1..K. D detections, K classes.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.errors import InputError


class ImageDetections(NamedTuple):
    """What was found in one image, without padding."""

    boxes: np.ndarray  # [D, 4] float32
    scores: np.ndarray  # [D] float32, 0..1
    labels: np.ndarray  # [D] int32, 1..K


class CocoResult(NamedTuple):
    """COCO's numbers, 0..1; NaN where the data set has no object to be found."""

    ap: float  # mean over IoU 0.50, 0.55, ..., 0.95
    ap50: float
    ap75: float
    ap_small: float  # area up to 32^2
    ap_medium: float
    ap_large: float  # area from 96^2 on
    ar_100: float  # mean recall over the same thresholds, at most 100 detections per image and class
    class_ap: np.ndarray  # [K] float64
    class_ap50: np.ndarray  # [K] float64


class Metrics(NamedTuple):
    """Everything measured on one data set."""

    voc07: np.ndarray  # [K] float64: 11-point average precision at IoU 0.5
    voc_area: np.ndarray  # [K] float64: area under the curve at IoU 0.5
    coco: CocoResult


def check_detections(detections: Sequence[ImageDetections], dataset: Dataset) -> None:
    """Raises ValueError, naming the image, if `detections` cannot be detections on `dataset`."""
    if len(detections) != len(dataset.records):
        raise ValueError(
            f"{dataset.name} has {len(dataset.records)} images, but detections has {len(detections)} entries"
        )
    class_count = len(dataset.class_names)
    for found, record in zip(detections, dataset.records, strict=True):
        boxes, scores, labels = (np.asarray(field) for field in found)
        count = len(scores)
        if boxes.shape != (count, 4) or scores.shape != (count,) or labels.shape != (count,):
            raise ValueError(
                f"image {record.id}: boxes, scores and labels must be [D, 4], [D] and [D], "
                f"got {boxes.shape}, {scores.shape} and {labels.shape}"
            )
        # A NaN score would sort anywhere and a NaN box match anything.
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(f"image {record.id}: boxes and scores must be finite")
        if count and not (labels.dtype.kind in "iu" and labels.min() >= 1 and labels.max() <= class_count):
            raise ValueError(
                f"image {record.id}: labels must be integers in 1..{class_count}, "
                f"got {labels.min()}..{labels.max()} ({labels.dtype})"
            )


def evaluate_detections(detections: Sequence[ImageDetections], dataset: Dataset) -> Metrics:
    """Returns all metrics of `detections`: one entry per record of `dataset`, in the same order.

    Raises:
      ValueError: detections that do not fit the data set.
    """
    # Imported here because both modules take their records from this one.
    from fasterrcnn_jax.evaluation.coco_ap import coco_ap
    from fasterrcnn_jax.evaluation.voc_ap import voc_ap

    return Metrics(
        voc07=voc_ap(detections, dataset, use_07_metric=True),
        voc_area=voc_ap(detections, dataset, use_07_metric=False),
        coco=coco_ap(detections, dataset),
    )


def metrics_dict(metrics: Metrics, class_names: Sequence[str]) -> dict[str, float | None]:
    """Returns `metrics` under flat names for a log or a JSON file; None where a number is undefined.

    `mAP` is the mean over the classes that have objects; a class's own numbers are `NAME/CLASS`.

    Raises:
      ValueError: not one class name per class.
    """
    coco = metrics.coco
    values = {
        "voc07_mAP": mean_over_classes(metrics.voc07),
        "voc_area_mAP": mean_over_classes(metrics.voc_area),
        "AP": coco.ap,
        "AP50": coco.ap50,
        "AP75": coco.ap75,
        "AP_small": coco.ap_small,
        "AP_medium": coco.ap_medium,
        "AP_large": coco.ap_large,
        "AR_100": coco.ar_100,
    }
    per_class = {
        "voc07": metrics.voc07,
        "voc_area": metrics.voc_area,
        "AP": coco.class_ap,
        "AP50": coco.class_ap50,
    }
    for name, column in per_class.items():
        values |= {f"{name}/{c}": value for c, value in zip(class_names, column, strict=True)}
    # NaN is not JSON; several readers refuse a whole file over it.
    return {name: None if math.isnan(value) else float(value) for name, value in values.items()}


def format_table(dataset: Dataset, voc07: np.ndarray, voc_area: np.ndarray, coco: CocoResult) -> str:
    """Returns the table per class that the scripts print, ending with the line `AP50 0.xx`.

    Columns: class, number of objects to be found, VOC 11-point and area AP (IoU 0.5), COCO AP50 and AP.
    The last row is the mean over the classes that have objects.
    """
    counts = object_counts(dataset)
    columns = (voc07, voc_area, coco.class_ap50, coco.class_ap)
    rows = list(zip(dataset.class_names, counts, *columns, strict=True))
    rows.append(("mAP", counts.sum(), *(mean_over_classes(column) for column in columns)))
    width = max(len("class"), *(len(row[0]) for row in rows))
    lines = [f"{'class':<{width}}  {'boxes':>7}  {'VOC07':>8}  {'VOC area':>8}  {'AP50':>8}  {'AP':>8}"]
    for name, count, *values in rows:
        lines.append(f"{name:<{width}}  {count:>7}" + "".join(f"  {value:>8.3f}" for value in values))
    return "\n".join([*lines, f"AP50 {coco.ap50:.2f}"])


def object_counts(dataset: Dataset) -> np.ndarray:
    """Returns the number of objects per class that are to be found, neither difficult nor crowds: [K] int64."""
    counts = np.zeros(len(dataset.class_names) + 1, np.int64)
    for record in dataset.records:
        np.add.at(counts, record.labels[~(record.difficult | record.crowd)], 1)
    return counts[1:]


def mean_over_classes(values: np.ndarray) -> float:
    """Returns the mean of [K] `values` over the classes that have one; NaN, without a warning, if none has."""
    defined = np.asarray(values)[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


def write_coco_json(path: str | Path, detections: Sequence[ImageDetections], dataset: Dataset) -> None:
    """Writes the COCO result format, https://cocodataset.org/#format-results: one object per detection.

    `image_id` is the record's id: an integer if it reads as one and nothing is lost (`139`), otherwise
    text (`000005`, `2008_000008`). `category_id` is the one of `dataset.category_ids`; `bbox` is
    [x, y, width, height]. The file appears whole or not at all.

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
    _write_atomically(Path(path), json.dumps(entries, allow_nan=False))


def write_voc_files(
    folder: str | Path, detections: Sequence[ImageDetections], dataset: Dataset, *, split: str
) -> None:
    """Writes `comp4_det_SPLIT_CLASS.txt` for every class, as the VOC development kit reads them.

    A line is `id score xmin ymin xmax ymax`, in the kit's pixels, which count from 1 and include both
    ends: (x1 + 1, y1 + 1, x2, y2) of ours. Each file appears whole or not at all.

    Raises:
      InputError: a class or split that is not part of a file name, an image id with white space, or a
        file that cannot be written. Names are checked before anything is written.
      ValueError: detections that do not fit the data set.
    """
    check_detections(detections, dataset)
    for field, name in [("split", split), *(("class", name) for name in dataset.class_names)]:
        # Both separators on every system: a name that is harmless here may be unpacked elsewhere.
        if not name or any(character in name for character in "/\\\0"):
            raise InputError(f"{dataset.name}: {field} {name!r} cannot be part of a file name")
    lines = {label: [] for label in range(1, len(dataset.class_names) + 1)}
    for found, record in zip(detections, dataset.records, strict=True):
        if record.id.split() != [record.id]:
            raise InputError(
                f"{dataset.name}: image id {record.id!r} has white space, which VOC files cannot hold"
            )
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
            x1, y1, x2, y2 = (float(side) for side in box)
            lines[int(label)].append(
                f"{record.id} {float(score):.6f} {x1 + 1:.1f} {y1 + 1:.1f} {x2:.1f} {y2:.1f}\n"
            )
    for label, name in enumerate(dataset.class_names, start=1):
        _write_atomically(Path(folder) / f"comp4_det_{split}_{name}.txt", "".join(lines[label]))


def _coco_image_id(record_id: str) -> int | str:
    """Returns an integer where turning it back into text gives the same id."""
    number = record_id.isascii() and record_id.isdigit() and (record_id == "0" or record_id[0] != "0")
    return int(record_id) if number else record_id


def _write_atomically(path: Path, text: str) -> None:
    """Writes a neighbour of `path` and renames it, so that a reader never sees half a file."""
    # Not the tempfile module: its files are readable by their owner alone, and keep that when renamed.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8", newline="\n")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
