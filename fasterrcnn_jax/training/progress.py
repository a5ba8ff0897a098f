"""The output of a running training: a progress bar, metrics.jsonl, results.csv, TensorBoard events, and images.

The numbers of a step are read one step late, while the device already works on the next one.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.config import ImageConfig
from fasterrcnn_jax.config.checks import fitted
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.errors import InputError, NonFiniteLossError
from fasterrcnn_jax.inference.drawing import Pixels, batch_sheet, save_image
from fasterrcnn_jax.printing import printable, progress_bar
from fasterrcnn_jax.processes import is_main, process
from fasterrcnn_jax.regular_files import check_regular
from fasterrcnn_jax.report.history import History, curves_image, results_csv
from fasterrcnn_jax.structures import Batch, LossTerms
from fasterrcnn_jax.training import compilations, replay
from fasterrcnn_jax.training.expected_time import (
    FIRST_STEPS,
    Evaluations,
    TimedStep,
    expected_seconds,
    in_words,
)
from fasterrcnn_jax.training.optimizer import learning_rates
from fasterrcnn_jax.training.run_folder import (
    curves_path,
    first_batch_path,
    image_path,
    metrics_path,
    results_path,
)
from fasterrcnn_jax.training.stages import Stage
from fasterrcnn_jax.training.state import StepMetrics
from fasterrcnn_jax.training.tensorboard import TensorBoard

logger = logging.getLogger(__name__)


def say(text: str) -> None:
    """Prints a line above the progress bar, in the first process only."""
    if is_main():
        tqdm.write(printable(text))


class StepReport(NamedTuple):
    """One step as the training loop leaves it; `metrics` may still be on its way from the device."""

    number: int
    metrics: StepMetrics
    batch: Batch
    data_wait: float  # seconds that the loop waited for the batch


class LateReport:
    """Passes each report on when the next one comes, so that reading its numbers does not stop the device."""

    def __init__(self, write: Callable[[StepReport], None]):
        self._write = write
        self._waiting: StepReport | None = None

    def offer(self, report: StepReport) -> None:
        """Passes the report before this one on, and keeps this one."""
        self.flush()
        self._waiting = report

    def flush(self) -> None:
        """Passes on the report that waits, if there is one."""
        if self._waiting is not None:
            report, self._waiting = self._waiting, None
            self._write(report)


def _step_of(line: bytes) -> int | None:
    """Returns the step of a line of metrics.jsonl; None if the line is damaged."""
    try:
        step = json.loads(line.decode())["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    # True is an int too.
    return step if type(step) is int else None


def evaluated_steps(run: Path, split: str) -> set[int]:
    """Returns the steps whose evaluation on a split is in the metrics of a run; none if they cannot be read."""
    path = metrics_path(run)
    try:
        check_regular(path)
        lines = path.read_bytes().splitlines(keepends=True)
    except (InputError, OSError):
        return set()
    steps = {line: _step_of(line) for line in lines}
    return {
        step for line, step in steps.items() if step is not None and _has_evaluation(json.loads(line.decode()), split)
    }


def _has_evaluation(names: Iterable[str], split: str) -> bool:
    # The numbers of an evaluation have names such as test/AP50.
    return any(name.startswith(f"{split}/") for name in names)


class MetricsWriter:
    """Appends the numbers of each step to metrics.jsonl and to TensorBoard events. With `silent` it writes nothing.

    Lines of steps after `after`, the step of the newest checkpoint, are deleted: an interrupted run repeats these
    steps.
    """

    def __init__(self, run: Path, *, after: int, silent: bool = False):
        self._run, self._lines, self._board = run, None, None
        self.history = History()
        self._evaluated: dict[int, set[str]] = {}  # names of the numbers of evaluations, by step
        if silent:
            return
        path = metrics_path(run)
        check_regular(path)
        try:
            kept = _keep(path, after)
            self._lines = path.open("a", buffering=1)
        except OSError as error:
            raise InputError(f"{path} cannot be read and written: {error.strerror or error}") from error
        for line in kept:
            values = json.loads(line)
            self._note(values["step"], values)
        self._board = TensorBoard(run, purge_step=after + 1)

    def has(self, step: int, names: Iterable[str]) -> bool:
        """Returns whether an evaluation with numbers of these names is written for `step`."""
        return self._evaluated.get(step, set()).issuperset(names)

    def evaluations(self, split: str) -> int:
        """Returns the number of steps with an evaluation on a split."""
        return sum(_has_evaluation(names, split) for names in self._evaluated.values())

    def _note(self, step: int, values: Mapping[str, object]) -> None:
        self.history.add(step, {name: value for name, value in values.items() if name not in ("step", "time")})
        # The numbers of an evaluation have names such as test/AP50.
        names = {name for name in values if "/" in name}
        if names:
            self._evaluated.setdefault(step, set()).update(names)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Appends one line.

        Raises:
          InputError: it cannot be written; names the file.
        """
        if self._lines is None or self._board is None:
            return
        try:
            self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        except OSError as error:
            raise InputError(f"{metrics_path(self._run)} cannot be written: {error.strerror or error}") from error
        self._note(step, values)
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def write_results(self, *, every: int, batch_size: int, images: int) -> None:
        """Replaces results.csv and curves.png by those of all steps so far; see `report.history.results_csv`.

        Raises:
          InputError: a file cannot be written; names it.
        """
        if self._board is None:
            return
        text = results_csv(self.history, every=every, batch_size=batch_size, images=images)
        write_atomically(results_path(self._run), text)
        image = curves_image(self.history)
        if image is not None:
            save_image(curves_path(self._run), image)

    def write_image(self, step: int, image: Pixels, *, split: str = "") -> Path:
        """Writes images/STEP.png, or STEP_SPLIT.png, and TensorBoard's copy of it; returns its path.

        Raises:
          InputError: it cannot be written; names the file.
        """
        path = image_path(self._run, step, split)
        if self._board is not None:
            save_image(path, image)
            self._board.add_image(f"images{split and '/'}{split}", image, step)
        return path

    def write_first_batch(self, batch: Batch, image: ImageConfig, train_set: Dataset) -> None:
        """Writes images/first_batch.png: the first training batch as the network sees it.

        Raises:
          InputError: it cannot be written; names the file.
        """
        if self._board is not None:
            names = [train_set.records[index].id for index in batch.image_index]
            save_image(first_batch_path(self._run), batch_sheet(batch, image, train_set.class_names, names=names))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            # A line that could not be written is still in the buffer, and closing would try again.
            with contextlib.suppress(OSError):
                self._lines.close()
        if self._board is not None:
            self._board.close()


def _keep(path: Path, after: int) -> list[bytes]:
    """Deletes the lines of steps after `after`, and those that are damaged; returns the others."""
    # Bytes, because a line may be damaged in any way: zeros after a power cut, characters that are not UTF-8.
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    steps = [_step_of(line) for line in lines]
    # A killed process may have left an incomplete last line.
    damaged = sum(step is None for step in steps[:-1])
    if damaged:
        logger.warning("%s: %d damaged lines are removed", path, damaged)
    kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= after]
    if kept != lines:
        write_atomically(path, b"".join(kept))
    return kept


class Progress:
    """Shows how far one stage is, in the first process.

    After the first steps it says how long the training is expected to take.
    """

    def __init__(
        self,
        stage: Stage,
        train_set: Dataset,
        metrics: MetricsWriter,
        *,
        done: int,
        canvases: frozenset[tuple[int, int]],
        evaluations: Evaluations,
        afterwards: Sequence[Evaluations] = (),
        checkpoint_bytes: int = 0,
    ):
        """Starts the bar and the clock.

        Args:
          done: number of steps that were completed before this start.
          canvases: canvases of the training images.
          evaluations: the evaluations of the whole stage that choose the best checkpoint.
          afterwards: detections of other images after the last step.
          checkpoint_bytes: size of a checkpoint.
        """
        self._stage, self._train_set, self._metrics = stage, train_set, metrics
        self._canvases, self._evaluations, self._afterwards = canvases, evaluations, afterwards
        self._checkpoint_bytes = checkpoint_bytes
        self._started, self._expected = time.perf_counter(), None
        self._rates = learning_rates(stage.train)
        self._steps = len(self._rates)
        self._timed: list[TimedStep] = []
        self._reported = time.perf_counter()
        self._bar = progress_bar(title=stage.name, total=self._steps, unit="step", done=done, shown=is_main())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def restart_clock(self) -> None:
        """Leaves the time since the last report out of the next rate: an evaluation or a checkpoint is no step."""
        self._reported = time.perf_counter()

    def write(self, report: StepReport) -> None:
        """Writes the numbers of a step. Waits for the device.

        Raises:
          NonFiniteLossError: a number is not finite; the message names the file with the batch of the step.
        """
        number, batch = report.number, report.batch
        ids = [self._train_set.records[index].id for index in batch.image_index[batch.image_valid]]
        try:
            values = finite_metrics(number, report.metrics, ids)
        except NonFiniteLossError as error:
            try:
                path = replay.write_batch(self._stage.run, number, batch, ids, process=process()[0])
            except InputError as unwritten:
                raise NonFiniteLossError(f"{error}; its batch is not kept: {unwritten}") from None
            raise NonFiniteLossError(f"{error}; --replay {path} shows where it comes from") from None
        seconds, self._reported = time.perf_counter() - self._reported, time.perf_counter()
        rate = self._stage.train.batch_size / seconds
        extra = {
            "learning_rate": self._rates[number - 1],
            "images_per_second": rate,
            "data_wait": report.data_wait,
        }
        self._metrics.write(number, values | extra | compilations.so_far())
        self._bar.update(number - self._bar.n)
        losses = {name: f"{values[name]:.3f}" for name in LossTerms._fields if values[name]}
        self._bar.set_postfix(losses | {"images/s": f"{rate:.1f}"}, refresh=False)
        self._timed.append(TimedStep((batch.images.shape[1], batch.images.shape[2]), seconds))
        if len(self._timed) == FIRST_STEPS and number < self._steps:
            self._say_expected_time(number)

    def _say_expected_time(self, number: int) -> None:
        done = self._evaluations.number * number // self._steps
        every = fitted(self._stage.train.checkpoint_every, "train.checkpoint_every")
        # After the first evaluation, detection is compiled.
        canvases = frozenset() if done else self._evaluations.canvases
        left = self._evaluations._replace(number=self._evaluations.number - done, canvases=canvases)
        seconds = expected_seconds(
            self._timed,
            steps=self._steps - number,
            batch_size=self._stage.train.batch_size,
            canvases=self._canvases,
            evaluations=(left, *self._afterwards),
            checkpoints=self._steps // every - number // every + (self._steps % every > 0),
            checkpoint_bytes=self._checkpoint_bytes,
        )
        number_of = left.number + sum(evaluations.number for evaluations in self._afterwards)
        evaluations = "1 evaluation" if number_of == 1 else f"{number_of} evaluations"
        say(f"expected   {in_words(seconds)} for {self._steps - number} more steps and {evaluations}")
        self._expected = time.perf_counter(), seconds

    def say_time(self, number: int) -> None:
        """Says how long the training took to step `number`, with its evaluations; and how long was expected.

        A training that ended early has no expected time.
        """
        now = time.perf_counter()
        if self._expected is None or number < self._steps:
            say(f"took       {in_words(now - self._started)}")
            return
        since, seconds = self._expected
        first = f"the first {FIRST_STEPS} steps of this start"
        say(f"took       {in_words(now - since)} after {first} (expected: {in_words(seconds)})")


def finite_metrics(step: int, metrics: StepMetrics, image_ids: list[str]) -> dict[str, float]:
    """Returns the numbers of a step as plain floats.

    Raises:
      NonFiniteLossError: a number is infinite or NaN; the message names the step, the number and the images.
    """
    values = {name: float(value) for name, value in metrics._asdict().items()}
    wrong = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise NonFiniteLossError(
            f"step {step}: {', '.join(wrong)} on images {', '.join(image_ids)}; "
            "the last checkpoint is unchanged; a lower train.learning_rate (with another --run) often helps"
        )
    return values
