"""The stages of a training: one for joint training and for the RPN alone, four for alternating training.

4-step alternating training, Ren et al. 2015 (arXiv:1506.01497), section 3.2, as py-faster-rcnn does it: an RPN; a
detector from a fresh trunk on that RPN's proposals; an RPN on the detector's trunk, which no longer moves; the
detector's head on the new proposals. The last stage's model holds trunk, RPN and head, in the run folder itself.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from fasterrcnn_jax.config import Config, TrainConfig
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.recall import RECALL
from fasterrcnn_jax.models.faster_rcnn import (
    box_training_losses,
    rpn_training_losses,
    training_losses,
)
from fasterrcnn_jax.structures import Losses
from fasterrcnn_jax.training.run_folder import run_of_failed_batch, stage_folder

TRUNK, RPN, BOX = ("backbone", "neck"), ("rpn_head",), ("box_head",)


class Stage(NamedTuple):
    """One pass through the training loop."""

    name: str  # for messages
    run: Path  # folder of its checkpoints and numbers
    train: TrainConfig  # with the stage's own steps, falls and batch size
    losses: Callable[..., Losses]  # what is differentiated
    parts: tuple[str, ...]  # of the detector: what moves
    first: Path | None  # run whose newest checkpoint it starts from; None: `config.init`, or random weights
    proposals: Path | None  # run whose stored proposals stand in for the RPN's
    # "given" proposals are the stored ones: the stage's model has no trained RPN.
    evaluated: Literal["proposals", "detections", "detections in given proposals"]
    proposes_on: tuple[str, ...]  # splits whose proposals are stored in its folder when it is done

    @property
    def metric(self) -> str:
        """Name of the number that decides which checkpoint is best."""
        return RECALL if self.evaluated == "proposals" else self.train.best_metric


def stages_of(config: Config) -> tuple[Stage, ...]:
    """Returns the stages in their order; each needs those before it to be done."""
    data, train = config.data, config.train
    if train.scheme != "alternating":
        is_rpn = train.scheme == "rpn"
        return (
            Stage(
                name="",
                run=config.run,
                train=train,
                losses=rpn_training_losses if is_rpn else training_losses,
                parts=TRUNK + RPN if is_rpn else TRUNK + RPN + BOX,
                first=None,
                proposals=None,
                evaluated="proposals" if is_rpn else "detections",
                proposes_on=(),
            ),
        )
    # Step 3 begins with the RPN's first weights, which step 2 leaves as they are, step 4 with the head of step 2.
    names = ("1_rpn", "2_detector", "3_rpn", "4_detector")
    runs = (*(stage_folder(config.run, name) for name in names[:3]), config.run)
    # The detector of step 2 has no RPN of its own to be evaluated with.
    splits = tuple(dict.fromkeys((data.train_split, train.best_split or data.test_split, data.test_split)))
    rpn = dict(losses=rpn_training_losses, proposals=None, evaluated="proposals")
    box = dict(losses=box_training_losses, proposes_on=())
    of_stage = (
        dict(rpn, parts=TRUNK + RPN, first=None, proposes_on=splits),
        dict(box, parts=TRUNK + BOX, first=None, proposals=runs[0], evaluated="detections in given proposals"),
        dict(rpn, parts=RPN, first=runs[1], proposes_on=splits[:1]),
        dict(box, parts=BOX, first=runs[2], proposals=runs[2], evaluated="detections"),
    )
    return tuple(
        Stage(name, run, _training(train, number), **fields)
        for number, (name, run, fields) in enumerate(zip(names, runs, of_stage, strict=True))
    )


def _training(train: TrainConfig, number: int) -> TrainConfig:
    """Returns the optimisation of one stage, which by itself is a training like any other."""
    alternating = train.alternating
    is_rpn = number % 2 == 0
    return dataclasses.replace(
        train,
        scheme="joint",
        steps=alternating.steps[number],
        decay_steps=(alternating.decay_steps[number],) if train.schedule == "steps" else (),
        batch_size=alternating.rpn_batch_size or train.batch_size if is_rpn else train.batch_size,
    )


def failed_stage(stages: tuple[Stage, ...], batch: Path) -> Stage:
    """Returns the stage whose step failed on the batch in the file `batch`: where there are several, by its folder.

    Raises:
      InputError: the file lies in the run folder of none of them.
    """
    if len(stages) == 1:
        return stages[0]
    for stage in stages:
        if stage.run.resolve() == run_of_failed_batch(batch):
            return stage
    folders = ", ".join(str(stage.run) for stage in stages)
    raise InputError(f"--replay {batch}: lies in the run folder of no stage: {folders}")
