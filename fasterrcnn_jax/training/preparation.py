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

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.config import Config, DataConfig
from fasterrcnn_jax.config.checks import AUTO, fitted
from fasterrcnn_jax.config.rules import first_difference
from fasterrcnn_jax.config.text import from_json
from fasterrcnn_jax.data import sources
from fasterrcnn_jax.data.division import (
    ChangedImages,
    Division,
    TooFewImages,
    divide,
    division_text,
    part,
    parts_of,
    read_division,
)
from fasterrcnn_jax.data.fitting import adopted, fit
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
    division: Division | None  # of the split that is divided; `write_division` stores it


def prepare(config: Config) -> Prepared:
    """Returns the run with its data read and with every "auto" replaced; writes nothing.

    A run that has started keeps the division and the fitted values that it stored.

    Raises:
      InputError: the data cannot be used; see `sources.open_split`.
    """
    if DATA_NAME not in str(config.run):
        return _prepared(config, _stored(config.run))
    name = config.data.root.resolve().name or "data"
    for number in itertools.count(1):
        run = Path(str(config.run).replace(DATA_NAME, name if number == 1 else f"{name}-{number}"))
        asked, stored = dataclasses.replace(config, run=run), _stored(run)
        if stored is None and run_folder.is_unused(run):
            return _prepared(asked, None)
        # Cheap comparisons first: the data of another run is not read.
        if stored is None or stored.data.root.resolve() != config.data.root.resolve() or stored.init != config.init:
            continue
        try:
            prepared = _prepared(asked, stored)
        except ChangedImages:
            continue
        if first_difference(stored, prepared.config) is None:
            return prepared
    raise AssertionError("unreachable")


def write_division(prepared: Prepared) -> None:
    """Writes the division of a new run into its folder. Call it under the lock of the folder, in the first process.

    Raises:
      InputError: another start has divided the images otherwise since this one looked.
    """
    if prepared.division is None:
        return
    path = run_folder.division_path(prepared.config.run)
    if _stored(prepared.config.run) is None:
        write_atomically(path, division_text(prepared.division))
        return
    is_other = path.exists() and path.read_text(encoding="utf-8") != division_text(prepared.division)
    if is_other and not prepared.config.data.accept_changed:
        raise InputError(f"{path}: another start has divided the images; start again, or choose another --run")


def stored_split(config: Config, run: Path, name: str) -> Dataset:
    """Returns a split of the run in `run`, whose division lies in that folder."""
    data = config.data
    if not data.split or name not in parts_of(fitted(data.split, "data.split")):
        return sources.open_split(data, name)
    whole = sources.open_split(data, data.split_of or data.train_split)
    division = read_division(run_folder.division_path(run), whole, accept_changed=True)
    return part(whole, division, name)


def _prepared(config: Config, stored: Config | None) -> Prepared:
    """Returns the prepared run.

    Args:
      stored: the configuration of a run that has started; None: a new run.
    """
    data, splits_of_data, sentences = _understood(config.data)
    data, parts, division = _divided(data, splits_of_data, config, stored)
    epochs = config.train.epochs
    if stored is not None:
        config = adopted(config, stored)
    train = config.train
    if train.best_split is None and stored is not None:
        train = dataclasses.replace(train, best_split=stored.train.best_split)
    elif train.best_split is None:
        train = dataclasses.replace(train, best_split=_validation(data, (*parts, *splits_of_data)))
    config = dataclasses.replace(config, data=data, train=train)
    splits = {name: parts[name] if name in parts else sources.open_split(data, name) for name in split_names(config)}
    train_set = prepare_training_set(splits[data.train_split], data)
    fitting = fit(config, splits.values(), train_set)
    whole = dataclasses.replace(fitting.config, train=dataclasses.replace(fitting.config.train, epochs=epochs))
    sentences += [_classes(splits[data.train_split]), _images(splits), *fitting.sentences]
    return Prepared(whole, splits, train_set, tuple(sentences), division)


def _validation(data: DataConfig, splits: tuple[str, ...]) -> str | None:
    """Returns the split that chooses the best checkpoint; None: the test split, because there is no other."""
    used = (*data.train_split.split("+"), data.test_split)
    # Names like val, valid, val2017, dev and 2007_val. The images of val are also in trainval.
    held_out = [name for name in splits if re.match(r"(\d{4}_)?(val|dev|eval)", name.lower()) and name not in used]
    return held_out[0] if held_out and "trainval" not in data.train_split else None


def _understood(data: DataConfig) -> tuple[DataConfig, tuple[str, ...], list[str]]:
    """Returns the data with its layout and class names, the splits of the data if they are known, and sentences."""
    found, layout = sources.understood(data)
    if layout is None:
        return found, (), [f"data       {found.root}"]
    return found, layout.splits, [f"data       {found.root}: {layout.name} ({layout.why})", *layout.notes]


def _divided(
    data: DataConfig, splits: tuple[str, ...], config: Config, stored: Config | None
) -> tuple[DataConfig, dict[str, Dataset], Division | None]:
    """Returns the data with the names of its parts, the parts and the division; nothing where it is not divided.

    Args:
      splits: the names of the splits that the data set has, if they are known.
      stored: as in `_prepared`.
    """
    fractions, whole_name = data.split, data.split_of or data.train_split
    # A data set with nothing but a test split is divided, as any other single split is.
    own_test = {*data.test_split.split("+")} <= {*splits}
    has_test = own_test and (data.test_split, len(splits)) != (DataConfig.test_split, 1)
    if fractions == AUTO:
        fractions = DEFAULT_SPLIT if splits and not has_test else ()
    if not fractions:
        return dataclasses.replace(data, split=()), {}, None
    # Every image is trained on. Without test images, the same images are evaluated.
    undivided = dataclasses.replace(
        data, split=(), train_split=whole_name, test_split=data.test_split if has_test else whole_name
    )
    if fractions == EVERYTHING or (data.split == AUTO and stored is not None and not stored.data.split):
        return undivided, {}, None
    named = parts_of(fractions)
    if splits and not {*data.test_split.split("+")} <= {DataConfig.test_split, *named, *splits}:
        raise no_such_split(f"data.test_split: no split is named {quoted(data.test_split)}", (*named, *splits))
    whole = sources.open_split(data, whole_name)
    path = run_folder.division_path(config.run)
    try:
        if stored is not None and path.exists():
            division = read_division(path, whole, accept_changed=data.accept_changed)
        else:
            division = divide(whole, tuple(named.values()), seed=config.train.seed)
    except TooFewImages:
        if data.split != AUTO:
            raise
        logger.warning("%s: too few images that differ to divide them: all are trained on and evaluated", whole.name)
        return undivided, {}, None
    # The data set's own test images are a better report than images that choose the checkpoint.
    test = data.test_split if has_test or data.test_split in named else list(named)[-1]
    divided = dataclasses.replace(
        data, split=tuple(named.values()), split_of=whole_name, train_split="train", test_split=test
    )
    return divided, {name: part(whole, division, name) for name in division}, division


def _classes(dataset: Dataset) -> str:
    counts = Counter(label for record in dataset.records for label in record.labels.tolist())
    shown = [f"{name} {counts[label]:,}" for label, name in enumerate(dataset.class_names, start=1)]
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return f"classes    {len(shown)}, with objects to train on: {', '.join(shown[:20])}{more}"


def _images(splits: dict[str, Dataset]) -> str:
    return f"images     {', '.join(f'{name} {len(dataset.records):,}' for name, dataset in splits.items())}"


def _stored(run: Path) -> Config | None:
    """Returns the configuration of a run that has started; None for a new run, or where it cannot be read."""
    path = run_folder.config_path(run)
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except (InputError, OSError, UnicodeDecodeError):
        return None
