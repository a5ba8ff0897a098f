"""Writes a detector as StableHLO programs: fasterrcnn-jax export RUN

The file takes uint8 images and returns boxes in pixels of the original images. fasterrcnn_jax.load_exported reads it,
and so does fasterrcnn_jax/exported.py by itself, which needs JAX and flatbuffers alone. The batch size is free. RUN is
--ckpt without the flag.
"""

import dataclasses
import time
from pathlib import Path

from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.exported import read_manifest
from fasterrcnn_jax.inference.exporting import Platform, save_exported
from fasterrcnn_jax.printing import print_lines
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.training import checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    ckpt: Path
    """run folder (uses its best checkpoint), one checkpoint folder RUN/checkpoints/STEP, or a weights file"""
    backbone: str | None = None
    """MODULE:CLASS of your own backbone, if the model was trained with one; the class is imported"""
    canvas: tuple[int, int] | None = None
    """HEIGHT WIDTH of the largest image that the program takes; None: the largest sides of the model's canvases"""
    platforms: tuple[Platform, ...] = ("cpu", "cuda", "tpu")
    """what the program is lowered for"""
    output: Path | None = None
    """file to write; None: exported.zip in the run folder, or the weights file's name with .zip"""


@cli.script
def main(argv: list[str] | None = None) -> None:
    usage = ("RUN | WEIGHTS [--canvas HEIGHT WIDTH] [--platforms cpu cuda tpu] [--output FILE]",)
    arguments = cli.parse(Arguments, argv=argv, usage=usage, description=__doc__, subject="--ckpt")
    path, started = arguments.ckpt, time.monotonic()
    output = arguments.output or (path / "exported.zip" if path.is_dir() else path.with_suffix(".zip"))
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder; give the name of a file")
    if output.resolve() == path.resolve():
        raise InputError(f"--output {output}: would replace the weights that are exported; give another name")
    model = cli.load_model(path, arguments.backbone)
    if path.is_dir():
        scheme = checkpoint.load_run_config(path).train.scheme
        if scheme in ("rpn", "fast_rcnn"):
            raise InputError(f"--ckpt {path}: train.scheme was {scheme}, so a part of the detector was not trained")
    save_exported(model, output, canvas=arguments.canvas, platforms=arguments.platforms)
    took = time.monotonic() - started
    manifest, digest = read_manifest(output)
    print_lines(
        f"file       {output}, {output.stat().st_size / 1e6:.1f} MB, in {took:.1f} s",
        f"digest     {digest}",
        "input      uint8 images [batch, {}, {}, 3], sizes [batch, 2]".format(*manifest["canvas"]),
        "canvases   {} of the network (height x width)".format(
            ", ".join("{} x {}".format(*program["network_canvas"]) for program in manifest["programs"])
        ),
        f"platforms  {', '.join(manifest['platforms'])}",
        f"classes    {len(manifest['class_names'])}",
    )


if __name__ == "__main__":
    cli.run_as_program(main)
