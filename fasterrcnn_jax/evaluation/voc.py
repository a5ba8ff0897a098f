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

from fasterrcnn_jax.data.records import Dataset, ImageDetections, ImageRecord, box_iou_in_parts
from fasterrcnn_jax.evaluation.detections import check_detections, object_counts

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
    counts = object_counts(dataset)
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
    matched, first_object = [np.zeros(0, np.int64)], 0
    for found, record in zip(detections, dataset.records, strict=True):
        matched.append(_matched_object(found, record, iou_threshold, first_object))
        first_object += len(record.boxes)
    matched = np.concatenate(matched)
    scores = np.concatenate([np.zeros(0), *(found.scores for found in detections)])
    labels = np.concatenate([np.zeros(0, np.int64), *(found.labels for found in detections)])
    # One more entry than objects: index -1, "no object", is not difficult.
    ignored = (record.difficult | record.crowd for record in dataset.records)
    difficult = np.concatenate([*ignored, [False]]).astype(bool)

    curves = []
    for label, count in enumerate(object_counts(dataset), start=1):
        of_class = np.flatnonzero(labels == label)
        objects = matched[of_class[np.argsort(-scores[of_class], kind="stable")]]
        earliest = np.zeros(len(objects), bool)
        earliest[np.unique(objects, return_index=True)[1]] = True
        true_positive = (objects >= 0) & ~difficult[objects] & earliest
        false_positive = ~true_positive & ~difficult[objects]
        hits, misses = np.cumsum(true_positive), np.cumsum(false_positive)
        recall = hits / count if count else np.full(len(objects), np.nan)
        # Hits and misses are both 0 if the first detections are on difficult objects.
        curves.append((recall, hits / np.maximum(hits + misses, 1)))
    return curves


def _matched_object(found: ImageDetections, record: ImageRecord, iou_threshold: float, first_object: int) -> np.ndarray:
    """Returns [D] int64: the index of each detection's object among all objects; -1: no object."""
    objects, labels = np.full(len(found.boxes), -1, np.int64), np.asarray(found.labels)
    if not len(record.boxes):
        return objects
    for first, iou in box_iou_in_parts(found.boxes, record.boxes):
        part = slice(first, first + len(iou))
        iou[labels[part, None] != record.labels[None, :]] = -1.0
        best = np.argmax(iou, axis=1)
        overlap = np.take_along_axis(iou, best[:, None], axis=1)[:, 0]
        objects[part] = np.where(overlap > iou_threshold, best + first_object, -1)
    return objects
