"""Training and evaluation as functions, for Python programs and notebooks: `fasterrcnn_jax.train`, `.evaluate`."""

from pathlib import Path
from typing import Any, NamedTuple

from fasterrcnn_jax.config.text import load_config, with_fields
from fasterrcnn_jax.data.records import Dataset, ImageDetections
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import BackboneClass, Detector
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.scripts import evaluate as evaluating
from fasterrcnn_jax.scripts import train as training
from fasterrcnn_jax.zoo import load


class TrainingResult(NamedTuple):
    """What a training leaves behind."""

    folder: Path  # the run folder
    metrics: dict[str, float | None]  # of the best checkpoint, by name: AP50, AP, AP50/CLASS and so on; None: undefined
    table: str  # the same as text

    @property
    def best(self) -> Path:
        """The folder of the best checkpoint, which `load`, `predict` and `evaluate` take."""
        return self.folder / "best"

    @property
    def model(self) -> Detector:
        """The detector of the best checkpoint, read anew each time. For a backbone of your own, use `load`."""
        return load(self.folder)


class EvaluationResult(NamedTuple):
    """What an evaluation finds."""

    metrics: dict[str, float | None]  # by name: AP50, AP, AP50/CLASS and so on; None: undefined
    table: str  # the same as text
    split: str
    detections: list[ImageDetections]  # of each image of `dataset`
    dataset: Dataset


def train(
    data: str | Path | None = None,
    *,
    config: str | Path | None = None,
    init: str | Path | None = None,
    epochs: float | None = None,
    **fields: Any,
) -> TrainingResult:
    """Trains a detector on a folder of labelled images, as `fasterrcnn-jax train FOLDER` does.

    It never ends the process. It handles signals only in the main thread: SIGINT and SIGTERM save a checkpoint and
    raise KeyboardInterrupt; the same call continues the run.

    Args:
      data: folder of labelled images; None: the folder in the configuration.
      config: configuration file, or the name of a shipped one such as "shapes.py"; None: the one for a folder.
      init: weights file or run folder that a new run starts from, or "imagenet".
      epochs: number of passes over the training images; None: fitted to the number of images.
      fields: values of other fields by their name (batch_size=8), or by their full name with
        `**{"model.rpn.channels": 64}`; `train.py --help_all` lists them.
    Raises:
      InputError: the data, the run folder or a field cannot be used.
      NonFiniteLossError: training diverged.
      KeyboardInterrupt: a signal asked the training to stop, and its last step is saved.
    """
    path = cli.start() if config is None else cli.shipped_or_own(Path(config))
    if "replay" in fields:
        raise InputError("replay is for train.py, which prints what it finds")
    given = {"data.root": data, "init": init, "train.epochs": epochs}
    fields = {name: value for name, value in given.items() if value is not None} | fields
    cli.set_up_libraries()
    try:
        outcome = training.train_stages(with_fields(load_config(path), fields))
    except training.preemption.Stopped as stopped:
        raise KeyboardInterrupt(str(stopped)) from None
    assert outcome is not None, "the last stage of a training always has results"
    return TrainingResult(outcome.run, outcome.values, "\n".join(outcome.lines))


def evaluate(
    ckpt: str | Path,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    batch_size: int | None = None,
    backbone: BackboneClass | None = None,
    **arguments: Any,
) -> EvaluationResult:
    """Evaluates a run, one of its checkpoints, or a weights file, as `fasterrcnn-jax evaluate` does; writes no file.

    Args:
      ckpt: run folder, checkpoint folder or weights file.
      data: folder of labelled images; None: the data that the run was trained on.
      split: split to evaluate; None: the test split.
      batch_size: number of images detected at once; None: one device's share of the training batch.
      backbone: your own backbone class, if the model was trained with one.
      arguments: other arguments of evaluate.py: layout, implementation, given, coco_backend, soft_nms, test_flip,
        test_scales.
    Raises:
      InputError: the model or the data cannot be used.
    """
    cli.set_up_libraries()
    root = None if data is None else Path(data)
    asked = evaluating.Arguments(ckpt=Path(ckpt), root=root, split=split, batch_size=batch_size, **arguments)
    if asked.compare:
        raise ValueError("compare is for the command line; call fasterrcnn_jax.evaluation.comparison.compare")
    for name in ("proposals", "report", "out"):
        if getattr(asked, name) not in (False, None):
            raise ValueError(f"{name} is for the command line: fasterrcnn-jax evaluate")
    found = evaluating.evaluate_model(asked, load(ckpt, backbone=backbone))
    assert found.score.detections is not None, "proposals are not evaluated here"
    return EvaluationResult(found.score.values, found.score.table, found.split, found.score.detections, found.dataset)
