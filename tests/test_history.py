"""results.csv and the learning curves: the numbers of metrics.jsonl, the same after a resumption."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from fasterrcnn_jax.report import history as history_of
from fasterrcnn_jax.report.history import History, read_history, results_csv
from fasterrcnn_jax.training.progress import MetricsWriter


def lines_of(text):
    return list(csv.DictReader(text.splitlines()))


def write(run, steps, *, after=0):
    run.mkdir(exist_ok=True)
    with MetricsWriter(run, after=after) as metrics:
        for step in steps:
            metrics.write(step, {"rpn_box": float(step), "box_class": 2.0, "learning_rate": 0.1, "compilations": 3})
            if step % 4 == 0:
                metrics.write(step, {"val/AP50": step / 10, "val/AP": None, "val/AP50/ring": 0.5})
            if step % 2 == 0:
                metrics.write_results(every=2, batch_size=4, images=10)
        return metrics.history


def test_each_line_has_the_mean_of_the_steps_since_the_line_before_and_the_metrics(tmp_path):
    write(tmp_path, range(1, 7))
    lines = lines_of((tmp_path / "results.csv").read_text())
    assert list(lines[0]) == ["step", "epoch", "rpn_box", "box_class", "learning_rate", "val/AP50", "val/AP"]
    assert [line["step"] for line in lines] == ["2", "4", "6"]
    assert [float(line["rpn_box"]) for line in lines] == [1.5, 3.5, 5.5]
    assert [line["epoch"] for line in lines] == ["0.8", "1.6", "2.4"]
    # Undefined metrics and steps without an evaluation have empty cells, which a spreadsheet reads.
    assert [line["val/AP50"] for line in lines] == ["", "0.4", ""] and lines[1]["val/AP"] == ""


def test_a_resumed_run_writes_the_files_of_a_run_that_was_never_stopped(tmp_path):
    write(tmp_path / "whole", range(1, 9))
    write(tmp_path / "stopped", range(1, 8))  # the newest checkpoint is of step 6
    write(tmp_path / "stopped", range(7, 9), after=6)
    for name in ("results.csv", "curves.png"):
        whole, stopped = (tmp_path / run / name for run in ("whole", "stopped"))
        assert whole.read_bytes() == stopped.read_bytes(), name


def test_the_history_of_a_run_folder_is_that_of_its_training(tmp_path):
    history = write(tmp_path, range(1, 9))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"bad\n' + path.read_bytes() + b'[1]\n{"step": true}\n{"step": 9, "rpn_box": "x"}\n{"st')
    read = read_history(path)
    assert read.steps[:8] == history.steps and read.evaluations.keys() == history.evaluations.keys()
    np.testing.assert_array_equal(read.of_steps("rpn_box")[:8], history.of_steps("rpn_box"))
    assert read_history(tmp_path / "missing.jsonl").steps.tolist() == []


def test_curves_show_losses_and_evaluations(tmp_path):
    history = write(tmp_path, range(1, 9))
    shown = {chart.title: chart for chart in history_of.curves(history)}
    assert list(shown) == ["Training losses", "Evaluations", "Learning rate"]
    assert shown["Training losses"].legend == ("total", "rpn_box", "box_class")
    assert "total ends at 10" in shown["Training losses"].description
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 1400 and len(image.convert("RGB").getcolors(10**6)) > 10
    assert history_of.curves(History()) == [] and history_of.curves_image(History()) is None


def test_a_long_training_is_shown_by_means_of_equally_many_steps():
    history = History()
    for step in range(1, 1001):
        history.add(step, {"rpn_box": float(step % 2)})
    (losses,) = history_of.curves(history)
    (line,) = {shape.points.shape for shape in losses.shapes if getattr(shape, "colour", "") == "s1"}
    assert line == (200, 2)
    heights = np.concatenate([s.points[:, 1] for s in losses.shapes if getattr(s, "colour", "") == "s1"])
    # Five steps have a mean of 0.4 or 0.6: the noise of single steps is gone.
    assert np.ptp(heights) < 0.25 * history_of.pixels(losses).shape[0] / 2


def test_a_hostile_log_gives_no_curve_and_no_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = [
        {"step": 10**30},
        {"step": -1},
        {"step": 1, "a/b": 1e308},
        {"step": 2, "rpn_box": 10**400},
        {"step": 3, "x": []},
    ]
    path.write_text("\n".join(json.dumps(value) for value in values) + '\n{"step": 4, "rpn_box": NaN}\n' + "[" * 10**5)
    history = read_history(path)
    assert history.steps.tolist() == [2, 3, 4]
    history_of.curves(history)
    assert len(lines_of(results_csv(history, every=1, batch_size=1, images=0))) == 4


def test_a_new_name_in_every_line_takes_no_memory(tmp_path):
    """Without a limit, a file of one megabyte would become a table of a billion cells."""
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {n}, "a{n}": 1}}\n{{"step": {n}, "a/{n}": 1}}\n' for n in range(1, 2_000)]
    path.write_text("".join(lines))
    history = read_history(path)
    assert len(history.values) == len(history.metrics) == history_of.MOST_NAMES
    assert len(history.steps) == len(history.evaluations) == 1_999
    assert len(results_csv(history, every=1, batch_size=1, images=1)) < 2_000 * 300


@pytest.mark.parametrize("batch_size, images, epoch", [(8, 1000, "0.8"), (3, 7, "42.8571")])
def test_epochs_count_passes_over_the_training_images(batch_size, images, epoch):
    history = History()
    history.add(100, {"rpn_box": 1.0})
    (line,) = lines_of(results_csv(history, every=100, batch_size=batch_size, images=images))
    assert line["epoch"] == epoch
