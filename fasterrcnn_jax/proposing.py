"""A data set's proposals, and detections among given ones: the two halves of a detector, each on its own."""

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fasterrcnn_jax import parallel
from fasterrcnn_jax.data.loader import evaluation_batches
from fasterrcnn_jax.data.proposal_files import read_proposals, write_proposals
from fasterrcnn_jax.data.records import Dataset, ImageProposals
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.results import ImageDetections
from fasterrcnn_jax.inference import gathered, to_original
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector, detect_in_given, find_proposals
from fasterrcnn_jax.structures import Batch, Detections

logger = logging.getLogger(__name__)

jitted_find_proposals = jax.jit(find_proposals, static_argnames="implementation")
jitted_detect_in_given = jax.jit(detect_in_given, static_argnames="implementation")


def propose_dataset(
    model: Detector, dataset: Dataset, *, batch_size: int, implementation: Implementation = None
) -> list[ImageProposals]:
    """Returns the proposals of every image of a data set, in its order and in pixels of the stored images.

    Each process makes its share of them, on one device, and all return the same: all must call this.
    """

    def propose(batch: Batch) -> Detections:
        found = jitted_find_proposals(model, batch.images, batch.image_hw, batch.scale, implementation=implementation)
        return Detections(found.boxes, found.scores, jnp.zeros_like(found.valid, jnp.int32), found.valid)

    batches = evaluation_batches(dataset, model.config.image, batch_size=batch_size, process=parallel.process())
    return [ImageProposals(of.boxes, of.scores) for of in _over(batches, propose, dataset, "proposals ")]


def detect_dataset_in(
    model: Detector,
    dataset: Dataset,
    proposals: Mapping[str, ImageProposals],
    *,
    batch_size: int,
    implementation: Implementation = None,
) -> list[ImageDetections]:
    """Returns the detections of every image among the best of its stored proposals: Fast R-CNN.

    All processes must call this, as `propose_dataset`.

    Args:
      proposals: by image id; as many of each image are looked at as the model proposes when it detects.
    """
    limit = model.config.test_proposals.post_nms_top_n
    best = {name: ImageProposals(boxes[:limit], scores[:limit]) for name, (boxes, scores) in proposals.items()}

    def detect(batch: Batch) -> Detections:
        return jitted_detect_in_given(
            model, batch.images, batch.image_hw, batch.proposals, implementation=implementation
        )

    batches = evaluation_batches(
        dataset, model.config.image, batch_size=batch_size, process=parallel.process(), proposals=best
    )
    return _over(batches, detect, dataset, "")


def _over(
    batches: Iterator[Batch], find: Callable[[Batch], Detections], dataset: Dataset, doing: str
) -> list[ImageDetections]:
    """Returns what `find` finds in every image, in its pixels."""
    results = {}
    index, count = parallel.process()
    interval = 0.1 if sys.stderr.isatty() else 15.0
    options = dict(unit="image", leave=False, mininterval=interval, disable=index > 0)
    with tqdm(total=len(dataset.records) // count, desc=doing + dataset.name, **options) as bar:
        for batch in batches:
            found = jax.device_get(find(batch))
            for row in np.flatnonzero(batch.image_valid).tolist():
                position = int(batch.image_index[row])
                results[position] = to_original(found, row, batch.scale[row], dataset.records[position].image_hw)
            bar.update(int(batch.image_valid.sum()))
    return gathered(results)


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
    if parallel.any_process(parallel.is_main() and is_theirs()):
        logger.info("%s: proposals of the same weights are there already", path)
        return list(read_proposals(path)[0].values())
    results = propose_dataset(model, dataset, batch_size=batch_size, implementation=implementation)
    if parallel.is_main():
        write_proposals(path, dict(zip(ids, results, strict=True)), made_by=made_by)
        logger.info("%s: %d proposals of %d images", path, sum(len(of.boxes) for of in results), len(ids))
    # Nobody reads the file before it is there.
    bool(parallel.any_process(False))
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
