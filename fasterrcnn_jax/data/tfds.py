"""Reader of detection sets of TensorFlow Datasets that are stored as array_record; TensorFlow is not needed.

TFDS writes (ymin, xmin, ymax, xmax) as float32 parts of the stored image's sides. Its VOC builder divides VOC's
1-based inclusive indices as they are, so that what comes back is converted here as `data.voc` converts it;
every other set is taken to be in continuous pixels.

A set is read by what lies in its folder alone: no builder's code is run, and nothing is downloaded. An image and
its annotation are one record, so all of the set's bytes are read once when it is opened; of the images none is kept.
"""

import functools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float

from fasterrcnn_jax.data import coco, voc
from fasterrcnn_jax.data.faults import (
    FAULTY_IMAGE,
    FAULTY_OBJECT,
    Faults,
    findings_of,
    notes_of,
    skipping,
    watched,
)
from fasterrcnn_jax.data.images import annotated_frame
from fasterrcnn_jax.data.records import (
    MIN_SIDE,
    Dataset,
    ImageRecord,
    StoredImage,
    box_areas,
    check_class_names,
)
from fasterrcnn_jax.errors import InputError

_ONE_BASED = ("voc",)
# COCO numbers its 80 classes up to 90. TFDS keeps their order and drops the numbers, which result files need.
_COCO_IDS = tuple(number for number in range(1, 91) if number not in coco.UNUSED_IDS)


def read_tfds(
    root: Path | str, name: str, split: str, class_names: tuple[str, ...], *, faults: Faults = "error"
) -> Dataset:
    """Returns the records of one split, in the order in which they are stored.

    Images without objects and objects marked difficult or a crowd are kept. As in its folder, boxes of VOC
    under two pixels are dropped; of other sets those without a width or height are.

    Args:
      root: what TFDS calls data_dir.
      name: NAME or NAME/CONFIG, as voc/2007; the newest version there is, or the one that :VERSION names.
      split: of the set, or a part of one in TFDS's words, as train[:90%].
      class_names: label k is class_names[k - 1]; names are compared exactly.
      faults: "skip" leaves out the image or the object with a fault.

    Raises:
      InputError: one sentence naming place, field and value of the first fault found.
    """
    check_class_names(class_names)
    builder = _open_builder(root, name)
    stored_names = _label_names(builder)
    absent = [class_name for class_name in class_names if class_name not in stored_names]
    if absent:
        raise InputError(f"{builder.data_path}: no class is named {absent[0]!r}; there are {', '.join(stored_names)}")
    source, places = _open_source(builder, split)
    one_based = builder.info.name in _ONE_BASED

    dataset_name, found, records = f"{builder.data_path} ({split})", defaultdict(list), []
    seen = {}
    for index, place in enumerate(watched(places, f"reading {dataset_name}", len(places))):
        with skipping(FAULTY_IMAGE, found, faults):
            example = _example(source, index, place)
            content = StoredImage(place, functools.partial(bytes, example["image"]))
            image_hw, _ = annotated_frame(content, None, place, found)
            rows = []
            for number, stored in enumerate(_objects(example["objects"])):
                with skipping(FAULTY_OBJECT, found, faults):
                    field = f"{place}, objects[{number}]"
                    label = _label(stored["label"], field, stored_names, class_names)
                    box = _box(stored["bbox"], field, image_hw, one_based, found)
                    if box is not None:
                        flags = bool(stored.get("is_difficult", False)), bool(stored.get("is_crowd", False))
                        rows.append((box, label, *flags, float(stored.get("area", np.nan))))
            record_id = _record_id(example, place)
            if record_id in seen:
                raise InputError(f"{place}: image id {record_id} is also that of {seen[record_id]}")
            seen[record_id] = place
            image = StoredImage(place, functools.partial(_image_bytes, source, index, place))
            records.append(ImageRecord(record_id, image, image_hw, *_arrays(rows)))
    findings = findings_of(found)
    is_coco = builder.info.name == "coco" and stored_names == coco.CLASS_NAMES
    ids = _COCO_IDS if is_coco else range(1, 1 + len(stored_names))
    category_ids = tuple(ids[stored_names.index(class_name)] for class_name in class_names)
    return Dataset(dataset_name, tuple(class_names), tuple(records), notes_of(findings), category_ids, findings)


def class_names_of(root: Path | str, name: str) -> tuple[str, ...]:
    """Returns the names of the set's classes in its order."""
    return _label_names(_open_builder(root, name))


def import_tfds():
    """Returns the module tensorflow_datasets, an optional dependency.

    Raises:
      InputError: it is not installed, or lacks a part.
    """
    try:
        import array_record  # noqa: F401
        import importlib_resources  # noqa: F401 - TFDS 4.9.10 imports it and does not declare it.
        import tensorflow_datasets
    except ImportError as error:
        raise InputError(
            f"data.layout tfds needs more packages: pip install 'fasterrcnn_jax[tfds]' ({error})"
        ) from None
    return tensorflow_datasets


def _open_builder(root: Path | str, name: str) -> Any:
    """Returns TFDS's view of a set that is read by its files; checks them first."""
    tfds = import_tfds()
    name, _, version = name.partition(":")
    folder = Path(root).expanduser() / name
    found = {
        path.parent.name: path.parent
        for path in sorted(folder.glob("*/dataset_info.json"))
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
    }
    newest = max(found, key=lambda text: [int(part) for part in text.split(".")], default="VERSION")
    folder = found.get(version or newest, folder / (version or newest))
    if not (folder / "features.json").is_file():
        raise InputError(
            f"{folder / 'features.json'}: not found; `fasterrcnn-jax tfds` stores voc/2007, voc/2012 and coco/2017 "
            "there, TFDS itself other sets, with file_format='array_record'; or give another folder with --data.root"
        )
    _check_feature_types(folder / "features.json")
    try:
        builder = tfds.builder_from_directory(folder)
        stored_as = builder.info.file_format.value
    except Exception as error:  # TFDS and what it stands on share no type of error
        raise InputError(f"{folder}: TFDS cannot read this folder: {first_sentence(error)}") from error
    if stored_as != "array_record":
        raise InputError(f"{folder}: must be stored as array_record, got {stored_as}, which only TensorFlow reads")
    return builder


def _check_feature_types(path: Path) -> None:
    """Raises InputError where the file names a class that is not TFDS's own: TFDS would import its module."""
    try:
        pending = [json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON in UTF-8: {first_sentence(error)}") from None
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            for key in ("pythonClassName", "python_class_name", "type"):
                kind = value.get(key, "")
                if isinstance(kind, str) and kind and not kind.startswith("tensorflow_datasets.core.features."):
                    raise InputError(f"{path}, {key}: must be a feature of TFDS's own, got {kind!r}")
        if isinstance(value, (dict, list)):
            pending += value.values() if isinstance(value, dict) else value


def _label_names(builder: Any) -> tuple[str, ...]:
    """Returns the names of the classes; refuses a set without boxes, or with boxes of another kind."""
    features, path = builder.info.features, builder.data_path
    objects = getattr(features["objects"], "feature", {}) if "objects" in features else {}
    if "image" not in features or not {"bbox", "label"} <= set(objects) or not hasattr(objects["label"], "names"):
        got = ", ".join(sorted(features)) + (f" with objects of {', '.join(sorted(objects))}" if objects else "")
        raise InputError(
            f"{path}: must have the features image and objects with bbox and a label of classes, got {got}"
        )
    form = getattr(objects["bbox"], "bbox_format", None)
    form = str(getattr(form, "value", form))
    if form != "REL_YXYX":
        raise InputError(f"{path}, objects, bbox: must be in the format REL_YXYX, got {form}")
    return tuple(objects["label"].names)


def _open_source(builder: Any, split: str) -> tuple[Sequence[Any], list[str]]:
    """Returns the examples of a split with encoded images, and "SHARD[POSITION]" of each."""
    tfds = import_tfds()
    path, names = builder.data_path, ", ".join(builder.info.splits)
    features = builder.info.features
    images = [name for name in features if isinstance(features[name], tfds.features.Image)]
    decoders = {name: tfds.decode.SkipDecoding() for name in images}
    try:
        instructions = builder.info.splits[split].file_instructions
        outside = [item.filename for item in instructions if not _is_inside(item.filename, path)]
        if outside:
            raise InputError(f"{outside[0]} is not inside the folder")
        source = builder.as_data_source(split=split, decoders=decoders)
    except Exception as error:
        raise InputError(
            f"{path}: split {split!r} cannot be read: {first_sentence(error)}; there are {names}"
        ) from error
    places = [
        f"{item.filename}[{position}]" for item in instructions for position in range(item.skip, item.skip + item.take)
    ]
    if not places:
        raise InputError(f"{path}: split {split!r} holds 0 images")
    return source, places


def _is_inside(filename: str, folder: Any) -> bool:
    return Path(os.path.realpath(filename)).is_relative_to(os.path.realpath(folder))


def _example(source: Sequence[Any], index: int, place: str) -> dict[str, Any]:
    try:
        return source[index]
    except Exception as error:
        raise InputError(f"{place}: cannot be read: {first_sentence(error)}") from error


def _image_bytes(source: Sequence[Any], index: int, place: str) -> bytes:
    return _example(source, index, place)["image"]


def _record_id(example: dict[str, Any], place: str) -> str:
    """Returns the set's number of an image, its file name without extension, or its place."""
    if "image/id" in example:
        return str(example["image/id"])
    name = example.get("image/filename", b"")
    name = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
    return str(PurePosixPath(name).with_suffix("")) if name else PurePosixPath(place).name


def _objects(stored: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for number in range(len(stored["label"])):
        yield {name: values[number] for name, values in stored.items()}


def _label(index: Any, field: str, stored_names: tuple[str, ...], class_names: tuple[str, ...]) -> int:
    if not 0 <= index < len(stored_names):
        raise InputError(f"{field}, label: must be in 0..{len(stored_names) - 1}, got {index}")
    if stored_names[index] not in class_names:
        raise InputError(f"{field}, label: {stored_names[index]!r} is not one of the classes {', '.join(class_names)}")
    return class_names.index(stored_names[index]) + 1


def _box(
    stored: Float[np.ndarray, "4"], field: str, image_hw: tuple[int, int], one_based: bool, found
) -> Float[np.ndarray, "4"] | None:
    """Returns xyxy in continuous pixels, clipped to the image; None where too little is left."""
    if not np.isfinite(stored).all() or (stored[2:] < stored[:2]).any() or (np.abs(stored) > 2).any():
        raise InputError(
            f"{field}, bbox: must be ymin <= ymax, xmin <= xmax in parts of the image, got {stored.tolist()}"
        )
    sides = np.array([image_hw[1], image_hw[0]] * 2, np.float64)
    box = stored.astype(np.float64)[[1, 0, 3, 2]] * sides
    # Pixels and hundredths of them come back as they were written: float32 lost less than this of them.
    rounded = np.round(box, 2)
    box = np.where(np.abs(box - rounded) <= sides * 2.0**-24, rounded, box)
    if one_based:
        box[:2] -= 1.0
    inside = np.clip(box, 0.0, sides)
    width, height = inside[2:] - inside[:2]
    if min(width, height) < MIN_SIDE if one_based else min(width, height) <= 0:
        found[voc.SMALL if one_based else coco.EMPTY].append(field)
        return None
    if (inside != box).any():
        found[voc.CLIPPED].append(f"{field}, bbox: {stored.tolist()}")
    return inside.astype(np.float32)


def _arrays(rows: list[tuple]) -> tuple[np.ndarray, ...]:
    """Returns boxes, labels, difficult, crowd and area of a record."""
    boxes, labels, difficult, crowd, area = zip(*rows, strict=True) if rows else ((),) * 5
    boxes, area = np.array(boxes, np.float32).reshape(-1, 4), np.array(area, np.float64)
    flags = np.array(difficult, bool), np.array(crowd, bool)
    return boxes, np.array(labels, np.int32), *flags, np.where(np.isnan(area), box_areas(boxes), area)


def first_sentence(error: Exception) -> str:
    """Returns the first sentence of an error's message, without what ends it."""
    return re.split(r"\.\s|\n", str(error).strip() or type(error).__name__)[0].rstrip(".:")
