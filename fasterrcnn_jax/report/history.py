"""Keeps the numbers of a training, and gives them as results.csv and as learning curves."""

import csv
import io
import json
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from fasterrcnn_jax.inference.drawing import side_by_side
from fasterrcnn_jax.regular_files import check_regular
from fasterrcnn_jax.report.charts import Chart, Series, axis, line_chart, pixels, unit_axis
from fasterrcnn_jax.structures import LossTerms

# A line of a chart has at most so many points; each is the mean over equally many steps.
POINTS = 200
LOSSES = LossTerms._fields
# Of a step, and of an evaluation; ours are fewer. A stranger's file could have a new name in every line.
MOST_NAMES = 100
LINES = 6  # in one chart
OMITTED = ("compilations", "compilation_seconds")  # a mean of them says nothing
SHOWN = ("AP", "AP50", "AR_300")  # metrics of the evaluations that the curves show


class History:
    """The numbers of every step and of every evaluation of one training."""

    def __init__(self):
        self.steps = array("q")
        self.values: dict[str, array] = {}  # by name, one per step; NaN where a step lacks it
        self.evaluations: dict[int, dict[str, float]] = {}  # by step, then by SPLIT/METRIC; NaN: undefined
        self.metrics: dict[str, None] = {}  # names of the metrics, in the order of their appearance

    def add(self, step: int, values: Mapping[str, object]) -> None:
        """Adds one line of metrics.jsonl. Metrics of single classes are left out, and names after `MOST_NAMES`."""
        # The numbers of an evaluation have names such as test/AP50; those of one class test/AP50/CLASS.
        evaluated = {name: value for name, value in values.items() if "/" in name}
        if evaluated:
            kept = {name: _number(value) for name, value in evaluated.items() if name.count("/") == 1}
            for name in kept:
                if len(self.metrics) < MOST_NAMES:
                    self.metrics.setdefault(name)
            kept = {name: value for name, value in kept.items() if name in self.metrics}
            self.evaluations.setdefault(step, {}).update(kept)
            return
        for name in dict.fromkeys([*self.values, *values]):
            if name not in self.values:
                if len(self.values) == MOST_NAMES:
                    continue
                self.values[name] = array("d", [float("nan")] * len(self.steps))
            self.values[name].append(_number(values.get(name)))
        self.steps.append(step)

    def of_steps(self, name: str) -> np.ndarray:
        """Returns one number of every step, float64."""
        return np.array(self.values[name], np.float64) if name in self.values else np.full(len(self.steps), np.nan)


def read_history(path: Path) -> History:
    """Returns the history in a file metrics.jsonl; empty if there is none. Damaged lines are left out.

    Raises:
      InputError: the path is a pipe or a device.
    """
    history = History()
    if path.exists():
        check_regular(path)
        for line in path.read_bytes().splitlines():
            try:
                told = json.loads(line.decode())
                step = told.pop("step")
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue
            if type(step) is int and 0 <= step < 2**62:
                told.pop("time", None)
                history.add(step, {name: value for name, value in told.items() if _is_number(value)})
    return history


def results_csv(history: History, *, every: int, batch_size: int, images: int) -> str:
    """Returns results.csv: one line per `every` steps and per evaluation.

    The columns are the step, the epoch, the mean of each number of the steps since the line before, and the metrics of
    an evaluation after that step. The metrics of single classes are in metrics.jsonl.

    Args:
      batch_size: images per step.
      images: number of training images.
    """
    steps = np.array(history.steps, np.int64)
    last = steps[-1:].tolist()
    ends = sorted({*steps[steps % max(1, every) == 0].tolist(), *history.evaluations, *last})
    means = {name: history.of_steps(name) for name in history.values if name not in OMITTED}
    metrics = list(history.metrics)
    written = io.StringIO()
    lines = csv.writer(written, lineterminator="\n")
    lines.writerow(["step", "epoch", *means, *metrics])
    before = 0
    for end in ends:
        first, after = np.searchsorted(steps, [before, end], side="right")
        numbers = [_mean(values[first:after]) for values in means.values()]
        of_step = history.evaluations.get(end, {})
        row = [end, f"{end * batch_size / max(1, images):.6g}", *map(_cell, numbers)]
        lines.writerow([*row, *(_cell(of_step.get(name, float("nan"))) for name in metrics)])
        before = end
    return written.getvalue()


def curves(history: History) -> list[Chart]:
    """Returns the charts of a training: losses, metrics of its evaluations, learning rate, images per second."""
    steps = np.array(history.steps, np.float64)
    charts = []
    if len(steps):
        each = -(-len(steps) // POINTS)
        x = axis("step" if each == 1 else f"step (means of {each} steps)", 0.0, float(steps[-1]))
        at = _means(steps, each)
        terms = {name: _means(history.of_steps(name), each) for name in LOSSES if name in history.values}
        terms = {name: values for name, values in terms.items() if np.nansum(values)}
        if terms:
            total = np.sum(list(terms.values()), axis=0)
            lines = [Series("total", at, total), *(Series(name, at, values) for name, values in terms.items())]
            # The first steps may be far above everything after them.
            top = max(float(np.nanquantile(total, 0.98)), 1e-9) * 1.1
            lines = [line._replace(y=np.minimum(line.y, top)) for line in lines]
            charts.append(line_chart("Training losses", lines, x, axis("loss", 0.0, top)))
        for name, title in (("learning_rate", "Learning rate"), ("images_per_second", "Images per second")):
            values = _means(history.of_steps(name), each)
            if np.isfinite(values).any():
                y = axis(title.lower(), 0.0, float(np.nanmax(values)))
                charts.append(line_chart(title, [Series(title.lower(), at, values)], x, y))
    evaluated = sorted(history.evaluations)
    lines = []
    for name in [name for name in history.metrics if _is_shown(name)][:LINES]:
        found = [(step, history.evaluations[step][name]) for step in evaluated if name in history.evaluations[step]]
        if len(found) > 1:
            lines.append(Series(name, *np.array(found, np.float64).T))
    if lines:
        x = axis("step", 0.0, float(max(evaluated[-1], steps[-1] if len(steps) else 0)))
        charts.insert(1, line_chart("Evaluations", lines, x, unit_axis("metric")))
    return charts


def curves_image(history: History) -> UInt8[np.ndarray, "h w 3"] | None:
    """Returns the charts of a training as one image, two in a row; None if there is nothing to show."""
    shown = [pixels(chart) for chart in curves(history)]
    if not shown:
        return None
    if len(shown) % 2:
        shown.append(np.full((1, 1, 3), 255, np.uint8))
    return side_by_side([(shown[i], shown[i + 1]) for i in range(0, len(shown), 2)])


def _is_shown(name: str) -> bool:
    return name.rpartition("/")[2] in SHOWN


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, int | float) else float("nan")
    except OverflowError:
        return float("nan")


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _means(values: np.ndarray, each: int) -> np.ndarray:
    """Returns the mean of every `each` values; NaN where none of them is finite."""
    parts: Iterable[np.ndarray] = np.split(values, range(each, len(values), each))
    return np.array([_mean(part) for part in parts])


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"
