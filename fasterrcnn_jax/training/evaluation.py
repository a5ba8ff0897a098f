"""Evaluation within a training: detect, score, log, draw."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fasterrcnn_jax.config import Config, TrainConfig
from fasterrcnn_jax.config.checks import fitted
from fasterrcnn_jax.data.records import Dataset, ImageProposals
from fasterrcnn_jax.evaluation.analysis import analyse
from fasterrcnn_jax.inference.drawing import comparison_sheet, shown_positions
from fasterrcnn_jax.inference.scoring import Score, score, shown_proposals
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.report.evaluation_page import Evaluation, write_report
from fasterrcnn_jax.report.history import History
from fasterrcnn_jax.training.progress import MetricsWriter, say
from fasterrcnn_jax.training.run_folder import best_folder, checkpoint_folder, report_path
from fasterrcnn_jax.training.stages import Stage


class Shown(NamedTuple):
    """What the page of a run is about."""

    score: Score
    dataset: Dataset
    split: str
    also: str  # what the images were used for before, for the end of a sentence
    step: int  # of the checkpoint
    history: History


class Outcome(NamedTuple):
    """The results of one stage."""

    run: Path
    values: dict[str, float | None]  # metrics by name; None: undefined
    lines: tuple[str, ...]  # the table, and where the files are
    shown: Shown | None = None


def chose_among_several(train: TrainConfig, *, last: int, evaluated: int) -> bool:
    """Returns whether evaluations decided which checkpoint is the best: one evaluation alone chooses nothing.

    Args:
      last: the last step.
      evaluated: number of steps with an evaluation on the deciding split, as far as it is known.
    """
    return evaluated > 1 or 0 < fitted(train.evaluate_every, "train.evaluate_every") < last


def also_used(*, chose: bool, trained: bool) -> str:
    """Returns what the images of a table were used for before, as the end of a sentence."""
    uses = ["used to choose the checkpoint"] * chose + ["trained on"] * trained
    return f", also {' and '.join(uses)}" if uses else ""


def is_within(split: str, whole: str) -> bool:
    """Returns whether the splits that `split` joins with + share one with `whole`."""
    return not {*split.split("+")}.isdisjoint(whole.split("+"))


def outcome_of(stage: Stage, shown: Shown, last: int, *, chosen: str | None) -> Outcome:
    """Returns the results that a stage ends with.

    Args:
      shown: the results of the checkpoint that the table shows.
      last: the last step.
      chosen: what RUN/best is, as `checkpoint.write_best` says it; None: the stage has no such folder.
    """
    lines = [*shown.score.table.split("\n"), f"split      {shown.split}{shown.also}"]
    lines.append(f"checkpoint {checkpoint_folder(stage.run, last)}")
    if chosen is not None:
        lines.append(f"best       {best_folder(stage.run)}: {chosen}")
    return Outcome(stage.run, shown.score.values, tuple(lines), shown)


def write_run_report(config: Config, run: Path, shown: Shown) -> str:
    """Writes RUN/report.html, whole or not at all, in place of an older one; returns a sentence about it.

    Raises:
      InputError: the file cannot be written, or an image cannot be decoded.
    """
    detections, metrics = shown.score.detections, shown.score.metrics
    if detections is None or metrics is None:
        return "none: an RPN alone has no detections"
    page = Evaluation(
        name=str(run),
        split=shown.split,
        also=shown.also,
        dataset=shown.dataset,
        analysis=analyse(detections, shown.dataset),
        metrics=metrics,
        config=config,
        step=shown.step,
        history=shown.history,
    )
    return write_report(report_path(run), page)


class Evaluator(NamedTuple):
    """Evaluates the models of one stage on any of its splits."""

    stage: Stage
    splits: Mapping[str, Dataset]
    given: Mapping[str, Mapping[str, ImageProposals]]  # stored proposals by split and image id
    best_split: str  # the split that decides which checkpoint is best
    metrics: MetricsWriter
    batch_size: int  # images at once, on one device; its share of a training batch is known to fit into memory

    def evaluate(self, model: Detector, split: str, number: int) -> Score:
        """Returns the score of `model` after step `number`; writes its numbers and an image of its detections."""
        dataset, given = self.splits[split], self.given.get(split)
        batch_size, implementation = self.batch_size, self.stage.train.implementation
        result = score(
            model,
            dataset,
            of=self.stage.evaluated,
            given=given,
            batch_size=batch_size,
            implementation=implementation,
            coco_backend=self.stage.train.coco_backend,
        )
        positions = shown_positions(dataset)
        proposals = shown_proposals(
            model,
            dataset,
            result,
            positions,
            given=given,
            batch_size=batch_size,
            implementation=implementation,
        )
        values = {f"{split}/{name}": value for name, value in result.values.items()}
        # A finished run that is evaluated again has them already.
        if not self.metrics.has(number, values):
            self.metrics.write(number, values)
        sheet = comparison_sheet(dataset, positions, result.detections, proposals)
        # The last step may be evaluated on both splits.
        image = self.metrics.write_image(number, sheet, split="" if split == self.best_split else split)
        say(f"step {number}: {result.headline} on {split}, image {image}")
        return result
