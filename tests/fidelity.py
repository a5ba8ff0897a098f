"""Comparisons with the numbers of the reference implementations in tests/golden, and a record of each."""

from typing import NamedTuple

import numpy as np


class Record(NamedTuple):
    concept: str
    reference: str
    name: str
    values: int
    max_abs: float  # NaN where only one side is finite
    max_rel: float  # over the reference's values other than 0
    identical: bool
    tolerance: str


RECORDS: list[Record] = []


def compare(concept, reference, name, ours, theirs, *, atol=0.0, rtol=0.0) -> None:
    """Asserts `|ours - theirs| <= atol + rtol |theirs|`, equality where both are 0; NaN equals NaN."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, f"{concept}, {reference}, {name}: {ours.shape} and {theirs.shape}"
    both = np.stack([ours.ravel(), theirs.ravel()]).astype(np.float64)
    different = ~((both[0] == both[1]) | np.isnan(both).all(axis=0))
    differences = np.abs(both[0] - both[1], where=different, out=np.zeros(ours.size))
    sizes = np.abs(both[1])
    relative = np.divide(differences, sizes, where=sizes > 0, out=np.zeros(ours.size))
    exact = atol == 0.0 and rtol == 0.0
    RECORDS.append(
        Record(
            concept,
            reference,
            name,
            ours.size,
            float(differences.max(initial=0.0)),
            float(relative.max(initial=0.0)),
            not different.any(),
            "identical" if exact else f"{atol:g} + {rtol:g} |x|",
        )
    )
    message = f"{concept}, {reference}, {name}"
    if exact:
        np.testing.assert_array_equal(ours, theirs, err_msg=message)
    else:
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=rtol, err_msg=message)


def continuous(inclusive) -> np.ndarray:
    """Converts boxes with inclusive corners (width x2 - x1 + 1) to our continuous boxes."""
    return np.asarray(inclusive, np.float32) + np.float32([0, 0, 1, 1])


def inclusive(continuous) -> np.ndarray:
    """Converts our boxes to boxes with inclusive corners."""
    return np.asarray(continuous, np.float32) - np.float32([0, 0, 1, 1])


def swapped(boxes) -> np.ndarray:
    """Returns boxes or deltas with x and y exchanged."""
    return np.asarray(boxes)[..., [1, 0, 3, 2]]
