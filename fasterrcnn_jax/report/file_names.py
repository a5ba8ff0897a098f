"""Names of image files for a page."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePath

from fasterrcnn_jax.data.records import StoredImage


def distinct_names(paths: Sequence[Path | StoredImage]) -> list[str]:
    """Returns a name for each image: the file name, or the end of its path where several files have the same name.

    That end is as short as tells the files apart, and never reaches above the folder that holds all images. Images from
    the same file keep the same name.
    """
    parts = {path: PurePath(str(path)).parts for path in paths}
    folders = [one[:-1] for one in parts.values()]
    shared = 0
    if folders:
        first, last = min(folders), max(folders)
        while shared < min(len(first), len(last)) and first[shared] == last[shared]:
            shared += 1
    same = defaultdict(list)
    for path, one in parts.items():
        same[path.name].append((path, one[shared:]))
    names = {}
    for name, files in same.items():
        most = max(len(below) for _, below in files)
        length = 1
        while length < most and len({below[-length:] for _, below in files}) < len(files):
            length += 1
        names |= {path: "/".join(below[-length:]) if length > 1 else name for path, below in files}
    return [names[path] for path in paths]
