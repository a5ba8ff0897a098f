"""Writes report.html: what a model finds on a data set, and what it gets wrong."""

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import fasterrcnn_jax
from fasterrcnn_jax.config import Config
from fasterrcnn_jax.config.rules import flat_fields
from fasterrcnn_jax.data.fingerprint import short_digest
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.evaluation.analysis import (
    BACKGROUND,
    CORRECT,
    ERRORS,
    IGNORED,
    KINDS,
    Analysis,
    ClassCurve,
)
from fasterrcnn_jax.evaluation.comparison import Comparison
from fasterrcnn_jax.evaluation.report import Metrics
from fasterrcnn_jax.printing import printable
from fasterrcnn_jax.report import pages
from fasterrcnn_jax.report.binning import ASPECTS, SIDES, bin_names, bin_of
from fasterrcnn_jax.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Series,
    axis,
    bar_chart,
    line_chart,
    unit_axis,
)
from fasterrcnn_jax.report.file_names import distinct_names
from fasterrcnn_jax.report.history import History, curves
from fasterrcnn_jax.report.pictures import (
    Outline,
    Picture,
    Wanted,
    cost,
    long_texts,
    make_pictures,
    ranked_by_group,
)
from fasterrcnn_jax.report.tables import packed

FILE = "report.html"
TEMPLATE = "evaluation.html"
# Limits of a page. The last ones of them fall where the page would exceed `pages.MOST_BYTES`.
MOST_PICTURES = 50  # of each kind and class
CANDIDATES = 900  # pictures that are made before the budget of bytes decides
CLASS_LINES = 5  # up to so many classes, every one has its line in a chart
CONFUSED = 100  # classes in the confusion matrix
NEIGHBOURS = 10  # other labels drawn on a picture
PICTURE_BYTES = 2_900_000
MOST_ROWS = 60_000  # of each table behind the lists

# A detection on no object that is at least this sure, and above the threshold of its class, may be right.
SURE = 0.5
LABEL_ERROR, MISSED = len(KINDS), len(KINDS) + 1
PICTURED = {
    LABEL_ERROR: "probable label error",
    KINDS.index("class"): "wrong class",
    KINDS.index("localisation"): "wrong place",
    KINDS.index("both"): "wrong class and place",
    KINDS.index("duplicate"): "duplicate",
    BACKGROUND: "on background",
    MISSED: "missed",
}
MEANINGS = {
    "class": "covers an object of another class well",
    "localisation": "covers an object of its class badly, with an IoU of 0.1 to 0.5",
    "both": "covers an object of another class badly",
    "duplicate": "its object was found before, with a higher score",
    "background": "covers no object, with an IoU of at most 0.1",
    "missed": "no detection found the object, and no other error explains it",
}


class Compared(NamedTuple):
    """Another run beside this one."""

    name: str
    result: Comparison
    settings: tuple[tuple[str, object, object], ...]  # (field, value here, value there) of the fields that differ
    uses: str = ""  # what the other run used the images for before, as `Evaluation.also`


class Evaluation(NamedTuple):
    """All that the page shows."""

    name: str  # of the run or the weights file
    split: str
    also: str  # what the images were used for before, for the end of a sentence
    dataset: Dataset
    analysis: Analysis
    metrics: Metrics
    config: Config | None = None
    step: int | None = None  # of the checkpoint
    history: History | None = None  # of the training
    compared: tuple[Compared, ...] = ()


def write_report(path: Path, shown: Evaluation) -> str:
    """Writes the page, whole or not at all; returns a sentence about it.

    Raises:
      InputError: the file cannot be written, or an image cannot be decoded.
    """
    values = page_values(shown)
    size = pages.write_page(path, TEMPLATE, **values)
    return f"{path}: {size / 1e6:.1f} MB, {len(values['pictures'])} pictures"


def page_values(shown: Evaluation) -> dict[str, Any]:
    """Returns the values of the template `evaluation.html`.

    The pictures get the bytes that the rest of the page leaves. Where it leaves none, the lists get shorter.
    """
    analysis, dataset = shown.analysis, shown.dataset
    names = [printable(name) for name in dataset.class_names]
    detections, objects = detection_columns(analysis), object_columns(analysis)
    candidates, groups = _candidates(analysis, dataset)
    kept = {
        "images": image_columns(dataset, analysis),
        "curves": curve_columns(analysis) if len(names) > CLASS_LINES else {"label": np.zeros(0)},
    }
    lists = {
        "detections": ["file", "label", "score", "box", "kind", "truth", "iou"],
        "objects": ["file", "label", "box", "side", "aspect"],
        "images": ["file", "width", "height", "objects", "detected"],
    }
    meta: dict[str, Any] = {}
    sections = [("summary", "Summary")]
    if shown.compared:
        kept["compared"], lists["compared"] = compared_columns(shown.compared), ["file", "first", "second"]
        meta |= {"first": "F1 here", "second": "F1 there"}
        sections.append(("comparison", "Comparison"))
    learning = [] if shown.history is None else curves(shown.history)
    sections += [("learning", "Learning")] * bool(learning)
    sections += [("classes", "Classes"), ("curves", "Curves"), ("confusion", "Confusion"), ("errors", "Errors")]
    sections += [("missed", "Missed"), ("pictures", "Pictures")]
    meta |= {
        "kinds": list(KINDS),
        "lists": lists,
        "groups": groups,
        "most": MOST_PICTURES,
        "plot": [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
    }
    files = distinct_names([record.path for record in dataset.records])
    texts = {"classes": ["", *names], "images": list(map(printable, files))}
    total = sum(group[2][0] for group in groups)
    fields = {} if shown.config is None else flat_fields(shown.config)
    confusion, confused, confusion_words = confusion_rows(analysis, names)
    values = {
        "title": f"{shown.name} on {shown.split}",
        "subtitle": f"Detections on {shown.split} of {dataset.name}{shown.also}",
        "sections": sections,
        "headline": headline(shown),
        "tiles": tiles(shown),
        "totals": [
            ("images", len(files), "images", []),
            ("objects", int((~analysis.objects.ignored).sum()), "objects", [["ignored", 0, 0]]),
            ("detections", len(analysis.detections.score), "detections", []),
        ],
        "notes": [],
        "threshold_words": _threshold_words(analysis),
        "origin": origin(shown),
        "config": [(name, _value(value)) for name, value in fields.items()],
        "comparisons": [comparison_values(one, names, number) for number, one in enumerate(shown.compared)],
        "learning": learning,
        "classes": class_rows(shown, names),
        "iou_names": iou_names(),
        "iou_rows": iou_rows(shown.metrics, names),
        "choose_class": len(names) > CLASS_LINES,
        "class_options": list(enumerate(names, start=1)),
        "curve_charts": curve_charts(analysis, names),
        "expected_error": analysis.calibration.expected_error,
        "calibration": calibration_rows(analysis),
        "confusion": confusion,
        "confusion_names": confused,
        "confusion_words": confusion_words,
        **error_values(analysis, names),
        **missed_values(objects),
        "kind_options": list(PICTURED.items()),
        "pictures": [],
        "shown_words": "",
        "meta": meta,
    }
    importance, room = _importance(analysis), 0
    for divisor in pages.SHORTENED:
        rows = MOST_ROWS // divisor
        kept["detections"] = _kept(detections, importance, rows)
        kept["objects"] = _kept(objects, objects["found"], rows)
        values["packed"] = packed(kept, texts)
        room = pages.room(TEMPLATE, **values)
        if room >= 0:
            break
    entries = _pictured(candidates, analysis, dataset, files, budget=min(PICTURE_BYTES, max(0, room)))
    words = f"{len(entries):,} of {total:,} errors are shown as pictures, {total - len(entries):,} are not."
    return values | {"pictures": entries, "shown_words": words}


def headline(shown: Evaluation) -> list[tuple[str, float]]:
    """Returns (name, value) of the main numbers."""
    coco = shown.metrics.coco
    return [("AP", coco.ap), ("AP50", coco.ap50), ("AP75", coco.ap75), ("VOC07 mAP", _mean(shown.metrics.voc07))]


def tiles(shown: Evaluation) -> list[tuple[str, float]]:
    """Returns (name, value) of the other numbers."""
    coco = shown.metrics.coco
    return [
        ("AP small", coco.ap_small),
        ("AP medium", coco.ap_medium),
        ("AP large", coco.ap_large),
        ("AR@1", coco.ar_1),
        ("AR@10", coco.ar_10),
        ("AR@100", coco.ar_100),
        ("AR small", coco.ar_small),
        ("AR medium", coco.ar_medium),
        ("AR large", coco.ar_large),
        ("VOC area mAP", _mean(shown.metrics.voc_area)),
    ]


def origin(shown: Evaluation) -> list[tuple[str, str]]:
    """Returns (name, value) of what the numbers depend on."""
    versions = {"fasterrcnn_jax": fasterrcnn_jax.__version__, "Python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "pycocotools")}
    now = datetime.datetime.now().astimezone()
    rows = [("run", shown.name)]
    if shown.step is not None:
        rows.append(("checkpoint", f"step {shown.step:,}"))
    return [
        *rows,
        ("data", f"{shown.split} of {shown.dataset.name}"),
        ("fingerprint of the data", f"{short_digest(shown.dataset)}, of the labels and the image files"),
        ("device", f"{jax.device_count()} x {jax.devices()[0].device_kind}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("written", now.strftime("%Y-%m-%d %H:%M:%S %z")),
    ]


def detection_columns(analysis: Analysis) -> dict[str, np.ndarray]:
    """Returns the columns [D] of the detections, as the lists of the page read them."""
    table, objects = analysis.detections, analysis.objects
    truth = np.where(table.object >= 0, np.append(objects.label, 0)[table.object], 0)
    edges = analysis.calibration.edges
    return {
        "image": table.image,
        "label": table.label,
        "score": table.score,
        "kind": table.kind,
        "truth": truth,
        "iou": table.iou,
        "true": table.true_label,
        "wrong": (table.true_label >= 0) & (table.true_label != table.label),
        "bin": np.clip(np.searchsorted(edges, table.score, side="right") - 1, 0, len(edges) - 2),
        **_sides(table.box),
    }


def object_columns(analysis: Analysis) -> dict[str, np.ndarray]:
    """Returns the columns [G] of the objects, as the lists of the page read them."""
    objects = analysis.objects
    side = np.sqrt(objects.area)
    return {
        "image": objects.image,
        "label": objects.label,
        "ignored": objects.ignored,
        "unexplained": objects.missed,
        "predicted": objects.predicted_label,
        "found": objects.predicted_label > 0,
        "side": side,
        "aspect": objects.aspect,
        "side_bin": bin_of(side, SIDES),
        "aspect_bin": bin_of(objects.aspect, ASPECTS),
        **_sides(objects.box),
    }


def image_columns(dataset: Dataset, analysis: Analysis) -> dict[str, np.ndarray]:
    """Returns the columns [N] of the images."""
    sizes = np.array([record.image_hw for record in dataset.records], np.int64).reshape(-1, 2)
    count = len(dataset.records)
    return {
        "image": np.arange(count),
        "width": sizes[:, 1],
        "height": sizes[:, 0],
        "objects": np.bincount(analysis.objects.image, minlength=count),
        "detected": np.bincount(analysis.detections.image, minlength=count),
    }


def curve_columns(analysis: Analysis) -> dict[str, np.ndarray]:
    """Returns the curves of the classes with objects at 101 steps, for the line of a chosen class."""
    labels = np.flatnonzero(_object_counts(analysis)) + 1
    curves_of = [analysis.curves[label - 1] for label in labels]
    nothing = np.zeros(0)
    return {
        "label": np.repeat(labels, 101),
        "step": np.tile(np.arange(101), len(labels)),
        "precision": np.concatenate([nothing, *map(interpolated_precision, curves_of)]) * 1000,
        "f1": np.concatenate([nothing, *map(f1_at_thresholds, curves_of)]) * 1000,
    }


def interpolated_precision(curve: ClassCurve) -> np.ndarray:
    """Returns the highest precision at each recall of 0, 0.01, ..., 1 or more, as COCO and VOC interpolate it.

    It is 0 where the recall is not reached. The class must have objects; without any, recall is undefined.
    """
    recalls = np.linspace(0.0, 1.0, 101)
    envelope = np.maximum.accumulate(curve.precision[::-1])[::-1]
    return np.append(envelope, 0.0)[np.searchsorted(curve.recall, recalls)]


def f1_at_thresholds(curve: ClassCurve) -> np.ndarray:
    """Returns the F1 at each threshold of 0, 0.01, ..., 1; 0 where no detection is left.

    The class must have objects; without any, F1 is undefined.
    """
    kept = np.searchsorted(-curve.score, -np.linspace(0.0, 1.0, 101), side="right") - 1
    return np.append(curve.f1, 0.0)[kept]


def class_rows(shown: Evaluation, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the rows of the table per class."""
    analysis, metrics, coco = shown.analysis, shown.metrics, shown.metrics.coco
    confusion = analysis.confusion
    objects = _object_counts(analysis)
    rows = []
    for label, name in enumerate(names, start=1):
        curve = analysis.curves[label - 1]
        best = curve.best
        at = [float("nan")] * 4
        if best >= 0:
            at = [float(curve.f1[best]), curve.best_threshold, float(curve.precision[best]), float(curve.recall[best])]
        columns = (coco.class_ap, coco.class_ap50, coco.class_iou_ap[:, 5], metrics.voc07, metrics.voc_area)
        rows.append(
            {
                "label": label,
                "name": name,
                "objects": int(objects[label - 1]),
                "ap": [float(column[label - 1]) for column in (*columns, coco.class_ar_100)],
                "at": at,
                "found": int(confusion[label, label]),
                "missed": int(confusion[label, 0]),
                "wrong": int(confusion[:, label].sum() - confusion[label, label]),
                "calibration": float(analysis.calibration.class_expected_error[label - 1]),
            }
        )
    return rows


def iou_names() -> list[str]:
    return [*(f"{0.5 + 0.05 * step:.2f}" for step in range(10)), "small", "medium", "large"]


def iou_rows(metrics: Metrics, names: Sequence[str]) -> list[tuple[str, list[float]]]:
    """Returns (class, AP at each IoU and of each size)."""
    both = np.concatenate([metrics.coco.class_iou_ap, metrics.coco.class_size_ap], axis=1)
    return [(name, row.tolist()) for name, row in zip(names, both, strict=True)]


def curve_charts(analysis: Analysis, names: Sequence[str]) -> list[Chart]:
    """Returns the charts of precision over recall, F1 over the threshold, and calibration."""
    steps = np.linspace(0.0, 1.0, 101)
    has_objects = _object_counts(analysis) > 0
    precision, f1 = np.full((2, len(names), 101), np.nan)
    for row in np.flatnonzero(has_objects):
        precision[row] = interpolated_precision(analysis.curves[row])
        f1[row] = f1_at_thresholds(analysis.curves[row])
    mean = precision[has_objects].mean(axis=0) if has_objects.any() else np.full(101, np.nan)
    recall_lines = [Series("all classes", steps, mean)]
    f1_lines = [Series("all classes", analysis.thresholds, analysis.mean_f1)]
    if len(names) <= CLASS_LINES:
        recall_lines += [Series(name, steps, row) for name, row in zip(names, precision, strict=True)]
        f1_lines += [Series(name, steps, row) for name, row in zip(names, f1, strict=True)]
    else:
        nothing = np.zeros(0)
        recall_lines.append(Series("chosen class", nothing, nothing, "precision"))
        f1_lines.append(Series("chosen class", nothing, nothing, "f1"))
    calibration = analysis.calibration
    bins = [f"{edge:.1f}" for edge in calibration.edges[:-1]]
    groups = [("mean score", calibration.score), ("fraction correct", calibration.precision)]
    return [
        line_chart("Precision and recall at IoU 0.5", recall_lines, unit_axis("recall"), unit_axis("precision")),
        line_chart("F1 by threshold", f1_lines, unit_axis("score threshold"), unit_axis("F1")),
        bar_chart("Calibration", bins, groups, "score, from", unit_axis("fraction")),
    ]


def calibration_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """Returns the rows of the table of the calibration."""
    found = analysis.calibration
    return [
        {
            "name": f"{found.edges[number]:.1f} to {found.edges[number + 1]:.1f}",
            "count": int(found.count[number]),
            "where": [["bin", number, number], ["kind", 0, IGNORED - 1]],
            "score": float(found.score[number]),
            "precision": float(found.precision[number]),
        }
        for number in range(len(found.count))
    ]


def confusion_rows(analysis: Analysis, names: Sequence[str]) -> tuple[list[dict[str, Any]], list[str], str]:
    """Returns the rows of the confusion matrix, the names of its columns, and a sentence about classes left out."""
    matrix = analysis.confusion
    labels, words = np.arange(1, len(names) + 1), ""
    if len(labels) > CONFUSED:
        wrong = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * np.diag(matrix)
        labels = np.sort(labels[np.argsort(-wrong[1:], kind="stable")[:CONFUSED]])
        words = f"It shows the {CONFUSED} classes with the most mistakes; {len(names) - CONFUSED} others are left out."
    rows = []
    for true in (*labels.tolist(), 0):
        total = max(1, int(matrix[true].sum()))
        of = names[true - 1] if true else "no object"
        cells = []
        for found in (*labels.tolist(), 0):
            number = int(matrix[true, found])
            if found:
                table, where = "detections", [["label", found, found], ["true", true, true]]
            else:
                table, where = "objects", [["label", true, true], ["predicted", 0, 0]]
            shade = 0 if not number else 1 + min(4, int(5 * number / total)) if true else 1
            right = " right" if true and true == found else ""
            to = names[found - 1] if found else "not found"
            cells.append(
                {"count": number, "table": table, "where": where, "title": f"{of}, detected as {to}"}
                | {"css": f"{f'h{shade}' if shade else ''}{right}".strip()}
            )
        rows.append({"name": of, "cells": cells})
    return rows, [names[label - 1] for label in labels.tolist()], words


def error_values(analysis: Analysis, names: Sequence[str]) -> dict[str, Any]:
    """Returns the values of the section about the kinds of errors."""
    errors = analysis.errors

    def cell(row: int, label: int | None, number: int) -> dict[str, Any]:
        of = [] if label is None else [["label", label, label]]
        if ERRORS[row] == "missed":
            table, where = "objects", [["unexplained", 1, 1], *of]
        else:
            kind = KINDS.index(ERRORS[row])
            table, where = "detections", [["kind", kind, kind], *of]
        title = f"{ERRORS[row]}{'' if label is None else f', {names[label - 1]}'}"
        return {"count": number, "table": table, "where": where, "title": title}

    rows = [
        cell(row, None, int(errors.count[row].sum()))
        | {"name": name, "meaning": MEANINGS[name], "delta": float(errors.delta[row])}
        for row, name in enumerate(ERRORS)
    ]
    by_class = [
        {
            "name": name,
            "cells": [cell(row, label, int(errors.count[row, label - 1])) for row in range(len(ERRORS))],
        }
        for label, name in enumerate(names, start=1)
    ]
    most = float(np.nanmax([*errors.delta, 0.0]))
    # Short names, which fit below the bars of a phone.
    short = {"localisation": "place", "background": "backgr.", "duplicate": "double"}
    bars = [short.get(name, name) for name in ERRORS]
    lost = [("AP50 lost", errors.delta)]
    chart = bar_chart("AP50 lost by kind of error", bars, lost, "kind", axis("AP50 lost", 0.0, max(most, 0.01)))
    return {
        "errors": rows,
        "errors_by_class": by_class,
        "error_chart": chart,
        "false_positive_delta": errors.false_positive_delta,
        "false_negative_delta": errors.false_negative_delta,
    }


def missed_values(objects: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the values of the section about missed objects."""
    counted = objects["ignored"] == 0
    charts, tables = [], []
    for column, limits, words, x_name in (
        ("side_bin", SIDES, "Size", "square root of the area, pixels"),
        ("aspect_bin", ASPECTS, "Shape", "height / width"),
    ):
        bins = bin_names(limits)
        everything = np.bincount(objects[column][counted], minlength=len(bins))
        missed = np.bincount(objects[column][counted & (objects["predicted"] == 0)], minlength=len(bins))
        groups = [("objects", everything), ("missed", missed)]
        y = axis("objects", 0.0, float(max(1, everything.max(initial=0))))
        charts.append(bar_chart(f"{words} of the objects", bins, groups, x_name, y))
        rows = [
            {
                "name": name,
                "objects": int(everything[number]),
                "missed": int(missed[number]),
                "share": missed[number] / everything[number] if everything[number] else float("nan"),
                "where": [[column, number, number]],
            }
            for number, name in enumerate(bins)
        ]
        tables.append({"name": words, "rows": rows})
    return {"missed_charts": charts, "missed_tables": tables}


class _Candidate(NamedTuple):
    kind: int  # of PICTURED
    label: int
    score: float
    row: int  # in the table of detections, or of objects for MISSED
    rank: int  # within its kind and class


def _candidates(analysis: Analysis, dataset: Dataset) -> tuple[list[_Candidate], list[list[Any]]]:
    """Returns the worst errors and, for each kind and class, the number of errors by score.

    At most `MOST_PICTURES` of each kind and class are candidates, those with the highest scores, or the lowest for
    missed objects.

    Returns:
      candidates: the worst ones of every kind and class first.
      groups: [kind, label, counts]; counts[n] is the number of errors with a score of at least n / 20.
    """
    table, objects = analysis.detections, analysis.objects
    kind = table.kind.astype(np.int64)
    sure = (kind == BACKGROUND) & (table.true_label == 0) & (table.score >= SURE)
    kind[sure] = LABEL_ERROR
    rows = np.flatnonzero((kind != CORRECT) & (kind != IGNORED))
    missed = np.flatnonzero(objects.predicted_label == 0)
    # An object may have been found with a score below the threshold of its class.
    below = np.where(objects.detection >= 0, np.append(table.score, 0.0)[objects.detection], 0.0)[missed]
    kinds = np.concatenate([kind[rows], np.full(len(missed), MISSED)])
    labels = np.concatenate([table.label[rows], objects.label[missed]])
    scores = np.concatenate([table.score[rows].astype(np.float64), below])
    # Of the missed objects, the largest ones first where several have no detection at all.
    order = np.concatenate([-table.score[rows].astype(np.float64), below - 1e-12 * objects.area[missed]])
    groups = kinds * (len(dataset.class_names) + 1) + labels
    ranks = ranked_by_group(groups, order)
    _, first, number = np.unique(groups, return_index=True, return_inverse=True)
    steps = np.floor(scores * 20 + 1e-9).astype(np.int64).clip(0, 20)
    in_step = np.bincount(number * 21 + steps, minlength=21 * len(first)).reshape(-1, 21)
    at_least = np.cumsum(in_step[:, ::-1], axis=1)[:, ::-1]
    counts = [
        [int(kinds[n]), int(labels[n]), np.trim_zeros(row, "b").tolist()]
        for n, row in zip(first, at_least, strict=True)
    ]
    chosen = np.flatnonzero(ranks < MOST_PICTURES)
    chosen = chosen[np.lexsort((kinds[chosen], ranks[chosen]))][:CANDIDATES]
    sources = np.concatenate([rows, missed])
    candidates = [
        _Candidate(int(kinds[n]), int(labels[n]), float(scores[n]), int(sources[n]), int(ranks[n])) for n in chosen
    ]
    return candidates, counts


def _pictured(
    candidates: Sequence[_Candidate], analysis: Analysis, dataset: Dataset, files: Sequence[str], *, budget: int
) -> list[dict[str, Any]]:
    """Returns the pictures of the first candidates, as many as the budget of bytes allows, by kind and score."""
    wanted = [_wanted(candidate, analysis, dataset) for candidate in candidates]
    pictures = make_pictures(wanted, dataset.records, budget=budget, title="pictures of the report")
    entries = []
    for candidate, picture in zip(candidates, pictures, strict=True):
        if picture is None:
            break
        entry = _entry(candidate, picture, analysis, dataset, files)
        budget -= cost(picture) + long_texts(entry["title"], entry["described"], entry["file"])
        if budget < 0:
            break
        entries.append(entry)
    place = {kind: number for number, kind in enumerate(PICTURED)}
    entries.sort(
        key=lambda entry: (place[entry["kind"]], -entry["score"] if entry["kind"] != MISSED else entry["score"])
    )
    return entries


def _wanted(candidate: _Candidate, analysis: Analysis, dataset: Dataset) -> Wanted:
    table, objects = analysis.detections, analysis.objects
    outlines = []
    if candidate.kind == MISSED:
        image, truth = int(objects.image[candidate.row]), candidate.row
    else:
        image, truth = int(table.image[candidate.row]), int(table.object[candidate.row])
        outlines.append(Outline(table.box[candidate.row], "found"))
    record = dataset.records[image]
    own = -1
    if truth >= 0:
        own = int(objects.index[truth])
        outlines.insert(0, Outline(objects.box[truth], "truth"))
    # The nearest ones: a crowd would hide the object.
    centre = (outlines[-1].box[:2] + outlines[-1].box[2:]) / 2
    others = np.array([number for number in range(len(record.boxes)) if number != own], np.int64)
    distance = np.abs((record.boxes[others, :2] + record.boxes[others, 2:]) / 2 - centre).max(axis=1, initial=0.0)
    near = others[np.argsort(distance, kind="stable")[:NEIGHBOURS]]
    return Wanted(image, (*(Outline(record.boxes[number], "other") for number in near), *outlines))


def _entry(
    candidate: _Candidate, picture: Picture, analysis: Analysis, dataset: Dataset, files: Sequence[str]
) -> dict[str, Any]:
    table, objects = analysis.detections, analysis.objects
    names, row = dataset.class_names, candidate.row
    if candidate.kind == MISSED:
        x1, y1, x2, y2 = objects.box[row].tolist()
        title, image = names[candidate.label - 1], int(objects.image[row])
        found = int(objects.detection[row])
        why = "no detection" if found < 0 else f"found with {table.score[found]:.2f}, below the threshold"
        detail = f"{PICTURED[MISSED]}: {x2 - x1:.0f} x {y2 - y1:.0f} pixels, {why}"
    else:
        title, image = f"{names[candidate.label - 1]} {candidate.score:.2f}", int(table.image[row])
        truth, iou = int(table.object[row]), float(table.iou[row])
        of = "no label here" if truth < 0 else f"labelled {names[int(objects.label[truth]) - 1]}"
        detail = f"{PICTURED[candidate.kind]}: {of}, IoU {iou:.2f}"
    return {
        "kind": candidate.kind,
        "label": candidate.label,
        "score": candidate.score,
        "title": title,
        "detail": detail,
        "described": f"{title}, {detail}",
        "file": files[image],
        "picture": picture,
    }


def comparison_values(compared: Compared, names: Sequence[str], number: int) -> dict[str, Any]:
    """Returns the values of the section that compares this run with another one."""
    result = compared.result
    pairs = [(result.ap, result.ap50), *zip(result.class_ap, result.class_ap50, strict=True)]
    rows = []
    for name, both in zip(["all classes", *names], pairs, strict=True):
        values = [value for one in both for value in (one.first, one.second, one.difference, one.low, one.high)]
        rows.append({"name": name, "values": values, "verdict": both[0].verdict})
    return {
        "name": compared.name,
        "uses": compared.uses.removeprefix(",").strip(),
        "number": number,
        "rows": rows,
        "won": len(result.won),
        "lost": len(result.lost),
        "settings": [(name, _value(here), _value(there)) for name, here, there in compared.settings],
    }


def compared_columns(compared: Sequence[Compared]) -> dict[str, np.ndarray]:
    """Returns the columns of the images that the other runs win or lose; `other` is the number of the run."""
    image = [np.concatenate([one.result.won, one.result.lost]).astype(np.int64) for one in compared]
    won = [np.repeat([1, -1], [len(one.result.won), len(one.result.lost)]) for one in compared]
    first = [one.result.first_f1[rows] for one, rows in zip(compared, image, strict=True)]
    second = [one.result.second_f1[rows] for one, rows in zip(compared, image, strict=True)]
    return {
        "image": np.concatenate(image),
        "other": np.repeat(np.arange(len(compared)), [len(rows) for rows in image]),
        "won": np.concatenate(won),
        "first": np.concatenate(first),
        "second": np.concatenate(second),
    }


def _importance(analysis: Analysis) -> np.ndarray:
    """Returns the order of the detections in a list that has no room for all: those above the thresholds first."""
    table = analysis.detections
    groups = table.kind.astype(np.int64) * (int(table.label.max(initial=0)) + 1) + table.label
    ranks = ranked_by_group(groups, -table.score.astype(np.float64))
    return np.where(table.true_label >= 0, -1, ranks)


def _kept(columns: Mapping[str, np.ndarray], order: np.ndarray, most: int) -> dict[str, np.ndarray]:
    """Returns at most `most` rows, the first by `order`, in the order of the images."""
    if len(order) <= most:
        return dict(columns)
    rows = np.sort(np.argsort(order, kind="stable")[:most])
    return {name: values[rows] for name, values in columns.items()}


def _object_counts(analysis: Analysis) -> np.ndarray:
    """Returns the number of objects to find per class: [K]."""
    objects = analysis.objects
    return np.bincount(objects.label[~objects.ignored], minlength=len(analysis.curves) + 1)[1:]


def _sides(boxes: np.ndarray) -> dict[str, np.ndarray]:
    return {name: boxes[:, number] for number, name in enumerate(("x1", "y1", "x2", "y2"))}


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _threshold_words(analysis: Analysis) -> str:
    if np.isnan(analysis.best_threshold):
        return ""
    best = float(np.nanmax(analysis.mean_f1))
    return f"The best single threshold for all classes is {analysis.best_threshold:.2f}, with a mean F1 of {best:.3f}."


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
