"""Evaluates a checkpoint: fasterrcnn-jax evaluate runs/shapes

RUN is --ckpt without the flag. The model and the configuration come from the checkpoint. Prints the average precision
per class, and writes the detections as COCO JSON and as VOC comp4 files. With --proposals, prints how many objects the
RPN's proposals cover.
"""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

from fasterrcnn_jax.config import Config, DataConfig
from fasterrcnn_jax.config.checks import AUTO
from fasterrcnn_jax.config.data import Layout
from fasterrcnn_jax.data import sources
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.analysis import analyse
from fasterrcnn_jax.evaluation.files import write_coco_json, write_voc_files
from fasterrcnn_jax.inference.scoring import Score, score
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.printing import print_lines
from fasterrcnn_jax.processes import per_device
from fasterrcnn_jax.report.evaluation_page import FILE, Evaluation, write_report
from fasterrcnn_jax.report.history import read_history
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.training import checkpoint, run_folder
from fasterrcnn_jax.training.evaluation import also_used, is_within
from fasterrcnn_jax.training.preparation import stored_split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    ckpt: Path
    """run folder (uses its best checkpoint), one checkpoint folder RUN/checkpoints/STEP, or a weights file, which needs
    --root"""
    backbone: str | None = None
    """MODULE:CLASS of your own backbone, if the model was trained with one; the class is imported"""
    root: Path | None = None
    """folder of labelled images; objects of classes that the model does not know are left out and counted; None: the
    folder that the run was trained on"""
    layout: Layout = "auto"
    """file layout of --root; auto: recognised"""
    split: str | None = None
    """split to evaluate, or several joined by +; None: the test split of the run, or of --root"""
    batch_size: int | None = None
    """number of images detected at once, on one device; None: one device's share of the training batch"""
    implementation: Literal["xla", "mosaic"] | None = None
    """implementation of NMS and region features: xla: plain JAX; mosaic: GPU kernels; None: GPU kernels where they can
    run"""
    proposals: bool = False
    """print the recall of the proposals instead of detecting; use it for an RPN that was trained alone"""
    report: bool = False
    """write report.html too: the results with their errors, as one page that opens from disk"""
    out: Path | None = None
    """folder for the result files; None: evaluation/SPLIT in the run folder, or beside the weights file"""


class Evaluated(NamedTuple):
    """A model's results on one split."""

    split: str
    also: str  # what the run used the split for before, for the end of a sentence
    dataset: Dataset
    score: Score


@cli.script
def main(argv: list[str] | None = None) -> None:
    arguments = cli.parse(
        Arguments, argv=argv, usage=("RUN [--FLAG VALUE ...]",), description=__doc__, subject="--ckpt"
    )
    split, also, dataset, found = evaluate_model(arguments, cli.load_model(arguments.ckpt, arguments.backbone))
    # Printed before a file can fail: the table is what took the time.
    print_lines(*found.table.split("\n"), f"split      {split} of {dataset.name}{also}")
    if found.detections is None:  # proposals are not written to files
        return
    ckpt = arguments.ckpt
    run = ckpt.parent if ckpt.is_file() else checkpoint.run_of(ckpt)
    out = arguments.out or run_folder.evaluation_folder(run, split)
    write_coco_json(out / "detections.json", found.detections, dataset)
    left_out = write_voc_files(out, found.detections, dataset, split=split)
    print_lines(f"files      {out}", *(f"           {sentence}" for sentence in left_out))
    if arguments.report and found.metrics is not None:
        own = None if ckpt.is_file() else checkpoint.load_run_config(ckpt)
        page = Evaluation(
            name=str(ckpt),
            split=split,
            also=also,
            dataset=dataset,
            analysis=analyse(found.detections, dataset),
            metrics=found.metrics,
            config=own,
            history=None if own is None else read_history(run_folder.metrics_path(run)),
        )
        print_lines(f"report     {write_report(out / FILE, page)}")


def evaluate_model(arguments: Arguments, model: Detector) -> Evaluated:
    """Returns the results of `model`, which was loaded from `arguments.ckpt`, on one split.

    Raises:
      InputError: the data cannot be used.
    """
    ckpt = arguments.ckpt
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise InputError(f"--batch_size must be positive, got {arguments.batch_size}")
    config = None if ckpt.is_file() else checkpoint.load_run_config(ckpt)
    if config is not None and config.train.scheme == "rpn" and not arguments.proposals:
        raise InputError(f"--ckpt {ckpt}: this is an RPN trained alone; add --proposals to evaluate its proposals")
    split, dataset = _dataset(arguments, config, model)
    batch_size = arguments.batch_size or _batch_size(config)
    of = "proposals" if arguments.proposals else "detections"
    found = score(model, dataset, of=of, batch_size=batch_size, implementation=arguments.implementation)
    also = ""
    if config is not None and (arguments.root is None or _is_own_data(arguments, config)):
        chose = is_within(split, config.train.best_split or config.data.test_split)
        also = also_used(chose=chose, trained=is_within(split, config.data.train_split))
    return Evaluated(split, also, dataset, found)


def _dataset(arguments: Arguments, config: Config | None, model: Detector) -> tuple[str, Dataset]:
    """Returns the split to evaluate: of the run's own data, or of the folder `--root`."""
    root, split = arguments.root, arguments.split
    if _is_own_data(arguments, config):
        root = None  # with the division of the run
    if root is None:
        if config is None:
            raise InputError(f"--ckpt {arguments.ckpt}: a weights file names no data; add --root FOLDER")
        # An evaluation never draws the data set: a relative root may belong to another working directory.
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, shapes=None))
        split = split or config.data.test_split
        return split, stored_split(config, checkpoint.run_of(arguments.ckpt), split)
    data = DataConfig(root=root) if config is None else config.data
    data = dataclasses.replace(data, root=root, shapes=None, class_names=model.class_names, split=())
    if data.layout != "tfds":
        recognised = arguments.layout == AUTO
        splits = sources.recognise(root, follow_links=data.follow_links).splits if recognised else ()
        data = sources.with_layout(dataclasses.replace(data, layout=arguments.layout))
        split = split or _held_out(splits, data.test_split)
    split = split or data.test_split
    return split, sources.open_split(data, split)


def _is_own_data(arguments: Arguments, config: Config | None) -> bool:
    """Returns whether `--root` is the folder that the run was trained on."""
    if arguments.root is None or config is None or arguments.layout != AUTO:
        return False
    return arguments.root.resolve() == config.data.root.resolve()


def _held_out(splits: tuple[str, ...], usual: str) -> str:
    """Returns the split that a folder holds out of training; a folder with one split is evaluated whole."""
    wanted = (usual, "test", "val", "valid", "validation", *splits)
    return next((name for name in wanted if name in splits), usual)


def _batch_size(config: Config | None) -> int:
    return 1 if config is None else per_device(config.train.batch_size // config.train.accumulate)


if __name__ == "__main__":
    cli.run_as_program(main)
