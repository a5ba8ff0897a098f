"""Computes COCO's average precision with pycocotools or faster-coco-eval, on a data set in memory.

Lin et al. 2014 (arXiv:1405.0312) and https://cocodataset.org/#detection-eval: AP is the mean over the
IoU thresholds 0.50, 0.55, ..., 0.95 and over 101 recall points, with at most 100 detections per image
and class. The limits between small, medium and large objects are areas of 32^2 and 96^2 square pixels.
If the COCO file gives areas, they are the areas of the outlines, as in the official numbers. If the
annotations have only boxes, the areas of the boxes are used, which are larger.
"""

import contextlib
import functools
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fasterrcnn_jax.config.train import CocoBackend
from fasterrcnn_jax.data.records import Dataset, ImageDetections
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.detections import check_detections
from fasterrcnn_jax.evaluation.tables import flat_detections, flat_objects

if TYPE_CHECKING:
    import pycocotools.coco

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
SIZES = ("small", "medium", "large")


class CocoResult(NamedTuple):
    """COCO's metrics, 0..1; NaN if the data set has no object to find."""

    ap: float  # mean over IoU 0.50, 0.55, ..., 0.95
    ap50: float
    ap75: float
    ap_small: float  # area up to 32^2
    ap_medium: float
    ap_large: float  # area of 96^2 or more
    ar_1: float  # mean recall over the same thresholds, at most 1 detection per image and class
    ar_10: float  # at most 10
    ar_100: float  # at most 100, like the average precision and the recall by size
    ar_small: float
    ar_medium: float
    ar_large: float
    class_ap: np.ndarray  # [K] float64
    class_ap50: np.ndarray  # [K] float64
    class_iou_ap: np.ndarray  # [K, 10] float64, by `IOU_THRESHOLDS`
    class_size_ap: np.ndarray  # [K, 3] float64, by `SIZES`
    class_ar_100: np.ndarray  # [K] float64


class _DifficultIou:
    """Computes the overlap with difficult objects as with ordinary ones, while COCO ignores them like crowds.

    VOC ignores every detection on a difficult object. pycocotools overwrites `ignore` of an object with its
    `iscrowd`, and an ignored object that is not a crowd matches only one detection, so the second one would be a
    false positive. Crowds match any number of detections, but their overlap is the intersection over the
    *detection's* area, so any small box inside would be ignored; only real crowds (`crowd`) use this overlap.
    """

    cocoGt: "pycocotools.coco.COCO"

    def computeIoU(self, imgId: Any, catId: Any) -> Any:
        objects: list[dict[str, Any]] = list(self.cocoGt.imgToAnns[imgId])  # pyright: ignore - with "crowd"; one class
        flags = [item["iscrowd"] for item in objects]
        for item in objects:
            item["iscrowd"] = item["crowd"]
        iou = super().computeIoU(imgId, catId)  # pyright: ignore[reportAttributeAccessIssue] - of the evaluation class
        for item, flag in zip(objects, flags, strict=True):
            item["iscrowd"] = flag
        return iou


def coco_ap(
    detections: Sequence[ImageDetections], dataset: Dataset, *, backend: CocoBackend = "pycocotools"
) -> CocoResult:
    """Returns the COCO metrics of `detections`; NaN if there is no object to find.

    A detection matched to a crowd is neither a true nor a false positive. COCO has no difficult objects; they
    are ignored as in VOC, so a detection matched to one is neither a true nor a false positive. Unlike in VOC, a
    detection that also overlaps an ordinary unmatched object enough is matched to that object. Equal scores keep
    the order of the images and, within an image, the given order. The output of the package is dropped: the
    standard output of the process is redirected during the call. The classes are evaluated one after the other,
    which gives the same numbers as all at once and takes much less memory.

    Args:
      detections: one entry per record of `dataset`, in the same order.
      backend: the package that computes the numbers; both give the same.

    Raises:
      InputError: the package of `backend` is not installed.
      ValueError: detections that do not fit the data set.
    """
    from pycocotools.cocoeval import COCOeval

    check_detections(detections, dataset)
    make = _evaluation_class(backend)
    count = len(dataset.class_names)
    whole = COCOeval(iouType="bbox")
    thresholds, recalls, areas, limits = (
        len(getattr(whole.params, name)) for name in ("iouThrs", "recThrs", "areaRng", "maxDets")
    )
    # -1 means undefined. [10 IoU thresholds, 101 recalls, K, 4 area ranges, 3 limits].
    precision = -np.ones((thresholds, recalls, count, areas, limits))
    recall = -np.ones((thresholds, count, areas, limits))
    with contextlib.redirect_stdout(io.StringIO()):
        for label, objects, results in _by_class(detections, dataset):
            evaluation = make(objects, results)
            evaluation.evaluate()
            evaluation.accumulate()
            precision[:, :, label - 1] = evaluation.eval["precision"][:, :, 0]
            recall[:, label - 1] = evaluation.eval["recall"][:, 0]
        whole.eval = {"precision": precision, "recall": recall}  # pyright: ignore - only what the summary reads
        whole.summarize()
    stats = np.where(whole.stats < 0, np.nan, whole.stats)
    precision, recall = (np.where(values < 0, np.nan, values) for values in (precision, recall))
    # At most 100 detections: [K, 10 IoU thresholds, 4 area ranges].
    by_iou = precision[..., -1].mean(axis=1).transpose(1, 0, 2)
    return CocoResult(
        *(float(value) for value in stats),
        class_ap=by_iou[:, :, 0].mean(axis=1),
        class_ap50=by_iou[:, 0, 0],
        class_iou_ap=by_iou[:, :, 0],
        class_size_ap=by_iou[:, :, 1:].mean(axis=1),
        class_ar_100=recall[:, :, 0, -1].mean(axis=0),
    )


def _evaluation_class(backend: CocoBackend) -> Any:
    """Returns a function of (objects, results) that returns an evaluation with the interface of `COCOeval`."""
    if backend == "pycocotools":
        from pycocotools.cocoeval import COCOeval

        base, options = COCOeval, {}
    else:
        try:
            from faster_coco_eval import COCOeval_faster  # pyright: ignore[reportMissingImports] - of an extra
        except ImportError as error:
            raise InputError(
                f"coco_backend = {backend}: {error}; install it with: pip install 'fasterrcnn_jax[faster-coco-eval]'"
            ) from error
        base, options = COCOeval_faster, {"print_function": lambda *_: None, "separate_eval": True}
    with_difficult: Any = type("DifficultEval", (_DifficultIou, base), {})
    return functools.partial(with_difficult, iouType="bbox", **options)


def _by_class(
    detections: Sequence[ImageDetections], dataset: Dataset
) -> Iterator[tuple[int, "pycocotools.coco.COCO", "pycocotools.coco.COCO"]]:
    """Yields, for each class with objects, its label, its objects, and its detections as `COCO.loadRes` would.

    `loadRes` itself fails on an empty list. The images are numbered from 1; images without anything of the class are
    left out, which changes nothing.
    """
    found, objects = flat_detections(detections), flat_objects(dataset)
    rows_found, rows_objects = (_rows_by_label(of.label, len(dataset.class_names)) for of in (found, objects))
    ignored = objects.difficult | objects.crowd
    for label, name in enumerate(dataset.class_names, start=1):
        rows = rows_objects[label - 1]
        columns = (values[rows].tolist() for values in (ignored, objects.crowd, objects.area))
        annotations = [
            annotation | {"iscrowd": int(is_ignored), "crowd": int(is_crowd), "area": area}
            for annotation, is_ignored, is_crowd, area in zip(
                _annotations(objects.image[rows], objects.box[rows], label), *columns, strict=True
            )
        ]
        if not annotations:
            continue
        rows = rows_found[label - 1]
        results = [
            annotation | {"iscrowd": 0, "score": score}
            for annotation, score in zip(
                _annotations(found.image[rows], found.box[rows], label), found.score[rows].tolist(), strict=True
            )
        ]
        images = sorted({item["image_id"] for item in annotations + results})
        yield label, _index(images, label, name, annotations), _index(images, label, name, results)


def _rows_by_label(labels: np.ndarray, count: int) -> list[np.ndarray]:
    """Returns the rows of each of `count` classes, in order."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, count + 1)))[1:]


def _annotations(images: np.ndarray, boxes: np.ndarray, label: int) -> Iterator[dict[str, Any]]:
    for image, (x1, y1, x2, y2) in zip(images.tolist(), boxes.tolist(), strict=True):
        width, height = x2 - x1, y2 - y1
        box = [x1, y1, width, height]
        yield {"image_id": image + 1, "category_id": label, "bbox": box, "area": width * height}


def _index(images: Sequence[int], label: int, name: str, annotations: list[dict[str, Any]]) -> "pycocotools.coco.COCO":
    """Returns a COCO object with `annotations`; pycocotools prints to standard output."""
    from pycocotools.coco import COCO

    # Ids start at 1, because pycocotools reads a match with id 0 as no match.
    for annotation_id, annotation in enumerate(annotations, start=1):
        annotation["id"] = annotation_id
    coco = COCO()
    # Only with the fields that the metric reads.
    coco.dataset = {
        "images": [{"id": image_id} for image_id in images],
        "categories": [{"id": label, "name": name}],
        "annotations": annotations,  # pyright: ignore[reportAttributeAccessIssue]
    }
    coco.createIndex()
    return coco
