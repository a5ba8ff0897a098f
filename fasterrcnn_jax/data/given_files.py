"""Lists the images and videos that a user gives: files, folders, patterns, and a list on standard input."""

import glob
import io
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fasterrcnn_jax.data.faults import findings_of, notes_of
from fasterrcnn_jax.data.file_names import is_image
from fasterrcnn_jax.data.layouts import IMAGE_EXTENSIONS, names_below
from fasterrcnn_jax.data.records import joined_names
from fasterrcnn_jax.errors import InputError

# The containers that `video` reads; see there for the reason that the extension decides.
VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")

STANDARD_INPUT = "-"
IGNORED = "Hidden files, subfolders and files without an image extension were ignored"
OWN_RESULTS = "Files in the folders of --out that hold drawn images and crops were ignored"


class GivenFile(NamedTuple):
    """One image file or video file."""

    id: str  # its name in results; unique
    path: Path

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_EXTENSIONS


def list_given(
    given: Sequence[Path], *, recursive: bool = False, written: Sequence[Path] = ()
) -> tuple[list[GivenFile], tuple[str, ...]]:
    """Returns the given files in their order, and notes about what was ignored; opens no file.

    The id of a file is its name; if several files have one name, it is the path below the folder that all files are in.
    A file that is given twice is listed once. In a folder, the files with an image extension are listed, sorted by
    name; hidden files, other files and subfolders are ignored, and a note counts them.

    Args:
      given: image files, video files and folders; patterns such as `photos/**/*.jpg`, as `glob` reads them, whose
        matches with the extension of an image or a video are listed; `-` for a list on standard input, one file per
        line, or with a null byte after each (`find -print0`). A line that is no file is listed all the same: reading
        it reports the error later.
      recursive: list the images of the folders inside a folder too, but not of linked folders, of run folders and of
        folders that `predict` wrote.
      written: folders that the command writes images into; files in them are ignored, and a note counts them.
    Raises:
      InputError: a path does not exist, or there is no file.
    """
    found = defaultdict(list)
    listed: dict[str, Path] = {}
    results = tuple(os.path.join(os.path.realpath(folder), "") for folder in written)
    for place in given:
        for path in _files_of(place, recursive, found[IGNORED]):
            real = os.path.realpath(path)
            if real.startswith(results):
                found[OWN_RESULTS].append(str(path))
            else:
                listed.setdefault(real, path)
    if not listed:
        if found[OWN_RESULTS]:
            raise InputError(f"{found[OWN_RESULTS][0]}: --out writes images into this folder; choose another --out")
        if list(map(str, given)) == [STANDARD_INPUT]:
            raise InputError("standard input: no file is listed")
        # Not all names: a shell may have made thousands of a pattern.
        title = joined_names([str(place) for place in given], 3)
        raise InputError(f"{title}: contains no readable image with an extension of {' '.join(IMAGE_EXTENSIONS)}")
    names = Counter(path.name for path in listed.values())
    # Not `absolute`, which keeps "..": an id is also the name of a file that `predict` writes.
    folders = {os.path.dirname(os.path.abspath(path)) for path in listed.values()}
    shared = os.path.commonpath(folders)
    files = [
        GivenFile(path.name if names[path.name] == 1 else Path(os.path.relpath(path, shared)).as_posix(), path)
        for path in listed.values()
    ]
    return files, notes_of(findings_of(defaultdict(list, {key: places for key, places in found.items() if places})))


def _files_of(place: Path, recursive: bool, ignored: list[str]) -> Iterator[Path]:
    if str(place) == STANDARD_INPUT:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes of a name that are no text
        text = sys.stdin.read()
        # A name can hold a line break; `find -print0` is meant for such names.
        names = text.split("\0") if "\0" in text else (line.rstrip("\r") for line in text.split("\n"))
        yield from (Path(name) for name in names if name)
    elif place.is_dir() and recursive:
        for name in names_below(place):
            if is_image(name):
                yield place / name
            else:
                ignored.append(str(place / name))
    elif place.is_dir():
        for path in sorted(place.iterdir()):
            if is_image(path.name) and not path.name.startswith(".") and not path.is_dir():
                yield path
            else:
                ignored.append(str(path))
    elif place.exists():
        yield place
    elif glob.has_magic(str(place)):
        matches = map(Path, sorted(glob.glob(str(place), recursive=True)))
        files = [path for path in matches if is_image(path.name) or path.suffix.lower() in VIDEO_EXTENSIONS]
        if not files:
            raise InputError(f"{place}: no image or video fits this pattern")
        yield from files
    else:
        raise InputError(f"{place}: no such file or folder")
