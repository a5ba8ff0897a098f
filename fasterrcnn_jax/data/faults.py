"""Handles faults of data sets: strict reading stops at the first fault; lenient reading skips and counts faults."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.records import Dataset, Finding, ImageRecord
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.printing import progress_bar

Faults = Literal["error", "skip"]

FAULTY_IMAGE = "Faulty images were skipped"
FAULTY_OBJECT = "Faulty objects were skipped"
# A choice of the user and no fault: every reader leaves these objects out.
OTHER_CLASS = "Objects of classes outside data.class_names were ignored"

# Sentence about one kind of finding -> file, field and value of each finding.
Found = defaultdict[str, list[str]]

Item = TypeVar("Item")

# Threads help because Pillow releases the interpreter lock while it decodes.
THREADS = 4


@contextlib.contextmanager
def skipping(sentence: str, found: Found, faults: Faults) -> Iterator[None]:
    """Leaves its block at a fault and adds the fault to `found`; with `faults` "error", the fault is raised."""
    try:
        yield
    except InputError as error:
        if faults == "error":
            raise
        found[sentence].append(str(error))


def findings_of(found: Found) -> tuple[Finding, ...]:
    """Returns the findings, grouped by kind."""
    return tuple(
        Finding(sentence, where, sentence in (FAULTY_IMAGE, FAULTY_OBJECT))
        for sentence, places in found.items()
        for where in places
    )


def notes_of(findings: tuple[Finding, ...]) -> tuple[str, ...]:
    """Returns one sentence per kind of finding, with the count and the first finding."""
    places = defaultdict(list)
    for finding in findings:
        places[finding.sentence].append(finding.where)
    return tuple(
        f"{sentence}: {len(where)}, the first in {where[0].rstrip('.')}." for sentence, where in places.items()
    )


def dataset_of(
    name: str,
    class_names: tuple[str, ...],
    records: Iterable[ImageRecord],
    found: Found,
    *,
    category_ids: tuple[int, ...] | None = None,
) -> Dataset:
    """Returns what a reader has read: the records, and what it found on the way as findings and notes.

    Args:
      category_ids: id of each class in result files; None: 1, 2, 3 and so on.
    """
    findings = findings_of(found)
    ids = tuple(range(1, len(class_names) + 1)) if category_ids is None else category_ids
    return Dataset(name, tuple(class_names), tuple(records), notes_of(findings), ids, findings)


def skip_undecodable(dataset: Dataset) -> Dataset:
    """Returns the data set without the images that cannot be decoded; decodes every image once.

    Raises:
      InputError: every image was skipped, or the remaining images have no objects because of skipped faults.
    """
    kept, found = [], defaultdict(list)
    for record, result in decoded(dataset, lambda record, pixels: None):
        if isinstance(result, InputError):
            found[FAULTY_IMAGE].append(str(result))
        else:
            kept.append(record)
    findings = (*dataset.findings, *findings_of(found))
    skipped = [finding.where for finding in findings if finding.is_fault]
    if skipped and not any(len(record.boxes) for record in kept):
        what = "object in its images" if kept else "image"
        raise InputError(
            f"{dataset.name}: no {what} is left because faults were skipped: {len(skipped)}, the first in {skipped[0]}"
        )
    return dataset._replace(records=tuple(kept), findings=findings, notes=notes_of(findings))


def decoded(dataset: Dataset, measure: Callable[[ImageRecord, Any], Any]) -> Iterator[tuple[ImageRecord, Any]]:
    """Yields each record with `measure(record, pixels)`, or with the InputError if its image cannot be decoded."""

    def attempt(record: ImageRecord) -> Any:
        try:
            return measure(record, record_pixels(record))
        except InputError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(attempt, dataset.records)
        yield from zip(dataset.records, watched(results, f"decoding {dataset.name}", len(dataset.records)), strict=True)


def watched(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """Returns `items` with a progress bar."""
    return progress_bar(items, title=what, total=total, unit="image")
