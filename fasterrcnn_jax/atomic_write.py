"""Writes a file completely or not at all."""

import os
from pathlib import Path

from fasterrcnn_jax.errors import InputError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a temporary file next to `path` and renames it to `path`, so that no reader sees an incomplete file.

    Args:
      content: text is written as UTF-8 with a line feed at the end of each line.
    Raises:
      InputError: the file cannot be written; the message names it.
    """
    # The tempfile module would create a file that only its owner can read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
