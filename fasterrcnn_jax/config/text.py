"""Reads and writes configurations: Python files, JSON in a checkpoint, and checks of the field types.

A configuration file is Python code that builds one `Config` named `config`. A misspelt field is an error in every
form.
"""

import ast
import dataclasses
import difflib
import inspect
import json
import logging
import os
import runpy
import textwrap
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from fasterrcnn_jax.config import Config, ModelConfig
from fasterrcnn_jax.errors import InputError, quoted

logger = logging.getLogger(__name__)


def load_config(path: Path) -> Config:
    """Returns the `config` that the Python file at `path` builds.

    Raises:
      InputError: the file is missing, raises an error, or does not define a `config` with the declared types.
    """
    if not path.is_file():
        raise InputError(f"--config {path}: no such file")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise InputError(f"--config {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise InputError(f"--config {path}: defines no `config` of type Config")
    check_types(config, str(path))
    return config


def check_types(config: Any, name: str) -> None:
    """Raises an InputError for the first field, depth first, whose value does not have its declared type."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        where = f"{name}.{field.name}" if ":" in name else f"{name}: {field.name}"
        if not _has_type(value, field.type):
            raise InputError(f"{where} must be {_type_name(field.type)}, got {quoted(value)}")
        if dataclasses.is_dataclass(value):
            check_types(value, where)


def _has_type(value: Any, expected: Any) -> bool:
    import typeguard

    try:
        # By default typeguard checks only the first item of a collection.
        typeguard.check_type(value, expected, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        return False
    return True


def _type_name(kind: Any) -> str:
    """Returns the name of a type for a message, for example: int or 'auto'."""
    alternatives = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, alternatives))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_type_name, alternatives))
    if kind is type(None):
        return "None"
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the configuration with other values of some fields.

    Args:
      values: values by the field's full name (train.batch_size), or by its last part (batch_size), which means the
        outermost field of that name. Lists become tuples and, for a path, text becomes a path. One value may
        stand for a list of one.
    Raises:
      InputError: there is no such field, several fields have the name, or the value does not suit it.
    """
    places = dict(_leaves(config, ""))
    for name, value in values.items():
        found = [place for place in places if place == name or place.endswith(f".{name}")]
        depths = [place.count(".") for place in found]
        found = [place for place, depth in zip(found, depths, strict=True) if depth == min(depths)]
        if len(found) != 1:
            near = difflib.get_close_matches(name, [*places, *(place.rpartition(".")[2] for place in places)])
            meant = " or ".join(found or dict.fromkeys(near)) or "see train.py --help_all"
            raise InputError(f"{name}: {'several fields have' if found else 'no field has'} this name; {meant}")
        kind = places[found[0]]
        try:
            value = _plain(list(value) if isinstance(value, tuple) else value, found[0])
            value = Path(value) if isinstance(value, str) and _is_path(value, kind) else value
            # As on the command line, one value is a list of one: split=0.8, class_names="cat".
            value = value if _has_type(value, kind) or not _has_type((value,), kind) else (value,)
            if not _has_type(value, kind):
                raise InputError(f"{found[0]} must be {_type_name(kind)}, got {quoted(value)}")
            config = _replaced(config, found[0].split("."), value)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{found[0]}: {error}") from error
    return config


def _leaves(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields the full name and the type of every field that is not itself a group of fields."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.type


def _replaced(config: Any, names: list[str], value: Any) -> Any:
    first, *rest = names
    return dataclasses.replace(config, **{first: _replaced(getattr(config, first), rest, value) if rest else value})


def field_help(cls: type) -> dict[str, str]:
    """Returns the text under each field in the source of a configuration class, as one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    texts, name = {}, ""
    for node in definition.body:  # pyright: ignore[reportAttributeAccessIssue] - a class
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            texts[name] = " ".join(str(node.value.value).split())
    return texts


def to_json(config: Config | ModelConfig) -> str:
    """Returns the configuration as JSON text; inverse of `from_json`."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str, name: str, *, of: type = Config) -> Any:
    """Returns the configuration that `to_json` wrote, an instance of `of`.

    Where a field is missing, as in a file of an older release, its default is taken, and a warning says so.

    Args:
      name: file or checkpoint that holds the text, for error messages.
      of: class to build.
    Raises:
      InputError: the text is not JSON, or a field is missing, unknown or invalid.
    """
    taken: list[str] = []
    try:
        config = _build(of, json.loads(text, object_pairs_hook=_once), "config", taken)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: this configuration cannot be read: {str(error)[:500]}") from error
    if taken:
        logger.warning("%s: fields without a value in it take their defaults: %s", name, ", ".join(taken))
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the fields of a JSON object. Raises ValueError if a name appears twice."""
    ((name, count),) = Counter(name for name, _ in pairs).most_common(1) or [("", 0)]
    if count > 1:
        raise ValueError(f"field {quoted(name)} appears twice")
    return dict(pairs)


def _build(cls: type, values: Any, name: str, taken: list[str]) -> Any:
    """Returns the instance of `cls` with the given values; adds each field that takes its default to `taken`."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold fields, got {quoted(values)}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{name} has no field {quoted(unknown[0])}")
    built = {}
    for field, value in values.items():
        where = f"{name}.{field}"
        # A field is nested if its type, or one alternative of its type, is a dataclass.
        alternatives = (known[field].type, *get_args(known[field].type))
        nested = next(
            (kind for kind in alternatives if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None
        )
        if nested is not None and value is not None:
            built[field] = _build(nested, value, where, taken)
            continue
        if isinstance(value, str) and _is_path(value, known[field].type):
            # The name of a file may contain bytes that are not UTF-8.
            _check_text(value, where, os.fsencode)
            built[field] = Path(value)
        else:
            built[field] = _plain(value, where)
        # `check_types` accepts True as a number.
        is_number = isinstance(value, bool) and bool not in alternatives
        if is_number or not _has_type(built[field], known[field].type):
            raise ValueError(f"{where} must be {_type_name(known[field].type)}, got {quoted(value)}")
    for field in known.values():
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                raise ValueError(f"{name} needs a field {quoted(field.name)}")
            taken.append(f"{name}.{field.name} = {quoted(field.default)}")
    try:
        return cls(**built)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _is_path(text: str, kind: Any) -> bool:
    """Returns whether `text` is a path for a field of type `kind`, and not a word that the type names."""
    alternatives = (kind, *get_args(kind))
    words = [
        word for alternative in alternatives if get_origin(alternative) is Literal for word in get_args(alternative)
    ]
    return Path in alternatives and text not in words


def _plain(value: Any, where: str) -> Any:
    """Returns a value of JSON with tuples for lists. Raises ValueError for what no field can hold."""
    if isinstance(value, list):
        return tuple(_plain(item, where) for item in value)
    if isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, int | float) and not abs(value) < 2**63:
        raise ValueError(f"{where} must be a number below 2^63, got {quoted(value)}")
    return value


def _check_text(text: str, where: str, encode: Callable[[str], bytes] = str.encode) -> None:
    try:
        is_text = b"\0" not in encode(text)
    except UnicodeEncodeError:
        is_text = False
    if not is_text:
        raise ValueError(f"{where} must be text without NUL and surrogate characters, got {quoted(text)}")
