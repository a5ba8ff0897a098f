"""Stores the proposals of a data set in a file, and checks that the file belongs to the model's weights."""

import hashlib
import logging
from pathlib import Path

import jax
import numpy as np

from fasterrcnn_jax.data.proposal_files import check_present, read_proposals, write_proposals
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
    """Returns the model's proposals for a data set. Reads them from the file at `path`, or computes and writes them.

    A file that is damaged, or that belongs to other weights or images, is replaced. The log says what was done. All
    processes must call this.
    """
    made_by, ids = digest(model), [record.id for record in dataset.records]

    def is_theirs() -> bool:
        if not path.exists():
            return False
        try:
            found, maker = read_proposals(path)
        except InputError as error:
            logger.warning("%s; the proposals are computed again", error)
            return False
        theirs = maker == made_by and list(found) == ids
        if not theirs:
            logger.warning("%s: the proposals belong to other weights or images and are replaced", path)
        return theirs

    # Process 0 decides for all: a process that decided otherwise would wait for the others forever.
    if any_process(is_main() and is_theirs()):
        logger.info("%s: the file already has the proposals of these weights", path)
        return list(read_proposals(path)[0].values())
    results = propose_dataset(model, dataset, batch_size=batch_size, implementation=implementation)
    if is_main():
        write_proposals(path, dict(zip(ids, results, strict=True)), made_by=made_by)
        logger.info("%s: wrote %d proposals of %d images", path, sum(len(of.boxes) for of in results), len(ids))
    # A barrier: no process reads the file before it is written.
    bool(any_process(False))
    return results


def given_proposals(path: Path, dataset: Dataset) -> dict[str, ImageProposals]:
    """Returns the stored proposals of a data set, by image id.

    Raises:
      InputError: the file cannot be read, or it has no proposals for an image.
    """
    found, _ = read_proposals(path)
    check_present(path, found, dataset)
    return found


def digest(model: Detector) -> str:
    """Returns the SHA-256 checksum of all weights."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(model):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()
