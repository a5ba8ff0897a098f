"""The order of the layers, read from the source: a module imports from lower layers only."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "fasterrcnn_jax"

# Lowest first. A module sees the layers before its own and nothing beside it.
# box_coder is ground because the configuration is typed with its Weights, roi_align because roi_crop
# shares its products.
LAYERS = (
    {"kernels"},
    {"errors", "structures", "boxes", "box_coder", "roi_align"},
    {"config", "anchors", "levels", "nms", "roi_pool", "roi_crop", "matching"},
    {"sampling", "config_io", "families", "anchor_grid"},
    {"proposals", "targets", "losses", "postprocess", "roi_features"},
    {"models"},
    {"training", "weights", "summary"},
    {"parallel"},
    {"inference"},
    {"checkpoint", "drawing", "preemption", "stages", "proposing"},
    {"run_folder", "zoo", "scoring", "replay", "compilations"},
    {"cli"},
)
# What the modules of these folders may see of the package, beside their own folder.
FOLDERS = {
    "data": {"errors", "structures", "boxes", "config"},
    "evaluation": {"errors", "structures", "boxes", "config", "data.records"},
    "kernels": set(),
    "configs": {"config", "families", "data.coco", "data.shapes", "data.voc"},
}
# Beside the lower layers: the host's side of detection reads images and hands over results.
HOST = {"inference", "run_folder", "zoo", "proposing", "scoring", "stages"}
HOST_SEES = {"data", "evaluation.results", "evaluation.proposal_recall"}
ENTRIES = {"__init__", "__main__", "scripts"}
FLAX = {"models", "training", "checkpoint", "summary", "replay"}


def modules():
    """Yields (dotted name below the package, path); links are followed."""
    for path in sorted((ROOT / PACKAGE).glob("*.py")):
        yield path.stem, path
    for folder in sorted(path for path in (ROOT / PACKAGE).iterdir() if path.is_dir()):
        for path in sorted(folder.rglob("*.py")):
            yield ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts), path


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
    """Returns what a file imports from the package, without the package's name."""
    return {name.removeprefix(f"{PACKAGE}.") for name in imported(path) if name.startswith(f"{PACKAGE}.")}


def is_within(name, allowed):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)


def allowed_in(name):
    """Returns the prefixes that module `name` may import from the package."""
    top = name.split(".")[0]
    if top in FOLDERS:
        return FOLDERS[top] | {top}
    rank = next((rank for rank, layer in enumerate(LAYERS) if top in layer), None)
    assert rank is not None, f"{name} is in no layer; give it a place in {Path(__file__).name}"
    lower = set().union(*LAYERS[:rank])
    return lower | ({top} if top in ("models", "weights") else set()) | (HOST_SEES if top in HOST else set())


CHECKED = {name: path for name, path in modules() if name.split(".")[0] not in ENTRIES}


@pytest.mark.parametrize("name", CHECKED)
def test_modules_import_lower_layers_only(name):
    allowed = allowed_in(name)
    beyond = {other for other in own(CHECKED[name]) if not is_within(other, allowed)}
    assert not beyond


def test_flax_is_seen_by_the_network_and_its_state_only():
    users = {
        name.split(".")[0] for name, path in modules() if any(is_within(other, {"flax"}) for other in imported(path))
    }
    assert users <= FLAX


def test_nothing_imports_the_folders_at_the_top_by_their_bare_names():
    bare = {"kernels", "configs", "train", "evaluate"}
    found = {(name, other) for name, path in modules() for other in imported(path) if is_within(other, bare)}
    assert not found


def test_kernels_depend_on_jax_alone():
    """Beside the standard library and NumPy, which JAX cannot be without."""
    roots = {
        name.split(".")[0]
        for module, path in modules()
        if module.split(".")[0] == "kernels"
        for name in imported(path)
        if not is_within(name, {f"{PACKAGE}.kernels"})
    }
    assert "jax" in roots and roots - {"jax", "numpy"} <= sys.stdlib_module_names


def test_every_layer_that_is_named_exists():
    present = {name.split(".")[0] for name, _ in modules()}
    assert set().union(*LAYERS) | set(FOLDERS) | ENTRIES <= present
