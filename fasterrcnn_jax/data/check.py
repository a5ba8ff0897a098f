"""Describes a data set and finds its irregularities."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.data.faults import FAULTY_IMAGE, decoded
from fasterrcnn_jax.data.overlap import Trace, identical, shifted_views, trace
from fasterrcnn_jax.data.records import Dataset, Finding, ImageRecord, box_iou, large_enough

SAME_BOX = "The same box of the same class appears twice"
NEARLY_SAME_BOX = "Boxes of the same class almost coincide (IoU above 0.8)"
TWO_CLASSES = "Boxes of two classes almost coincide (IoU above 0.9)"
TINY_BOX = "Boxes under two pixels on a side are not trained on"
SAME_PIXELS = "Images with the same pixels are in both splits"
SAME_PIXELS_WITHIN = "Images with the same pixels appear more than once in a split"
SAME_FIELD = "Shifted views of the same scene are in both splits"

# A data set of blood cells has eight known pairs of duplicate boxes; one pair has an IoU of 0.83. The limit for two
# classes is higher, because a person and the horse under it can have such an IoU.
NEARLY_OF_ONE_CLASS, NEARLY_OF_TWO = 0.8, 0.9
# For more pairs of images than this, the search for shifted views would take longer than minutes.
MOST_PAIRS = 400_000


class Checked(NamedTuple):
    """One split, read leniently and decoded."""

    dataset: Dataset  # only images that can be decoded; `findings` has the findings of all images
    traces: list[Trace]  # one per image of `dataset`


def check_split(dataset: Dataset) -> Checked:
    """Returns the split with the findings about its pixels and boxes; decodes every image."""
    records, traces, findings = [], [], list(dataset.findings)
    for record, result in decoded(dataset, lambda record, pixels: trace(pixels)):
        if isinstance(result, Trace):
            records.append(record)
            traces.append(result)
        else:
            findings.append(Finding(FAULTY_IMAGE, str(result), True))
    for record in records:
        findings += box_findings(record)
    first = {}
    for record, of_record in zip(records, traces, strict=True):
        twin = first.setdefault(of_record.digest, record)
        if twin is not record:
            findings.append(Finding(SAME_PIXELS_WITHIN, f"{record.path} and {twin.path}", False, (record, twin)))
    return Checked(dataset._replace(records=tuple(records), findings=tuple(findings)), traces)


def box_findings(record: ImageRecord) -> list[Finding]:
    """Returns the findings about the boxes of one image; overlaps with crowds are allowed."""
    findings = [
        Finding(TINY_BOX, f"{record.path}, object {k + 1}: {_words(record.boxes[k])}", False, (record,), (int(k),))
        for k in np.flatnonzero(~large_enough(record.boxes))
    ]
    for i, j, iou in coinciding(record):
        sentence = NEARLY_SAME_BOX if record.labels[i] == record.labels[j] else TWO_CLASSES
        if sentence == NEARLY_SAME_BOX and (record.boxes[i] == record.boxes[j]).all():
            sentence = SAME_BOX
        where = f"{record.path}: {_words(record.boxes[i])} and {_words(record.boxes[j])}, IoU {iou:.3f}"
        findings.append(Finding(sentence, where, False, (record,), (i, j)))
    return findings


def coinciding(record: ImageRecord) -> Iterator[tuple[int, int, float]]:
    """Yields (i, j, IoU) for each box j that almost coincides with an earlier box i that coincides with none.

    Time and memory are proportional to the number of boxes: boxes are compared only with those of about the same size
    and place, and a box that was yielded as j is not compared again.
    """
    kept = defaultdict(list)
    boxes, labels = record.boxes.tolist(), record.labels
    for j in np.flatnonzero(~record.crowd).tolist():
        x1, y1, x2, y2 = boxes[j]
        (own_x, *near_x), (own_y, *near_y) = _cells(x1, x2 - x1), _cells(y1, y2 - y1)
        near = sorted(i for cell in itertools.product(near_x, near_y) if cell in kept for i in kept[cell])
        if near:
            iou = box_iou(record.boxes[near], record.boxes[j : j + 1])[:, 0]
            limits = np.where(labels[near] == labels[j], NEARLY_OF_ONE_CLASS, NEARLY_OF_TWO)
            first = int((iou > limits).argmax())
            if iou[first] > limits[first]:
                yield near[first], j, float(iou[first])
                continue
        kept[own_x, own_y].append(j)


def _cells(low: float, side: float) -> list[tuple[int, int]]:
    """Returns the cell of a side of a box on one axis, then the cells of all sides that may almost coincide with it.

    A cell is (level, place): the side has at least 1.25^level pixels and begins at a multiple of that. Where the IoU is
    above 0.8, the sides differ by less than a factor 1.25, and their beginnings by less than a fifth of the longer one.
    """
    growth = 1.0 / NEARLY_OF_ONE_CLASS
    level = math.floor(math.log(max(side, 1e-3), growth))
    cells = [(level, math.floor(low / growth**level))]
    for near in (level - 1, level, level + 1):
        step, reach = growth**near, (1.0 - NEARLY_OF_ONE_CLASS) * growth ** (near + 2)
        cells += {(near, math.floor((low - reach) / step)), (near, math.floor((low + reach) / step))}
    return cells


def capped_recall(records: Iterable[ImageRecord], model: ModelConfig) -> list[str]:
    """Returns a sentence about images that have more objects than a detector returns boxes; [] if there are none."""
    caps = {
        "model.postprocess.max_detections": model.postprocess.max_detections,
        "model.test_proposals.post_nms_top_n": model.test_proposals.post_nms_top_n,
    }
    counts = np.array([int((~(record.crowd | record.difficult)).sum()) for record in records])
    most = counts.max(initial=0)
    over = [f"{name} = {cap}" for name, cap in caps.items() if cap < most]
    if not over:
        return []
    cap = min(caps.values())
    recall = np.minimum(counts, cap).sum() / counts.sum()
    return [
        f"{(counts > cap).sum()} of {len(counts)} images have more than {cap} objects, up to {most}, but a detector "
        f"returns no more boxes than {' and '.join(over)}; its recall is at most {recall:.3f}"
    ]


def shared_images(one: Checked, other: Checked) -> tuple[list[Finding], str]:
    """Returns findings about images that are in both splits, and a sentence about what was compared."""
    a, b = one.dataset.records, other.dataset.records
    same = identical(one.traces, other.traces)
    findings = [
        Finding(SAME_PIXELS, f"{a[p.first].path} and {b[p.second].path}", True, (a[p.first], b[p.second])) for p in same
    ]
    pairs = len(a) * len(b)
    compared = f"{one.dataset.name} and {other.dataset.name}: {pairs:,} pairs of images"
    if pairs > MOST_PAIRS:
        return findings, f"{compared}, compared only for the same pixels: too many for shifted views"
    longest = [max(record.image_hw) for record in a]
    for pair in shifted_views(one.traces, other.traces):
        if one.traces[pair.first].digest != other.traces[pair.second].digest:
            x, y = (round(shift * longest[pair.first]) for shift in pair.shift)
            where = (
                f"{a[pair.first].path} and {b[pair.second].path}: shifted by {x}, {y} pixels, "
                f"correlation {pair.correlation:.3f}"
            )
            findings.append(Finding(SAME_FIELD, where, False, (a[pair.first], b[pair.second])))
    return findings, f"{compared}, compared for the same pixels and for shifted views"


def table(dataset: Dataset) -> list[str]:
    """Returns the lines that describe a split: its images, and the boxes of each class in original image pixels."""
    records = dataset.records
    sizes = _counted(f"{record.image_hw[1]} x {record.image_hw[0]}" for record in records)
    empty = sum(not len(record.boxes) for record in records)
    per_image = [len(record.boxes) for record in records] or [0]
    lines = [
        f"images     {len(records):,}, {empty:,} without an object; "
        f"objects per image {min(per_image)} to {max(per_image)}, median {np.median(per_image):g}",
        f"sizes      {', '.join(f'{size}: {count:,}' for size, count in sizes[:5])}"
        + (f", {len(sizes) - 5} more" if len(sizes) > 5 else ""),
        f"{'class':20} {'objects':>8} {'images':>7} {'difficult':>9} {'crowds':>6} "
        f"{'side 5 %':>8} {'50 %':>6} {'95 %':>6} {'h/w 5 %':>7} {'95 %':>5}",
    ]
    labels, absent = _joined(records, "labels", np.int32), []
    flags = [_joined(records, flag, bool) for flag in ("difficult", "crowd")]
    sides = _sides(records)
    images = Counter(label for record in records for label in {*record.labels.tolist(), *["all"][: len(record.labels)]})
    # The objects of each class, found in one pass: there can be as many classes as objects.
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.searchsorted(labels[order], np.arange(2, len(dataset.class_names) + 1)))
    named = zip([*range(1, len(members) + 1), "all"], [*dataset.class_names, "all"], [*members, order], strict=True)
    for label, name, here in named:
        if not len(here):
            absent.append(name)
            continue
        counts = [int(flag[here].sum()) for flag in flags]
        row = f"{name:20} {len(here):8,} {images[label]:7,} {counts[0]:9,} {counts[1]:6,}"
        width, height = sides[here].T
        side, ratio = np.sqrt(width * height), height / width
        row += " {:8.0f} {:6.0f} {:6.0f}".format(*np.quantile(side, (0.05, 0.5, 0.95)))
        row += " {:7.2f} {:5.2f}".format(*np.quantile(ratio, (0.05, 0.95)))
        lines.append(row)
    return [*lines, f"no object  {', '.join(absent)}"] if absent else lines


def network_sizes(
    records: tuple[ImageRecord, ...], size_of: Callable[[tuple[int, int]], tuple[int, int]]
) -> Float[np.ndarray, "n 2"]:
    """Returns the (width, height) in network pixels of all boxes that are trained on.

    Args:
      size_of: function from the (height, width) of an image to the (height, width) after resizing.
    """
    found = [np.zeros((0, 2), np.float32)]
    for record in records:
        kept = large_enough(record.boxes) & ~record.crowd
        scale = np.array(size_of(record.image_hw), np.float32) / np.array(record.image_hw, np.float32)
        found.append((record.boxes[kept, 2:] - record.boxes[kept, :2]) * scale[::-1])
    return np.concatenate(found)


def _sides(records: Iterable[ImageRecord]) -> np.ndarray:
    boxes = _joined(records, "boxes", np.float32).reshape(-1, 4)
    return boxes[:, 2:] - boxes[:, :2]


def _joined(records: Iterable[ImageRecord], name: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros((0, 4) if name == "boxes" else 0, dtype), *(getattr(r, name) for r in records)])


def _counted(items: Iterable[str]) -> list[tuple[str, int]]:
    counts = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return sorted(counts.items(), key=lambda pair: -pair[1])


def _words(box: np.ndarray) -> str:
    return "[" + ", ".join(f"{side:g}" for side in box) + "]"
