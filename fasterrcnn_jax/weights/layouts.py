"""How an array of another program becomes ours, and, where we write its files, back: no number changes on the way.

There weights are laid out as (out, in) and (out, in, rows, columns), here as (in, out) and (rows, columns, in, out).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray] | None = None  # None: never written


def _ours(w: np.ndarray) -> np.ndarray:
    return w if w.ndim < 2 else w.transpose(*range(2, w.ndim), 1, 0)


def _theirs(w: np.ndarray) -> np.ndarray:
    return w if w.ndim < 2 else w.transpose(w.ndim - 1, w.ndim - 2, *range(w.ndim - 2))


# Convolutions, matrices, and vectors, which stay as they are.
PLAIN = Layout(_ours, _theirs)


def after_pooling(size: int) -> Layout:
    """A matrix on `size` x `size` cells, ordered as channel, row, column there and as row, column, channel here."""

    def ours(w):
        return w if w.ndim < 2 else _ours(w.reshape(len(w), -1, size, size)).reshape(-1, len(w))

    def theirs(w):
        return w if w.ndim < 2 else _theirs(w.reshape(size, size, -1, w.shape[1])).reshape(w.shape[1], -1)

    return Layout(ours, theirs)


def _difference(w: np.ndarray) -> np.ndarray:
    background, foreground = np.split(w, 2)
    return _ours(foreground - background)


def _with_zero_background(w: np.ndarray) -> np.ndarray:
    w = _theirs(w)
    return np.concatenate([np.zeros_like(w), w])


# Objectness: of the logits for background and foreground only the difference counts.
TWO_LOGITS = Layout(_difference, _with_zero_background)

# Class logits: background is the last class there and the first one here.
BACKGROUND_LAST = Layout(lambda w: _ours(np.concatenate([w[-1:], w[:-1]])))

# Box deltas: none for background there, four here that are never read.
NO_BACKGROUND = Layout(lambda w: _ours(np.concatenate([np.zeros_like(w[:4]), w])))
