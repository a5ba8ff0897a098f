"""Divides one list of images into training, validation and test images.

Near copies of an image (the same pixels, or shifted views of one scene) stay on one side: a network that has seen one
of them in training would be measured on it. The classes are spread by iterative stratification (Sechidis et al. 2011,
"On the Stratification of Multi-Label Data"): the rarest class is dealt first.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fasterrcnn_jax.data.check import MOST_PAIRS
from fasterrcnn_jax.data.faults import decoded
from fasterrcnn_jax.data.overlap import Trace, identical, shifted_views, trace
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.regular_files import check_regular

logger = logging.getLogger(__name__)

PARTS = ("train", "val", "test")
# The images that are in no part, where the fractions leave a rest.
REST = "unused"

# Ids of the images of each part.
Division = Mapping[str, tuple[str, ...]]


class TooFewImages(InputError):
    """A data set has fewer groups of near copies than parts."""


def parts_of(fractions: tuple[float, ...]) -> dict[str, float]:
    """Returns the fraction of each part by name; one number leaves the rest for validation."""
    if len(fractions) == 1:
        fractions = (fractions[0], round(1.0 - fractions[0], 9))
    return dict(zip(PARTS, fractions, strict=False))


def divide(dataset: Dataset, fractions: tuple[float, ...], *, seed: int) -> Division:
    """Returns the ids of each part; decodes every image to find near copies.

    Args:
      fractions: of training, validation and test, as in `data.split`; images beyond their sum are in no part.
      seed: of the order in which groups are dealt.
    Raises:
      TooFewImages: a part would have no image.
      InputError: an image cannot be decoded.
    """
    traces, records = [], dataset.records
    few = len(records) * (len(records) - 1) // 2 <= MOST_PAIRS
    for _, result in decoded(dataset, lambda record, pixels: trace(pixels)):
        if isinstance(result, InputError):
            raise result
        # The thumbnails of 50,000 images would take gigabytes.
        traces.append(result if few else result._replace(thumbnail=np.zeros((0, 0), np.float32)))
    groups = _groups(traces, shifted=few)
    doubles = sum(len(group) - 1 for group in groups)
    if doubles:
        logger.info("%s: %d near copies of other images; near copies stay in one part", dataset.name, doubles)
    if not few:
        logger.info("%s: compared only for the same pixels: too many images for shifted views", dataset.name)
    counts = np.zeros((len(records), len(dataset.class_names)))
    for row, record in zip(counts, records, strict=True):
        np.add.at(row, record.labels - 1, 1)
    wanted = parts_of(fractions)
    if len(groups) < len(wanted):
        raise TooFewImages(
            f"{dataset.name}: data.split cannot divide the images into {', '.join(wanted)}: near copies stay together, "
            f"and the {len(records)} images form {len(groups)} groups; --data.split 1.0 trains on all images"
        )
    dealt = _deal(groups, counts, np.array(list(wanted.values())), seed)
    ids = {
        name: tuple(records[index].id for index in range(len(records)) if dealt[index] == part)
        for part, name in enumerate(wanted)
    }
    rest = tuple(record.id for record, part in zip(records, dealt, strict=True) if part < 0)
    return ids | ({REST: rest} if rest else {})


def division_text(division: Division) -> str:
    """Returns the text of the file that stores a division."""
    return json.dumps(division, indent=1) + "\n"


class ChangedImages(InputError):
    """The data set has other images than when it was divided."""


def read_division(path: Path, dataset: Dataset, *, accept_changed: bool) -> Division:
    """Returns the division in `path`.

    Args:
      accept_changed: images that are new are in no part and images that are gone are left out, with a warning.
    Raises:
      ChangedImages: images are new or gone.
      InputError: the file is damaged.
    """
    check_regular(path)
    try:
        division = json.loads(path.read_text(encoding="utf-8"))
        if not all(
            name in (*PARTS, REST) and isinstance(ids, list) and all(isinstance(image_id, str) for image_id in ids)
            for name, ids in division.items()
        ):
            raise ValueError("must map train, val and test to lists of image ids")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: the division of the images cannot be read: {error}") from error
    known, named = {record.id for record in dataset.records}, {i for ids in division.values() for i in ids}
    if known != named:
        sentence = (
            f"{path}: {dataset.name} has changed since it was divided: {len(known - named)} images are new and "
            f"{len(named - known)} are gone, for example {quoted(min(known ^ named))}"
        )
        if not accept_changed:
            raise ChangedImages(f"{sentence}; restore it, choose another --run, or add --data.accept_changed")
        logger.warning("%s; the new ones are in no part", sentence)
    return {name: tuple(image_id for image_id in ids if image_id in known) for name, ids in division.items()}


def part(dataset: Dataset, division: Division, name: str) -> Dataset:
    """Returns the records of one part, in the order of the data set."""
    ids = set(division[name])
    records = tuple(record for record in dataset.records if record.id in ids)
    return dataset._replace(name=f"{dataset.name}, {name} part", records=records)


def _groups(traces: list[Trace], *, shifted: bool) -> list[list[int]]:
    """Returns the indices of the images, with near copies in one group."""
    leader = list(range(len(traces)))

    def lead(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    pairs = identical(traces, traces)
    if shifted:
        pairs += shifted_views(traces, traces)
    for pair in pairs:
        first, second = sorted((lead(pair.first), lead(pair.second)))
        leader[second] = first
    groups: dict[int, list[int]] = {}
    for index in range(len(traces)):
        groups.setdefault(lead(index), []).append(index)
    return list(groups.values())


def _deal(groups: list[list[int]], counts: np.ndarray, fractions: np.ndarray, seed: int) -> np.ndarray:
    """Returns the part of each image, -1 for none.

    Args:
      counts: objects of each class in each image, [images, classes].
    """
    order = np.random.default_rng(seed).permutation(len(groups))
    sums = np.array([counts[group].sum(axis=0) for group in groups])
    sizes = np.array([len(group) for group in groups])
    # What each part still lacks: images, and objects of each class.
    images = fractions * sizes.sum()
    objects = fractions[:, None] * sums.sum(axis=0)
    dealt, waiting = np.full(len(counts), -1), list(order)
    while waiting:
        left = sums[waiting].sum(axis=0)
        rarest = int(np.where(left > 0, left, np.inf).argmin()) if left.any() else None
        turn = [g for g in waiting if rarest is None or sums[g, rarest] > 0]
        for group in turn:
            lacking = images if rarest is None else objects[:, rarest] + 1e-6 * images
            chosen = int(lacking.argmax())
            # Where the fractions leave a rest, the last groups are in no part.
            if images[chosen] <= -0.5 * sizes[group] and fractions.sum() < 1.0 - 1e-6:
                continue
            dealt[groups[group]] = chosen
            images[chosen] -= sizes[group]
            objects[chosen] -= sums[group]
        done = set(turn)
        waiting = [g for g in waiting if g not in done]
    for part in range(len(fractions)):
        # Of few images, a small fraction is less than one.
        if not (dealt == part).any():
            of_group = [dealt[group[0]] for group in groups]
            giving = max(sorted(set(of_group)), key=of_group.count)
            given = min((g for g in order if of_group[g] == giving), key=lambda g: sizes[g])
            dealt[groups[given]] = part
    return dealt
