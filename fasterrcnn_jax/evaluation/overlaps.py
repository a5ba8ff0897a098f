"""Finds the pairs of detections and objects that overlap, in all images at once, and matches them one to one.

Shapes: D detections, G objects, P pairs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_PAIRS = 2**20  # compared at a time
_NOBODY = np.iinfo(np.int64).max


class Overlaps(NamedTuple):
    """Every pair of a detection and an object of the same group that overlap, ordered by detection, then object."""

    detection: np.ndarray  # [P] int64
    object: np.ndarray  # [P] int64
    iou: np.ndarray  # [P] float64, above 0
    inside: np.ndarray  # [P] float64: the part of the detection that lies inside the object

    def where(self, chosen: np.ndarray) -> "Overlaps":
        """Returns the pairs with True in `chosen` [P]."""
        return Overlaps(*(column[chosen] for column in self))


def overlapping_pairs(
    boxes: Float[np.ndarray, "d 4"],
    groups: Int[np.ndarray, "d"],
    objects: Float[np.ndarray, "g 4"],
    object_groups: Int[np.ndarray, "g"],
) -> Overlaps:
    """Returns the overlaps of `boxes` with `objects` of the same group, for example of the same image.

    The objects are sorted by group and left side. Each box is compared only with the objects of its group whose left
    side lies near enough, so the time does not grow with the product of all boxes of an image.
    """
    boxes, objects = np.asarray(boxes, np.float64), np.asarray(objects, np.float64)
    names, group = np.unique(np.concatenate([groups, object_groups]), return_inverse=True)
    group, object_group = group[: len(groups)], group[len(groups) :]
    widest = np.zeros(len(names))
    np.maximum.at(widest, object_group, objects[:, 2] - objects[:, 0])
    order = np.lexsort((objects[:, 0], object_group))
    left = np.minimum(boxes[:, 0].min(initial=0.0), objects[:, 0].min(initial=0.0)) - 1.0
    reach = max(boxes[:, 2].max(initial=0.0), objects[:, 2].max(initial=0.0)) + widest.max(initial=0.0) + 2.0 - left
    keys = object_group[order] * reach + (objects[order, 0] - left)
    # The keys of late groups are large numbers: the margin covers their rounding.
    margin = 1e-12 * reach * (len(names) + 1)
    nearest = np.maximum(boxes[:, 0] - left - widest[group], 0.0)
    first = np.searchsorted(keys, group * reach + nearest - margin, side="left")
    last = np.searchsorted(keys, group * reach + (boxes[:, 2] - left) + margin, side="right")
    found = []
    for rows, positions in _ranges(first, np.maximum(last, first)):
        others = order[positions]
        same = group[rows] == object_group[others]
        found.append(_compared(boxes, objects, rows[same], others[same]))
    return Overlaps(*(np.concatenate(column) for column in zip(_none(), *found, strict=True)))


def _none() -> Overlaps:
    empty = np.zeros(0, np.int64)
    return Overlaps(empty, empty, np.zeros(0), np.zeros(0))


def _ranges(
    first: Int[np.ndarray, "d"], last: Int[np.ndarray, "d"]
) -> Iterator[tuple[Int[np.ndarray, "p"], Int[np.ndarray, "p"]]]:
    """Yields (row, position) for every position of first[row] to last[row], some rows at a time."""
    ends = np.cumsum(last - first)
    start = 0
    while start < len(first):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS, side="right")))
        counts = (last - first)[start:stop]
        rows = np.repeat(np.arange(start, stop), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        yield rows, first[rows] + within
        start = stop


def _compared(
    boxes: Float[np.ndarray, "d 4"],
    objects: Float[np.ndarray, "g 4"],
    rows: Int[np.ndarray, "p"],
    others: Int[np.ndarray, "p"],
) -> Overlaps:
    """Returns those of the pairs (rows, others) that overlap."""
    sides = np.minimum(boxes[rows, 2:], objects[others, 2:]) - np.maximum(boxes[rows, :2], objects[others, :2])
    overlapping = np.flatnonzero((sides > 0.0).all(axis=1))
    rows, others, shared = rows[overlapping], others[overlapping], sides[overlapping].prod(axis=1)
    in_order = np.lexsort((others, rows))
    rows, others, shared = rows[in_order], others[in_order], shared[in_order]
    area, object_area = ((of[:, 2:] - of[:, :2]).prod(axis=1) for of in (boxes[rows], objects[others]))
    return Overlaps(rows, others, shared / (area + object_area - shared), shared / area)


def best_overlaps(
    pairs: Overlaps, overlap: Float[np.ndarray, "p"], count: int
) -> tuple[Int[np.ndarray, "{count}"], Float[np.ndarray, "{count}"]]:
    """Returns, for each of `count` detections, the object with the largest `overlap` and this overlap; -1 and 0: none.

    Equal overlaps: the first object.
    """
    objects, best = np.full(count, -1, np.int64), np.zeros(count)
    order = np.lexsort((-overlap, pairs.detection))  # stable: the first object of equal ones comes first
    rows, first = np.unique(pairs.detection[order], return_index=True)
    objects[rows], best[rows] = pairs.object[order][first], overlap[order][first]
    return objects, best


def matched_in_order(pairs: Overlaps, count: int, object_count: int) -> Int[np.ndarray, "{count}"]:
    """Returns the object of each of `count` detections if they choose one after the other; -1: none.

    Each detection takes the free object with the largest IoU, of equal ones the last, as pycocotools does. This is
    done in rounds: all detections ask for their best object, each object keeps the earliest of them, and the others
    ask for their next one. Because all objects prefer earlier detections, the result is the one of the loop.

    Args:
      pairs: those with an IoU high enough for a match.
    """
    order = np.lexsort((-pairs.object, -pairs.iou, pairs.detection))
    detection, wanted = pairs.detection[order], pairs.object[order]
    end = np.searchsorted(detection, detection, side="right")  # of the pairs of the same detection
    asking = np.flatnonzero(np.diff(detection, prepend=-1))
    keeps, kept_pair = np.full(object_count, _NOBODY), np.full(object_count, -1, np.int64)
    while len(asking):
        np.minimum.at(keeps, wanted[asking], detection[asking])
        wins = keeps[wanted[asking]] == detection[asking]
        winners = asking[wins]
        displaced = kept_pair[wanted[winners]]
        kept_pair[wanted[winners]] = winners
        asking = np.concatenate([asking[~wins], displaced[displaced >= 0]]) + 1
        # A detection whose last pair is refused stays without an object.
        asking = asking[asking < end[asking - 1]]
    matched = np.full(count, -1, np.int64)
    taken = np.flatnonzero(kept_pair >= 0)
    matched[detection[kept_pair[taken]]] = taken
    return matched


def matched_by_iou(pairs: Overlaps) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "m"]]:
    """Returns the detections and objects of a matching one to one that takes the pairs by descending IoU."""
    order = np.argsort(-pairs.iou, kind="stable")
    detections, objects = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    while len(order):
        detection, wanted = pairs.detection[order], pairs.object[order]
        # A pair that is the first of both its detection and its object is taken.
        first = np.zeros((2, len(order)), bool)
        for row, column in enumerate((detection, wanted)):
            first[row, np.unique(column, return_index=True)[1]] = True
        taken = first.all(axis=0)
        detections.append(detection[taken])
        objects.append(wanted[taken])
        order = order[~(np.isin(detection, detections[-1]) | np.isin(wanted, objects[-1]))]
    return np.concatenate(detections), np.concatenate(objects)
