"""Computes the recall of proposals: COCO's average recall for boxes without classes.

Hosang et al. 2015 (arXiv:1502.05082), section 4; https://cocodataset.org/#detection-eval. The best proposals of each
image are matched in the order of their scores. Each proposal is matched to the unmatched object with the highest IoU
if this IoU is at least the threshold. Difficult objects and crowds are ignored.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from fasterrcnn_jax.data.records import Dataset, ImageProposals, box_iou_in_parts

LIMITS = (100, 300, 1000, 2000)
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
RECALL = "proposal_AR_300"  # the metric that selects the best RPN
_NEVER = np.iinfo(np.int64).max


class ProposalRecall(NamedTuple):
    """Recall of proposals, 0..1; NaN if there is no object."""

    num_objects: int
    recall: np.ndarray  # [LIMITS, THRESHOLDS] float64, with at most so many proposals per image


def proposal_recall(proposals: Sequence[ImageProposals], dataset: Dataset) -> ProposalRecall:
    """Returns the recall of `proposals`, one entry per record of `dataset` in the same order, best first.

    Raises:
      ValueError: `proposals` does not have one entry per image.
    """
    if len(proposals) != len(dataset.records):
        raise ValueError(
            f"{dataset.name} has {len(dataset.records)} images, but proposals has {len(proposals)} entries"
        )
    found_at = [np.zeros((len(THRESHOLDS), 0), np.int64)]
    for found, record in zip(proposals, dataset.records, strict=True):
        objects = record.boxes[~(record.difficult | record.crowd)]
        found_at.append(_ranks(found.boxes[: max(LIMITS)], objects))
    ranks = np.concatenate(found_at, axis=1)
    if not ranks.size:
        return ProposalRecall(0, np.full((len(LIMITS), len(THRESHOLDS)), math.nan))
    return ProposalRecall(ranks.shape[1], np.stack([(ranks < limit).mean(axis=1) for limit in LIMITS]))


def _ranks(proposals: Float[np.ndarray, "p 4"], objects: Float[np.ndarray, "g 4"]) -> Int[np.ndarray, "t g"]:
    """Returns, per threshold and object, the rank of the proposal that finds the object; `_NEVER`: no proposal does."""
    ranks = np.full((len(THRESHOLDS), len(objects)), _NEVER)
    levels = np.arange(len(THRESHOLDS))
    for first, iou in box_iou_in_parts(proposals, objects):
        for row in np.flatnonzero(iou.max(axis=1, initial=0.0) >= THRESHOLDS[0]):
            free = np.where(ranks == _NEVER, iou[row], -1.0)
            # Equal IoUs: the last object, as in pycocotools.
            best = free.shape[1] - 1 - free[:, ::-1].argmax(axis=1)
            takes = free[levels, best] >= THRESHOLDS
            ranks[levels[takes], best[takes]] = first + row
    return ranks


def recall_dict(result: ProposalRecall) -> dict[str, float | None]:
    """Returns the recall under flat names for a log or a JSON file; None if it is undefined."""
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
