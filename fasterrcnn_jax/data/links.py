"""Symbolic links in a data set: a stranger's data set must not make us read files outside its folder."""

import os
from collections.abc import Callable
from pathlib import Path

from fasterrcnn_jax.errors import InputError

Guard = Callable[[Path], None]


def link_guard(within: Path | None) -> Guard:
    """Returns a function that raises InputError for a path that symbolic links place outside the folder `within`.

    The folder itself may be a link, and links from inside to inside are allowed. The function takes some microseconds,
    because it resolves each folder only once.

    Args:
      within: None: the function allows every path (`data.follow_links`).
    """
    if within is None:
        return lambda path: None
    root = os.path.realpath(within)
    known: set[Path] = set()

    def check(path: Path) -> None:
        if path.parent in known and not path.is_symlink():
            return
        for place in (path.parent, path):
            target = os.path.realpath(place)
            # The target of the folder itself lies above what it holds.
            if os.path.commonpath([root, target]) != root:
                raise InputError(
                    f"{path}: must lie inside {within}, but is reached by a link to {target}; "
                    "data.follow_links = True allows it"
                )
        known.add(path.parent)

    return check
