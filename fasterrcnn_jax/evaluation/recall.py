"""How many objects the proposals cover: COCO's average recall of boxes without classes.

Hosang et al. 2015 (arXiv:1502.05082), section 4; https://cocodataset.org/#detection-eval. The best proposals of each
image take objects in the order of their scores, each the free object that it overlaps most; an object is found
where that is at least the threshold. Difficult objects and crowds are not to be found.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from fasterrcnn_jax.data.records import Dataset, ImageProposals, box_iou

LIMITS = (100, 300, 1000, 2000)
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
RECALL = "proposal_AR_300"  # what decides which RPN is best
_NEVER = np.iinfo(np.int64).max


class ProposalRecall(NamedTuple):
    """Parts of the objects that are found, 0..1; NaN where there is no object."""

    num_objects: int
    recall: np.ndarray  # [LIMITS, THRESHOLDS] float64: among the best so many proposals of each image


def proposal_recall(proposals: Sequence[ImageProposals], dataset: Dataset) -> ProposalRecall:
    """Returns the recall of `proposals`, one entry per record of `dataset` in the same order, best first.

    Raises:
      ValueError: not one entry per image.
    """
    if len(proposals) != len(dataset.records):
        raise ValueError(
            f"{dataset.name} has {len(dataset.records)} images, but proposals has {len(proposals)} entries"
        )
    found_at = [np.zeros((len(THRESHOLDS), 0), np.int64)]
    for found, record in zip(proposals, dataset.records, strict=True):
        objects = record.boxes[~(record.difficult | record.crowd)]
        found_at.append(_ranks(box_iou(found.boxes[: max(LIMITS)], objects)))
    ranks = np.concatenate(found_at, axis=1)
    if not ranks.size:
        return ProposalRecall(0, np.full((len(LIMITS), len(THRESHOLDS)), math.nan))
    return ProposalRecall(ranks.shape[1], np.stack([(ranks < limit).mean(axis=1) for limit in LIMITS]))


def _ranks(iou: Float[np.ndarray, "p g"]) -> Int[np.ndarray, "t g"]:
    """Returns for each threshold the place of the proposal that finds each object; `_NEVER` where none does."""
    ranks = np.full((len(THRESHOLDS), iou.shape[1]), _NEVER)
    levels = np.arange(len(THRESHOLDS))
    for place in np.flatnonzero(iou.max(axis=1, initial=0.0) >= THRESHOLDS[0]):
        free = np.where(ranks == _NEVER, iou[place], -1.0)
        # Of equal overlaps the last, as pycocotools.
        best = free.shape[1] - 1 - free[:, ::-1].argmax(axis=1)
        takes = free[levels, best] >= THRESHOLDS
        ranks[levels[takes], best[takes]] = place
    return ranks


def recall_dict(result: ProposalRecall) -> dict[str, float | None]:
    """Returns the recall under flat names for a log or a JSON file; None where it is undefined."""
    values = {}
    for limit, recall in zip(LIMITS, result.recall, strict=True):
        named = {"AR": recall.mean(), "recall50": recall[0], "recall70": recall[4]}
        values |= {f"proposal_{name}_{limit}": None if math.isnan(x) else float(x) for name, x in named.items()}
    return values


def format_recall(result: ProposalRecall) -> str:
    """Returns the table that the scripts print, ending with the line `AR@300 0.xxx`."""
    lines = [f"proposals  recall at IoU 0.5  at 0.7  AR (0.5 to 0.95)  of {result.num_objects} objects"]
    for limit, recall in zip(LIMITS, result.recall, strict=True):
        lines.append(f"{limit:>9}  {recall[0]:>17.3f}  {recall[4]:>6.3f}  {recall.mean():>16.3f}")
    return "\n".join([*lines, f"AR@300 {result.recall[1].mean():.3f}"])
