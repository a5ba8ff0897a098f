"""Evaluation within a training: detect, score, log, draw."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fasterrcnn_jax.data.records import Dataset, ImageProposals
from fasterrcnn_jax.inference.drawing import comparison_sheet, shown_positions
from fasterrcnn_jax.inference.scoring import Score, score, shown_proposals
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.training.progress import MetricsWriter, say
from fasterrcnn_jax.training.run_folder import best_folder, checkpoint_folder
from fasterrcnn_jax.training.stages import Stage


class Outcome(NamedTuple):
    """The results of one stage."""

    run: Path
    values: dict[str, float | None]  # metrics by name; None: undefined
    lines: tuple[str, ...]  # the table, and where the files are


def also_used(*, chose: bool, trained: bool) -> str:
    """Returns what the images of a table were used for before, as the end of a sentence."""
    uses = ["used to choose the checkpoint"] * chose + ["trained on"] * trained
    return f", also {' and '.join(uses)}" if uses else ""


def is_within(split: str, whole: str) -> bool:
    """Returns whether the splits that `split` joins with + share one with `whole`."""
    return not {*split.split("+")}.isdisjoint(whole.split("+"))


def outcome_of(
    stage: Stage, result: Score, last: int, *, chosen: str | None, chosen_on: str, shown_on: str, trained_on: str
) -> Outcome:
    """Returns the results that a stage ends with.

    Args:
      last: the last step.
      chosen: what RUN/best is, as `checkpoint.write_best` says it; None: the stage has no such folder.
      chosen_on: split that chose the best checkpoint.
      shown_on: split of `result`.
      trained_on: split of the training images.
    """
    chose = chosen_on == shown_on and chosen is not None
    also = also_used(chose=chose, trained=is_within(shown_on, trained_on))
    lines = [*result.table.split("\n"), f"split      {shown_on}{also}"]
    lines.append(f"checkpoint {checkpoint_folder(stage.run, last)}")
    if chosen is not None:
        lines.append(f"best       {best_folder(stage.run)}: {chosen}")
    return Outcome(stage.run, result.values, tuple(lines))


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
