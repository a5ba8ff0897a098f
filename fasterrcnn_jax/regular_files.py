"""Files that can be read to their end: no pipes and no devices."""

import stat
from pathlib import Path

from fasterrcnn_jax.errors import InputError

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def check_regular(path: Path) -> None:
    """Raises InputError where a pipe, a device or a socket lies in place of a file: reading it might never end.

    Missing and unreadable files pass: the code that opens them reports the error.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise InputError(f"{path}: must be a regular file, but is {name}")
