"""Converts arrays of other programs to our layout and, for the files that we write, back.

Other programs store weights as (out, in) and (out, in, rows, columns); we store them as (in, out) and (rows, columns,
in, out).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    ours: Callable[[np.ndarray], np.ndarray]  # from their array to ours
    theirs: Callable[[np.ndarray], np.ndarray] | None = None  # from our array to theirs; None: never written


def _ours(w: np.ndarray) -> np.ndarray:
    return w if w.ndim < 2 else w.transpose(*range(2, w.ndim), 1, 0)


def _theirs(w: np.ndarray) -> np.ndarray:
    return w if w.ndim < 2 else w.transpose(w.ndim - 1, w.ndim - 2, *range(w.ndim - 2))


# Convolutions and matrices are transposed; vectors do not change.
PLAIN = Layout(_ours, _theirs)


def after_pooling(size: int) -> Layout:
    """Returns the layout of a matrix on `size` x `size` cells.

    Other programs order its inputs by (channel, row, column); we order them by (row, column, channel).
    """

    def ours(w: np.ndarray) -> np.ndarray:
        return w if w.ndim < 2 else _ours(w.reshape(len(w), -1, size, size)).reshape(-1, len(w))

    def theirs(w: np.ndarray) -> np.ndarray:
        return w if w.ndim < 2 else _theirs(w.reshape(size, size, -1, w.shape[1])).reshape(w.shape[1], -1)

    return Layout(ours, theirs)


def _difference(w: np.ndarray) -> np.ndarray:
    background, foreground = np.split(w, 2)
    return _ours(foreground - background)


def _with_zero_background(w: np.ndarray) -> np.ndarray:
    w = _theirs(w)
    return np.concatenate([np.zeros_like(w), w])


# Objectness: other programs have a background and a foreground logit; our single logit is their difference.
TWO_LOGITS = Layout(_difference, _with_zero_background)

# Class logits: background is the last class in other programs and the first class here.
BACKGROUND_LAST = Layout(lambda w: _ours(np.concatenate([w[-1:], w[:-1]])))

# Box deltas: other programs have none for background; here background has four, which are never used.
NO_BACKGROUND = Layout(lambda w: _ours(np.concatenate([np.zeros_like(w[:4]), w])))
