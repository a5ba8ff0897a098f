"""The output of a running training: a progress bar, metrics.jsonl, TensorBoard events, and images.

The numbers of a step are read one step late, while the device already works on the next one.
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.errors import InputError, NonFiniteLossError
from fasterrcnn_jax.inference.drawing import Pixels, save_image
from fasterrcnn_jax.processes import is_main, process
from fasterrcnn_jax.regular_files import check_regular
from fasterrcnn_jax.structures import Batch, LossTerms
from fasterrcnn_jax.training import compilations, replay
from fasterrcnn_jax.training.optimizer import learning_rates
from fasterrcnn_jax.training.run_folder import image_path, metrics_path
from fasterrcnn_jax.training.stages import Stage
from fasterrcnn_jax.training.state import StepMetrics
from fasterrcnn_jax.training.tensorboard import TensorBoard

logger = logging.getLogger(__name__)


def say(text: str) -> None:
    """Prints a line above the progress bar, in the first process only."""
    if is_main():
        tqdm.write(text)


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


class MetricsWriter:
    """Appends the numbers of each step to metrics.jsonl and to TensorBoard events. With `silent` it writes nothing.

    Lines of steps after `after`, the step of the newest checkpoint, are deleted: an interrupted run repeats these
    steps.
    """

    def __init__(self, run: Path, *, after: int, silent: bool = False):
        self._run, self._lines, self._board = run, None, None
        if silent:
            return
        path = metrics_path(run)
        check_regular(path)
        try:
            self._keep(path, after)
            self._lines = path.open("a", buffering=1)
        except OSError as error:
            raise InputError(f"{path} cannot be read and written: {error.strerror or error}") from error
        self._board = TensorBoard(run, purge_step=after + 1)

    @staticmethod
    def _keep(path: Path, after: int) -> None:
        """Deletes the lines of steps after `after`, and those that are damaged."""
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
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

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

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            # A line that could not be written is still in the buffer, and closing would try again.
            with contextlib.suppress(OSError):
                self._lines.close()
        if self._board is not None:
            self._board.close()


class Progress:
    """The progress bar and the numbers of one stage. Only the first process shows the bar."""

    def __init__(self, stage: Stage, train_set: Dataset, metrics: MetricsWriter, *, done: int):
        """Starts the progress bar at `done`, the number of steps that were completed before this start."""
        self._stage, self._train_set, self._metrics = stage, train_set, metrics
        self._rates = learning_rates(stage.train)
        self._reported = time.perf_counter()
        self._bar = tqdm(
            desc=stage.name or None,
            total=stage.train.steps,
            initial=done,
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 15.0,
            disable=not is_main(),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def restart_clock(self) -> None:
        """Leaves the time since the last report out of the next rate: an evaluation does not make a step slow."""
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
