"""Evaluates a checkpoint: python evaluate.py runs/shapes, or --ckpt runs/shapes

The model and the configuration come from the checkpoint. Prints the average precision per class, and writes the
detections as COCO JSON and as VOC comp4 files. With --proposals, prints how many objects the RPN's proposals cover.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from fasterrcnn_jax.data import sources
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.files import write_coco_json, write_voc_files
from fasterrcnn_jax.inference.scoring import score
from fasterrcnn_jax.printing import print_lines
from fasterrcnn_jax.processes import per_device
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.training import checkpoint, run_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    ckpt: Path
    """run folder (uses its best checkpoint), or one checkpoint folder RUN/checkpoints/STEP"""
    backbone: str | None = None
    """MODULE:CLASS of your own backbone, if the model was trained with one; the class is imported"""
    root: Path | None = None
    """data set folder with the layout of the training data; None: the folder that the run was trained on"""
    split: str | None = None
    """split to evaluate, or several joined by +; None: the configuration's test split"""
    batch_size: int | None = None
    """number of images detected at once, on one device; None: one device's share of the training batch"""
    implementation: Literal["xla", "mosaic"] | None = None
    """implementation of NMS and region features: xla: plain JAX; mosaic: GPU kernels; None: GPU kernels where they can
    run"""
    proposals: bool = False
    """print the recall of the proposals instead of detecting; use it for an RPN that was trained alone"""
    out: Path | None = None
    """folder for the result files; None: evaluation/SPLIT in the run folder"""


@cli.script
def main(argv: list[str] | None = None) -> None:
    arguments = cli.parse(Arguments, argv, subject="--ckpt", description=__doc__)
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise InputError(f"--batch_size must be positive, got {arguments.batch_size}")
    config = checkpoint.load_run_config(arguments.ckpt)
    model = cli.load_model(arguments.ckpt, arguments.backbone)
    if config.train.scheme == "rpn" and not arguments.proposals:
        raise InputError(
            f"--ckpt {arguments.ckpt}: this is an RPN trained alone; add --proposals to evaluate its proposals"
        )
    split = arguments.split or config.data.test_split
    root = arguments.root or config.data.root
    out = arguments.out or run_folder.evaluation_folder(checkpoint.run_of(arguments.ckpt), split)

    # An evaluation never draws the data set: a relative root may belong to another working directory.
    dataset = sources.open_split(dataclasses.replace(config.data, root=root, shapes=None), split)
    batch_size = arguments.batch_size or per_device(config.train.batch_size // config.train.accumulate)
    of = "proposals" if arguments.proposals else "detections"
    found = score(model, dataset, of=of, batch_size=batch_size, implementation=arguments.implementation)
    # Printed before a file can fail: the table is what took the time.
    print_lines(*found.table.split("\n"))
    if found.detections is None:  # proposals are not written to files
        return
    write_coco_json(out / "detections.json", found.detections, dataset)
    write_voc_files(out, found.detections, dataset, split=split)
    print_lines(f"files      {out}")


if __name__ == "__main__":
    cli.run_as_program(main)
