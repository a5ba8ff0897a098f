"""Evaluates a checkpoint: python evaluate.py --ckpt runs/shapes

Model and configuration come from the checkpoint alone. Prints average precision per class and writes
detections as COCO json and as VOC comp4 files. With --proposals: how many objects the RPN's proposals cover.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from fasterrcnn_jax.data import sources
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.files import write_coco_json, write_voc_files
from fasterrcnn_jax.inference.scoring import score
from fasterrcnn_jax.processes import per_device
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.training import checkpoint, run_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    ckpt: Path
    """run folder (its newest checkpoint) or one of its checkpoints/STEP"""
    root: Path | None = None
    """folder laid out as the one trained on; default: that one"""
    split: str | None = None
    """split, or several joined by +; default: the configuration's test split"""
    batch_size: int | None = None
    """images detected at once, on one device; default: a device's share of the training batch"""
    implementation: Literal["xla", "mosaic"] | None = None
    """of NMS and region features: plain JAX, GPU kernels, or None: the kernels where they can run"""
    proposals: bool = False
    """print the recall of the proposals in place of detecting; what an RPN trained alone is judged by"""
    out: Path | None = None
    """folder for the result files; default: evaluation/SPLIT in the run folder"""


@cli.script
def main(argv: list[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, description=__doc__, args=argv, use_underscores=True)
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise InputError(f"--batch_size must be positive, got {arguments.batch_size}")
    model = checkpoint.load(arguments.ckpt)
    config = checkpoint.load_run_config(arguments.ckpt)
    if config.train.scheme == "rpn" and not arguments.proposals:
        raise InputError(f"--ckpt {arguments.ckpt}: is an RPN trained alone, whose proposals --proposals evaluates")
    split = arguments.split or config.data.test_split
    root = arguments.root or config.data.root
    out = arguments.out or run_folder.evaluation_folder(checkpoint.run_of(arguments.ckpt), split)

    # An evaluation never makes a data set: a relative root may be meant from another folder.
    dataset = sources.open_split(dataclasses.replace(config.data, root=root, shapes=None), split)
    batch_size = arguments.batch_size or per_device(config.train.batch_size // config.train.accumulate)
    options = dict(batch_size=batch_size, implementation=arguments.implementation)
    if arguments.proposals:
        print(score(model, dataset, of="proposals", **options).table)
        return
    found = score(model, dataset, **options)

    out.mkdir(parents=True, exist_ok=True)
    write_coco_json(out / "detections.json", found.detections, dataset)
    write_voc_files(out, found.detections, dataset, split=split)
    print(found.table)
    print(f"files      {out}")


if __name__ == "__main__":
    main()
