"""The documentation site: every page has a place in it, and its reference has every public name."""

import re
from pathlib import Path

import pytest
import yaml

import fasterrcnn_jax
from fasterrcnn_jax import models, ops

ROOT = Path(__file__).parents[1]


def pages(entries):
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [value] if isinstance(value, str) else pages(value)


def test_every_page_has_one_place_in_the_site():
    placed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(placed) == sorted(
        path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")
    )


@pytest.mark.parametrize("package", [fasterrcnn_jax, models, ops], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package):
    named = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    missing = [name for name in package.__all__ if not re.search(rf"[.\[ `]{name}\b", named)]
    assert not missing
