"""Finds images that are in two splits: images with the same pixels, or shifted views of the same scene.

Shifted views are found by normalised cross-correlation (Lewis 1995, "Fast Normalized Cross-Correlation") of grey
thumbnails over all shifts, with the Fourier transform. Every pair is compared at a quarter of the thumbnail size. The
few similar pairs are compared again at full thumbnail size, after their local mean is subtracted.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from fasterrcnn_jax.data.faults import watched

# Pixels of the longer side of a thumbnail.
THUMBNAIL_SIDE = 80
# The fraction of the thumbnail in which two views must overlap, and their minimum correlation there.
MIN_OVERLAP = 0.25
MIN_CORRELATION = 0.8
# The mean over squares of this side is subtracted; otherwise shading, or one bright object on a plain background,
# would make unrelated images similar. In four data sets, real pairs had a correlation of 0.82 or more and all other
# pairs 0.72 or less.
SMOOTH = 9
# At a quarter of the size, shifts are rounded more; real pairs had a correlation of 0.80 or more there.
COARSER, MIN_COARSE_CORRELATION = 4, 0.7


class Trace(NamedTuple):
    """Digest and thumbnail of the pixels of an image."""

    digest: bytes  # depends only on the pixels, not on the file format
    thumbnail: Float[np.ndarray, "h w"]  # float32, grey


class SharedImage(NamedTuple):
    first: int  # index in the first split
    second: int  # index in the second split
    correlation: float  # 1.0 for the same pixels
    shift: tuple[float, float]  # (x, y) from the first to the second, in fractions of the longer side


def trace(pixels: UInt8[np.ndarray, "h w 3"]) -> Trace:
    """Returns the digest and the thumbnail of an image."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    height, width = pixels.shape[:2]
    scale = THUMBNAIL_SIDE / max(height, width)
    rows, columns = (max(1, round(side * scale)) for side in (height, width))
    grey = np.concatenate([part.mean(axis=2, dtype=np.float32) for part in np.array_split(pixels, rows)])
    return Trace(digest.digest(), _means(_means(grey, rows, 0), columns, 1))


def _means(grey: np.ndarray, count: int, axis: int) -> np.ndarray:
    """Returns the means of `count` equal parts along an axis, or all values if there are no more than `count`."""
    if grey.shape[axis] <= count:
        return grey
    starts = np.linspace(0, grey.shape[axis], count, endpoint=False).astype(int)
    sizes = np.diff([*starts, grey.shape[axis]]).astype(np.float32)
    return np.add.reduceat(grey, starts, axis) / (sizes[:, None] if axis == 0 else sizes)


def identical(traces: list[Trace], others: list[Trace]) -> list[SharedImage]:
    """Returns each image with the first of the others that has the same pixels."""
    places = {}
    for index, other in enumerate(others):
        places.setdefault(other.digest, index)
    return [
        SharedImage(first, places[one.digest], 1.0, (0.0, 0.0))
        for first, one in enumerate(traces)
        if one.digest in places
    ]


def shifted_views(traces: list[Trace], others: list[Trace]) -> list[SharedImage]:
    """Returns the pairs that show the same scene, shifted but not scaled; the highest correlation first."""
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
    """Returns the transforms [3, s, s / 2 + 1] of the image minus its mean, of its square, and of its mask."""
    # Padded to twice the side, so that no shift wraps around.
    side = 2 * THUMBNAIL_SIDE // coarser
    grey = thumbnail.astype(np.float64) - thumbnail.mean(dtype=np.float64)
    layers = np.zeros((3, side, side))
    layers[:, : grey.shape[0], : grey.shape[1]] = grey, grey * grey, np.ones_like(grey)
    return np.fft.rfft2(layers)


def _best_shift(a: np.ndarray, b: np.ndarray, size: int, coarser: int) -> tuple[float, tuple[float, float]]:
    """Returns the largest correlation over all shifts with enough overlap, and the (x, y) of this shift."""
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
    # A shift is not usable if one of the two overlapping parts has a single colour.
    usable = (count >= MIN_OVERLAP * size) & (spread > count * count)
    correlation = np.where(usable, (both - sum_a * sum_b / count) / np.sqrt(np.maximum(spread, 1e-9)), -1.0)
    best = np.unravel_index(int(correlation.argmax()), correlation.shape)
    y, x = (int(place) - side if place > side // 2 else int(place) for place in best)
    return float(correlation[best]), (2 * x / side, 2 * y / side)
