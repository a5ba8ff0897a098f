"""Computes COCO's average precision with pycocotools, on a data set in memory.

Lin et al. 2014 (arXiv:1405.0312) and https://cocodataset.org/#detection-eval: AP is the mean over the
IoU thresholds 0.50, 0.55, ..., 0.95 and over 101 recall points, with at most 100 detections per image
and class. The limits between small, medium and large objects are areas of 32^2 and 96^2 square pixels.
If the COCO file gives areas, they are the areas of the outlines, as in the official numbers. If the
annotations have only boxes, the areas of the boxes are used, which are larger.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fasterrcnn_jax.data.records import Dataset, ImageDetections
from fasterrcnn_jax.evaluation.detections import check_detections


class CocoResult(NamedTuple):
    """COCO's metrics, 0..1; NaN if the data set has no object to find."""

    ap: float  # mean over IoU 0.50, 0.55, ..., 0.95
    ap50: float
    ap75: float
    ap_small: float  # area up to 32^2
    ap_medium: float
    ap_large: float  # area of 96^2 or more
    ar_100: float  # mean recall over the same thresholds, at most 100 detections per image and class
    class_ap: np.ndarray  # [K] float64
    class_ap50: np.ndarray  # [K] float64


class _DifficultEval(COCOeval):
    """A COCOeval that ignores difficult objects like crowds, but computes their overlap as for ordinary objects.

    VOC ignores every detection on a difficult object. pycocotools overwrites `ignore` of an object with its
    `iscrowd`, and an ignored object that is not a crowd matches only one detection, so the second one would be a
    false positive. Crowds match any number of detections, but their overlap is the intersection over the
    *detection's* area, so any small box inside would be ignored; only real crowds (`crowd`) use this overlap.
    """

    # Of COCOeval: the objects by image and category.
    _gts: Mapping[tuple[int, int], list[dict[str, Any]]]

    def computeIoU(self, imgId: Any, catId: Any) -> Any:
        objects = self._gts[imgId, catId]
        flags = [item["iscrowd"] for item in objects]
        for item in objects:
            item["iscrowd"] = item["crowd"]
        iou = super().computeIoU(imgId, catId)
        for item, flag in zip(objects, flags, strict=True):
            item["iscrowd"] = flag
        return iou


def coco_ap(detections: Sequence[ImageDetections], dataset: Dataset) -> CocoResult:
    """Returns the COCO metrics of `detections`; NaN if there is no object to find.

    A detection matched to a crowd is neither a true nor a false positive. COCO has no difficult objects; they
    are ignored as in VOC, so a detection matched to one is neither a true nor a false positive. Unlike in VOC, a
    detection that also overlaps an ordinary unmatched object enough is matched to that object. Equal scores keep
    the order of the images and, within an image, the given order. The output of pycocotools is dropped: the
    standard output of the process is redirected during the call.

    Args:
      detections: one entry per record of `dataset`, in the same order.

    Raises:
      ValueError: detections that do not fit the data set.
    """
    check_detections(detections, dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _DifficultEval(_ground_truth(dataset), _results(detections, dataset), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = np.where(evaluation.stats < 0, np.nan, evaluation.stats)  # -1 means undefined
    # [10 IoU thresholds, 101 recalls, K, 4 area ranges, 3 limits]: all areas, at most 100 detections.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    precision = np.where(precision < 0, np.nan, precision)
    return CocoResult(
        ap=float(stats[0]),
        ap50=float(stats[1]),
        ap75=float(stats[2]),
        ap_small=float(stats[3]),
        ap_medium=float(stats[4]),
        ap_large=float(stats[5]),
        ar_100=float(stats[8]),
        class_ap=precision.mean(axis=(0, 1)),
        class_ap50=precision[0].mean(axis=0),
    )


def _ground_truth(dataset: Dataset) -> COCO:
    """Returns the objects of `dataset` with the images numbered from 1."""
    annotations = []
    for image_id, record in enumerate(dataset.records, start=1):
        for number, (box, label) in enumerate(zip(record.boxes, record.labels, strict=True)):
            ignored = record.difficult[number] or record.crowd[number]
            flags = {"iscrowd": int(ignored), "crowd": int(record.crowd[number])}
            area = float(record.area[number])
            annotations.append(_annotation(image_id, box, int(label)) | flags | {"area": area})
    return _index(dataset, annotations)


def _results(detections: Sequence[ImageDetections], dataset: Dataset) -> COCO:
    """Returns the detections as `COCO.loadRes` would; `loadRes` itself fails on an empty list."""
    annotations = []
    for image_id, found in enumerate(detections, start=1):
        for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True):
            annotations.append(_annotation(image_id, box, int(label)) | {"iscrowd": 0, "score": float(score)})
    return _index(dataset, annotations)


def _annotation(image_id: int, box: np.ndarray, label: int) -> dict[str, Any]:
    x1, y1, x2, y2 = (float(side) for side in box)
    width, height = x2 - x1, y2 - y1
    return {
        "image_id": image_id,
        "category_id": label,
        "bbox": [x1, y1, width, height],
        "area": width * height,
    }


def _index(dataset: Dataset, annotations: list[dict[str, Any]]) -> COCO:
    """Returns a COCO object with `annotations`; pycocotools prints to standard output."""
    # Ids start at 1, because pycocotools reads a match with id 0 as no match.
    for annotation_id, annotation in enumerate(annotations, start=1):
        annotation["id"] = annotation_id
    coco = COCO()
    # Only with the fields that the metric reads.
    coco.dataset = {
        "images": [{"id": image_id} for image_id in range(1, len(dataset.records) + 1)],
        "categories": [{"id": label, "name": name} for label, name in enumerate(dataset.class_names, 1)],
        "annotations": annotations,  # pyright: ignore[reportAttributeAccessIssue]
    }
    coco.createIndex()
    return coco
