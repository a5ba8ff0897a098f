"""Finds the files of a data set by the names that annotation files give, which may come from another machine."""

import codecs
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from fasterrcnn_jax.data.faults import Found
from fasterrcnn_jax.data.layouts import IMAGE_EXTENSIONS, composed, names_below
from fasterrcnn_jax.data.links import link_guard
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.regular_files import check_regular

# The longest path that Linux allows.
MAX_PATH = 4096

MOVED = "Paths that do not exist were read as the only file of that name in the folder"

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class Files(NamedTuple):
    """The files below the folder of a data set; all names are relative to it, with /. Keys are `composed`."""

    root: Path
    images: tuple[str, ...]  # sorted
    others: dict[str, str]  # composed name -> name of each file that is no image
    folders: frozenset[str]  # folders with an image in them or below them; "" is the root
    by_place: dict[str, str]  # name of an image, as it is and without its extension -> name
    by_name: dict[str, list[str]]  # the same without its folders, as `_alike` writes it -> names
    by_letters: dict[str, list[str]]  # others and folders, as `_alike` writes them -> names

    def other(self, name: str) -> str | None:
        """Returns the file of that name that is no image, or the only one that differs in upper and lower case."""
        same = [other for other in self.by_letters.get(_alike(name), ()) if other not in self.folders]
        return self.others.get(name) or (same[0] if len(same) == 1 else None)

    def folder(self, name: str) -> str | None:
        """Returns the folder of that name with images, or the only one that differs in upper and lower case."""
        same = [folder for folder in self.by_letters.get(_alike(name), ()) if folder in self.folders]
        return name if name in self.folders else same[0] if len(same) == 1 else None


def files_below(root: Path, within: Path | None = None) -> Files:
    """Returns the files below `root`; hidden files are left out.

    Args:
      within: folder that no symbolic link may lead out of, so that linked folders are left out; None: links are
        followed.

    Raises:
      InputError: there is no such folder, or a file is a link out of `within`.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    names, guard = names_below(root, follow_links=within is None), link_guard(within)
    for name in names:
        guard(root / name)
    images = tuple(name for name in names if is_image(name))
    # A name with its extension goes before an equal name without.
    by_place = {composed(without_extension(name)): name for name in reversed(images)}
    by_place |= {composed(name): name for name in images}
    by_name = defaultdict(list)
    for name in images:
        last = _alike(posixpath.basename(name))
        by_name[last].append(name)
        by_name[without_extension(last)].append(name)
    others, folders = {composed(name): name for name in names if not is_image(name)}, set()
    for name in images:
        while name not in folders:
            name = posixpath.dirname(name)
            folders.add(name)
    by_letters = defaultdict(list)
    for name in (*others.values(), *folders):
        by_letters[_alike(name)].append(name)
    return Files(root, images, others, frozenset(folders), by_place, dict(by_name), dict(by_letters))


def _alike(name: str) -> str:
    """Returns a name in small letters and without the codes of a URL: Label Studio can write %C3%A9 for é."""
    return composed(unquote(name)).lower()


def is_image(name: str) -> bool:
    """Returns whether a file has the extension of an image."""
    return posixpath.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def without_extension(name: str) -> str:
    return posixpath.splitext(name)[0]


def image_named(text: str, files: Files, folders: Iterable[str], field: str, found: Found) -> str:
    """Returns the image that an annotation calls `text`, which may be a path of another machine.

    It is searched in `folders`; then under the longest end of the path that exists below the root; then by its file
    name, which must be in one folder only. Both separators are read, the extension may be absent, and the last search
    ignores upper and lower case. `found` counts images that were not found where the path says.

    Args:
      folders: folders that the path may be relative to, in this order, relative to the root.
      field: file and field of `text`, for messages.

    Raises:
      InputError: no image or several images fit.
    """
    path, folders = composed(clean_path(text, field)), tuple(map(composed, folders))
    for folder in folders:
        name = files.by_place.get(posixpath.normpath(posixpath.join(folder, path)))
        if name is not None:
            return name
    parts = [part for part in posixpath.normpath(path).split("/") if part not in ("", "..")]
    name = next((files.by_place[end] for end in ends(parts) if end in files.by_place), None)
    if name is None:
        last = parts[-1] if parts else ""
        # An image may have been converted to another format after it was labelled.
        fitting = files.by_name.get(_alike(last)) or files.by_name.get(_alike(without_extension(last)), ())
        if not fitting:
            raise InputError(f"{field}: no image file {quoted(text)} in {files.root}")
        if len(fitting) > 1:
            # One of the folders, in other letters.
            likely = {posixpath.normpath(folder).lower() for folder in folders}
            near = [name for name in fitting if (posixpath.dirname(composed(name)) or ".").lower() in likely]
            fitting = near if len(near) == 1 else fitting
        if len(fitting) > 1:
            raise InputError(
                f"{field}: {quoted(text)} does not exist, and {len(fitting)} images in {files.root} have its name, "
                f"for example {fitting[0]} and {fitting[1]}"
            )
        name = fitting[0]
    found[MOVED].append(f"{field}: {quoted(text)} as {name}")
    return name


def clean_path(text: str, field: str) -> str:
    """Returns a path with / as separator and without a drive letter.

    Raises:
      InputError: no file can have this path.
    """
    path = re.sub(r"^[A-Za-z]:", "", text.strip().replace("\\", "/"))
    if not path or len(path) > MAX_PATH or re.search(r"[\0\n\ud800-\udfff]", path):
        raise InputError(f"{field}: must be the path of a file, got {quoted(text)}")
    return path


def ends(parts: list[str]) -> Iterable[str]:
    """Yields a path given by its parts, then the path without its first part, and so on."""
    # No data set is deeper; the limit keeps the time linear in the length of the path.
    parts = parts[-20:]
    return ("/".join(parts[start:]) for start in range(len(parts)))


def read_text(path: Path) -> str:
    """Returns the text of a file in UTF-8, or in UTF-16 if the file starts with its mark.

    Raises:
      InputError: the file cannot be read or is not text.
    """
    check_regular(path)
    try:
        content = path.read_bytes()
        return content.decode(_encoding(content))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the file is not UTF-8 text: {error}") from None


def first_line(path: Path) -> str:
    """Returns the start of the first line that is not blank, for a guess at the format; "" if nothing can be read."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            content = file.read(4096)
    except (OSError, InputError):
        return ""
    line = re.search(r"\S[^\r\n]*", content.decode(_encoding(content), "ignore"))
    return line[0] if line else ""


def _encoding(content: bytes) -> str:
    return next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")


def lines_of(path: Path) -> list[tuple[int, str]]:
    """Returns the number and the text of each line that is not blank, without surrounding blanks."""
    lines = enumerate(re.split(r"\r\n|\r|\n", read_text(path)), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]
