"""Tests that reading small data sets, and checking them, takes time and memory in proportion to their size."""

import budget
import hostile_sets
import pytest

from fasterrcnn_jax.config import DataConfig

# Sizes at which the square of the size would break the budget.
SIZES = {
    "blanks in a VOC list": 900_000,
    "COCO categories": 25_000,
    "ids of one hash value": 30_000,
    "classes and faults": 10_000,
    "class names": 50_000,
    "YOLO labels": 20_000,
    "LabelMe shapes": 10_000,
    "lines of csv": 20_000,
    "check: scattered boxes": 6_000,
    "check: equal boxes": 6_000,
    "check: classes": 3_000,
}


def test_every_set_has_a_size():
    assert SIZES.keys() == hostile_sets.SETS.keys()


def test_small_sets_cost_little():
    budget.check("hostile_sets:read", [*SIZES.items()])


def test_repeated_class_names_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"class_names contains \['disc'\] more than once"):
        DataConfig(root=tmp_path, class_names=("disc", "ring", "disc"))
