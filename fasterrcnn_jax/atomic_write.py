"""Writes a file completely or not at all."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fasterrcnn_jax.errors import InputError


def is_temporary(path: Path) -> bool:
    """Returns whether the name is one that `write_atomically` gives to its temporary files."""
    return re.fullmatch(r"\..+\.[0-9]+\.tmp", path.name, re.DOTALL) is not None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a temporary file next to `path` and renames it to `path`, so that no reader sees an incomplete file.

    Args:
      content: text is written as UTF-8 with a line feed at the end of each line.
    Raises:
      InputError: the file cannot be written; the message names it.
    """
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a temporary file next to `path`, and renames it to `path` when the body ends.

    If the body raises, `path` is unchanged. For content that is too large for memory; see `write_atomically`.

    Raises:
      InputError: the file cannot be written; the message names it. An OSError of the body that names another file,
        which the body reads, is raised as it is.
    """
    # The tempfile module would create a file that only its owner can read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # as is_temporary says
    of_another_file: OSError | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                try:
                    yield file
                except OSError as error:
                    if error.filename is not None:  # a failed write names none
                        of_another_file = error
                    raise
            # Without this, a power cut can leave an empty file under the final name.
            _reach_disk(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if os.name != "nt":  # which cannot open folders
            _reach_disk(path.parent)
    except OSError as error:
        if error is of_another_file:
            raise
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def _reach_disk(path: Path) -> None:
    """Returns when the file, or the list of names in the folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot do this.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
