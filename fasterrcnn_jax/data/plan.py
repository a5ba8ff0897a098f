"""Plans the batches of an epoch and their canvases from the image sizes, before any image is read.

Every process computes the same plan and takes its own rows, so all processes see the same shapes in the same
order. A batch contains images of one canvas; the last batch of a canvas is filled up with invalid rows, so
every image appears exactly once per epoch. With ranking by aspect, the images of a batch also have a similar
width / height, and less of the canvas is padding.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Canvas = tuple[int, int]


class BatchPlan(NamedTuple):
    canvas: Canvas
    image_index: Int[np.ndarray, "b"]  # 0 in rows that only fill the batch
    image_valid: Bool[np.ndarray, "b"]


def plan_batches(canvases: list[Canvas], order: Int[np.ndarray, "n"], batch_size: int) -> list[BatchPlan]:
    """Returns batches of the images in `order`, canvas after canvas.

    Args:
      canvases: canvas of each image.
      order: positions in `canvases`.
    """
    batches = []
    for canvas in sorted(set(canvases)):
        members = [index for index in order if canvases[index] == canvas]
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            image_index = np.zeros(batch_size, np.int32)
            image_index[: len(chosen)] = chosen
            batches.append(BatchPlan(canvas, image_index, np.arange(batch_size) < len(chosen)))
    return batches


def rows_of(plan: BatchPlan, index: int, count: int) -> BatchPlan:
    """Returns the rows of a batch that process `index` of `count` reads; every process gets the same number."""
    rows = np.arange(len(plan.image_index)).reshape(count, -1)[index]
    return plan._replace(image_index=plan.image_index[rows], image_valid=plan.image_valid[rows])


def plan_epoch(
    canvases: list[Canvas],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    aspects: Float[np.ndarray, "n"] | None = None,
) -> list[BatchPlan]:
    """Returns the batches of one epoch: images shuffled, then batches shuffled, both determined by (seed, epoch).

    Args:
      aspects: width / height of each image; batches contain neighbours in this order, and the shuffle breaks ties.
        None: no ranking.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(canvases))
    if aspects is not None:
        order = order[np.argsort(aspects[order], kind="stable")]
    batches = plan_batches(canvases, order, batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]
