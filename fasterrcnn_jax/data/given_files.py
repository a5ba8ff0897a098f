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
from fasterrcnn_jax.data.layouts import IMAGE_EXTENSIONS, names_below
from fasterrcnn_jax.data.records import joined_names
from fasterrcnn_jax.errors import InputError

# The containers that `video` reads; see there for the reason that the extension decides.
VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")

STANDARD_INPUT = "-"
IGNORED = "Hidden files, subfolders and files without an image extension were ignored"


class GivenFile(NamedTuple):
    """One image file or video file."""

    id: str  # its name in results; unique
    path: Path

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_EXTENSIONS


def list_given(given: Sequence[Path], *, recursive: bool = False) -> tuple[list[GivenFile], tuple[str, ...]]:
    """Returns the given files in their order, and notes about what was ignored; opens no file.

    The id of a file is its name; if several files have one name, it is the path below the folder that all files are in.
    A file that is given twice is listed once. In a folder, the files with an image extension are listed, sorted by
    name; hidden files, other files and subfolders are ignored, and a note counts them.

    Args:
      given: image files, video files and folders; patterns such as `photos/**/*.jpg`, as `glob` reads them, whose
        matches with the extension of an image or a video are listed; `-` for a list on standard input, one file per
        line. A line that is no file is listed all the same: who reads it finds out.
      recursive: list the images of the folders inside a folder too, but not of linked folders and of run folders.
    Raises:
      InputError: a path does not exist, or there is no file.
    """
    found = defaultdict(list)
    listed: dict[str, Path] = {}
    for place in given:
        for path in _files_of(place, recursive, found[IGNORED]):
            listed.setdefault(os.path.realpath(path), path)
    if not listed:
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
        yield from (Path(line) for line in (line.rstrip("\r\n") for line in sys.stdin) if line)
    elif place.is_dir() and recursive:
        for name in names_below(place):
            if _is_image(Path(name)):
                yield place / name
            else:
                ignored.append(str(place / name))
    elif place.is_dir():
        for path in sorted(place.iterdir()):
            if _is_image(path) and not path.name.startswith(".") and not path.is_dir():
                yield path
            else:
                ignored.append(str(path))
    elif place.exists():
        yield place
    elif glob.has_magic(str(place)):
        matches = map(Path, sorted(glob.glob(str(place), recursive=True)))
        files = [path for path in matches if _is_image(path) or path.suffix.lower() in VIDEO_EXTENSIONS]
        if not files:
            raise InputError(f"{place}: no image or video fits this pattern")
        yield from files
    else:
        raise InputError(f"{place}: no such file or folder")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_EXTENSIONS
