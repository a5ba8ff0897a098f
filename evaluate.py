"""Evaluates a checkpoint: fasterrcnn-jax evaluate runs/shapes

RUN is --ckpt without the flag. The model and the configuration come from the checkpoint. Prints the average precision
per class, by IoU and by size, the best score thresholds, and the kinds of errors. Writes them as metrics.json, and the
detections as COCO JSON and as VOC comp4 files. With --compare, prints how other runs differ on the same images. With
--proposals, prints how many objects the RPN's proposals cover. With --given FILE, detects in the proposals of a file
instead of the RPN's.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Literal, NamedTuple

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.config import Config, DataConfig
from fasterrcnn_jax.config.checks import AUTO, fitted
from fasterrcnn_jax.config.data import Layout
from fasterrcnn_jax.config.rules import differences
from fasterrcnn_jax.config.train import CocoBackend
from fasterrcnn_jax.data import sources
from fasterrcnn_jax.data.proposal_files import own_proposals
from fasterrcnn_jax.data.records import Dataset, joined_names
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.analysis import analyse
from fasterrcnn_jax.evaluation.comparison import compare, comparison_dict, format_comparison
from fasterrcnn_jax.evaluation.files import write_coco_json, write_voc_files
from fasterrcnn_jax.evaluation.report import details_dict, format_analysis, format_coco
from fasterrcnn_jax.inference.dataset import detect_dataset
from fasterrcnn_jax.inference.scoring import Score, score
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.printing import print_lines, printable
from fasterrcnn_jax.processes import per_device
from fasterrcnn_jax.report.evaluation_page import FILE, Compared, Evaluation, write_report
from fasterrcnn_jax.report.history import read_history
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.training import checkpoint, run_folder
from fasterrcnn_jax.training.evaluation import also_used, chose_among_several, is_within
from fasterrcnn_jax.training.preparation import stored_split
from fasterrcnn_jax.training.progress import evaluated_steps


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
    given: Path | None = None
    """file of proposals to detect in, instead of the RPN's; {split} in it stands for the name of the split; None: the
    file that a run of train.scheme fast_rcnn names, and for any other run the RPN's proposals"""
    report: bool = False
    """write report.html too: the results with their errors, as one page that opens from disk"""
    coco_backend: CocoBackend | None = None
    """package that computes COCO's metrics; None: train.coco_backend of the run"""
    soft_nms: Literal["off", "linear", "gaussian"] | None = None
    """instead of model.postprocess.soft_nms; off: NMS; None: as in the run"""
    test_flip: bool | None = None
    """instead of model.test_augment.flip; None: as in the run"""
    test_scales: tuple[float, ...] | None = None
    """instead of model.test_augment.scales; None: as in the run"""
    compare: tuple[Path, ...] = ()
    """other runs, checkpoints or weights files with the same classes: print how their average precision on the same
    images differs; the options above do not apply to them"""
    out: Path | None = None
    """folder for the result files; None: evaluation/SPLIT in the run folder, or beside the weights file;
    evaluation/FOLDER_SPLIT for a --root that the run was not trained on"""


class Evaluated(NamedTuple):
    """A model's results on one split."""

    split: str
    also: str  # what the run used the split for before, for the end of a sentence
    dataset: Dataset
    score: Score
    model: Detector  # with the options of the command line in its configuration


@cli.script
def main(argv: list[str] | None = None) -> None:
    arguments = cli.parse(
        Arguments, argv=argv, usage=("RUN [--FLAG VALUE ...]",), description=__doc__, subject="--ckpt"
    )
    model = cli.load_model(arguments.ckpt, arguments.backbone)
    _check_compared(arguments, model)  # before the evaluation takes its time
    evaluated = evaluate_model(arguments, model)
    split, also, dataset, found, _ = evaluated
    split_line = f"split      {split} of {dataset.name}{also}"
    if found.detections is None or found.metrics is None:  # proposals are not written to files
        print_lines(*found.table.split("\n"), split_line)
        return
    analysis = analyse(found.detections, dataset)
    # Printed before a file can fail: the table is what took the time.
    details = f"{format_coco(dataset, found.metrics.coco)}\n{format_analysis(dataset, analysis)}"
    print_lines(*details.split("\n"), *found.table.split("\n"), split_line)
    ckpt = arguments.ckpt
    run = ckpt.parent if ckpt.is_file() else checkpoint.run_of(ckpt)
    config = _run_config(ckpt)
    out = arguments.out or run_folder.evaluation_folder(run, _folder_name(arguments, config, split))
    write_coco_json(out / "detections.json", found.detections, dataset)
    left_out = write_voc_files(out, found.detections, dataset, split=split)
    content = details_dict(found.metrics, analysis, dataset)
    write_atomically(out / "metrics.json", json.dumps(content, indent=1, allow_nan=False))
    print_lines(f"files      {out}", *(f"           {sentence}" for sentence in left_out))
    compared = [_compared(arguments, evaluated, other) for other in arguments.compare]
    if compared:
        content = {
            one.name: comparison_dict(one.result, dataset)
            | {"settings": {name: {"first": old, "second": new} for name, old, new in one.settings}}
            for one in compared
        }
        write_atomically(out / "comparison.json", json.dumps(content, indent=1, allow_nan=False))
    if arguments.report:
        page = Evaluation(
            name=str(ckpt),
            split=split,
            also=also,
            dataset=dataset,
            analysis=analysis,
            metrics=found.metrics,
            config=None if config is None else dataclasses.replace(config, model=evaluated.model.config),
            step=None if config is None else checkpoint.step_of(ckpt),
            history=None if config is None else read_history(run_folder.metrics_path(run)),
            compared=tuple(compared),
        )
        print_lines(f"report     {write_report(out / FILE, page)}")


def _check_compared(arguments: Arguments, model: Detector) -> None:
    """Raises InputError if a run of `--compare`, or the evaluated one beside it, cannot be compared."""
    for other in arguments.compare:
        theirs = cli.load_model(other, arguments.backbone).class_names
        if theirs != model.class_names:
            raise InputError(
                f"--compare {other}: its classes are {joined_names(theirs)}, and those of {arguments.ckpt} are "
                f"{joined_names(model.class_names)}; compare models with the same classes in the same order"
            )
        for ckpt in (arguments.ckpt, other):
            config = _run_config(ckpt)
            if config is not None and config.train.scheme in ("rpn", "fast_rcnn"):
                raise InputError(
                    f"--compare {other}: {ckpt} has train.scheme {config.train.scheme}, which trains a part of the "
                    "detector; compare whole detectors"
                )


def _compared(arguments: Arguments, evaluated: Evaluated, other: Path) -> Compared:
    """Prints how the model of `other` differs from the evaluated one, and returns it."""
    dataset, first = evaluated.dataset, evaluated.score.detections
    assert first is not None, "proposals are not compared"
    model = cli.load_model(other, arguments.backbone)
    config = _run_config(other)
    batch_size = arguments.batch_size or _batch_size(config)
    second = detect_dataset(model, dataset, batch_size=batch_size, implementation=arguments.implementation)
    result = compare(first, second, dataset)
    table = format_comparison(result, dataset, printable(arguments.ckpt), printable(other))
    mine = _run_config(arguments.ckpt)
    if mine is None or config is None:  # a weights file has no other settings
        changed = differences(evaluated.model.config, model.config)
    else:
        mine = dataclasses.replace(mine, model=evaluated.model.config)
        changed = differences(mine, dataclasses.replace(config, model=model.config))
    uses = ""
    if config is not None and _same_data(mine, config):
        uses = _also(config, evaluated.split, checkpoint.run_of(other))
    lines = [f"           {printable(name)}: {printable(old)} -> {printable(new)}" for name, old, new in changed]
    print_lines(
        *table.split("\n"),
        *([f"split      {evaluated.split}{uses} by {printable(other)}"] if uses else []),
        f"settings   {len(changed)} fields differ",
        *lines,
    )
    return Compared(str(other), result, tuple(changed), uses)


def _run_config(ckpt: Path) -> Config | None:
    return None if ckpt.is_file() else checkpoint.load_run_config(ckpt)


def _same_data(first: Config | None, second: Config) -> bool:
    return first is not None and first.data.root.resolve() == second.data.root.resolve()


def _also(config: Config, split: str, run: Path) -> str:
    """Returns what a run used a split of its own data for before, as the end of a sentence."""
    chosen_on = config.train.best_split or config.data.test_split
    last, evaluated = fitted(config.train.steps, "train.steps"), len(evaluated_steps(run, chosen_on))
    chose = is_within(split, chosen_on) and chose_among_several(config.train, last=last, evaluated=evaluated)
    return also_used(chose=chose, trained=is_within(split, config.data.train_split))


def _with_options(model: Detector, arguments: Arguments) -> Detector:
    """Returns the model with the options of the command line in its configuration."""
    config = model.config
    postprocess, augment = config.postprocess, config.test_augment
    if arguments.soft_nms is not None:
        kind = None if arguments.soft_nms == "off" else arguments.soft_nms
        postprocess = dataclasses.replace(postprocess, soft_nms=kind)
    try:
        if arguments.test_flip is not None:
            augment = dataclasses.replace(augment, flip=arguments.test_flip)
        if arguments.test_scales is not None:
            augment = dataclasses.replace(augment, scales=arguments.test_scales)
        config = dataclasses.replace(config, postprocess=postprocess, test_augment=augment)
    except ValueError as error:
        raise InputError(f"--test_scales: {error}") from error
    other = copy.copy(model)
    other.config = config
    return other


def evaluate_model(arguments: Arguments, model: Detector) -> Evaluated:
    """Returns the results of `model`, which was loaded from `arguments.ckpt`, on one split.

    Raises:
      InputError: the data cannot be used.
    """
    ckpt = arguments.ckpt
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise InputError(f"--batch_size must be positive, got {arguments.batch_size}")
    config = _run_config(ckpt)
    if arguments.compare and arguments.proposals:
        raise InputError("--compare compares detections; leave out --proposals")
    if arguments.report and arguments.proposals:
        raise InputError("--report shows detections; leave out --proposals")
    if config is not None and config.train.scheme == "rpn" and not arguments.proposals:
        raise InputError(f"--ckpt {ckpt}: this is an RPN trained alone; add --proposals to evaluate its proposals")
    given = arguments.given
    if config is not None and config.train.scheme == "fast_rcnn":
        if arguments.proposals:
            raise InputError(f"--ckpt {ckpt}: this is a box head trained alone, without an RPN; leave out --proposals")
        given = given or config.data.proposals
    if given is not None and arguments.proposals:
        raise InputError(
            f"--given {given}: the proposals of a file are not the RPN's; leave out --given or --proposals"
        )
    split, dataset = _dataset(arguments, config, model)
    batch_size = arguments.batch_size or _batch_size(config)
    of = "proposals" if arguments.proposals else "detections" if given is None else "detections in given proposals"
    proposals = None
    if given is not None:
        field, limit = "model.test_proposals.post_nms_top_n", model.config.test_proposals.post_nms_top_n
        proposals = own_proposals(given, split, dataset, field=field, limit=limit)
    backend = arguments.coco_backend or ("pycocotools" if config is None else config.train.coco_backend)
    model = _with_options(model, arguments)
    found = score(
        model,
        dataset,
        of=of,
        given=proposals,
        batch_size=batch_size,
        implementation=arguments.implementation,
        coco_backend=backend,
    )
    also = ""
    if config is not None and (arguments.root is None or _is_own_data(arguments, config)):
        also = _also(config, split, checkpoint.run_of(ckpt))
    return Evaluated(split, also, dataset, found, model)


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
        # The places of the run's own data say nothing about another folder.
        given = DataConfig(root=root, layout=arguments.layout)
        places = {name: getattr(given, name) for name in ("layout", *sources.PLACES)}
        data, layout = sources.placed(dataclasses.replace(data, **places))
        split = split or _held_out(() if layout is None else layout.splits, data.test_split)
    split = split or data.test_split
    return split, sources.open_split(data, split)


def _is_own_data(arguments: Arguments, config: Config | None) -> bool:
    """Returns whether `--root` is the folder that the run was trained on."""
    if arguments.root is None or config is None or arguments.layout != AUTO:
        return False
    return arguments.root.resolve() == config.data.root.resolve()


def _folder_name(arguments: Arguments, config: Config | None, split: str) -> str:
    """Returns the name of the folder of the results; results on other data do not replace those on the run's own."""
    if arguments.root is None or config is None or _is_own_data(arguments, config):
        return split
    return f"{arguments.root.resolve().name}_{split}"


def _held_out(splits: tuple[str, ...], usual: str) -> str:
    """Returns the split that a folder holds out of training; a folder with one split is evaluated whole."""
    wanted = (usual, "test", "val", "valid", "validation", *splits)
    return next((name for name in wanted if name in splits), usual)


def _batch_size(config: Config | None) -> int:
    return 1 if config is None else per_device(config.train.batch_size // config.train.accumulate)


if __name__ == "__main__":
    cli.run_as_program(main)
