"""Reads and writes configurations: Python files, JSON in a checkpoint, and checks of the field types.

A configuration file is Python code that builds one `Config` named `config`. A misspelt field is an error in every
form.
"""

import ast
import dataclasses
import difflib
import inspect
import json
import runpy
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typeguard

from fasterrcnn_jax.config import Config, ModelConfig
from fasterrcnn_jax.errors import InputError


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
        _check_type(value, field.type, where)
        if dataclasses.is_dataclass(value):
            check_types(value, where)


def _check_type(value: Any, kind: Any, where: str) -> None:
    try:
        # By default typeguard checks only the first item of a collection.
        typeguard.check_type(value, kind, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        raise InputError(f"{where} must be {_type_name(kind)}, got {value!r}") from None


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
        outermost field of that name. Lists become tuples and, for a path, text becomes a path.
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
        value = _tuples(list(value)) if isinstance(value, list | tuple) else value
        kind = places[found[0]]
        value = Path(value) if Path in (kind, *get_args(kind)) and isinstance(value, str) else value
        _check_type(value, kind, found[0])
        try:
            config = _replaced(config, found[0].split("."), value)
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

    Args:
      name: file or checkpoint that holds the text, for error messages.
      of: class to build.
    Raises:
      InputError: the text is not JSON, or a field is missing, unknown or invalid.
    """
    try:
        config = _build(of, json.loads(text), "config")
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: this configuration cannot be read: {error}") from error
    check_types(config, name)
    return config


def _build(cls: type, values: dict[str, Any], name: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold fields, got {values!r}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{name} has no field {', '.join(unknown)}")
    built = {}
    for field, value in values.items():
        # A field is nested if its type, or one alternative of its type, is a dataclass.
        alternatives = (known[field].type, *get_args(known[field].type))
        nested = next(
            (kind for kind in alternatives if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None
        )
        if nested is not None and value is not None:
            built[field] = _build(nested, value, f"{name}.{field}")
        elif Path in alternatives and value is not None:
            built[field] = Path(value)
        else:
            built[field] = _tuples(value)
    return cls(**built)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
