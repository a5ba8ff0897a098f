"""Computes all metrics of detections, and gives them as flat names and as the table that the scripts print."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fasterrcnn_jax.config.train import CocoBackend
from fasterrcnn_jax.data.records import Dataset, ImageDetections
from fasterrcnn_jax.evaluation.analysis import ERRORS, Analysis
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
        "AR_1": coco.ar_1,
        "AR_10": coco.ar_10,
        "AR_100": coco.ar_100,
        "AR_small": coco.ar_small,
        "AR_medium": coco.ar_medium,
        "AR_large": coco.ar_large,
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


def format_coco(dataset: Dataset, coco: CocoResult) -> str:
    """Returns COCO's twelve numbers, and its AP of each class by IoU and by size of the objects."""
    precisions = (coco.ap, coco.ap50, coco.ap75, coco.ap_small, coco.ap_medium, coco.ap_large)
    recalls = (coco.ar_1, coco.ar_10, coco.ar_100, coco.ar_small, coco.ar_medium, coco.ar_large)
    sizes = ("small", "medium", "large")
    lines = [
        "COCO       " + _cells(("AP", "AP50", "AP75", *sizes)),
        "precision  " + _cells(precisions),
        "COCO       " + _cells(("max 1", "max 10", "max 100", *sizes)),
        "recall     " + _cells(recalls),
    ]
    width = _width(dataset)
    heads = [f"{iou:.2f}" for iou in np.arange(10) * 0.05 + 0.5]
    lines.append(f"{'AP at IoU':<{width}}  {_cells((*heads, *sizes))}")
    for name, by_iou, by_size in zip(dataset.class_names, coco.class_iou_ap, coco.class_size_ap, strict=True):
        lines.append(f"{printable(name):<{width}}  {_cells((*by_iou, *by_size))}")
    return "\n".join(lines)


def format_analysis(dataset: Dataset, analysis: Analysis) -> str:
    """Returns the best threshold of each class, the kinds of errors, and how well the scores are calibrated."""
    width = _width(dataset)
    lines = [f"{'best F1':<{width}}  " + _cells(("score", "F1", "prec.", "recall"))]
    for name, curve in zip(dataset.class_names, analysis.curves, strict=True):
        best = curve.best
        of_best = (curve.score, curve.f1, curve.precision, curve.recall)
        values = [column[best] for column in of_best] if best >= 0 else [math.nan] * 4
        lines.append(f"{printable(name):<{width}}  {_cells(values)}")
    if not math.isnan(analysis.best_threshold):
        best = int(np.flatnonzero(analysis.thresholds == analysis.best_threshold)[0])
        lines.append(f"{'all':<{width}}  {_cells((analysis.best_threshold, analysis.mean_f1[best]))}  (mean F1)")
    errors = analysis.errors
    lines.append(f"errors     {'number':>7}  {'AP50 +':>7}  (AP50 gained if all errors of the kind were mended; TIDE)")
    for kind, count, gain in zip(ERRORS, errors.count.sum(axis=1), errors.delta, strict=True):
        lines.append(f"{kind:<12} {count:>5}  {gain:>7.3f}")
    lines.append(f"calibration: expected error of the scores {analysis.calibration.expected_error:.3f}")
    return "\n".join(lines)


def details_dict(metrics: Metrics, analysis: Analysis, dataset: Dataset) -> dict[str, Any]:
    """Returns everything that the tables show for a JSON file; None for what is undefined."""
    counts, errors, calibration = object_counts(dataset), analysis.errors, analysis.calibration
    classes = {}
    for label, (name, curve) in enumerate(zip(dataset.class_names, analysis.curves, strict=True)):
        best = curve.best
        of_best = {"score": curve.score, "F1": curve.f1, "precision": curve.precision, "recall": curve.recall}
        classes[name] = {
            "objects": int(counts[label]),
            "AP_by_IoU": metrics.coco.class_iou_ap[label],
            "AP_by_size": metrics.coco.class_size_ap[label],
            "AR_100": metrics.coco.class_ar_100[label],
            "voc07": metrics.voc07[label],
            "voc_area": metrics.voc_area[label],
            "best": {key: column[best] for key, column in of_best.items()} if best >= 0 else None,
            "errors": dict(zip(ERRORS, errors.count[:, label], strict=True)),
            "calibration_error": calibration.class_expected_error[label],
        }
    content = {
        "metrics": metrics_dict(metrics, dataset.class_names),
        "classes": classes,
        "best_threshold": analysis.best_threshold,
        "confusion": {
            "names": ["background", *dataset.class_names],
            "thresholds": analysis.confusion_thresholds,
            "true_by_predicted": analysis.confusion,
        },
        "errors": {
            "AP50": errors.ap50,
            "AP50_gained": dict(zip(ERRORS, errors.delta, strict=True)),
            "AP50_gained_without_false_positives": errors.false_positive_delta,
            "AP50_gained_without_false_negatives": errors.false_negative_delta,
        },
        "calibration": {
            "edges": calibration.edges,
            "count": calibration.count,
            "score": calibration.score,
            "precision": calibration.precision,
            "expected_error": calibration.expected_error,
        },
    }
    return _plain(content)


def _plain(value: Any) -> Any:
    """Returns dictionaries and arrays as JSON knows them, with None for NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.integer, np.floating)):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value


def _cells(values: Iterable[Any]) -> str:
    return "  ".join(f"{value:>7}" if isinstance(value, str) else f"{value:>7.3f}" for value in values)


def _width(dataset: Dataset) -> int:
    return max(len("AP at IoU"), *(len(printable(name)) for name in dataset.class_names))
