"""The order of the folders, read from the source: a module imports from the folders below its own only."""

import ast
import contextlib
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fasterrcnn_jax

ROOT = Path(__file__).parents[1]
PACKAGE = "fasterrcnn_jax"

# Lowest first. A module sees the folders, and the single modules, before its own, and its own folder.
ORDER = (
    "_lazy",
    "exported",
    "kernels",
    "printing",
    "errors",
    "structures",
    "atomic_write",
    "regular_files",
    "config",
    "processes",
    "ops",
    "models",
    "weights",
    "data",
    "configs",
    "evaluation",
    "inference",
    "report",
    "training",
    "zoo",
    "scripts",
    "programs",
)
# The package's own face, and that of its models: they see everything and nothing sees them.
FACE = ("__init__", "__main__", "_source_tree", "models")
FOLDERS = {"kernels": ROOT / "kernels", "configs": ROOT / "configs"}
SCRIPTS = {"scripts.train": ROOT / "train.py", "scripts.evaluate": ROOT / "evaluate.py"}


def modules():
    """Returns {dotted name below the package: path} of every module."""
    found = dict(SCRIPTS)
    for top, folder in ({"": ROOT / PACKAGE} | FOLDERS).items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(filter(None, (top, *(part for part in parts if part != "__init__")))) or "__init__"] = path
    return found


MODULES = modules()
INSIDE = {name: path for name, path in MODULES.items() if name not in FACE}


def imported(path):
    """Returns every absolute name that a file imports anywhere, `from a import b` as `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(path):
    """Returns the modules of the package that a file imports, without the package's name."""
    found = set()
    for name in imported(path):
        if name.startswith(f"{PACKAGE}."):
            parts = name.removeprefix(f"{PACKAGE}.").split(".")
            # The longest part of the name that is a module: the rest is what is imported from it.
            lengths = [n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in MODULES]
            found.add(".".join(parts[: lengths[0]]) if lengths else name)
    return found


@pytest.mark.parametrize("name", INSIDE)
def test_a_module_imports_only_from_folders_before_its_own(name):
    folder = name.split(".")[0]
    seen = set(ORDER[: ORDER.index(folder) + 1])
    assert not {other for other in own(INSIDE[name]) if other.split(".")[0] not in seen}


def test_the_order_names_every_folder_and_nothing_else():
    assert {name.split(".")[0] for name in INSIDE} == set(ORDER)


def test_no_modules_import_each_other_in_a_circle():
    imports = {name: own(path) for name, path in INSIDE.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done or name not in imports:
            return
        path.append(name)
        # A folder's own __init__ that is imported as a whole counts as the folder.
        for other in sorted(imports[name] - {name}):
            visit(other)
        path.pop()
        done.add(name)

    for name in sorted(imports):
        visit(name)


def test_nothing_imports_the_folders_at_the_top_by_their_bare_names():
    bare = {"kernels", "configs", "train", "evaluate"}
    found = {(name, other) for name, path in MODULES.items() for other in imported(path) if other.split(".")[0] in bare}
    assert not found


def test_flax_is_imported_by_the_network_and_its_state_only():
    users = {
        name.split(".")[0]
        for name, path in INSIDE.items()
        if any(other.split(".")[0] == "flax" for other in imported(path))
    }
    assert users == {"models", "training", "scripts"}


def test_kernels_import_jax_alone():
    """Beside the standard library and NumPy, which JAX cannot be without."""
    roots = {
        name.split(".")[0]
        for module, path in INSIDE.items()
        if module.split(".")[0] == "kernels"
        for name in imported(path)
        if not name.startswith(f"{PACKAGE}.kernels")
    }
    assert "jax" in roots and roots - {"jax", "numpy"} <= sys.stdlib_module_names


def public(module):
    """Returns {name: value} of what a module defines for others."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }


def test_no_public_function_shares_its_name_with_a_module_beside_it():
    """Otherwise `from fasterrcnn_jax import name` gives one or the other, by what was imported before."""
    for name in MODULES:
        if not name.startswith("__"):
            importlib.import_module(f"{PACKAGE}.{name}")
    for package in (fasterrcnn_jax, fasterrcnn_jax.models, fasterrcnn_jax.ops):
        inside = package.__name__.partition(".")[2]
        assert not {name for name in package.__all__ if ".".join(filter(None, (inside, name))) in MODULES}
    for name in fasterrcnn_jax.__all__:
        # Called without its arguments, a function complains about them; a module cannot be called at all.
        with contextlib.suppress(ValueError):
            try:
                getattr(fasterrcnn_jax, name)()
            except TypeError as error:
                assert "missing" in str(error), f"{name}: {error}"
    for name in INSIDE:
        module = importlib.import_module(f"{PACKAGE}.{name}")
        folder = name.rpartition(".")[0]
        beside = {other.rpartition(".")[2] for other in INSIDE if other.rpartition(".")[0] == folder}
        shared = beside & {key for key, value in public(module).items() if inspect.isfunction(value)}
        assert not shared, f"{name} defines {shared}, which are modules beside it"


@pytest.mark.parametrize("package", [fasterrcnn_jax, fasterrcnn_jax.models], ids=lambda package: package.__name__)
def test_type_checkers_see_every_public_name(package):
    """The names under TYPE_CHECKING, which checkers read, are those that are imported when they are used."""
    tree = ast.parse(Path(package.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    static = {alias.name: node.module for node in block.body for alias in node.names}
    assert static == package._HOMES and set(static) == set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is getattr(importlib.import_module(package._HOMES[name]), name)
        assert name in dir(package)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nmss'"):
        package.nmss  # noqa: B018


HEAVY = ("faster_coco_eval", "optax", "orbax", "pycocotools", "tensorboardX", "tyro")
# Notes each heavy module that a module of ours imports: Flax itself imports optax.
FRESH = """
import builtins, json, sys
ours, real = set(), builtins.__import__
def noting(name, globals=None, *rest):
    if (globals or {}).get("__name__", "").startswith("fasterrcnn_jax"):
        ours.add(name.split(".")[0])
    return real(name, globals, *rest)
builtins.__import__ = noting
import numpy, fasterrcnn_jax
light = sorted(name for name in ("flax", "jax", "numpy") if name in sys.modules)
model = fasterrcnn_jax.load(sys.argv[1])
found = fasterrcnn_jax.predict(model, numpy.zeros((48, 64, 3), numpy.uint8))
heavy = json.loads(sys.argv[2])
print(json.dumps([light, sorted(ours & set(heavy)), sorted(set(heavy) & set(sys.modules))]))
"""


@pytest.mark.parametrize("kind, allowed", [("weights", set()), ("run", {"orbax"})])
def test_prediction_imports_nothing_that_it_does_not_need(small_run, kind, allowed, tmp_path):
    path = small_run
    if kind == "weights":
        path = tmp_path / "model.safetensors"
        fasterrcnn_jax.save_weights(fasterrcnn_jax.load(small_run), path)
    command = [sys.executable, "-c", FRESH, str(path), json.dumps(HEAVY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    light, ours, loaded = json.loads(done.stdout.splitlines()[-1])
    assert light == ["numpy"], "import fasterrcnn_jax must not import JAX"
    assert set(ours) == allowed
    # Flax imports optax, whoever imports Flax (flax/nnx/helpers.py).
    assert set(loaded) == allowed | {"optax"}
