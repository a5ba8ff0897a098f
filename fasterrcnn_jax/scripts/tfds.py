"""Stores voc/2007, voc/2012 or coco/2017 for TFDS, without TensorFlow: fasterrcnn-jax tfds voc/2007 ARCHIVES

ARCHIVES is the folder with the downloaded archives, or with their unpacked contents. To train on the stored data set,
give --data.layout tfds --data.tfds_name voc/2007 --data.root ROOT.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fasterrcnn_jax.data import tfds_builder
from fasterrcnn_jax.printing import print_lines
from fasterrcnn_jax.scripts import cli


@dataclasses.dataclass(frozen=True)
class Arguments:
    name: Annotated[Literal["voc/2007", "voc/2012", "coco/2017"], tyro.conf.Positional]
    """data set to store: voc/2007, voc/2012 or coco/2017"""
    archives: Annotated[Path, tyro.conf.Positional]
    """folder with the archives, or with their unpacked contents; voc/2007: VOCtrainval_06-Nov-2007.tar and
    VOCtest_06-Nov-2007.tar; voc/2012: VOCtrainval_11-May-2012.tar; coco/2017: train2017.zip, val2017.zip and
    annotations_trainval2017.zip"""
    root: Path = Path("~/tensorflow_datasets")
    """data_dir of TFDS; the archives are unpacked into it temporarily"""


@cli.script
def main(argv: list[str] | None = None) -> None:
    arguments = cli.parse(Arguments, argv=argv, usage=("NAME ARCHIVES [--root ROOT]",), description=__doc__)
    folder, counts = tfds_builder.build(arguments.name, arguments.archives, arguments.root.expanduser())
    lines = [f"{split:10} {count} images" for split, count in counts.items()]
    print_lines(*lines, f"folder     {folder}")


if __name__ == "__main__":
    cli.run_as_program(main)
