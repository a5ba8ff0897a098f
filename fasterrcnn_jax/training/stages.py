"""The stages of a training: four for alternating training, one for joint training, the RPN alone and Fast R-CNN.

4-step alternating training follows Ren et al. 2015 (arXiv:1506.01497), section 3.2, as py-faster-rcnn does it:
  1. an RPN;
  2. a detector, again from the initial weights, on the proposals of stage 1;
  3. an RPN on the fixed trunk of stage 2;
  4. the box head of stage 2 on the proposals of stage 3, with the same fixed trunk.
The model of stage 4 contains trunk, RPN and head; it is in the run folder itself.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
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

    name: str  # shown in messages
    run: Path  # folder of the stage's checkpoints and metrics
    train: TrainConfig  # with the stage's own steps, decay steps and batch size
    losses: Callable[..., Losses]  # function that is differentiated
    parts: tuple[str, ...]  # parts of the detector that are trained
    first: Path | None  # run whose newest checkpoint the stage starts from; None: `config.init`, or random weights
    proposals: Path | None  # run whose stored proposals are used instead of the RPN's proposals
    # "given" proposals are the stored ones, for a stage whose model has no trained RPN.
    evaluated: Literal["proposals", "detections", "detections in given proposals"]
    proposes_on: tuple[str, ...]  # splits whose proposals are stored in the stage's folder at its end
    own_proposals: Path | None = None  # the user's file of proposals, used like those of the run `proposals`

    @property
    def metric(self) -> str:
        """Name of the metric that selects the best checkpoint."""
        return RECALL if self.evaluated == "proposals" else self.train.best_metric


def split_names(config: Config) -> tuple[str, ...]:
    """Returns the splits that a run reads, each once."""
    data, train = config.data, config.train
    return tuple(dict.fromkeys((data.train_split, train.best_split or data.test_split, data.test_split)))


def stages_of(config: Config) -> tuple[Stage, ...]:
    """Returns the stages in order. Each stage needs the earlier stages to be complete."""
    train = config.train
    if train.scheme != "alternating":
        if train.scheme == "fast_rcnn":
            return (_fast_rcnn(config),)
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
    # Stage 3 starts with the initial weights of the RPN, because stage 2 does not train the RPN. Stage 4 starts with
    # the box head of stage 2.
    names = ("1_rpn", "2_detector", "3_rpn", "4_detector")
    runs = (*(stage_folder(config.run, name) for name in names[:3]), config.run)
    # The detector of stage 2 has no trained RPN, so it is evaluated in stored proposals of every split.
    splits = split_names(config)
    rpn = partial(Stage, losses=rpn_training_losses, proposals=None, evaluated="proposals")
    box = partial(Stage, losses=box_training_losses, proposes_on=())
    stages = (
        partial(rpn, parts=TRUNK + RPN, first=None, proposes_on=splits),
        partial(box, parts=TRUNK + BOX, first=None, proposals=runs[0], evaluated="detections in given proposals"),
        partial(rpn, parts=RPN, first=runs[1], proposes_on=splits[:1]),
        partial(box, parts=BOX, first=runs[2], proposals=runs[2], evaluated="detections"),
    )
    return tuple(
        stage(name, run, _training(train, number))
        for number, (name, run, stage) in enumerate(zip(names, runs, stages, strict=True))
    )


def _fast_rcnn(config: Config) -> Stage:
    """Returns the one stage of Fast R-CNN (Girshick 2015, arXiv:1504.08083): the RPN is neither trained nor used."""
    return Stage(
        name="",
        run=config.run,
        train=config.train,
        losses=box_training_losses,
        parts=TRUNK + BOX,
        first=None,
        proposals=None,
        evaluated="detections in given proposals",
        proposes_on=(),
        own_proposals=config.data.proposals,
    )


def _training(train: TrainConfig, number: int) -> TrainConfig:
    """Returns the training settings of one stage. Taken alone, a stage is an ordinary training."""
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
    """Returns the stage whose step failed on the batch in the file `batch`.

    If there are several stages, the folder of the file selects the stage.

    Raises:
      InputError: the file is not in the run folder of any stage.
    """
    if len(stages) == 1:
        return stages[0]
    for stage in stages:
        if stage.run.resolve() == run_of_failed_batch(batch):
            return stage
    folders = ", ".join(str(stage.run) for stage in stages)
    raise InputError(f"--replay {batch}: the file must be in the run folder of a stage: {folders}")
