"""Writes and reads the proposals of a data set: the user's own, and those that one stage of alternating training passes
to the next.

The `.safetensors` file contains the concatenated boxes and scores of all images and the number of boxes of each image.
Its header contains the image ids and the weights that made the proposals. The file is written completely or not at
all, and reading it runs no code.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.data.records import Dataset, ImageProposals, ImageRecord
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.regular_files import check_regular

logger = logging.getLogger(__name__)


def write_proposals(path: Path, proposals: Mapping[str, ImageProposals], *, made_by: str) -> None:
    """Writes proposals by image id.

    Args:
      made_by: identifies the weights that made the proposals, so that proposals of other weights are not used.
    Raises:
      InputError: the file cannot be written.
    """
    import safetensors.numpy

    found = list(proposals.values())
    arrays = {
        # The empty array also makes NumPy put the rows one after the other: safetensors stores the memory as it lies.
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
    import safetensors

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


SPLIT = "{split}"
# A box may reach this many pixels outside, as rounded corners and corners that are counted from 1 do; it is clipped.
OUTSIDE = 1.0


def own_proposals(path: Path, split: str, dataset: Dataset, *, field: str, limit: int) -> dict[str, ImageProposals]:
    """Returns the user's proposals of a split, by image id: checked, and those of each image best first.

    Proposals of equal score stay in the order of the file. A warning counts the images with more than `limit`.

    Args:
      path: the file; {split} in it stands for the name of the split, or for each name of splits that + joins.
      field: the setting that holds `limit`, the number of proposals that will be used of each image.
    Raises:
      InputError: a file cannot be read, it has no proposals for an image, or a box is not in its image.
    """
    names = split.split("+") if SPLIT in str(path) else [split]
    found, where = {}, {}
    for name in names:
        file = Path(str(path).replace(SPLIT, name))
        of_file, _ = read_proposals(file)
        # In joined splits whose images share ids, an image is called SPLIT/ID.
        of_file = {f"{name}/{image}": boxes for image, boxes in of_file.items()} | of_file
        found |= of_file
        where |= dict.fromkeys(of_file, file)
    check_present(path, found, dataset)
    checked = {record.id: _checked(found[record.id], record, where[record.id]) for record in dataset.records}
    if not any(len(of_image.boxes) for of_image in checked.values()):
        raise InputError(f"{path}: the file has no boxes for any of the {len(checked)} images of {dataset.name}")
    more = sum(len(of_image.boxes) > limit for of_image in checked.values())
    if more:
        logger.warning(
            "%s: %d images have more proposals than %s = %d; the best of each image are used", path, more, field, limit
        )
    return checked


def check_present(path: Path, found: Mapping[str, ImageProposals], dataset: Dataset) -> None:
    """Raises InputError if the file at `path` has no proposals for an image."""
    missing = [record.id for record in dataset.records if record.id not in found]
    if missing:
        raise InputError(f"{path}: has no proposals for {len(missing)} images, the first is {missing[0]}")


def best_of_each(proposals: Mapping[str, ImageProposals], limit: int) -> dict[str, ImageProposals]:
    """Returns the first `limit` proposals of each image, which are the best."""
    return {name: ImageProposals(boxes[:limit], scores[:limit]) for name, (boxes, scores) in proposals.items()}


def _checked(found: ImageProposals, record: ImageRecord, file: Path) -> ImageProposals:
    height, width = record.image_hw
    boxes, sides = found.boxes, np.array([width, height, width, height], np.float32)
    faulty = (boxes < -OUTSIDE).any(axis=1) | (boxes > sides + OUTSIDE).any(axis=1)
    clipped = np.clip(boxes, 0.0, sides)
    faulty |= (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)
    if faulty.any():
        number = int(np.flatnonzero(faulty)[0])
        raise InputError(
            f"{file}, image {quoted(record.id)}, boxes[{number}]: must be (x1, y1, x2, y2) with x1 < x2 and y1 < y2, "
            f"in pixels of the image of {width} x {height} (width x height), got {boxes[number].tolist()}"
        )
    order = np.argsort(-found.scores, kind="stable")
    return ImageProposals(clipped[order], found.scores[order])
