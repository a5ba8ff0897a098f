"""Analyses detections: curves, best thresholds, confusion, calibration, and the kind of every error.

Shapes: D detections and G objects of all images, K classes, B bins of scores, M distinct scores of one class.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fasterrcnn_jax.data.records import Dataset, ImageDetections

FOREGROUND_IOU = 0.5  # t_f of TIDE: a detection with this IoU or more can find an object
BACKGROUND_IOU = 0.1  # t_b of TIDE: a detection with this IoU or less with every object is on the background

# What became of a detection, by number (`DetectionTable.kind`). The names are also those of `ErrorSplit`.
KINDS = ("correct", "class", "localisation", "both", "duplicate", "background", "ignored")
CORRECT, CLASS, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, IGNORED = range(len(KINDS))
# The rows of `ErrorSplit`. Missed objects have no detection.
ERRORS = ("class", "localisation", "both", "duplicate", "background", "missed")


class DetectionTable(NamedTuple):
    """One row per detection, in the order of the images and, within an image, by descending score."""

    image: np.ndarray  # [D] int64: position in `dataset.records`
    index: np.ndarray  # [D] int64: position among the detections that were given for the image
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
    index: np.ndarray  # [G] int64: position in the record's boxes
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
    count: np.ndarray  # [B] int64: detections in each bin
    score: np.ndarray  # [B] float64: mean score; NaN in an empty bin
    precision: np.ndarray  # [B] float64: fraction that is correct; NaN in an empty bin
    expected_error: float  # mean of |precision - score|, weighted by count; NaN if there is no detection
    class_expected_error: np.ndarray  # [K] float64


class ErrorSplit(NamedTuple):
    """The AP at IoU 0.5, and what AP each kind of error costs: TIDE (arXiv:2008.08115)."""

    ap50: float  # mean over the classes with objects
    class_ap50: np.ndarray  # [K] float64; NaN for a class without objects
    count: np.ndarray  # [6, K] int64: errors by kind (ERRORS) and class of the detection, or of the missed object
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


def analyse(detections: Sequence[ImageDetections], dataset: Dataset) -> Analysis:
    """Returns the analysis of `detections`: one entry per record of `dataset`, in the same order.

    Raises:
      ValueError: detections that do not fit the data set.
    """
    raise NotImplementedError
