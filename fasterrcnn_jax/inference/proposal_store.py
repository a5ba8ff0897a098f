"""A data set's proposals in a file: made where there are none, checked against the weights that made them."""

import hashlib
import logging
from pathlib import Path

import jax
import numpy as np

from fasterrcnn_jax.data.proposal_files import read_proposals, write_proposals
from fasterrcnn_jax.data.records import Dataset, ImageProposals
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference.dataset import propose_dataset
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.processes import any_process, is_main

logger = logging.getLogger(__name__)


def stored_proposals(
    path: Path, model: Detector, dataset: Dataset, *, batch_size: int, implementation: Implementation = None
) -> list[ImageProposals]:
    """Returns the model's proposals of a data set from the file at `path`, which is made where it is not there.

    Those of other weights or images, or damaged ones, are made again. What was done is logged. All processes must
    call this.
    """
    made_by, ids = digest(model), [record.id for record in dataset.records]

    def is_theirs() -> bool:
        if not path.exists():
            return False
        try:
            found, maker = read_proposals(path)
        except InputError as error:
            logger.warning("%s; they are made again", error)
            return False
        theirs = maker == made_by and list(found) == ids
        if not theirs:
            logger.warning("%s: proposals of other weights or images are replaced", path)
        return theirs

    # One process decides: who saw something else would wait for the others without end.
    if any_process(is_main() and is_theirs()):
        logger.info("%s: proposals of the same weights are there already", path)
        return list(read_proposals(path)[0].values())
    results = propose_dataset(model, dataset, batch_size=batch_size, implementation=implementation)
    if is_main():
        write_proposals(path, dict(zip(ids, results, strict=True)), made_by=made_by)
        logger.info("%s: %d proposals of %d images", path, sum(len(of.boxes) for of in results), len(ids))
    # Nobody reads the file before it is there.
    bool(any_process(False))
    return results


def given_proposals(path: Path, dataset: Dataset) -> dict[str, ImageProposals]:
    """Returns the stored proposals of every image of a data set by its id.

    Raises:
      InputError: the file cannot be read, or an image is not in it.
    """
    found, _ = read_proposals(path)
    missing = [record.id for record in dataset.records if record.id not in found]
    if missing:
        raise InputError(f"{path}: holds no proposals of {len(missing)} images, the first is {missing[0]}")
    return found


def digest(model: Detector) -> str:
    """Returns a checksum of all weights."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(model):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()
