"""Prepares a run: recognises the data, divides it where it has one split, and fits the settings that are "auto".

A run stores the prepared configuration, so that continuing and evaluating it see the same.
"""

import dataclasses
import itertools
import logging
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fasterrcnn_jax.config import Config, DataConfig
from fasterrcnn_jax.config.checks import AUTO, fitted
from fasterrcnn_jax.config.rules import first_difference
from fasterrcnn_jax.config.text import from_json
from fasterrcnn_jax.data import sources
from fasterrcnn_jax.data.division import TooFewImages, part, parts_of, read_division, stored_division
from fasterrcnn_jax.data.fitting import fit
from fasterrcnn_jax.data.layouts import no_such_split
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.data.training_set import prepare_training_set
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.training import run_folder
from fasterrcnn_jax.training.stages import split_names

logger = logging.getLogger(__name__)

# A run path may contain this: the name of the data folder takes its place.
DATA_NAME = "{data}"
DEFAULT_SPLIT = (0.8, 0.2)
# data.split of a run that trains on every image.
EVERYTHING = (1.0,)


class Prepared(NamedTuple):
    """A run that can start."""

    config: Config  # without "auto"
    splits: dict[str, Dataset]
    train_set: Dataset  # what is trained on
    sentences: tuple[str, ...]  # what was understood of the data, and what was fitted to it


def prepare(config: Config) -> Prepared:
    """Returns the run with its data read and with every "auto" replaced.

    A division of the data is read from the run folder, or made and written there.

    Raises:
      InputError: the data cannot be used; see `sources.open_split`.
    """
    if DATA_NAME not in str(config.run):
        return _prepared(config)
    name = config.data.root.resolve().name or "data"
    for number in itertools.count(1):
        run = Path(str(config.run).replace(DATA_NAME, name if number == 1 else f"{name}-{number}"))
        if not run_folder.config_path(run).is_file() and not run_folder.is_unused(run):
            continue
        prepared = _prepared(dataclasses.replace(config, run=run))
        if _is_the_same_run(prepared.config):
            return prepared
    raise AssertionError("unreachable")


def stored_split(config: Config, run: Path, name: str) -> Dataset:
    """Returns a split of the run in `run`, whose division lies in that folder."""
    data = config.data
    if not data.split or name not in parts_of(fitted(data.split, "data.split")):
        return sources.open_split(data, name)
    whole = sources.open_split(data, data.split_of or data.train_split)
    return part(whole, read_division(run_folder.division_path(run), whole), name)


def _prepared(config: Config) -> Prepared:
    data, splits_of_data, sentences = _understood(config.data)
    data, parts = _divided(data, splits_of_data, config)
    train = config.train
    if train.best_split is None:
        train = dataclasses.replace(train, best_split=_validation(data, (*parts, *splits_of_data)))
    config = dataclasses.replace(config, data=data, train=train)
    splits = {name: parts[name] if name in parts else sources.open_split(data, name) for name in split_names(config)}
    train_set = prepare_training_set(splits[data.train_split], data)
    fitting = fit(config, splits.values(), train_set)
    sentences += [_classes(splits[data.train_split]), _images(splits), *fitting.sentences]
    return Prepared(fitting.config, splits, train_set, tuple(sentences))


def _validation(data: DataConfig, splits: tuple[str, ...]) -> str | None:
    """Returns the split that chooses the best checkpoint; None: the test split, because there is no other."""
    used = (*data.train_split.split("+"), data.test_split)
    # Names like val, valid, val2017, dev and 2007_val. The images of val are also in trainval.
    held_out = [name for name in splits if re.match(r"(\d{4}_)?(val|dev|eval)", name.lower()) and name not in used]
    return held_out[0] if held_out and "trainval" not in data.train_split else None


def _understood(data: DataConfig) -> tuple[DataConfig, tuple[str, ...], list[str]]:
    """Returns the data with its layout and class names, the splits if the layout was recognised, and sentences."""
    if data.layout != AUTO:
        return sources.with_class_names(data), (), [f"data       {data.root}"]
    layout = sources.recognise(data.root)
    found = sources.with_class_names(sources.with_layout(data))
    return found, layout.splits, [f"data       {found.root}: {layout.name} ({layout.why})", *layout.notes]


def _divided(data: DataConfig, splits: tuple[str, ...], config: Config) -> tuple[DataConfig, dict[str, Dataset]]:
    """Returns the data with the names of its parts, and the parts; none where nothing is divided.

    Args:
      splits: the names of the splits that the data set has, if they are known.
    """
    fractions, whole_name = data.split, data.split_of or data.train_split
    # A data set with nothing but a test split is divided, as any other single split is.
    has_test = data.test_split in splits and (data.test_split, len(splits)) != (DataConfig.test_split, 1)
    if fractions == AUTO:
        fractions = DEFAULT_SPLIT if splits and not has_test else ()
    if not fractions:
        return dataclasses.replace(data, split=()), {}
    # Every image is trained on. Without test images, the same images are evaluated.
    undivided = dataclasses.replace(
        data, split=(), train_split=whole_name, test_split=data.test_split if has_test else whole_name
    )
    if fractions == EVERYTHING:
        return undivided, {}
    named = parts_of(fractions)
    if splits and data.test_split not in (DataConfig.test_split, *named, *splits):
        raise no_such_split(f"data.test_split: no split is named {quoted(data.test_split)}", (*named, *splits))
    whole = sources.open_split(data, whole_name)
    path = run_folder.division_path(config.run)
    try:
        division = stored_division(path, whole, tuple(named.values()), seed=config.train.seed)
    except TooFewImages:
        if data.split != AUTO:
            raise
        logger.warning("%s: too few images that differ to divide them: all are trained on and evaluated", whole.name)
        return undivided, {}
    # The data set's own test images are a better report than images that choose the checkpoint.
    test = data.test_split if has_test or data.test_split in named else list(named)[-1]
    divided = dataclasses.replace(
        data, split=tuple(named.values()), split_of=whole_name, train_split="train", test_split=test
    )
    return divided, {name: part(whole, division, name) for name in division}


def _classes(dataset: Dataset) -> str:
    counts = Counter(label for record in dataset.records for label in record.labels.tolist())
    shown = [f"{name} {counts[label]:,}" for label, name in enumerate(dataset.class_names, start=1)]
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return f"classes    {len(shown)}, with objects to train on: {', '.join(shown[:20])}{more}"


def _images(splits: dict[str, Dataset]) -> str:
    return f"images     {', '.join(f'{name} {len(dataset.records):,}' for name, dataset in splits.items())}"


def _is_the_same_run(config: Config) -> bool:
    """Returns whether the run folder is new, or holds a run of the same data, first weights and settings."""
    path = run_folder.config_path(config.run)
    if not path.is_file():
        return True
    try:
        stored = from_json(path.read_text(encoding="utf-8"), str(path))
    except (InputError, OSError, UnicodeDecodeError):
        return False
    same_start = stored.data.root.resolve() == config.data.root.resolve() and stored.init == config.init
    return same_start and first_difference(stored, config) is None
