"""The training loop reports a step, and saves a checkpoint, one step late."""

import dataclasses
import functools
import json
import re
import types

import numpy as np
import pytest
import tiny

from fasterrcnn_jax import printing
from fasterrcnn_jax.scripts import train as train_script
from fasterrcnn_jax.structures import LossTerms
from fasterrcnn_jax.training import checkpoint
from fasterrcnn_jax.training import progress as progress_module
from fasterrcnn_jax.training.checkpoint import DeferredSave, Snapshot
from fasterrcnn_jax.training.expected_time import (
    CHECKPOINT,
    CHECKPOINT_RATE,
    DETECTION,
    DETECTION_COMPILATION,
    Evaluations,
    TimedStep,
    expected_seconds,
    in_words,
)
from fasterrcnn_jax.training.progress import LateReport, MetricsWriter, Progress, StepReport
from fasterrcnn_jax.training.stages import stages_of
from fasterrcnn_jax.training.state import StepMetrics


def report(number):
    return StepReport(number, metrics=None, batch=None, data_wait=0.0)


def test_a_report_is_passed_on_when_the_next_one_comes():
    written = []
    late = LateReport(written.append)
    late.offer(report(1))
    assert written == []
    late.offer(report(2))
    assert written == [report(1)]
    late.flush()
    late.flush()
    assert written == [report(1), report(2)]


def test_a_report_that_fails_is_not_passed_on_again():
    """A step that is not finite stops the run once, not a second time while the run ends."""

    def refuse(report):
        raise ArithmeticError(f"step {report.number}")

    late = LateReport(refuse)
    late.offer(report(1))
    with pytest.raises(ArithmeticError, match="step 1"):
        late.flush()
    late.flush()


def test_a_line_of_progress_shows_the_four_losses_and_the_images_per_second(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(printing, "LINE_EVERY", 0.0)
    config = tiny.config(tmp_path, steps=4)
    data = tiny.dataset(tmp_path / "images", [(np.zeros((9, 9, 3), np.uint8), [], [])])
    config.run.mkdir()
    numbers = dict.fromkeys(StepMetrics._fields, 7.0) | dict(zip(LossTerms._fields, (0.125, 0.25, 0.5, 0.75)))
    metrics = MetricsWriter(config.run, after=0)
    with metrics, progress_of(config, data, metrics) as progress:
        progress.write(StepReport(3, StepMetrics(**numbers), batch(), data_wait=0.0))
        progress.write(StepReport(4, StepMetrics(**numbers), batch(), data_wait=0.0))
    lines = capsys.readouterr().err.splitlines()
    losses = "rpn_objectness=0.125, rpn_box=0.250, box_class=0.500, box_delta=0.750"
    assert any(re.match(rf"4 of 4 steps, \d\d:\d\d, {losses}, images/s=\d+.\d", line) for line in lines), lines
    logged = json.loads((config.run / "metrics.jsonl").read_text().splitlines()[0])
    assert logged["step"] == 3 and numbers.items() <= logged.items()


def batch():
    images = np.zeros((1, 64, 96, 3), np.float32)
    return types.SimpleNamespace(images=images, image_index=np.array([0]), image_valid=np.array([True]))


def progress_of(config, data, metrics, *, evaluations=1, **options):
    canvases = frozenset({(64, 96)})
    plan = Evaluations(evaluations, 1, canvases)
    return Progress(stages_of(config)[0], data, metrics, done=0, canvases=canvases, evaluations=plan, **options)


def test_the_expected_time_is_said_once_after_ten_steps(tmp_path, capsys):
    config = tiny.config(tmp_path, steps=40)
    data = tiny.dataset(tmp_path / "images", [(np.zeros((9, 9, 3), np.uint8), [], [])])
    config.run.mkdir()
    numbers = StepMetrics(**dict.fromkeys(StepMetrics._fields, 1.0))
    metrics = MetricsWriter(config.run, after=0)
    with metrics, progress_of(config, data, metrics, evaluations=4) as progress:
        for number in range(1, 13):
            progress.write(StepReport(number, numbers, batch(), data_wait=0.0))
            said = capsys.readouterr().out
            assert ("expected" in said) == (number == 10)
            assert number != 10 or re.match(r"expected   \d+ s for 30 more steps and 3 evaluations\n", said)


def test_the_expected_time_counts_steps_compilations_and_evaluations():
    here, there = (64, 96), (96, 64)
    timed = [TimedStep(here, 10.0), TimedStep(here, 1.0), TimedStep(here, 1.1), TimedStep(here, 0.9)]
    seconds = functools.partial(expected_seconds, timed, batch_size=4)
    none = Evaluations(0, 8, frozenset({here}))
    assert seconds(steps=100, canvases=frozenset({here}), evaluations=[none]) == pytest.approx(100.0)
    assert seconds(steps=100, canvases=frozenset({here, there}), evaluations=[none]) == pytest.approx(109.0)
    evaluations = [none._replace(number=3)]
    evaluated = seconds(steps=100, canvases=frozenset({here}), evaluations=evaluations)
    assert evaluated == pytest.approx(100.0 + 3 * 8 * 0.25 * DETECTION + 9.0 * DETECTION_COMPILATION)
    # The test images come last; detection is compiled once for each canvas.
    evaluations.append(Evaluations(1, 20, frozenset({here})))
    tested = seconds(steps=100, canvases=frozenset({here}), evaluations=evaluations)
    assert tested - evaluated == pytest.approx(20 * 0.25 * DETECTION)
    # Batches are filled up, and the proposals of the images that are drawn are computed once more.
    drawn = seconds(steps=100, canvases=frozenset({here}), evaluations=[Evaluations(3, 5, frozenset({here}), 2)])
    assert drawn == pytest.approx(100.0 + 3 * (8 + 4) * 0.25 * DETECTION + 9.0 * DETECTION_COMPILATION)
    saved = seconds(
        steps=100, canvases=frozenset({here}), evaluations=[none], checkpoints=3, checkpoint_bytes=12 * 10**7
    )
    assert saved == pytest.approx(100.0 + 3 * (CHECKPOINT + 12e7 / CHECKPOINT_RATE))


def test_what_a_stage_detects_after_its_last_step_is_counted(tmp_path):
    config = tiny.config(tmp_path)
    data = {
        name: tiny.dataset(tmp_path / name, [(np.zeros((9, 9, 3), np.uint8), [], [])] * n)
        for name, n in (("train", 3), ("val", 2), ("test", 1))
    }
    (stage,) = stages_of(config)
    assert train_script.detected_afterwards(config, stage, data, known=frozenset()) == []
    apart = stage._replace(train=dataclasses.replace(config.train, best_split="val"), proposes_on=("train",))
    found = train_script.detected_afterwards(config, apart, data, known=frozenset())
    assert [(of.number, of.images, of.shown) for of in found] == [(1, 3, 0), (1, 1, 1)] and found[0].canvases
    (one, other) = train_script.detected_afterwards(config, apart, data, known=found[0].canvases)
    assert not one.canvases and not other.canvases


def test_the_end_says_what_the_training_took_and_what_was_expected(tmp_path, capsys):
    config = tiny.config(tmp_path, steps=40)
    data = tiny.dataset(tmp_path / "images", [(np.zeros((9, 9, 3), np.uint8), [], [])])
    config.run.mkdir()
    numbers = StepMetrics(**dict.fromkeys(StepMetrics._fields, 1.0))
    metrics = MetricsWriter(config.run, after=0)
    with metrics, progress_of(config, data, metrics) as progress:
        progress.say_time(3)
        assert re.fullmatch(r"took       \d+ s\n", capsys.readouterr().out)
        for number in range(1, 41):
            progress.write(StepReport(number, numbers, batch(), data_wait=0.0))
        expected = re.match(r"expected   (\d+ s) for", capsys.readouterr().out)[1]
        progress.say_time(40)
        said = capsys.readouterr().out
        took = rf"took       \d+ s after the first 10 steps of this start \(expected: {expected}\)\n"
        assert re.fullmatch(took, said), said
        # A training that ended early is not compared.
        progress.say_time(30)
        assert "expected" not in capsys.readouterr().out


def test_a_checkpoint_counts_as_time_that_is_left(tmp_path, capsys, monkeypatch):
    config = tiny.config(tmp_path, steps=40)
    data = tiny.dataset(tmp_path / "images", [(np.zeros((9, 9, 3), np.uint8), [], [])])
    config.run.mkdir()
    numbers = StepMetrics(**dict.fromkeys(StepMetrics._fields, 1.0))
    metrics = MetricsWriter(config.run, after=0)
    asked = []
    monkeypatch.setattr(progress_module, "expected_seconds", lambda *_, **of: asked.append(of) or 1.0)
    with metrics, progress_of(config, data, metrics, checkpoint_bytes=7) as progress:
        for number in range(1, 12):
            progress.write(StepReport(number, numbers, batch(), data_wait=0.0))
    (of,) = asked
    # Every second step and the last one.
    assert (of["checkpoints"], of["checkpoint_bytes"], of["steps"]) == (15, 7, 30)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(45.4, "45 s"), (371.0, "6 min 10 s"), (89.6, "1 min 30 s"), (700.0, "12 min"), (12_000.0, "3 h 20 min")],
)
def test_a_duration_is_said_in_few_words(seconds, words):
    assert in_words(seconds) == words


@pytest.fixture
def saved(monkeypatch):
    """The checkpoints that are written, as (state, metric)."""
    written = []
    monkeypatch.setattr(
        checkpoint, "save", lambda checkpoints, *, state, measured, **_: written.append((state, measured))
    )
    return written


@pytest.fixture
def saver(tmp_path):
    with checkpoint.open_checkpoints(tmp_path, keep=1) as checkpoints:
        yield DeferredSave(checkpoints)


def snapshot(state):
    return Snapshot(state, config=None, iterator_state={})


def test_a_snapshot_is_written_when_it_is_confirmed_and_only_once(saver, saved):
    saver.confirm()
    saver.offer(snapshot("step 2"))
    assert saved == [] and saver.pending is not None
    saver.confirm()
    saver.confirm()
    assert saved == [("step 2", None)] and saver.pending is None


def test_a_snapshot_that_is_never_confirmed_is_never_written(saver, saved):
    """The loss of the step after it was not finite."""
    saver.offer(snapshot("step 2"))
    assert saved == []


def test_the_metric_of_an_evaluation_is_written_with_its_snapshot(saver, saved):
    saver.offer(snapshot("step 2"))
    saver.measured(0.5)
    saver.confirm()
    saver.measured(0.7)  # of no snapshot
    assert saved == [("step 2", 0.5)]


def test_a_failed_evaluation_does_not_cost_the_snapshot_before_it(saver, saved):
    saver.offer(snapshot("step 2"))
    with pytest.raises(KeyboardInterrupt), saver.confirmed_on_error():
        raise KeyboardInterrupt
    assert saved == [("step 2", None)]
    saver.offer(snapshot("step 4"))
    with saver.confirmed_on_error():
        pass
    assert saved == [("step 2", None)] and saver.pending is not None
