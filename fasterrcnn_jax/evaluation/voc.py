"""Computes PASCAL VOC's average precision per class.

Everingham et al. 2010, "The PASCAL Visual Object Classes (VOC) Challenge", section 4.2. The 11-point
form is the metric of VOC 2007 and of the numbers in the Faster R-CNN paper; the area under the curve
is the metric from VOC 2010 on. The VOC tools add one pixel to every width because their boxes are
inclusive; our boxes are continuous (xmin - 1, ymin - 1, xmax, ymax), so their overlap is our plain IoU.
VOC has no crowds; a crowd of another data set is treated as a difficult object.

Shapes: D detections and N objects of one image, K classes, M detections of one class in all images.
"""

from collections.abc import Sequence

import numpy as np

from fasterrcnn_jax.data.records import Dataset, ImageDetections
from fasterrcnn_jax.evaluation.detections import check_detections, object_counts
from fasterrcnn_jax.evaluation.overlaps import best_overlaps, overlapping_pairs
from fasterrcnn_jax.evaluation.tables import flat_detections, flat_objects

# The points of py-faster-rcnn's `voc_ap`, np.arange(0., 1.1, 0.1). np.linspace(0, 1, 11) has the same bits. k / 10 has
# not: at 3, 6 and 7 the points of the reference are one rounding higher (0.30000000000000004 for 3/10), so a recall of
# exactly 3/10 does not reach the fourth point. Published numbers are computed with these points.
RECALL_POINTS = np.arange(0.0, 1.1, 0.1)


def average_precision(recall: np.ndarray, precision: np.ndarray, *, use_07_metric: bool) -> float:
    """Returns the average precision of one curve, in 0..1; 0 for an empty curve.

    Both forms first replace the precision by the best one at the same or any higher recall.

    Args:
      recall: [M] non-decreasing, in 0..1.
      precision: [M] in 0..1.
      use_07_metric: the mean over the 11 recall points 0, 0.1, ..., 1, rounded as in the reference
        (`RECALL_POINTS`); otherwise the area under the curve.

    Raises:
      ValueError: recall and precision are not vectors of the same length.
    """
    recall, precision = np.asarray(recall, np.float64), np.asarray(precision, np.float64)
    if recall.ndim != 1 or recall.shape != precision.shape:
        raise ValueError(f"recall and precision must both have the shape [M], got {recall.shape} and {precision.shape}")
    best_ahead = np.maximum.accumulate(precision[::-1])[::-1]
    if use_07_metric:
        reached = np.searchsorted(recall, RECALL_POINTS, side="left")
        # A recall that is never reached counts as precision 0.
        return float(np.append(best_ahead, 0.0)[reached].mean())
    return float(np.sum(np.diff(recall, prepend=0.0) * best_ahead))


def voc_ap(
    detections: Sequence[ImageDetections],
    dataset: Dataset,
    *,
    iou_threshold: float = 0.5,
    use_07_metric: bool,
) -> np.ndarray:
    """Returns the average precision of each class: [K] float64 in 0..1.

    A class without non-difficult objects has no recall. Its average precision is NaN in both forms, so that a
    mean can ignore it, as in simple-faster-rcnn-pytorch's `eval_detection_voc`. py-faster-rcnn's `voc_eval` gives
    NaN only for the area; its 11-point form gives 0, which lowers the mean. An overlap of exactly the threshold
    is no match here and in `voc_eval`, but a match in `eval_detection_voc`.

    Args:
      detections: one entry per record of `dataset`, in the same order.
      iou_threshold: a detection must overlap by strictly more than this.
      use_07_metric: 11 points (VOC 2007) or area under the curve (VOC 2010 and later).

    Raises:
      ValueError: detections that do not fit the data set, or a threshold outside (0, 1).
    """
    curves = precision_recall(detections, dataset, iou_threshold=iou_threshold)
    return average_precisions(curves, object_counts(dataset), use_07_metric=use_07_metric)


def average_precisions(
    curves: Sequence[tuple[np.ndarray, np.ndarray]], counts: np.ndarray, *, use_07_metric: bool
) -> np.ndarray:
    """Returns the average precision of each curve (recall, precision): [K] float64; NaN where `counts` [K] is 0."""
    return np.array(
        [
            average_precision(recall, precision, use_07_metric=use_07_metric) if count else np.nan
            for (recall, precision), count in zip(curves, counts, strict=True)
        ],
        np.float64,
    )


def precision_recall(
    detections: Sequence[ImageDetections], dataset: Dataset, *, iou_threshold: float = 0.5
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns K pairs (recall [M], precision [M]), one value per detection of the class in score order.

    Equal scores keep the order of the images and, within an image, the given order. Each detection is compared
    with the object of its class and image that it overlaps most, even if that object is already matched. It is a
    false positive if the overlap is not above the threshold or if an earlier detection matched the object. It is
    ignored if the object is difficult. Recall is NaN for a class without non-difficult objects.

    Raises:
      ValueError: as in `voc_ap`.
    """
    if not 0.0 < iou_threshold < 1.0:
        raise ValueError(f"iou_threshold must be in (0, 1), got {iou_threshold}")
    check_detections(detections, dataset)
    found, objects = flat_detections(detections), flat_objects(dataset)
    classes = len(dataset.class_names) + 1
    pairs = overlapping_pairs(
        found.box, found.image * classes + found.label, objects.box, objects.image * classes + objects.label
    )
    best, overlap = best_overlaps(pairs, pairs.iou, len(found.label))
    matched = np.where(overlap > iou_threshold, best, -1)
    # One more entry than objects: index -1, "no object", is not difficult.
    difficult = np.append(objects.difficult | objects.crowd, False)
    order = np.lexsort((-found.score, found.label))
    ends = np.searchsorted(found.label[order], np.arange(1, classes + 1))

    curves = []
    for label, count in enumerate(object_counts(dataset)):
        of_class = matched[order[ends[label] : ends[label + 1]]]
        earliest = np.zeros(len(of_class), bool)
        earliest[np.unique(of_class, return_index=True)[1]] = True
        true_positive = (of_class >= 0) & ~difficult[of_class] & earliest
        false_positive = ~true_positive & ~difficult[of_class]
        hits, misses = np.cumsum(true_positive), np.cumsum(false_positive)
        recall = hits / count if count else np.full(len(of_class), np.nan)
        # Hits and misses are both 0 if the first detections are on difficult objects.
        curves.append((recall, hits / np.maximum(hits + misses, 1)))
    return curves
