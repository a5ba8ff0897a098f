"""Finds the modules that a source tree keeps beside the package.

In a source tree `kernels/`, `configs/`, `train.py` and `evaluate.py` lie at the top. A wheel holds them inside the
package (`pyproject.toml`, `setup.py`). Imports name them inside the package in both cases.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
TOP = PACKAGE.parent
# By name: the place in a wheel, and the place in a source tree.
PLACES = {
    "fasterrcnn_jax.configs": (PACKAGE / "configs" / "__init__.py", TOP / "configs" / "__init__.py"),
    "fasterrcnn_jax.kernels": (PACKAGE / "kernels" / "__init__.py", TOP / "kernels" / "__init__.py"),
    "fasterrcnn_jax.scripts.evaluate": (PACKAGE / "scripts" / "evaluate.py", TOP / "evaluate.py"),
    "fasterrcnn_jax.scripts.train": (PACKAGE / "scripts" / "train.py", TOP / "train.py"),
}


class SourceTreeFinder(importlib.abc.MetaPathFinder):
    """Finds the modules in `PLACES` beside this package. In a wheel they are inside, and it finds nothing."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in PLACES:
            return None
        inside, beside = PLACES[fullname]
        if inside.is_file() or not beside.is_file():
            return None
        folders = [str(beside.parent)] if beside.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(fullname, beside, submodule_search_locations=folders)


_finder = SourceTreeFinder()


def install() -> None:
    """Makes Python ask the finder first.

    The finder of an editable install knows these modules too, but that may be the install of another source tree.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
