"""Analyses detections: curves, best thresholds, confusion, calibration, and the kind of every error.

Shapes: D detections and G objects of all images, K classes, B bins of scores, M distinct scores of one class.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int8

from fasterrcnn_jax.data.records import Dataset, ImageDetections
from fasterrcnn_jax.evaluation.detections import check_detections, mean_over_classes, object_counts
from fasterrcnn_jax.evaluation.overlaps import (
    Overlaps,
    best_overlaps,
    matched_by_iou,
    matched_in_order,
    overlapping_pairs,
)
from fasterrcnn_jax.evaluation.tables import (
    FlatDetections,
    FlatObjects,
    flat_detections,
    flat_objects,
    rank_in_group,
)

FOREGROUND_IOU = 0.5  # t_f of TIDE: a detection with this IoU or more can find an object
BACKGROUND_IOU = 0.1  # t_b of TIDE: a detection with this IoU or less with every object is on the background

# What became of a detection, by number (`DetectionTable.kind`). The names are also those of `ErrorSplit`.
KINDS = ("correct", "class", "localisation", "both", "duplicate", "background", "ignored")
CORRECT, CLASS, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, IGNORED = range(len(KINDS))
# The rows of `ErrorSplit`. Missed objects have no detection.
ERRORS = ("class", "localisation", "both", "duplicate", "background", "missed")
# COCO's recall points, with the bits of pycocotools.
RECALLS = np.linspace(0.0, 1.0, 101)


class DetectionTable(NamedTuple):
    """One row per detection, in the order of the images and, within an image, by descending score."""

    image: np.ndarray  # [D] int64: position in `dataset.records`
    # [D] int64: position among the detections that were given for the image
    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride] - a tuple's index, which nobody calls
    label: np.ndarray  # [D] int64, 1..K
    box: np.ndarray  # [D, 4] float32 xyxy in pixels of the original image
    score: np.ndarray  # [D] float32, 0..1
    kind: np.ndarray  # [D] int8: position in KINDS
    # The row in the object table that was found (correct) or that explains the error: the object of another class
    # (class), the badly covered one (localisation, both), the one found before (duplicate), the difficult object or
    # crowd (ignored); -1: none (background).
    object: np.ndarray  # [D] int64
    iou: np.ndarray  # [D] float64: IoU with this object; with -1, the largest IoU with any object of the image
    true_label: np.ndarray  # [D] int64: row in the confusion matrix, 0 background; -1: below the threshold or ignored


class ObjectTable(NamedTuple):
    """One row per object, in the order of the records."""

    image: np.ndarray  # [G] int64: position in `dataset.records`
    # [G] int64: position in the record's boxes
    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride] - a tuple's index, which nobody calls
    label: np.ndarray  # [G] int64, 1..K
    box: np.ndarray  # [G, 4] float32 xyxy in pixels of the original image
    area: np.ndarray  # [G] float64, square pixels, for COCO's size ranges
    aspect: np.ndarray  # [G] float64: height / width of the box
    ignored: np.ndarray  # [G] bool: difficult or crowd; nothing below is set for them
    detection: np.ndarray  # [G] int64: row in the detection table that found it, at any score; -1: none
    missed: np.ndarray  # [G] bool: a missed object of TIDE: no detection found it, and no error explains it
    predicted_label: np.ndarray  # [G] int64: column in the confusion matrix, 0 background; -1: ignored


class ClassCurve(NamedTuple):
    """Precision, recall and F1 of one class at IoU 0.5, one value per distinct score, descending."""

    score: np.ndarray  # [M] float64: the threshold; detections with this score or more are kept
    precision: np.ndarray  # [M] float64
    recall: np.ndarray  # [M] float64; NaN if the class has no object
    f1: np.ndarray  # [M] float64; NaN if the class has no object
    best: int  # position of the best F1; -1: no detection or no object

    @property
    def best_threshold(self) -> float:
        """Returns the score threshold with the best F1; NaN if there is none."""
        return float(self.score[self.best]) if self.best >= 0 else float("nan")


class Calibration(NamedTuple):
    """How often detections of a score are correct at IoU 0.5; ignored detections are left out."""

    edges: np.ndarray  # [B + 1] float64: limits of the bins, from 0 to 1
    # [B] int64: detections in each bin
    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride] - a tuple's count, which nobody calls
    score: np.ndarray  # [B] float64: mean score; NaN in an empty bin
    precision: np.ndarray  # [B] float64: fraction that is correct; NaN in an empty bin
    expected_error: float  # mean of |precision - score|, weighted by count; NaN if there is no detection
    class_expected_error: np.ndarray  # [K] float64


class ErrorSplit(NamedTuple):
    """The AP at IoU 0.5, and what AP each kind of error costs: TIDE (arXiv:2008.08115)."""

    ap50: float  # mean over the classes with objects
    class_ap50: np.ndarray  # [K] float64; NaN for a class without objects
    # [6, K] int64: errors by kind (ERRORS) and class of the detection, or of the missed object
    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride] - a tuple's count, which nobody calls
    delta: np.ndarray  # [6] float64: AP gained if all errors of this kind were mended, never below 0
    false_positive_delta: float  # AP gained if every false positive had score 0
    false_negative_delta: float  # AP gained if every object that no detection found were left out


class Analysis(NamedTuple):
    """Everything about the detections of one data set beside the average precision (`report.Metrics`)."""

    detections: DetectionTable
    objects: ObjectTable
    curves: tuple[ClassCurve, ...]  # one per class
    thresholds: np.ndarray  # [T] float64: 0, 0.01, ..., 1
    mean_f1: np.ndarray  # [T] float64: mean of the classes' F1 at each of `thresholds`; NaN without objects
    best_threshold: float  # of `thresholds`, the one with the best mean F1; NaN without objects
    confusion: np.ndarray  # [K + 1, K + 1] int64: true class by predicted class; 0 is background
    confusion_thresholds: np.ndarray  # [K] float64: score threshold of each class in the confusion matrix
    calibration: Calibration
    errors: ErrorSplit


_LIMIT = 100  # detections per image and class, as in COCO
_BINS = 10


def analyse(detections: Sequence[ImageDetections], dataset: Dataset) -> Analysis:
    """Returns the analysis of `detections`: one entry per record of `dataset`, in the same order.

    Detections find objects as in COCO at IoU 0.5: by descending score, each takes the free object of its class with
    the largest IoU. A detection that finds none, and that covers a difficult object or a crowd of its class, is
    ignored. The best 100 detections of each image and class take part; equal scores keep the order that is given.

    Raises:
      ValueError: detections that do not fit the data set.
    """
    check_detections(detections, dataset)
    class_count = len(dataset.class_names)
    found, objects = ranked_detections(detections, class_count), flat_objects(dataset)
    ignored = objects.difficult | objects.crowd
    counts = object_counts(dataset)
    pairs = overlapping_pairs(found.box, found.image, objects.box, objects.image)
    kind, explaining, iou = _kinds(found, objects, pairs, class_count)
    explained = _explained(kind, explaining, len(ignored))
    finder = np.full(len(ignored), -1, np.int64)
    finder[explaining[kind == CORRECT]] = np.flatnonzero(kind == CORRECT)
    missed = ~ignored & (finder < 0) & ~explained
    ranking = np.lexsort((-found.score, found.label))  # by class; within a class by descending score
    curves = _curves(found, kind, counts, ranking)
    thresholds, mean_f1, best = _best_of_all(curves, counts)
    limits = np.array([best if np.isnan(curve.best_threshold) else curve.best_threshold for curve in curves])
    limits = np.where(np.isnan(limits), 0.5, limits)
    true_label, predicted_label = _confused(found, objects, pairs, kind, explaining, limits)
    confusion = np.zeros((class_count + 1, class_count + 1), np.int64)
    counted = true_label >= 0
    np.add.at(confusion, (true_label[counted], found.label[counted]), 1)
    confusion[:, 0] += np.bincount(objects.label[predicted_label == 0], minlength=class_count + 1)
    sides = (objects.box[:, 2:] - objects.box[:, :2]).astype(np.float64)
    return Analysis(
        detections=DetectionTable(*found, kind=kind, object=explaining, iou=iou, true_label=true_label),
        objects=ObjectTable(
            *(objects.image, objects.index, objects.label, objects.box, objects.area),
            aspect=sides[:, 1] / sides[:, 0],
            ignored=ignored,
            detection=finder,
            missed=missed,
            predicted_label=predicted_label,
        ),
        curves=curves,
        thresholds=thresholds,
        mean_f1=mean_f1,
        best_threshold=best,
        confusion=confusion,
        confusion_thresholds=limits,
        calibration=_calibration(found, kind, class_count),
        errors=_error_split(found, objects.label, kind, explaining, missed, counts, ranking),
    )


def ranked_detections(detections: Sequence[ImageDetections], class_count: int) -> FlatDetections:
    """Returns the detections by image and descending score, at most `_LIMIT` of each image and class."""
    found = flat_detections(detections)
    found = found.rows(np.lexsort((-found.score, found.image)))
    return found.rows(rank_in_group(found.image * (class_count + 1) + found.label) < _LIMIT)


def _kinds(
    found: FlatDetections, objects: FlatObjects, pairs: Overlaps, class_count: int
) -> tuple[Int8[np.ndarray, "d"], Int[np.ndarray, "d"], Float[np.ndarray, "d"]]:
    """Returns what became of each detection, the object that explains it, and the overlap with this object.

    TIDE, section 2.2. A detection may fit several kinds: the first of localisation, class, duplicate, background and
    both holds, as in the program of the authors. An IoU of exactly `FOREGROUND_IOU` counts as high enough.
    """
    count = len(found.label)
    same = found.label[pairs.detection] == objects.label[pairs.object]
    regular = ~(objects.difficult | objects.crowd)[pairs.object]
    # COCO: the overlap with a crowd is the part of the detection inside it.
    overlap = np.where(objects.crowd[pairs.object], pairs.inside, pairs.iou)
    able = pairs.where(same & regular & (pairs.iou >= FOREGROUND_IOU))
    matched = matched_in_order(able, count, len(objects.label))

    def best(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return best_overlaps(pairs.where(chosen), overlap[chosen], count)

    own, own_iou = best(same & regular)
    other, other_iou = best(~same & regular)
    ignored, ignored_overlap = best(same & ~regular)
    conditions = [
        matched >= 0,
        ignored_overlap >= FOREGROUND_IOU,
        (own_iou >= BACKGROUND_IOU) & (own_iou < FOREGROUND_IOU),
        other_iou >= FOREGROUND_IOU,
        own_iou >= FOREGROUND_IOU,
        other_iou <= BACKGROUND_IOU,
    ]
    kinds = [CORRECT, IGNORED, LOCALISATION, CLASS, DUPLICATE, BACKGROUND]
    kind = np.select(conditions, kinds, default=BOTH).astype(np.int8)
    none = np.full(count, -1)
    explaining = np.select(conditions, [matched, ignored, own, other, own, none], default=other)
    own_match = np.zeros(count)
    taken = matched[able.detection] == able.object
    own_match[able.detection[taken]] = able.iou[taken]
    of_object = [own_match, ignored_overlap, own_iou, other_iou, own_iou, np.maximum(own_iou, other_iou)]
    return kind, explaining.astype(np.int64), np.select(conditions, of_object, default=other_iou)


def _explained(kind: np.ndarray, explaining: np.ndarray, count: int) -> Bool[np.ndarray, "{count}"]:
    """Returns which objects an error of class or localisation refers to; such an object is not missed."""
    explained = np.zeros(count, bool)
    explained[explaining[(kind == CLASS) | (kind == LOCALISATION)]] = True
    return explained


def _curves(found: FlatDetections, kind: np.ndarray, counts: np.ndarray, ranking: np.ndarray) -> tuple[ClassCurve, ...]:
    ranking = ranking[kind[ranking] != IGNORED]
    ends = np.searchsorted(found.label[ranking], np.arange(1, len(counts) + 2))
    curves = []
    for label, count in enumerate(counts):
        rows = ranking[ends[label] : ends[label + 1]]
        score = found.score[rows].astype(np.float64)
        last = np.flatnonzero(np.diff(score, append=-np.inf))  # of each distinct score
        hits = np.cumsum(kind[rows] == CORRECT)[last]
        recall = hits / count if count else np.full(len(last), np.nan)
        f1 = 2.0 * hits / (last + 1 + count) if count else np.full(len(last), np.nan)
        best = int(f1.argmax()) if hits.any() else -1
        curves.append(ClassCurve(score[last], hits / (last + 1), recall, f1, best))
    return tuple(curves)


def _best_of_all(curves: Sequence[ClassCurve], counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns thresholds, the mean F1 of the classes with objects at each, and the threshold with the best mean.

    Of several equal ones, the middle one: it is furthest from the scores where the F1 falls.
    """
    thresholds = np.arange(101) / 100.0
    of_class = []
    for curve, count in zip(curves, counts, strict=True):
        if count:
            kept = np.searchsorted(-curve.score, -thresholds, side="right")  # distinct scores at or above the threshold
            of_class.append(np.append(curve.f1, 0.0)[kept - 1])
    mean = np.mean(of_class, axis=0) if of_class else np.full(len(thresholds), np.nan)
    if not (mean > 0.0).any():
        return thresholds, mean, math.nan
    best = np.flatnonzero(mean == mean.max())
    return thresholds, mean, float(thresholds[best[len(best) // 2]])


def _confused(
    found: FlatDetections,
    objects: FlatObjects,
    pairs: Overlaps,
    kind: np.ndarray,
    explaining: np.ndarray,
    limits: np.ndarray,
) -> tuple[Int[np.ndarray, "d"], Int[np.ndarray, "g"]]:
    """Returns the true label of each detection and the predicted label of each object, for the confusion matrix.

    Only detections with the threshold of their class or more take part. Those that found an object of their own class
    keep it. The others and the objects that are left are then matched by descending IoU, whatever their classes.
    """
    kept = (found.score >= limits[found.label - 1]) & (kind != IGNORED)
    true_label = np.where(kept, 0, -1)
    predicted_label = np.where(objects.difficult | objects.crowd, -1, 0)
    correct = np.flatnonzero(kept & (kind == CORRECT))
    true_label[correct] = found.label[correct]
    predicted_label[explaining[correct]] = found.label[correct]
    free = (true_label[pairs.detection] == 0) & (predicted_label[pairs.object] == 0)
    rows, others = matched_by_iou(pairs.where(free & (pairs.iou >= FOREGROUND_IOU)))
    true_label[rows], predicted_label[others] = objects.label[others], found.label[rows]
    return true_label, predicted_label


def _calibration(found: FlatDetections, kind: np.ndarray, class_count: int) -> Calibration:
    """Returns the calibration in bins of equal width: Guo et al. 2017 (arXiv:1706.04599), eq. 3.

    For detectors, with the precision for the accuracy: Kueppers et al. 2020 (arXiv:2004.13546), eq. 4, on the score
    alone.
    """
    counted = kind != IGNORED
    score, label = found.score[counted].astype(np.float64), found.label[counted]
    cell = (label - 1) * _BINS + np.clip(np.floor(score * _BINS), 0, _BINS - 1).astype(np.int64)

    def summed(weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(cell, weights, minlength=class_count * _BINS).reshape(class_count, _BINS)

    count, scores, hits = summed(), summed(score), summed((kind[counted] == CORRECT).astype(np.float64))
    # The weighted mean of |precision - score| is the sum of |hits - scores| over the number of detections.
    class_error = _divided(np.abs(hits - scores).sum(axis=1), count.sum(axis=1))
    count, scores, hits = (values.sum(axis=0) for values in (count, scores, hits))
    return Calibration(
        edges=np.arange(_BINS + 1) / _BINS,
        count=count,
        score=_divided(scores, count),
        precision=_divided(hits, count),
        expected_error=float(_divided(np.abs(hits - scores).sum(), count.sum())),
        class_expected_error=class_error,
    )


def _divided(values: Any, counts: Any) -> np.ndarray:
    """Returns values / counts; NaN where the count is 0."""
    values, counts = np.asarray(values, np.float64), np.asarray(counts)
    return np.divide(values, counts, out=np.full(values.shape, np.nan), where=counts > 0)


def _error_split(
    found: FlatDetections,
    object_label: np.ndarray,
    kind: np.ndarray,
    explaining: np.ndarray,
    missed: np.ndarray,
    counts: np.ndarray,
    ranking: np.ndarray,
) -> ErrorSplit:
    """Returns the AP that each kind of error costs: TIDE, section 2.3.

    Each kind is mended alone, from the same start. Class and localisation errors become correct, the best detection
    of each object that was not found; the others are taken away, and so are duplicates, detections on the background
    and errors of both. Missed objects are taken away. The mean is over the classes with objects: the program of the
    authors also counts classes that have detections only, with AP 0.
    """
    correct, counted = kind == CORRECT, kind != IGNORED
    score = found.score.astype(np.float64)
    class_count = len(counts)

    def mean_ap(keep: np.ndarray, correct: np.ndarray, label: np.ndarray, score: np.ndarray, counts: np.ndarray):
        order = np.lexsort((-score, label))
        order = order[keep[order]]
        ends = np.searchsorted(label[order], np.arange(1, class_count + 2))
        per_class = np.full(class_count, np.nan)
        for position in np.flatnonzero(initial):
            rows = order[ends[position] : ends[position + 1]]
            # A class without anything left has nothing to measure.
            if counts[position] or len(rows):
                per_class[position] = average_precision_101(correct[rows], int(counts[position]))
        return per_class

    initial = counts > 0
    per_class = mean_ap(counted, correct, found.label, score, counts)
    ap50 = mean_over_classes(per_class)

    def gain(**mended: np.ndarray) -> float:
        if math.isnan(ap50):
            return math.nan
        start = dict(keep=counted, correct=correct, label=found.label, score=score, counts=counts)
        after = mean_over_classes(mean_ap(**(start | mended)))
        # All objects are missed and nothing is detected: nothing is wrong once they are taken away.
        return max((1.0 if math.isnan(after) else after) - ap50, 0.0)

    free = np.ones(len(object_label), bool)
    free[explaining[correct]] = False

    def corrected(error: int) -> dict[str, np.ndarray]:
        rows = np.flatnonzero(kind == error)
        rows = rows[free[explaining[rows]]]
        rows = rows[np.argsort(-score[rows], kind="stable")]
        best = rows[np.unique(explaining[rows], return_index=True)[1]]
        now, label = correct.copy(), found.label.copy()
        now[best], label[best] = True, object_label[explaining[best]]
        return {"keep": counted & ((kind != error) | now), "correct": now, "label": label}

    missed_counts = np.bincount(object_label[missed] - 1, minlength=class_count)
    false_positives_last = {"score": np.where(correct, 1.0, 0.0)}
    found_counts = np.bincount(found.label[correct] - 1, minlength=class_count)
    delta = [
        gain(**corrected(CLASS)),
        gain(**corrected(LOCALISATION)),
        *(gain(keep=counted & (kind != error)) for error in (BOTH, DUPLICATE, BACKGROUND)),
        gain(counts=counts - missed_counts),
    ]
    by_kind = [
        np.bincount(found.label[kind == error] - 1, minlength=class_count)
        for error in (CLASS, LOCALISATION, BOTH, DUPLICATE, BACKGROUND)
    ]
    return ErrorSplit(
        ap50=ap50,
        class_ap50=per_class,
        count=np.stack([*by_kind, missed_counts]),
        delta=np.array(delta),
        false_positive_delta=gain(**false_positives_last),
        false_negative_delta=gain(counts=found_counts),
    )


def average_precision_101(correct: Bool[np.ndarray, "m"], count: int) -> float:
    """Returns COCO's average precision over 101 recall points of a ranking for `count` objects; 0 without objects."""
    if not count or not len(correct):
        return 0.0
    hits = np.flatnonzero(correct)
    # Precision is best where a hit comes: only these places matter.
    precision = np.arange(1, len(hits) + 1) / (hits + 1.0)
    best_ahead = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(np.arange(1, len(hits) + 1) / count, RECALLS, side="left")
    return float(np.append(best_ahead, 0.0)[reached].sum() / len(RECALLS))
