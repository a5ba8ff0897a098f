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

TOP = Path(__file__).parents[1]
BESIDE = {
    "fasterrcnn_jax.configs": TOP / "configs" / "__init__.py",
    "fasterrcnn_jax.kernels": TOP / "kernels" / "__init__.py",
    "fasterrcnn_jax.scripts.evaluate": TOP / "evaluate.py",
    "fasterrcnn_jax.scripts.train": TOP / "train.py",
}


class SourceTreeFinder(importlib.abc.MetaPathFinder):
    """Finds what `BESIDE` names. Python asks it last, after a wheel's own folders."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        file = BESIDE.get(fullname)
        if file is None or not file.is_file():
            return None
        folders = [str(file.parent)] if file.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(fullname, file, submodule_search_locations=folders)


def install() -> None:
    """Adds the finder once per process."""
    if not any(type(finder).__name__ == SourceTreeFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.append(SourceTreeFinder())
