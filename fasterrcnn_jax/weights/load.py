"""Loads weights of other programs into our detector, and saves ours in files that these programs can read."""

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from fasterrcnn_jax.config import ModelConfig
from fasterrcnn_jax.config.text import from_json, to_json
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.printing import printable
from fasterrcnn_jax.weights import files
from fasterrcnn_jax.weights.files import Weights
from fasterrcnn_jax.weights.layouts import Layout
from fasterrcnn_jax.weights.tables import (
    CAFFE,
    FASTER_RCNN_PYTORCH,
    FORMATS,
    PUBLISHED,
    TORCHVISION_FPN,
    Format,
    find,
    is_named,
)

logger = logging.getLogger(__name__)

# Only these layers depend on the number of classes.
PREDICTORS = ("box_head/class_logits/", "box_head/deltas/")
# Metadata keys in the files we write: the format, the model configuration and the class names.
FORMAT, CONFIG, CLASS_NAMES = "weights_format", "model_config", "class_names"

# A line of the log shows at most this many names of arrays.
NAMES_IN_LOG = 8

# Fields of the model that decide which arrays it has. The anchors come last: they can differ in other ways than in
# their number.
SHAPES = (
    *("backbone.own", "backbone.name", "backbone.width", "backbone.norm", "fpn"),
    *("rpn.convs", "rpn.channels", "roi_features.output_size"),
    *("box_head.class_agnostic", "box_head.summary", "box_head.convs", "box_head.layers", "box_head.channels"),
    *("rpn.anchor_sizes", "rpn.anchor_scales", "rpn.anchor_ratios"),
)
# Fields of the model that decide what its weights mean.
MEANINGS = (
    *("image.channel_order", "image.mean", "image.std", "backbone.stride", "backbone.stride_in", "backbone.stem_pool"),
    *("rpn.anchor_base", "rpn.anchor_scales", "rpn.anchor_sizes", "rpn.anchor_ratios"),
    *("rpn.activation", "roi_sampling.box_means", "roi_sampling.box_stds"),
)


class Report(NamedTuple):
    """Which arrays of a file were used, and where the arrays of the model come from."""

    format: str
    sources: dict[str, str]  # our name -> the name in the file, or the constant value
    unused: tuple[str, ...]  # names in the file that were not used
    kept: tuple[str, ...]  # our names whose values did not change
    notes: tuple[str, ...]  # sentences about what can be a mistake


def load_weights(model: Detector, path: str | Path, *, format: str | None = None) -> Detector:
    """Returns the model with the weights of a file; logs which arrays were not used and which were not in the file.

    Reads `.safetensors`, `.pth` of torch and `.pkl` of NumPy arrays, and runs no code in them. ImageNet weights fill
    only the layers they have. From a detector with another number of classes, all layers except the last two are read.

    Args:
      format: `name` of one of `tables.FORMATS`; None: the names in the file decide. Caffe's and torchvision's
        ImageNet weights have the same names; the model's channel order decides between them.

    Raises:
      InputError: the file cannot be read, has an unknown format or is of another network; names file and entry.
    """
    weights = files.read(Path(path))
    model, report = assign(model, weights, _choose(weights, model.config, format, str(path)), where=str(path))
    log(report, str(path))
    return model


def log(report: Report, where: str) -> None:
    """Logs a report; notes, which can show a mistake, are warnings."""
    logger.info("%s: %d weights, format %s", where, len(report.sources), report.format)
    for note in report.notes:
        logger.warning("%s: %s", where, note)
    # PyTorch's batch norm counts its training steps; no network computes with this number.
    unused = [name for name in report.unused if not name.endswith("num_batches_tracked")]
    for what, names in (("not used from the file", unused), ("new, not from the file", _parts(report))):
        if names:
            # The names of a file can contain any character.
            shown = ", ".join(map(repr, names[:NAMES_IN_LOG]))
            more = f" and {len(names) - NAMES_IN_LOG} more" if len(names) > NAMES_IN_LOG else ""
            logger.info("%s: %s: %s%s", where, what, shown, more)


def _parts(report: Report) -> list[str]:
    """Returns the names of the arrays that are not from the file; one name for a part without any array from it."""
    filled = {name.split("/")[0] for name in report.sources}
    return list(dict.fromkeys(name if name.split("/")[0] in filled else name.split("/")[0] for name in report.kept))


def save_weights(model: Detector, path: str | Path) -> None:
    """Writes a `.safetensors` file with torchvision's names for FPN models, else with faster-rcnn.pytorch's names.

    `load_weights` reads it back bit for bit. The metadata contains the configuration and the class names, so that
    `fasterrcnn_jax.load` returns the same detector.

    Raises:
      InputError: the other program has no name for a part of this model, or the file cannot be written.
    """
    config = model.config
    format = FASTER_RCNN_PYTORCH if config.fpn is None else TORCHVISION_FPN
    rows, arrays = format.rows(config), {}
    for name, leaf in zip(*_leaves(model)[:2], strict=True):
        module, _, last = name.rpartition("/")
        keys, layout = find(rows, module) or _no_name(name, format, str(path))
        assert layout.theirs is not None, f"the names of {format.name} are written"
        arrays[keys[0] + format.leaves[last]] = layout.theirs(np.asarray(leaf))
    expects = {field: str(_field(config, field)) for field in format.expects}
    stored = {CONFIG: to_json(config), CLASS_NAMES: json.dumps(model.class_names)}
    files.write(Path(path), arrays, {FORMAT: format.name, **expects, **stored})


def stored_model(weights: Weights, where: str) -> tuple[ModelConfig, tuple[str, ...]] | None:
    """Returns the configuration and class names of a file that `save_weights` wrote; None for other files.

    Raises:
      InputError: its metadata cannot be read.
    """
    if CONFIG not in weights.metadata:
        return None
    config = from_json(weights.metadata[CONFIG], where, of=ModelConfig)
    try:
        names = json.loads(weights.metadata[CLASS_NAMES])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
            raise ValueError(f"got {quoted(names)}")
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: metadata {CLASS_NAMES} must be a JSON list of names ({error})") from error
    return config, tuple(names)


def formats_of(weights: Weights) -> tuple[Format, ...]:
    """Returns the formats that the file can have: none, one, or two that use the same names."""
    by_name = {format.name: format for format in FORMATS}
    published = PUBLISHED.get(weights.sha256[:8]) or by_name.get(weights.metadata.get(FORMAT, ""))
    if published is not None:
        return (published,)
    return tuple(format for format in FORMATS if weights.arrays.keys() & set(format.markers))


def num_classes_of(weights: Weights, config: ModelConfig, format: Format) -> int | None:
    """Returns the number of classes of a detector's file, without background; None for ImageNet weights."""
    place = find(format.rows(config), "box_head/class_logits")
    bias = weights.arrays.get(place[0][0] + format.leaves["bias"]) if place else None
    return None if bias is None else bias.size - 1


def assign(model: Detector, weights: Weights, format: Format, *, where: str) -> tuple[Detector, Report]:
    """Returns the model with the weights, and a report of what was used.

    Args:
      where: name of the file for messages.

    Raises:
      InputError: an array of the model is not in the file, or an array of the file has no place in the model, another
        shape, or a number that is not finite.
    """
    config, rows, arrays = model.config, format.rows(model.config), format.prepare(weights.arrays, where)
    expected = {field: weights.metadata.get(field, str(value)) for field, value in format.expects.items()}
    notes, anew = _differences(config, expected), ()
    classes = num_classes_of(weights, config, format)
    if classes is not None and classes != len(model.class_names):
        anew = PREDICTORS
        notes.append(_other_classes("file", classes, model))
    names, leaves, structure = _leaves(model)
    places = [find(rows, name.rpartition("/")[0]) for name in names]
    for name, place in zip(names, places, strict=True):
        if place is None and not name.startswith(format.absent):
            _no_name(name, format, where)
    sources, seen, values = {}, set(), []
    for name, leaf, place in zip(names, leaves, places, strict=True):
        values.append(leaf)
        if place is None:
            continue
        (keys, layout), last = place, name.rpartition("/")[2]
        if last in format.constants:
            sources[name] = str(format.constants[last])
            values[-1] = jnp.full(leaf.shape, format.constants[last], leaf.dtype)
            continue
        key = _first_present([stem + format.leaves[last] for stem in keys], arrays, name, where)
        seen.add(key)
        if not name.startswith(anew):
            sources[name] = key
            values[-1] = _converted(arrays[key], key, layout, leaf, name, where)
    _check_unseen(arrays.keys() - seen, rows, format, where)
    used = set(sources.values())
    report = Report(
        format.name,
        sources,
        unused=tuple(key for key in arrays if key not in used),
        kept=tuple(name for name in names if name not in sources),
        notes=tuple(notes),
    )
    return jax.tree.unflatten(structure, values), report


def assign_own(
    model: Detector, arrays: Mapping[str, np.ndarray], config: ModelConfig, class_names: tuple[str, ...], *, where: str
) -> tuple[Detector, Report]:
    """Returns the model with the weights of another detector of ours, and a report of what was used.

    Args:
      arrays: weights of the other detector by its names.
      config: configuration of the other detector.
      class_names: class names of the other detector.
      where: name of the checkpoint for messages.

    Raises:
      InputError: the detectors do not have the same arrays, apart from the number of classes.
    """
    notes, anew = _differences(model.config, {field: str(_field(config, field)) for field in MEANINGS}), ()
    if len(class_names) != len(model.class_names):
        anew = PREDICTORS
        notes.append(_other_classes("run", len(class_names), model))
    elif class_names != model.class_names:
        notes.append(
            f"the classes of the run are {', '.join(class_names)}, those of the model {', '.join(model.class_names)}: "
            "all layers are loaded, so class 1 must mean the same in both, and so on"
        )
    names, leaves, structure = _leaves(model)
    by_name = dict(zip(names, leaves, strict=True))
    for name in dict.fromkeys((*names, *arrays)):
        if name not in arrays:
            fault = f"{name} is missing, which the model needs"
        elif name not in by_name:
            fault = f"the model has no place for {name}"
        elif arrays[name].shape != by_name[name].shape and not name.startswith(anew):
            fault = f"{name} has shape {arrays[name].shape}, but shape {by_name[name].shape} in the model"
        else:
            continue
        raise InputError(f"{where}: the run is of another network: {fault}{_reason(config, model.config)}")
    used = [name for name in names if not name.startswith(anew)]
    report = Report(
        "run folder",
        {name: name for name in used},
        unused=tuple(name for name in arrays if name.startswith(anew)),
        kept=tuple(name for name in names if name.startswith(anew)),
        notes=tuple(notes),
    )
    values = by_name | {name: jnp.asarray(arrays[name], by_name[name].dtype) for name in used}
    return jax.tree.unflatten(structure, [values[name] for name in names]), report


def _reason(stored: ModelConfig, ours: ModelConfig) -> str:
    """Returns the first field that makes two models have different arrays, as the end of a message."""
    for field in SHAPES:
        if _field(stored, field) != _field(ours, field):
            return f"; the run has model.{field} = {_field(stored, field)}, and the model has {_field(ours, field)}"
    return ""


def _other_classes(what: str, classes: int, model: Detector) -> str:
    return (
        f"the {what} has {classes} classes, the model {len(model.class_names)}: box_head.class_logits and "
        "box_head.deltas are not loaded, all other layers are"
    )


def _leaves(model: Detector) -> tuple[list[str], list[Any], Any]:
    """Returns names such as backbone/stem/kernel, the arrays, and the structure that holds them."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return [name.removesuffix("/value") for name in names], [leaf for _, leaf in leaves], structure


def _choose(weights: Weights, config: ModelConfig, name: str | None, where: str) -> Format:
    if name is not None:
        by_name = {format.name: format for format in FORMATS}
        if name not in by_name:
            raise InputError(f"format must be one of {', '.join(by_name)}, got {name}")
        return by_name[name]
    found = formats_of(weights)
    if not found:
        raise InputError(
            f"{where}: unknown format; the first names are {', '.join(map(quoted, list(weights.arrays)[:3]))} …, "
            f"the known formats are {', '.join(format.name for format in FORMATS)}"
        )
    chosen = CAFFE if CAFFE in found and config.image.channel_order == "bgr" else found[0]
    if len(found) > 1:
        names = " and ".join(format.name for format in found)
        logger.info(
            "%s: %s use the same names; read as %s because the model's channel order is %s",
            where, names, chosen.name, config.image.channel_order,
        )  # fmt: skip
    return chosen


def _no_name(name: str, format: Format, where: str) -> NoReturn:
    raise InputError(f"{where}: format {format.name} has no name for {name} of this model")


def _first_present(keys: list[str], arrays: dict[str, np.ndarray], name: str, where: str) -> str:
    for key in keys:
        if key in arrays:
            return key
    raise InputError(f"{where}: {' or '.join(keys)} is missing, which {name} needs")


def _converted(array: np.ndarray, key: str, layout: Layout, leaf: Any, name: str, where: str) -> jax.Array:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"{where}: {key} must have a floating point type for {name}, got {array.dtype}")
    try:
        value = layout.ours(array)
    except ValueError:  # the layout cannot divide this number of rows
        value = array
    if value.shape != leaf.shape:
        raise InputError(f"{where}: {key} has shape {array.shape}, which does not fit {name} with shape {leaf.shape}")
    with np.errstate(over="ignore"):
        value = value.astype(leaf.dtype)
    others = value.size - np.count_nonzero(np.isfinite(value))
    if others:
        raise InputError(f"{where}: {key} must be finite, but {others} of its {value.size} numbers are NaN or infinite")
    return jnp.array(value)


def _check_unseen(keys: set[str], rows: tuple, format: Format, where: str) -> None:
    """Raises InputError if the file has a known weight that the model does not have, as from a deeper network."""
    # Biases are not checked: Caffe's first convolution has a bias of zeros, which no other program reads.
    ends = tuple(end for last, end in format.leaves.items() if last != "bias")
    for key in sorted(keys):
        end = next((end for end in ends if key.endswith(end)), None)
        if end is not None and is_named(rows, key.removesuffix(end)):
            raise InputError(f"{where}: the file is of another network: the model has no place for {key}")


def _differences(config: ModelConfig, expected: Mapping[str, str]) -> list[str]:
    """Returns a sentence for each setting in which the model differs from the training of the weights."""
    return [
        f"the weights were trained with model.{field} = {printable(value)}, but the model has {_field(config, field)}"
        for field, value in expected.items()
        if value != str(_field(config, field)) and _matters(field, config)
    ]


def _matters(field: str, config: ModelConfig) -> bool:
    if not config.backbone.name.startswith("resnet"):
        return not field.startswith("backbone.")
    # Blocks of two 3x3 convolutions have only one place for the stride.
    return field != "backbone.stride_in" or config.backbone.name not in ("resnet18", "resnet34")


def _field(config: ModelConfig, field: str) -> Any:
    # Without a pyramid, model.fpn is None and has no fields.
    return functools.reduce(lambda part, name: getattr(part, name, None), field.split("."), config)
