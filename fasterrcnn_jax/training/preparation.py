"""Prepares a run: recognises the data, divides it where it has one split, and fits the settings that are "auto".

A run stores the prepared configuration, so that continuing and evaluating it see the same.
"""

import dataclasses
import logging
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fasterrcnn_jax.config import Config, DataConfig
from fasterrcnn_jax.config.checks import AUTO, fitted
from fasterrcnn_jax.config.rules import first_difference
from fasterrcnn_jax.config.text import from_json
from fasterrcnn_jax.data import sources
from fasterrcnn_jax.data.division import Division, part, parts_of, read_division, stored_division
from fasterrcnn_jax.data.fitting import fit
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.data.training_set import prepare_training_set
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.training import run_folder
from fasterrcnn_jax.training.stages import split_names

logger = logging.getLogger(__name__)

# A run path may contain this: the name of the data folder takes its place.
DATA_NAME = "{data}"
SPLIT = (0.8, 0.2)


class Prepared(NamedTuple):
    """A run that can start."""

    config: Config  # without "auto"
    splits: dict[str, Dataset]
    train_set: Dataset  # what is trained on
    sentences: tuple[str, ...]  # what was understood of the data, and what was fitted to it


def prepare(config: Config) -> Prepared:
    """Returns the run with its data read and with every "auto" replaced.

    Raises:
      InputError: the data cannot be used; see `sources.open_split`.
    """
    if DATA_NAME not in str(config.run):
        return _prepared(config)
    name = config.data.root.resolve().name or "data"
    number = 1
    while True:
        run = Path(str(config.run).replace(DATA_NAME, name if number == 1 else f"{name}-{number}"))
        prepared = _prepared(dataclasses.replace(config, run=run)) if _stored(run) or not run.exists() else None
        if prepared is not None and _is_the_same_run(prepared.config):
            return prepared
        number += 1


def _prepared(config: Config) -> Prepared:
    data, sentences = _understood(config.data)
    data, division = _divided(data, config)
    config = dataclasses.replace(config, data=data)
    if data.split and config.train.best_split is None and data.test_split != "val":
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, best_split="val"))
    splits = {name: open_split(data, name, division) for name in split_names(config)}
    train_set = prepare_training_set(splits[data.train_split], data)
    fitting = fit(config, splits.values(), train_set)
    sentences += [_classes(splits[data.train_split]), _images(splits), *fitting.sentences]
    return Prepared(fitting.config, splits, train_set, tuple(sentences))


def open_split(data: DataConfig, name: str, division: Division | None) -> Dataset:
    """Returns one split of the data set, or one part of the split that `data.split` divides."""
    if division is None or name not in division:
        return sources.open_split(data, name)
    return part(sources.open_split(data, _whole(data)), division, name)


def stored_split(config: Config, name: str) -> Dataset:
    """Returns a split of a stored run, whose division lies in its folder."""
    data, path = config.data, run_folder.division_path(config.run)
    if not data.split or name not in parts_of(fitted(data.split, "data.split")):
        return sources.open_split(data, name)
    whole = sources.open_split(data, _whole(data))
    return part(whole, read_division(path, whole), name)


def _understood(data: DataConfig) -> tuple[DataConfig, list[str]]:
    """Returns the data with its layout and class names, and sentences about them."""
    if data.layout != AUTO:
        return sources.with_class_names(data), [f"data       {data.root}"]
    layout = sources.recognise(data.root)
    found = sources.with_class_names(sources.with_layout(data))
    if found.split == AUTO:
        # One split, or none to evaluate on.
        divided = found.test_split not in layout.splits
        found = dataclasses.replace(found, split=SPLIT if divided else ())
    return found, [f"data       {found.root}: {layout.name} ({layout.why})", *layout.notes]


def _divided(data: DataConfig, config: Config) -> tuple[DataConfig, Division | None]:
    """Returns the data with the names of its parts, and the division; None where nothing is divided."""
    if data.split == AUTO:
        return dataclasses.replace(data, split=()), None
    if not data.split:
        return data, None
    fractions = parts_of(data.split)
    whole = sources.open_split(data, _whole(data))
    division = stored_division(
        run_folder.division_path(config.run), whole, tuple(fractions.values()), seed=config.train.seed
    )
    *_, last = fractions
    return (
        dataclasses.replace(
            data, split=tuple(fractions.values()), split_of=_whole(data), train_split="train", test_split=last
        ),
        division,
    )


def _whole(data: DataConfig) -> str:
    return data.split_of or data.train_split


def _classes(dataset: Dataset) -> str:
    counts = Counter(label for record in dataset.records for label in record.labels.tolist())
    shown = [f"{name} {counts[label]:,}" for label, name in enumerate(dataset.class_names, start=1)]
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return f"classes    {len(shown)}, with objects to train on: {', '.join(shown[:20])}{more}"


def _images(splits: dict[str, Dataset]) -> str:
    return f"images     {', '.join(f'{name} {len(dataset.records):,}' for name, dataset in splits.items())}"


def _stored(run: Path) -> bool:
    return run_folder.config_path(run).is_file()


def _is_the_same_run(config: Config) -> bool:
    """Returns whether the run folder is new, or holds a run of the same data and settings."""
    path = run_folder.config_path(config.run)
    if not path.is_file():
        return True
    try:
        stored = from_json(path.read_text(encoding="utf-8"), str(path))
    except (InputError, OSError, UnicodeDecodeError):
        return False
    same_data = stored.data.root.resolve() == config.data.root.resolve()
    return same_data and first_difference(stored, config) is None
