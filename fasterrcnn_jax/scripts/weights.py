"""Shows and converts weights files: fasterrcnn-jax weights inspect FILE, fasterrcnn-jax weights convert SOURCE OUT

Code in a file is never run. fasterrcnn_jax.load_weights loads any of these files into a detector.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.printing import print_lines, printable
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.weights import files, save_weights
from fasterrcnn_jax.weights.load import FORMAT, formats_of

USAGE = ("inspect FILE", "convert SOURCE OUT [--backbone MODULE:CLASS]")


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Shows the format and the arrays of a weights file."""

    file: Annotated[Path, tyro.conf.Positional]
    """weights file: .safetensors, .pth of PyTorch, or .pkl of NumPy arrays"""


@dataclasses.dataclass(frozen=True)
class Convert:
    """Writes weights as .safetensors, a format that cannot contain code.

    Our own detectors are written with the array names of torchvision if they have a pyramid, otherwise with the names
    of faster-rcnn.pytorch. A file of another program keeps its array names and arrays.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """run folder (uses its best checkpoint), one checkpoint folder RUN/checkpoints/STEP, or a weights file"""
    out: Annotated[Path, tyro.conf.Positional]
    """.safetensors file to write"""
    backbone: str | None = None
    """MODULE:CLASS of the backbone of your own that the model was trained with; the class is imported"""


@cli.script
def main(argv: list[str] | None = None) -> None:
    arguments = cli.parse(Inspect, Convert, argv=argv, usage=USAGE, description=__doc__)
    if isinstance(arguments, Inspect):
        inspect(arguments.file)
    else:
        convert(arguments.source, arguments.out, arguments.backbone)


def inspect(file: Path) -> None:
    weights = files.read(file)
    formats = [f"{known.name}  {known.source}" for known in formats_of(weights)] or ["unknown"]
    names = list(map(printable, weights.arrays))
    width = max(map(len, names))
    print_lines(
        *(f"{'or' if number else 'format':10} {name}" for number, name in enumerate(formats)),
        f"arrays     {len(weights.arrays)}",
        f"numbers    {sum(array.size for array in weights.arrays.values()):,}",
        f"sha256     {weights.sha256}",
        *(
            f"{name:{width}}  {array.dtype}  {' x '.join(map(str, array.shape))}"
            for name, array in zip(names, weights.arrays.values(), strict=True)
        ),
    )


def convert(source: Path, out: Path, backbone: str | None = None) -> None:
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: the output file must end in .safetensors")
    if source.is_dir():
        save_weights(cli.load_model(source, backbone), out)
    else:
        weights = files.read(source)
        found = formats_of(weights)
        if not found:
            raise InputError(f"{source}: the format is unknown; `weights inspect` shows the arrays in the file")
        files.write(out, weights.arrays, weights.metadata | ({FORMAT: found[0].name} if len(found) == 1 else {}))
    print_lines(f"file       {out}")


if __name__ == "__main__":
    cli.run_as_program(main)
