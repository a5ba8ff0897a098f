"""Evaluates a model on a data set: detections, detections in given proposals, or proposals."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from fasterrcnn_jax.config.train import CocoBackend
from fasterrcnn_jax.data.check import capped_recall
from fasterrcnn_jax.data.records import Dataset, ImageDetections, ImageProposals
from fasterrcnn_jax.evaluation.recall import (
    RECALL,
    format_recall,
    proposal_recall,
    recall_dict,
)
from fasterrcnn_jax.evaluation.report import (
    Metrics,
    evaluate_detections,
    format_table,
    metrics_dict,
)
from fasterrcnn_jax.inference.dataset import (
    detect_dataset,
    detect_dataset_in_proposals,
    propose_dataset,
)
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector

Scored = Literal["detections", "detections in given proposals", "proposals"]


class Score(NamedTuple):
    values: dict[str, float | None]  # metrics under flat names for the log; None: undefined
    headline: str  # the main metric, in a few words
    table: str
    detections: list[ImageDetections] | None  # None: proposals were evaluated
    proposals: list[ImageProposals] | None  # None: detections were evaluated
    metrics: Metrics | None = None  # None: proposals were evaluated


def score(
    model: Detector,
    dataset: Dataset,
    *,
    of: Scored = "detections",
    given: Mapping[str, ImageProposals] | None = None,
    batch_size: int,
    implementation: Implementation = None,
    coco_backend: CocoBackend = "pycocotools",
) -> Score:
    """Returns the detections or proposals of a model on a data set, and their metrics.

    Args:
      given: the given proposals by image id, for "detections in given proposals".
      batch_size: number of images that one device processes at once.
      coco_backend: the package that computes COCO's metrics.
    Raises:
      InputError: this package is not installed.
    """
    if of == "proposals":
        proposals = propose_dataset(model, dataset, batch_size=batch_size, implementation=implementation)
        recall = proposal_recall(proposals, dataset)
        values = recall_dict(recall)
        headline = f"AR@300 of the proposals {_number(values[RECALL])}"
        return Score(values, headline, format_recall(recall), None, proposals)
    if of == "detections":
        found = detect_dataset(model, dataset, batch_size=batch_size, implementation=implementation)
    else:
        assert given is not None, f"{of} need them"
        found = detect_dataset_in_proposals(model, dataset, given, batch_size=batch_size, implementation=implementation)
    result = evaluate_detections(found, dataset, backend=coco_backend)
    values = metrics_dict(result, dataset.class_names)
    capped = [f"note: {sentence}" for sentence in capped_recall(dataset.records, model.config)]
    table = "\n".join([*capped, format_table(dataset, result.voc07, result.voc_area, result.coco)])
    return Score(values, f"AP50 {_number(values['AP50'])}", table, found, None, result)


def shown_proposals(
    model: Detector,
    dataset: Dataset,
    found: Score,
    chosen: Sequence[int],
    *,
    given: Mapping[str, ImageProposals] | None,
    batch_size: int,
    implementation: Implementation = None,
) -> list[ImageProposals]:
    """Returns the proposals of the images at positions `chosen`: from `found`, from `given`, or from the model."""
    if found.proposals is not None:
        return [found.proposals[index] for index in chosen]
    records = tuple(dataset.records[index] for index in chosen)
    if given is not None:
        return [given[record.id] for record in records]
    sample = dataset._replace(records=records)
    return propose_dataset(model, sample, batch_size=batch_size, implementation=implementation)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
