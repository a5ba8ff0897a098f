"""Images that two splits share: the same pixels, or a shifted view of the same field.

A view is found by normalised cross-correlation (Lewis 1995, "Fast Normalized Cross-Correlation") of small grey
images over every shift, by Fourier transform: once for every pair of images at a quarter of the size, and at the
whole of it, without what is smooth, for the few pairs that are alike there.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from fasterrcnn_jax.data.faults import watched

# Pixels of the longer side of a small image.
THUMBNAIL_SIDE = 80
# The part of a small image that two views must have in common, and how alike it must be there.
MIN_OVERLAP = 0.25
MIN_CORRELATION = 0.8
# Without the means of squares of this many pixels: shading and one bright object on a plain ground would make
# strangers alike. In four sets pairs of real views were 0.82 or more, all others 0.72 or less.
SMOOTH = 9
# At a quarter of the size shifts are rounded more; pairs of real views were 0.80 or more there.
COARSER, MIN_COARSE_CORRELATION = 4, 0.7


class Trace(NamedTuple):
    """What is kept of the pixels of an image."""

    digest: bytes  # the same for the same pixels, whatever the file format
    thumbnail: Float[np.ndarray, "h w"]  # float32, grey


class SharedImage(NamedTuple):
    first: int  # index in the one split
    second: int  # index in the other
    correlation: float  # 1.0 for the same pixels
    shift: tuple[float, float]  # (x, y) from the first to the second, in parts of the longer side


def trace(pixels: UInt8[np.ndarray, "h w 3"]) -> Trace:
    """Returns what tells an image among others."""
    digest = hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).digest()
    height, width = pixels.shape[:2]
    scale = THUMBNAIL_SIDE / max(height, width)
    rows, columns = (max(1, round(side * scale)) for side in (height, width))
    grey = pixels.mean(axis=2, dtype=np.float32)
    return Trace(digest, _means(_means(grey, rows, 0), columns, 1))


def _means(grey: np.ndarray, count: int, axis: int) -> np.ndarray:
    """Returns the means of `count` equal parts along an axis, or every value where there are fewer."""
    if grey.shape[axis] <= count:
        return grey
    starts = np.linspace(0, grey.shape[axis], count, endpoint=False).astype(int)
    sizes = np.diff([*starts, grey.shape[axis]]).astype(np.float32)
    return np.add.reduceat(grey, starts, axis) / (sizes[:, None] if axis == 0 else sizes)


def identical(traces: list[Trace], others: list[Trace]) -> list[SharedImage]:
    """Returns the pairs of images of the same pixels."""
    places = {}
    for index, other in enumerate(others):
        places.setdefault(other.digest, []).append(index)
    return [
        SharedImage(first, second, 1.0, (0.0, 0.0))
        for first, one in enumerate(traces)
        for second in places.get(one.digest, [])
    ]


def shifted_views(traces: list[Trace], others: list[Trace]) -> list[SharedImage]:
    """Returns the pairs that show the same field, shifted and not scaled, the most alike first."""
    shared = []
    coarse = [_spectra(_coarser(other.thumbnail), COARSER) for other in others]
    for first, one in enumerate(watched(traces, "comparing images", len(traces))):
        small = _coarser(one.thumbnail)
        own = _spectra(small, COARSER)
        for second, theirs in enumerate(coarse):
            if _best_shift(own, theirs, small.size, COARSER)[0] < MIN_COARSE_CORRELATION:
                continue
            pair = _spectra(_detail(one.thumbnail), 1), _spectra(_detail(others[second].thumbnail), 1)
            correlation, shift = _best_shift(*pair, one.thumbnail.size, 1)
            if correlation >= MIN_CORRELATION:
                shared.append(SharedImage(first, second, correlation, shift))
    return sorted(shared, key=lambda pair: -pair.correlation)


def _coarser(thumbnail: np.ndarray) -> np.ndarray:
    rows, columns = (max(1, size // COARSER) for size in thumbnail.shape)
    return _means(_means(thumbnail, rows, 0), columns, 1)


def _detail(thumbnail: np.ndarray) -> np.ndarray:
    """Returns the image minus its local mean; borders are mirrored."""
    padded = np.pad(thumbnail.astype(np.float64), SMOOTH // 2, mode="symmetric")
    sums = np.pad(padded.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    height, width = thumbnail.shape
    inside = sums[SMOOTH:, SMOOTH:] - sums[:height, SMOOTH:] - sums[SMOOTH:, :width] + sums[:height, :width]
    return thumbnail - inside / SMOOTH**2


def _spectra(thumbnail: np.ndarray, coarser: int) -> np.ndarray:
    """Returns the transforms [3, s, s / 2 + 1] of the image about its mean, of its square, and of where it is."""
    # Twice the image's side: a shift never comes around.
    side = 2 * THUMBNAIL_SIDE // coarser
    grey = thumbnail.astype(np.float64) - thumbnail.mean(dtype=np.float64)
    layers = np.zeros((3, side, side))
    layers[:, : grey.shape[0], : grey.shape[1]] = grey, grey * grey, np.ones_like(grey)
    return np.fft.rfft2(layers)


def _best_shift(a: np.ndarray, b: np.ndarray, size: int, coarser: int) -> tuple[float, tuple[float, float]]:
    """Returns the largest correlation over all shifts with enough in common, and its (x, y)."""
    side = 2 * THUMBNAIL_SIDE // coarser
    value, square, mask = range(3)
    conjugate = np.conj(a)
    products = np.stack([
        conjugate[mask] * b[mask], conjugate[value] * b[value],
        conjugate[value] * b[mask], conjugate[mask] * b[value],
        conjugate[square] * b[mask], conjugate[mask] * b[square],
    ])  # fmt: skip
    count, both, sum_a, sum_b, square_a, square_b = np.fft.irfft2(products, s=(side, side))
    count = np.maximum(np.round(count), 1.0)
    spread = (square_a - sum_a * sum_a / count) * (square_b - sum_b * sum_b / count)
    # Where one of the two is one colour there is nothing to compare.
    usable = (count >= MIN_OVERLAP * size) & (spread > count * count)
    correlation = np.where(usable, (both - sum_a * sum_b / count) / np.sqrt(np.maximum(spread, 1e-9)), -1.0)
    best = np.unravel_index(int(correlation.argmax()), correlation.shape)
    y, x = (int(place) - side if place > side // 2 else int(place) for place in best)
    return float(correlation[best]), (2 * x / side, 2 * y / side)
