"""The bins in which pages count objects by size and shape."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

SIDES = (0.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, float("inf"))  # of the square root of the area, in pixels
ASPECTS = (0.0, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0, float("inf"))  # of height / width


def bin_of(values: np.ndarray, limits: Sequence[float]) -> Int[np.ndarray, "n"]:
    """Returns the bin of each value [n]; a bin holds its lower limit."""
    return np.clip(np.searchsorted(limits, np.nan_to_num(values), side="right") - 1, 0, len(limits) - 2)


def bin_names(limits: Sequence[float]) -> list[str]:
    """Returns the names of the bins, such as 8-16."""
    return [
        f"{low:g}+" if np.isinf(high) else f"<{high:g}" if low == 0 else f"{low:g}-{high:g}"
        for low, high in zip(limits[:-1], limits[1:], strict=True)
    ]
