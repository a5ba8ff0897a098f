"""Writes and reads the proposals of a data set, which one stage of alternating training passes to the next.

The `.safetensors` file contains the concatenated boxes and scores of all images and the number of boxes of each image.
Its header contains the image ids and the weights that made the proposals. The file is written completely or not at
all, and reading it runs no code.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.data.records import ImageProposals
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.regular_files import check_regular


def write_proposals(path: Path, proposals: Mapping[str, ImageProposals], *, made_by: str) -> None:
    """Writes proposals by image id.

    Args:
      made_by: identifies the weights that made the proposals, so that proposals of other weights are not used.
    Raises:
      InputError: the file cannot be written.
    """
    found = list(proposals.values())
    arrays = {
        "boxes": np.concatenate([np.zeros((0, 4), np.float32), *(of_image.boxes for of_image in found)]),
        "scores": np.concatenate([np.zeros(0, np.float32), *(of_image.scores for of_image in found)]),
        "counts": np.array([len(of_image.boxes) for of_image in found], np.int64),
    }
    metadata = {"ids": json.dumps(list(proposals)), "made_by": made_by}
    write_atomically(path, safetensors.numpy.save(arrays, metadata=metadata))


def read_proposals(path: Path) -> tuple[dict[str, ImageProposals], str]:
    """Returns the proposals by image id and `made_by`, as given to `write_proposals`.

    Raises:
      InputError: the file is missing, damaged, or not a proposals file.
    """
    check_regular(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            boxes, scores, counts = (file.get_tensor(name) for name in ("boxes", "scores", "counts"))
        ids, made_by = json.loads(metadata["ids"]), metadata["made_by"]
    except Exception as error:  # safetensors raises what NumPy and Rust raise
        raise InputError(f"{path}: the proposals file is missing, damaged, or of another kind ({error})") from error
    if (
        not isinstance(ids, list)
        or not all(isinstance(name, str) for name in ids)
        or len(set(ids)) != len(ids)
        or counts.shape != (len(ids),)
        or counts.dtype != np.int64
        or not ((counts >= 0) & (counts <= len(boxes))).all()
        or boxes.shape != (counts.sum(), 4)
        or scores.shape != (counts.sum(),)
        or not (boxes.dtype == scores.dtype == np.float32)
        or not (np.isfinite(boxes).all() and np.isfinite(scores).all())
    ):
        raise InputError(f"{path}: the boxes, scores and counts in the file do not fit its image ids")
    ends = np.cumsum(counts)[:-1]
    pairs = zip(np.split(boxes, ends), np.split(scores, ends), strict=True) if ids else ()
    return {name: ImageProposals(*pair) for name, pair in zip(ids, pairs, strict=True)}, made_by
