"""What every reader of labelled images returns.

Boxes are float32 xyxy in continuous pixels of the image, turned first where `upright`: a box covers
[x1, x2) x [y1, y2).
Labels are 1..K in the order of `class_names`; 0 is background and never appears here.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from fasterrcnn_jax.errors import InputError

# Below two pixels nothing can be seen, and a 0-based file's empty boxes are one pixel wide by VOC's 1-based rule.
MIN_SIDE = 2.0


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An image file that is part of a larger one; stands where its path would, and is told from others by its place."""

    place: str
    read_bytes: Callable[[], bytes] = dataclasses.field(compare=False)

    @property
    def name(self) -> str:
        return self.place.rpartition("/")[2]

    def __str__(self) -> str:
        return self.place


class ImageRecord(NamedTuple):
    """One labelled image; its pixels are decoded only when it is its turn."""

    id: str  # what result files call the image; unique in what a reader returns
    path: Path | StoredImage
    image_hw: tuple[int, int]
    boxes: np.ndarray  # [N, 4] float32
    labels: np.ndarray  # [N] int32
    difficult: np.ndarray  # [N] bool; no metric counts detections on them
    crowd: np.ndarray  # [N] bool: the box holds many objects; never trained on
    area: np.ndarray  # [N] float64: what COCO calls small and large; of the outline where one is annotated
    flipped: bool = False  # trained on as its mirror image; the fields above are of the stored one
    upright: bool = False  # read turned as EXIF says: the size and the boxes are of what viewers show


class Finding(NamedTuple):
    """One thing that is not as it should be."""

    sentence: str  # what became of things of this kind, without the full stop
    where: str  # file, field and value
    is_fault: bool  # strict reading stops at it


class ImageProposals(NamedTuple):
    """The regions that an RPN proposes in one stored image, best first."""

    boxes: np.ndarray  # [P, 4] float32
    scores: np.ndarray  # [P] float32, objectness probability


class Dataset(NamedTuple):
    """All records of one split, annotations parsed once."""

    name: str  # for messages: the folder and the split
    class_names: tuple[str, ...]
    records: tuple[ImageRecord, ...]
    notes: tuple[str, ...]  # one sentence per kind of thing that was dropped or clipped, with its count
    category_ids: tuple[int, ...]  # what COCO result files call each class
    findings: tuple[Finding, ...] = ()  # each of the things that the notes count


def box_areas(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n"]:
    """Returns float64 areas: in float32 some would cross the borders between COCO's sizes."""
    sides = boxes[:, 2:].astype(np.float64) - boxes[:, :2]
    return sides[:, 0] * sides[:, 1]


def box_iou(boxes: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Returns float64 intersection over union of every pair; 0 where both are empty.

    In float32 some pairs would cross a threshold.
    """
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    near = np.maximum(boxes[:, None, :2], others[None, :, :2])
    far = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    intersection = np.maximum(far - near, 0.0).prod(axis=-1)
    area, other_area = (np.maximum(b[:, 2:] - b[:, :2], 0.0).prod(axis=1) for b in (boxes, others))
    union = area[:, None] + other_area[None] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0.0)


def check_class_names(class_names: tuple[str, ...]) -> None:
    """Raises InputError unless there is at least one class name and none appears twice."""
    if isinstance(class_names, str) or not class_names or len(set(class_names)) != len(class_names):
        raise InputError(f"class_names must be different names, at least one, got {class_names!r}")


def large_enough(boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, "n"]:
    """Returns which boxes have `MIN_SIDE` pixels or more on both sides."""
    return (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)


class ImageDetections(NamedTuple):
    """What was found in one image, without padding."""

    boxes: np.ndarray  # [D, 4] float32
    scores: np.ndarray  # [D] float32, 0..1
    labels: np.ndarray  # [D] int32, 1..K


class Prediction(NamedTuple):
    """What was found in one image, best first."""

    boxes: Float[np.ndarray, "d 4"]  # xyxy, pixels of the image as given
    scores: Float[np.ndarray, "d"]
    labels: Int[np.ndarray, "d"]  # 1..K
    class_names: tuple[str, ...]  # of each detection
