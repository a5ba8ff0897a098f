"""Blocks imports as on a machine that has JAX, Flax, optax, NumPy, jaxtyping, torch and torchvision, and nothing else.

Python imports this module at its start if this folder is in PYTHONPATH. A file of the repository can then import the
standard library, the repository, and the names in ALLOWED or in the variable ALSO_ALLOWED. What those packages
themselves import is not restricted, except that nobody can import what such a machine lacked.
"""

import builtins
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {"flax", "jax", "jaxlib", "jaxtyping", "numpy", "optax", "torch", "torchvision"}
LACKED = {
    *("array_record", "beartype", "docstring_parser", "orbax", "pycocotools", "tensorboardX", "typeguard", "tyro"),
}
OWN = {"fasterrcnn_jax", *(path.stem for path in (ROOT / "benchmarks").glob("*.py"))}

_allowed = {*ALLOWED, *OWN, *sys.stdlib_module_names, *os.environ.get("ALSO_ALLOWED", "").split()}
_import = builtins.__import__


def _import_allowed(name, globals=None, locals=None, fromlist=(), level=0):
    top = name.split(".")[0]
    ours = str((globals or {}).get("__file__")).startswith(f"{ROOT}/")
    if level == 0 and (top in LACKED or (ours and top not in _allowed)):
        raise ModuleNotFoundError(f"No module named {name!r}: blocked for the rehearsal", name=name)
    return _import(name, globals, locals, fromlist, level)


builtins.__import__ = _import_allowed
