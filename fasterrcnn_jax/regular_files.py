"""Files that can be read to their end and in little memory: no pipes, no devices, no sizes that are only declared."""

import stat
from pathlib import Path

from fasterrcnn_jax.errors import InputError

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)

# The weights of a trained model do not compress. Masks, zeros and black images do, but never all of a large file.
RATIO, ALWAYS = 200, 64 * 2**20


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


def check_declared(path: Path, declared: int, *, stored: int) -> None:
    """Raises InputError if a file or folder of `stored` bytes declares arrays of implausibly many bytes.

    Call it before the arrays are read, because reading reserves the declared memory.
    """
    if declared > RATIO * stored + ALWAYS:
        raise InputError(f"{path}: declares arrays of {declared} bytes, but has only {stored} bytes; it is damaged")
