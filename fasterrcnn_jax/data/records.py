"""What every reader of labelled images returns.

Boxes are float32 xyxy in continuous pixels of the stored image: a box covers [x1, x2) x [y1, y2).
Labels are 1..K in the order of `class_names`; 0 is background and never appears here.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np


class ImageRecord(NamedTuple):
    """One labelled image; its pixels are decoded only when it is its turn."""

    id: str  # unique in its data set; what result files call the image
    path: Path
    image_hw: tuple[int, int]
    boxes: np.ndarray  # [N, 4] float32
    labels: np.ndarray  # [N] int32
    difficult: np.ndarray  # [N] bool; kept out of training, ignored by the VOC metric


class Dataset(NamedTuple):
    """All records of one split, annotations parsed once."""

    name: str  # for messages: the folder and the split
    class_names: tuple[str, ...]
    records: tuple[ImageRecord, ...]
    notes: tuple[str, ...]  # one sentence per kind of thing that was dropped or clipped, with its count
