"""Compares the detections of two models on the same images: differences of the average precision, with intervals.

The intervals come from the bootstrap over images (Efron 1979): as many images as there are are drawn with replacement,
many times, the same ones for both models, and the average precision of both is computed on each draw.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from fasterrcnn_jax.data.records import Dataset, ImageDetections
from fasterrcnn_jax.evaluation.analysis import CORRECT, IGNORED, RECALLS, Analysis, analyse, ranked_detections
from fasterrcnn_jax.evaluation.detections import object_counts
from fasterrcnn_jax.evaluation.overlaps import best_overlaps, matched_in_order, overlapping_pairs
from fasterrcnn_jax.evaluation.tables import flat_objects
from fasterrcnn_jax.printing import printable

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's
RESAMPLES = 1000
CONFIDENCE = 0.95
_DRAWN = 100  # resamples at a time


class Interval(NamedTuple):
    """The second model's value minus the first one's, and where the difference lies with 95 % confidence."""

    first: float  # 0..1; NaN without objects
    second: float
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Returns gain or loss if the interval lies on one side of 0, otherwise unclear."""
        return "gain" if self.low > 0.0 else "loss" if self.high < 0.0 else "unclear"


class Comparison(NamedTuple):
    """Two models on the same N images."""

    ap: Interval  # COCO's, the mean over IoU 0.50 to 0.95 and the classes with objects
    ap50: Interval
    class_ap: tuple[Interval, ...]  # K
    class_ap50: tuple[Interval, ...]
    # F1 of each image at IoU 0.5, with the best threshold of each class for each model; 1 where nothing is to be found
    # and nothing is detected.
    first_f1: np.ndarray  # [N] float64
    second_f1: np.ndarray  # [N] float64
    won: np.ndarray  # positions of images where the second model has the better F1, the largest difference first
    lost: np.ndarray  # and where it has the worse one


def compare(first: Sequence[ImageDetections], second: Sequence[ImageDetections], dataset: Dataset) -> Comparison:
    """Returns the differences of two models' detections, each with one entry per record of `dataset` in its order.

    The draws are the same at each call. The interval holds the middle 95 % of the differences (percentile method).

    Raises:
      ValueError: detections that do not fit the data set.
    """
    analyses = [analyse(detections, dataset) for detections in (first, second)]
    rankings = [_Ranking.of(detections, dataset) for detections in (first, second)]
    images, classes = len(dataset.records), len(dataset.class_names)
    objects = flat_objects(dataset)
    regular = ~(objects.difficult | objects.crowd)
    per_image = np.zeros((images, classes), np.int64)
    np.add.at(per_image, (objects.image[regular], objects.label[regular] - 1), 1)
    whole = [ranking.average_precisions(np.ones((1, images), np.int64), per_image)[0] for ranking in rankings]
    generator = np.random.default_rng(0)
    drawn = [np.zeros((0, classes, len(IOU_THRESHOLDS)))], [np.zeros((0, classes, len(IOU_THRESHOLDS)))]
    for _ in range(0, RESAMPLES if images else 0, _DRAWN):
        weights = _drawn(generator, images)
        for kept, ranking in zip(drawn, rankings, strict=True):
            kept.append(ranking.average_precisions(weights, per_image))
    resampled = [np.concatenate(kept) for kept in drawn]
    f1 = [_image_f1(analysis, images) for analysis in analyses]
    change = f1[1] - f1[0]
    order = np.argsort(-change, kind="stable")

    def interval(chosen: slice | int, label: int | slice) -> Interval:
        """Returns the interval of the mean over the IoU thresholds `chosen` and the classes `label`."""
        values = [_means(of[None, label, chosen])[0] for of in whole]
        before, after = (_means(of[:, label, chosen]) for of in resampled)
        differences = (after - before)[~np.isnan(after - before)]
        edges = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
        low, high = np.quantile(differences, edges) if len(differences) else (np.nan, np.nan)
        return Interval(float(values[0]), float(values[1]), float(values[1] - values[0]), float(low), float(high))

    everything = slice(None)
    return Comparison(
        ap=interval(everything, everything),
        ap50=interval(slice(1), everything),
        class_ap=tuple(interval(everything, label) for label in range(classes)),
        class_ap50=tuple(interval(slice(1), label) for label in range(classes)),
        first_f1=f1[0],
        second_f1=f1[1],
        won=order[change[order] > 0],
        lost=order[::-1][change[order[::-1]] < 0],
    )


def _means(values: np.ndarray) -> Float[np.ndarray, "b"]:
    """Returns the mean of the values of each draw that are defined; NaN if there is none."""
    values = values.reshape(len(values), math.prod(values.shape[1:]))
    defined = ~np.isnan(values)
    count = defined.sum(axis=1)
    total = np.where(defined, values, 0.0).sum(axis=1)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _drawn(generator: np.random.Generator, images: int) -> Int[np.ndarray, "b n"]:
    """Returns how often each image is drawn in each of `_DRAWN` draws of as many images as there are."""
    chosen = generator.integers(0, images, (_DRAWN, images)) + np.arange(_DRAWN)[:, None] * images
    return np.bincount(chosen.ravel(), minlength=_DRAWN * images).reshape(_DRAWN, images)


class _Ranking(NamedTuple):
    """What became of each detection at each IoU threshold, by class and descending score."""

    image: tuple[np.ndarray, ...]  # K arrays [M]
    correct: tuple[np.ndarray, ...]  # K arrays [10, M] bool
    ignored: tuple[np.ndarray, ...]  # K arrays [10, M] bool

    @classmethod
    def of(cls, detections: Sequence[ImageDetections], dataset: Dataset) -> "_Ranking":
        classes = len(dataset.class_names)
        found, objects = ranked_detections(detections, classes), flat_objects(dataset)
        count = len(found.label)
        groups = (of.image * (classes + 1) + of.label for of in (found, objects))
        pairs = overlapping_pairs(found.box, next(groups), objects.box, next(groups))
        regular = ~(objects.difficult | objects.crowd)[pairs.object]
        overlap = np.where(objects.crowd[pairs.object], pairs.inside, pairs.iou)
        _, ignored_overlap = best_overlaps(pairs.where(~regular), overlap[~regular], count)
        correct, ignored = (np.zeros((len(IOU_THRESHOLDS), count), bool) for _ in range(2))
        for row, threshold in enumerate(IOU_THRESHOLDS):
            able = pairs.where(regular & (pairs.iou >= threshold))
            correct[row] = matched_in_order(able, count, len(objects.label)) >= 0
            ignored[row] = ~correct[row] & (ignored_overlap >= threshold)
        order = np.lexsort((-found.score, found.label))
        rows = np.split(order, np.searchsorted(found.label[order], np.arange(1, classes + 1)))[1:]
        return cls(*(tuple(values[..., of_class] for of_class in rows) for values in (found.image, correct, ignored)))

    def average_precisions(
        self, weights: Int[np.ndarray, "b n"], per_image: Int[np.ndarray, "n k"]
    ) -> Float[np.ndarray, "b k t"]:
        """Returns COCO's average precision by class and IoU threshold, if image i counts `weights[:, i]` times.

        Args:
          per_image: number of objects of each class in each image.
        """
        totals = weights @ per_image
        result = np.full((len(weights), per_image.shape[1], len(IOU_THRESHOLDS)), np.nan)
        for label, (image, correct, ignored) in enumerate(zip(*self, strict=True)):
            if not totals[:, label].any():
                continue
            counted = weights[:, image]
            seen = np.cumsum(counted, axis=1)
            for row in range(len(IOU_THRESHOLDS)):
                hits_at = np.flatnonzero(correct[row])
                hits = np.cumsum(counted[:, hits_at], axis=1)
                ranks = seen[:, hits_at]
                left_out = np.flatnonzero(ignored[row])
                if len(left_out):
                    before = np.cumsum(counted[:, left_out], axis=1)
                    positions = np.searchsorted(left_out, hits_at)
                    ranks = ranks - np.pad(before, ((0, 0), (1, 0)))[:, positions]
                result[:, label, row] = _averages(hits, ranks, totals[:, label])
        return result


def _averages(
    hits: Int[np.ndarray, "b h"], ranks: Int[np.ndarray, "b h"], totals: Int[np.ndarray, "b"]
) -> Float[np.ndarray, "b"]:
    """Returns the average precision over 101 recall points of each draw; NaN where there is no object.

    Args:
      hits: objects found up to each correct detection.
      ranks: detections up to it that are not ignored.
      totals: number of objects.
    """
    draws, count = hits.shape
    if not count:
        return np.where(totals > 0, 0.0, np.nan)
    precision = hits / np.maximum(ranks, 1)
    ahead = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    # The recall reaches each point with so many hits, compared with the rounding of hits / totals as in COCO.
    needed = np.floor(RECALLS * totals[:, None]).astype(np.int64) - 1
    for _ in range(3):
        needed += needed / np.maximum(totals, 1)[:, None] < RECALLS
    step = int(max(hits.max(), needed.max())) + 1
    starts = np.arange(draws)[:, None] * step
    reached = np.searchsorted((hits + starts).ravel(), (needed + starts).ravel(), side="left").reshape(draws, -1)
    reached -= np.arange(draws)[:, None] * count
    padded = np.pad(ahead, ((0, 0), (0, 1)))
    mean = np.take_along_axis(padded, np.minimum(reached, count), axis=1).sum(axis=1) / len(RECALLS)
    return np.where(totals > 0, mean, np.nan)


def _image_f1(analysis: Analysis, images: int) -> Float[np.ndarray, "{images}"]:
    rows, objects = analysis.detections, analysis.objects
    kept = (rows.score >= analysis.confusion_thresholds[rows.label - 1]) & (rows.kind != IGNORED)
    hits = np.bincount(rows.image[kept & (rows.kind == CORRECT)], minlength=images)
    total = np.bincount(rows.image[kept], minlength=images)
    total += np.bincount(objects.image[~objects.ignored], minlength=images)
    return np.divide(2.0 * hits, total, out=np.ones(images), where=total > 0)


def format_comparison(comparison: Comparison, dataset: Dataset, first: str, second: str) -> str:
    """Returns the table that evaluate.py prints.

    Args:
      first: name of the first model, second: name of the second one; printable.
    """
    counts = object_counts(dataset)
    rows = [
        (name, int(count), ap, ap50)
        for name, count, ap, ap50 in zip(
            dataset.class_names, counts, comparison.class_ap, comparison.class_ap50, strict=True
        )
    ]
    rows.append(("mAP", int(counts.sum()), comparison.ap, comparison.ap50))
    width = max(len("class"), *(len(printable(row[0])) for row in rows))
    lines = [
        f"compare    {second} (second) minus {first} (first) on {len(dataset.records)} images; each interval holds "
        f"95 % of {RESAMPLES} draws of the images",
        f"{'class':<{width}}  {'boxes':>7}  {'first':>6}  {'second':>6}  {'AP: difference [interval]':<33}  "
        "AP50: difference [interval]",
    ]
    for name, count, ap, ap50 in rows:
        start = f"{printable(name):<{width}}  {count:>7}  {ap.first:>6.3f}  {ap.second:>6.3f}"
        lines.append(f"{start}  {_interval(ap):<33}  {_interval(ap50)}")
    images = len(comparison.first_f1)
    won, lost = len(comparison.won), len(comparison.lost)
    lines.append(f"images     {won} won, {lost} lost, {images - won - lost} equal, by the F1 at the best thresholds")
    change = comparison.second_f1 - comparison.first_f1
    for what, positions in (("won", comparison.won), ("lost", comparison.lost)):
        shown = [f"{printable(dataset.records[at].id)} ({change[at]:+.2f})" for at in positions[:5]]
        if shown:
            lines.append(f"           most {what}: {', '.join(shown)}")
    return "\n".join(lines)


def _interval(of: Interval) -> str:
    return f"{of.difference:+.3f} [{of.low:+.3f}, {of.high:+.3f}] {of.verdict}"


def comparison_dict(comparison: Comparison, dataset: Dataset) -> dict:
    """Returns the comparison for a JSON file; None for what is undefined."""
    change = comparison.second_f1 - comparison.first_f1

    def images(positions: np.ndarray) -> list[dict]:
        return [{"image": dataset.records[at].id, "F1_difference": float(change[at])} for at in positions]

    def values(of: Interval) -> dict:
        numbers = {name: None if np.isnan(value) else value for name, value in of._asdict().items()}
        return numbers | {"verdict": of.verdict}

    return {
        "AP": values(comparison.ap),
        "AP50": values(comparison.ap50),
        "classes": {
            name: {"AP": values(ap), "AP50": values(ap50)}
            for name, ap, ap50 in zip(dataset.class_names, comparison.class_ap, comparison.class_ap50, strict=True)
        },
        "won": images(comparison.won),
        "lost": images(comparison.lost),
    }
