"""The benchmarks are imported where only JAX, Flax, optax, NumPy and jaxtyping are: a GPU that is lent for an hour."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
# torchvision, which they are compared with, brings Pillow. These scripts read images.
OF_IMAGES = {"full_size", "throughput", "train_minutes"}
# Compares with torchvision and is imported where it is.
OF_TORCHVISION = {"torchvision_detectors"}
ALLOWED = ("flax", "jax", "jaxlib", "jaxtyping", "numpy", "optax")
# What the machines with GPUs lacked: not even another package may import it.
MISSING = (
    *("grain", "array_record", "portpicker", "typeguard", "beartype", "pycocotools", "tensorboardX", "tyro"),
    *("docstring_parser", "orbax"),
)

# Refuses what a file of this repository imports from elsewhere.
BLOCKED = """
import builtins, json, runpy, sys
root, modules, allowed, missing = json.loads(sys.argv[1])
sys.path.insert(0, f"{root}/benchmarks")
real = builtins.__import__

def only_allowed(name, globals=None, locals=None, fromlist=(), level=0):
    top = name.split(".")[0]
    own = str((globals or {}).get("__file__")).startswith(root)
    others = level == 0 and top not in sys.stdlib_module_names and top not in allowed
    if top in missing or (own and others):
        raise ModuleNotFoundError(f"blocked: {name}", name=name)
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = only_allowed
for name in modules:
    runpy.run_path(f"{root}/benchmarks/{name}.py", run_name=name)
"""


def import_where_others_are_blocked(modules, allowed):
    ours = {"fasterrcnn_jax", "kernels", *BENCHMARKS}
    arguments = json.dumps([str(ROOT), sorted(modules), sorted({*ours, *allowed}), MISSING])
    command = [sys.executable, "-c", BLOCKED, arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "modules, allowed",
    [(BENCHMARKS - OF_IMAGES - OF_TORCHVISION, ALLOWED), (OF_IMAGES, (*ALLOWED, "PIL"))],
    ids=["networks and operations", "images"],
)
def test_benchmarks_import_nothing_that_a_machine_with_a_gpu_may_lack(modules, allowed):
    done = import_where_others_are_blocked(modules, allowed)
    assert done.returncode == 0, done.stderr


def test_what_is_blocked_is_seen():
    done = import_where_others_are_blocked({"throughput"}, ALLOWED)
    assert done.returncode == 1 and "blocked: PIL" in done.stderr
