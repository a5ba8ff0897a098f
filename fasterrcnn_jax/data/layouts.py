"""Describes a recognised layout of labelled images. Each reader module has a function `recognise` that returns one.

`sources.recognise` asks the readers one after another; `sources.with_layout` resolves `data.layout` "auto".
"""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.errors import InputError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

# Names of folders and files that stand for a split, in the order in which splits are listed.
SPLIT_NAMES = (
    *("train", "training", "trainval"),
    *("valid", "val", "validation", "dev", "eval", "evaluation"),
    *("test", "testing"),
)
# The split of a folder that is not split.
WHOLE = "all"


class Layout(NamedTuple):
    """The layout of a folder of labelled images."""

    name: str  # for messages, for example "PASCAL VOC with XML files beside the images"
    why: str  # one clause: the files that were seen
    data: DataConfig  # root, layout, the fields of the layout and the class names
    splits: tuple[str, ...]  # in the order train, valid or val, test, others
    notes: tuple[str, ...] = ()  # sentences


def composed(name: str) -> str:
    """Returns a name with its accents composed (Unicode NFC): macOS writes ä as two characters, other systems as one.

    Names are compared in this form; files are opened with the names that they have.
    """
    return unicodedata.normalize("NFC", name)


def in_order(splits: set[str]) -> tuple[str, ...]:
    """Returns the names of splits in the order of `SPLIT_NAMES`; others, for example with a year, follow sorted."""
    first = [split for name in SPLIT_NAMES for split in sorted(splits) if split.lower() == name]
    return (*first, *sorted(splits.difference(first)))


def split_among(parts: Iterable[str]) -> str | None:
    """Returns the first part of a path that is the name of a split in any letter case; None without one."""
    return next((part for part in parts if part.lower() in SPLIT_NAMES), None)


def splits_of(root: Path, pattern: str) -> tuple[str, ...] | None:
    """Returns the names that stand for {split} in the existing paths `root`/`pattern`; None if it has no {split}."""
    if "{split}" not in pattern:
        return None
    before, after = pattern.split("{split}", 1)
    # A pattern can have the split twice: train/train.json.
    wild = re.sub(r"([*?[])", r"[\1]", pattern).replace("{split}", "*")
    of_name = re.compile(re.escape(before) + "([^/]+)" + re.escape(after).replace(re.escape("{split}"), r"\1"))
    found = (of_name.fullmatch(path.relative_to(root).as_posix()) for path in root.glob(wild))
    return in_order({match[1] for match in found if match})


def part_of_a_name(split: str) -> bool:
    """Returns whether a split can be part of a file name: it must not lead out of the folder."""
    return bool(split) and split not in (".", "..") and re.search(r"[/\\\0]", split) is None


def no_such_split(what: str, splits: tuple[str, ...]) -> InputError:
    """Returns the error about a missing split, with the ways out; `what` names the file."""
    if not splits:
        return InputError(f"{what}; the existing splits are: none")
    return InputError(
        f"{what}; the existing splits are: {', '.join(splits)}; name one, for example --data.test_split {splits[0]}, "
        "or divide the training split with --data.split"
    )


def _is_run_folder(folders: list[str], files: list[str]) -> bool:
    # A name alone could be that of data: a training writes both.
    return "checkpoints" in folders and "config.json" in files


def _is_result_folder(files: list[str]) -> bool:
    return "job.json" in files and "detections.jsonl" in files


def names_below(folder: Path, *, follow_links: bool = False) -> tuple[str, ...]:
    """Returns the sorted paths of all files below `folder`, relative to it and with /.

    Hidden files and folders are left out, and so are the run folders of trainings and the folders that `predict` wrote,
    whose images are no data, and linked folders unless `follow_links`; a folder that is reached twice is listed once.
    """
    names, seen = [], set()
    for path, folders, files in os.walk(folder, followlinks=follow_links):
        real = os.path.realpath(path)
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        below = Path(path).relative_to(folder)
        if real in seen or (below.parts and (_is_run_folder(folders, files) or _is_result_folder(files))):
            folders.clear()
            continue
        seen.add(real)
        names += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return tuple(sorted(names))
