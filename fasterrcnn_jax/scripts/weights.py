"""Weights of other programs: fasterrcnn-jax weights inspect FILE, fasterrcnn-jax weights convert IN OUT

No code in a file is ever run. A detector takes its weights from any of them with fasterrcnn_jax.load_weights.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.training import checkpoint
from fasterrcnn_jax.weights import files, save_weights
from fasterrcnn_jax.weights.load import FORMAT, formats_of


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Shows what a file of weights is and what it holds."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """.safetensors, .pth of torch, or .pkl of NumPy arrays"""


@dataclasses.dataclass(frozen=True)
class Convert:
    """Writes weights as .safetensors, a format without code.

    A detector of ours is written under the names of torchvision, where it has a pyramid, or of faster-rcnn.pytorch.
    A file of another program keeps its names and arrays.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """run folder (its newest checkpoint), one of its checkpoints/STEP, or a file"""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """the .safetensors file"""


@cli.script
def main(argv: list[str] | None = None) -> None:
    arguments = tyro.cli(Inspect | Convert, description=__doc__, args=argv, use_underscores=True)
    if isinstance(arguments, Inspect):
        inspect(arguments.file)
    else:
        convert(arguments.source, arguments.out)


def inspect(file: Path) -> None:
    weights = files.read(file)
    names = [f"{known.name}  {known.source}" for known in formats_of(weights)] or ["unknown"]
    print(f"format     {f'{chr(10)}or         '.join(names)}")
    print(f"arrays     {len(weights.arrays)}")
    print(f"numbers    {sum(array.size for array in weights.arrays.values()):,}")
    print(f"sha256     {weights.sha256}")
    width = max(map(len, weights.arrays))
    for name, array in weights.arrays.items():
        print(f"{name:{width}}  {array.dtype}  {' x '.join(map(str, array.shape))}")


def convert(source: Path, out: Path) -> None:
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: .safetensors is what is written")
    if source.is_dir():
        save_weights(checkpoint.load(source), out)
    else:
        weights = files.read(source)
        found = formats_of(weights)
        if not found:
            raise InputError(f"{source}: of no known format; `weights inspect` shows what it holds")
        files.write(out, weights.arrays, weights.metadata | ({FORMAT: found[0].name} if len(found) == 1 else {}))
    print(f"file       {out}")


if __name__ == "__main__":
    main()
