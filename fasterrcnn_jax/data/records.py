"""Defines the records that every data set reader returns.

Boxes are float32 xyxy in continuous pixels of the stored image, or of the upright image if `upright` is set. A box
covers [x1, x2) x [y1, y2). Labels are 1..K in the order of `class_names`; 0 is background and never appears here.
"""

import dataclasses
import html
import itertools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from fasterrcnn_jax.data.layouts import composed
from fasterrcnn_jax.errors import InputError, quoted

# Smaller objects are not visible. Also, an empty box in a 0-based file is one pixel wide by VOC's 1-based rule.
MIN_SIDE = 2.0
# A prediction prints its best detections.
PRINTED = 10


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An image inside a larger file, used like the path of an image file; two are equal if their places are equal."""

    place: str
    read_bytes: Callable[[], bytes] = dataclasses.field(compare=False)

    @property
    def name(self) -> str:
        return self.place.rpartition("/")[2]

    @property
    def file(self) -> Path:
        """The larger file; a place is FILE[POSITION]."""
        return Path(self.place.rpartition("[")[0])

    def __str__(self) -> str:
        return self.place


class ImageRecord(NamedTuple):
    """One labelled image; its pixels are decoded only when they are needed."""

    id: str  # the image's name in result files; unique in the data set
    path: Path | StoredImage
    image_hw: tuple[int, int]
    boxes: np.ndarray  # [N, 4] float32
    labels: np.ndarray  # [N] int32
    difficult: np.ndarray  # [N] bool; metrics ignore detections on difficult objects
    crowd: np.ndarray  # [N] bool: the box covers many objects; never trained on
    area: np.ndarray  # [N] float64: area for COCO's size ranges; of the outline if one is annotated
    flipped: bool = False  # trained on as its mirror image; the fields above describe the original image
    upright: bool = False  # read turned as EXIF says; `image_hw` and the boxes refer to the turned image


class Finding(NamedTuple):
    """One irregularity of a data set."""

    sentence: str  # how irregularities of this kind are handled, without the full stop
    where: str  # file, field and value
    is_fault: bool  # strict reading stops here
    records: tuple[ImageRecord, ...] = ()  # the images to look at, where they could be read
    objects: tuple[int, ...] = ()  # positions of the boxes that it is about, in the first of them


class ImageProposals(NamedTuple):
    """The proposals of an RPN for one original image, best first."""

    boxes: np.ndarray  # [P, 4] float32
    scores: np.ndarray  # [P] float32, objectness probability


class Dataset(NamedTuple):
    """All records of one split."""

    name: str  # for messages: the folder and the split
    class_names: tuple[str, ...]
    records: tuple[ImageRecord, ...]
    notes: tuple[str, ...]  # one sentence per kind of finding, with the count
    category_ids: tuple[int, ...]  # id of each class in COCO result files
    findings: tuple[Finding, ...] = ()  # every finding that the notes count


def box_areas(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n"]:
    """Returns float64 areas; float32 rounding would move some areas across the limits of COCO's size ranges."""
    sides = boxes[:, 2:].astype(np.float64) - boxes[:, :2]
    return sides[:, 0] * sides[:, 1]


def box_iou(boxes: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Returns the float64 intersection over union of every pair; 0 if both boxes are empty.

    With float32 rounding some pairs would cross a threshold.
    """
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    near = np.maximum(boxes[:, None, :2], others[None, :, :2])
    far = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    intersection = np.maximum(far - near, 0.0).prod(axis=-1)
    area, other_area = (np.maximum(b[:, 2:] - b[:, :2], 0.0).prod(axis=1) for b in (boxes, others))
    union = area[:, None] + other_area[None] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0.0)


def box_iou_in_parts(
    boxes: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"]
) -> Iterator[tuple[int, Float[np.ndarray, "_ m"]]]:
    """Yields the first row and the IoUs of some rows of `box_iou` at a time: thousands of boxes take little memory."""
    rows = max(1, _PAIRS // max(1, len(others)))
    for first in range(0, len(boxes), rows):
        yield first, box_iou(boxes[first : first + rows], others)


_PAIRS = 2**18


def joined_names(names: Collection[str], most: int = 20) -> str:
    """Returns the first names for a message, joined, and the number of the others."""
    others = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(itertools.islice(names, most)) + others


def check_class_names(class_names: tuple[str, ...]) -> None:
    """Raises InputError unless there is at least one class name and none appears twice."""
    if isinstance(class_names, str) or not class_names or len(set(class_names)) != len(class_names):
        raise InputError(f"class_names must contain at least one name and no name twice, got {quoted(class_names)}")


def labels_of(class_names: tuple[str, ...]) -> dict[str, int]:
    """Returns the label of each class by its name, in which `composed` wrote the accents."""
    return {composed(name): label for label, name in enumerate(class_names, start=1)}


def large_enough(boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, "n"]:
    """Returns a mask of the boxes with both sides of at least `MIN_SIDE` pixels."""
    return np.all(boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE, axis=1)


class ImageDetections(NamedTuple):
    """The detections of one image, without padding."""

    boxes: np.ndarray  # [D, 4] float32
    scores: np.ndarray  # [D] float32, 0..1
    labels: np.ndarray  # [D] int32, 1..K


class Prediction(NamedTuple):
    """The detections of one image, best first, with their class names."""

    boxes: Float[np.ndarray, "d 4"]  # xyxy in pixels of the given image
    scores: Float[np.ndarray, "d"]
    labels: Int[np.ndarray, "d"]  # 1..K
    class_names: tuple[str, ...]  # one per detection

    def to_dict(self) -> dict[str, list]:
        """Returns {"boxes": [[x1, y1, x2, y2], ...], "scores", "labels", "class_names"}, all lists for `json.dumps`.

        Each list has one entry per detection, best first. Boxes are in pixels of the given image; labels count from 1.
        """
        return {name: np.asarray(values).tolist() for name, values in self._asdict().items()}

    def __repr__(self) -> str:
        """Returns one line per detection: class name, score, and box; only the best ones if there are many."""
        shown = self._shown()
        name_width, box_width = (max((len(row[column]) for row in shown), default=0) for column in (0, 2))
        lines = [f"  {name:{name_width}}  {score}  [{box:>{box_width}}]" for name, score, box in shown]
        more = len(self.scores) - len(shown)
        return "\n".join([self._title(), *lines, *([f"  and {more} more"] if more else [])])

    def _repr_html_(self) -> str:
        """Returns the same lines as a table, which notebooks show. It holds no image; `draw` draws the boxes."""
        heads = "".join(f"<th>{name}</th>" for name in ("class name", "score", "x1, y1, x2, y2"))
        rows = ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in self._shown()]
        more = len(self.scores) - len(rows)
        last = [f'<td colspan="3">and {more} more</td>'] if more else []
        body = "".join(f"<tr>{row}</tr>" for row in (heads, *rows, *last))
        return f"<table><caption>{self._title()}</caption>{body}</table>"

    def _title(self) -> str:
        count = len(self.scores)
        return f"Prediction: {count} detection{'' if count == 1 else 's'}"

    def _shown(self) -> list[tuple[str, str, str]]:
        """Returns (class name, score, box) of the best detections as text."""
        rows = zip(self.class_names[:PRINTED], self.scores, self.boxes, strict=False)
        return [
            # The repr of a name without its quotes: a line break in it must not break the line.
            (repr(name)[1:-1], f"{score:.2f}", ", ".join(f"{side:.1f}" for side in box))
            for name, score, box in rows
        ]
