"""Computes all metrics of detections, and gives them as flat names and as the table that the scripts print."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fasterrcnn_jax.config.train import CocoBackend
from fasterrcnn_jax.data.records import Dataset, ImageDetections
from fasterrcnn_jax.evaluation.coco import CocoResult
from fasterrcnn_jax.evaluation.detections import mean_over_classes, object_counts
from fasterrcnn_jax.printing import printable


class Metrics(NamedTuple):
    """All metrics of the detections on one data set."""

    voc07: np.ndarray  # [K] float64: 11-point average precision at IoU 0.5
    voc_area: np.ndarray  # [K] float64: area under the curve at IoU 0.5
    coco: CocoResult


def evaluate_detections(
    detections: Sequence[ImageDetections], dataset: Dataset, *, backend: CocoBackend = "pycocotools"
) -> Metrics:
    """Returns all metrics of `detections`: one entry per record of `dataset`, in the same order.

    Args:
      backend: the package that computes COCO's metrics.
    Raises:
      InputError: this package is not installed.
      ValueError: detections that do not fit the data set.
    """
    from fasterrcnn_jax.evaluation.coco import coco_ap
    from fasterrcnn_jax.evaluation.voc import average_precisions, precision_recall

    curves, counts = precision_recall(detections, dataset), object_counts(dataset)
    return Metrics(
        voc07=average_precisions(curves, counts, use_07_metric=True),
        voc_area=average_precisions(curves, counts, use_07_metric=False),
        coco=coco_ap(detections, dataset, backend=backend),
    )


def metrics_dict(metrics: Metrics, class_names: Sequence[str]) -> dict[str, float | None]:
    """Returns `metrics` under flat names for a log or a JSON file; None if a metric is undefined.

    `mAP` is the mean over the classes that have objects; the metrics of one class are `NAME/CLASS`.

    Raises:
      ValueError: `class_names` does not have one name per class.
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
    # NaN is not valid JSON, and many readers would refuse the whole file.
    return {name: None if math.isnan(value) else float(value) for name, value in values.items()}


def format_table(dataset: Dataset, voc07: np.ndarray, voc_area: np.ndarray, coco: CocoResult) -> str:
    """Returns the table per class that the scripts print, ending with the line `AP50 0.xx`.

    Columns: class, number of objects to find, VOC 11-point and area AP (IoU 0.5), COCO AP50 and AP.
    The last row is the mean over the classes that have objects.
    """
    counts = object_counts(dataset)
    columns = (voc07, voc_area, coco.class_ap50, coco.class_ap)
    rows = list(zip(map(printable, dataset.class_names), counts, *columns, strict=True))
    rows.append(("mAP", counts.sum(), *(mean_over_classes(column) for column in columns)))
    width = max(len("class"), *(len(row[0]) for row in rows))
    lines = [f"{'class':<{width}}  {'boxes':>7}  {'VOC07':>8}  {'VOC area':>8}  {'AP50':>8}  {'AP':>8}"]
    for name, count, *values in rows:
        lines.append(f"{name:<{width}}  {count:>7}" + "".join(f"  {value:>8.3f}" for value in values))
    return "\n".join([*lines, f"AP50 {coco.ap50:.2f}"])
