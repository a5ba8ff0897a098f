"""docs/reference.md agrees with the code: its fields, defaults, functions, files and tests exist; none is missing."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from fasterrcnn_jax.config import DataConfig, ModelConfig, TrainConfig

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "reference.md").read_text()
COLUMNS = ["mechanism", "our field(s)", "default", "test", "where the reference has it"]
SECTIONS = [
    "Backbones",
    "Images and data",
    "Anchors and RPN",
    "Proposals",
    "RoI targets",
    "RoI features",
    "Losses",
    "Optimisation",
    "Testing",
    "Configurations",
]
# Fields about names, paths, saving and evaluation of a run: they are not part of the method.
NO_MECHANISM = {
    "data": {"root", "class_names", "test_split", "shapes"},
    "train": {
        *("checkpoint_every", "keep_checkpoints", "evaluate_every", "best_split", "best_metric"),
        *("coco_backend", "report"),
    },
}
REQUIRED = "required"


class Row(NamedTuple):
    section: str
    cells: list[str]

    def code(self, column: str) -> list[str]:
        """Returns the texts between backticks in a cell."""
        return re.findall(r"`([^`]+)`", self.cells[COLUMNS.index(column)])


def rows_of(text):
    section, rows = None, []
    for line in text.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
            if set("".join(cells)) != {"-"} and cells != COLUMNS:
                rows.append(Row(section, cells))
    return rows


ROWS = rows_of(TEXT)


def defaults_below(part, name):
    """Yields (dotted path, default) of every field below a dataclass, or below an instance of one."""
    for field in dataclasses.fields(part):
        path, value = f"{name}.{field.name}", REQUIRED
        if not isinstance(part, type):
            value = getattr(part, field.name)
        elif field.default is not dataclasses.MISSING:
            value = field.default
        if dataclasses.is_dataclass(value):
            yield from defaults_below(value, path)
        else:
            yield path, value


FIELDS = {
    path: default
    for part, name in ((ModelConfig(), "model"), (DataConfig, "data"), (TrainConfig, "train"))
    for path, default in defaults_below(part, name)
}


def exists(name):
    """Returns whether the package has something of that name that is not a field."""
    if name.startswith("configs/"):
        return (ROOT / name).is_file()
    module, _, attribute = name.rpartition(".")
    return name.startswith("fasterrcnn_jax.") and hasattr(importlib.import_module(module), attribute)


def test_sections_and_cells_are_complete():
    assert re.findall(r"^## (.+)$", TEXT, re.MULTILINE) == SECTIONS
    header, line = "| " + " | ".join(COLUMNS) + " |", "|---|---|---|---|---|"
    assert TEXT.count(f"{header}\n{line}\n") == len(SECTIONS) and len(ROWS) > 80
    assert {row.section for row in ROWS} == set(SECTIONS)
    incomplete = [row for row in ROWS if len(row.cells) != len(COLUMNS) or not all(row.cells)]
    assert incomplete == []
    assert [row.cells[0] for row in ROWS if not row.code("our field(s)") or not row.code("test")] == []


@pytest.mark.parametrize("section", SECTIONS)
def test_fields_exist_with_the_default_that_is_stated(section):
    for row in (row for row in ROWS if row.section == section):
        for name, stated in zip(row.code("our field(s)"), row.code("default"), strict=True):
            if name not in FIELDS:
                assert exists(name) and stated == "none", f"{row.cells[0]}: {name}, {stated}"
            elif FIELDS[name] is REQUIRED:
                assert stated == REQUIRED, f"{name} has no default, {stated} is stated"
            else:
                value = ast.literal_eval(stated)
                # 1 is True, and 16 is 16.0.
                assert (value, repr(value)) == (FIELDS[name], repr(FIELDS[name])), f"{name}: {stated} is stated"


def test_every_field_is_in_a_row():
    named = {name for row in ROWS for name in row.code("our field(s)")}
    passed_over = {f"{part}.{name}" for part, names in NO_MECHANISM.items() for name in names}
    assert passed_over <= set(FIELDS)
    assert sorted(set(FIELDS) - passed_over - named) == []


def test_every_shipped_configuration_is_in_a_row():
    named = {name for row in ROWS for name in row.code("our field(s)")}
    assert {f"configs/{path.name}" for path in (ROOT / "configs").glob("[!_]*.py")} <= named


def test_tests_of_the_tables_exist():
    """The tests that docs/conventions.md names exist too."""
    names = [name for row in ROWS for name in row.code("test")]
    assert [name for name in names if not re.fullmatch(r"test_\w+\.py::test_\w+", name)] == []
    conventions = (ROOT / "docs" / "conventions.md").read_text()
    names += re.findall(r"`(test_\w+\.py::\w+)`", conventions)
    defined = {}
    for name in names:
        file, _, function = name.partition("::")
        if file not in defined:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            defined[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in defined[file], name
