"""Reads detection data sets of TensorFlow Datasets (TFDS), stored as tfrecord or array_record, without TensorFlow.

TFDS writes (ymin, xmin, ymax, xmax) in float32 as fractions of the image's sides. Its VOC builder divides VOC's
1-based inclusive indices without converting them, so boxes of VOC are converted here as in `data.voc`. Boxes of every
other data set are taken as continuous pixels.

A data set is read only from the files in its folder: no code of a builder is run, and nothing is downloaded. An image
and its annotation are one record, so opening a data set reads all its bytes once; no image is kept in memory.
"""

import functools
import importlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import coco, voc
from fasterrcnn_jax.data.faults import (
    FAULTY_IMAGE,
    FAULTY_OBJECT,
    Faults,
    Found,
    dataset_of,
    skipping,
    watched,
)
from fasterrcnn_jax.data.images import annotated_frame
from fasterrcnn_jax.data.links import Guard, link_guard
from fasterrcnn_jax.data.records import (
    MIN_SIDE,
    Dataset,
    ImageRecord,
    StoredImage,
    box_areas,
    check_class_names,
    joined_names,
)
from fasterrcnn_jax.data.tfrecord import TfRecordFile
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.regular_files import check_regular

_ONE_BASED = ("voc",)
# COCO's 80 classes have ids up to 90. TFDS keeps their order and drops the ids, which result files need.
_COCO_IDS = tuple(number for number in range(1, 91) if number not in coco.UNUSED_IDS)


def read_tfds(
    root: Path | str,
    name: str,
    split: str,
    class_names: tuple[str, ...],
    *,
    faults: Faults = "error",
    max_pixels: int = DataConfig.max_pixels,
    within: Path | None = None,
) -> Dataset:
    """Returns the records of one split, in the stored order.

    Images without objects, difficult objects and crowds are kept. Boxes of VOC under two pixels are dropped, as
    in `data.voc`; for other data sets, boxes without a width or height are dropped.

    Args:
      root: the folder that TFDS calls data_dir.
      name: NAME or NAME/CONFIG, for example voc/2007, of the newest version; NAME:VERSION chooses a version.
      split: name of a split, or a part of one in TFDS's notation, for example train[:90%].
      class_names: label k is class_names[k - 1]; names are compared exactly.
      faults: "skip" skips the image or the object with a fault.
      max_pixels: an image with more pixels is a fault.
      within: folder that no symbolic link may lead out of; None: links are followed.

    Raises:
      InputError: one sentence with the place, field and value of the first fault.
    """
    check_class_names(class_names)
    guard = link_guard(within)
    builder = _open_builder(root, name, guard)
    stored_names = _label_names(builder)
    index_of = {class_name: index for index, class_name in enumerate(stored_names)}
    absent = [class_name for class_name in class_names if class_name not in index_of]
    if absent:
        raise InputError(
            f"{builder.data_path}: no class is named {quoted(absent[0])}; it has {joined_names(stored_names)}"
        )
    label_of = {index_of[class_name]: label for label, class_name in enumerate(class_names, start=1)}
    source, places = _open_source(builder, split, guard)
    one_based = builder.info.name in _ONE_BASED

    dataset_name, found, records = f"{builder.data_path} ({split})", defaultdict(list), []
    seen = {}
    for index, place in enumerate(watched(places, f"reading {dataset_name}", len(places))):
        with skipping(FAULTY_IMAGE, found, faults):
            example = _example(source, index, place)
            content = StoredImage(place, functools.partial(bytes, example["image"]))
            image_hw, _ = annotated_frame(content, None, place, found, max_pixels=max_pixels)
            rows = []
            for number, stored in enumerate(_objects(example["objects"])):
                with skipping(FAULTY_OBJECT, found, faults):
                    field = f"{place}, objects[{number}]"
                    label = _label(stored["label"], field, stored_names, label_of, class_names)
                    box = _box(stored["bbox"], field, image_hw, one_based, found)
                    if box is not None:
                        flags = bool(stored.get("is_difficult", False)), bool(stored.get("is_crowd", False))
                        rows.append((box, label, *flags, float(stored.get("area", np.nan))))
            record_id = _record_id(example, place)
            if record_id in seen:
                raise InputError(f"{place}: image id {record_id} is also the id of {seen[record_id]}")
            seen[record_id] = place
            image = StoredImage(place, functools.partial(_image_bytes, source, index, place))
            records.append(ImageRecord(record_id, image, image_hw, *_arrays(rows)))
    is_coco = builder.info.name == "coco" and stored_names == coco.CLASS_NAMES
    ids = _COCO_IDS if is_coco else range(1, 1 + len(stored_names))
    category_ids = tuple(ids[index_of[class_name]] for class_name in class_names)
    return dataset_of(dataset_name, class_names, records, found, category_ids=category_ids)


def class_names_of(root: Path | str, name: str, *, within: Path | None = None) -> tuple[str, ...]:
    """Returns the class names of the data set in its order.

    Args:
      within: as in `read_tfds`.
    """
    return _label_names(_open_builder(root, name, link_guard(within)))


def import_tfds() -> ModuleType:
    """Returns the module tensorflow_datasets, an optional dependency.

    Raises:
      InputError: it or one of its dependencies is not installed.
    """
    try:
        # TFDS 4.9.10 imports importlib_resources but does not declare it.
        for name in ("array_record", "google_crc32c", "importlib_resources"):
            importlib.import_module(name)
        return importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise InputError(
            f"data.layout tfds needs more packages; run pip install 'fasterrcnn_jax[tfds]' ({error})"
        ) from None


def _open_builder(root: Path | str, name: str, guard: Guard) -> Any:
    """Returns TFDS's read-only builder of a stored data set; checks the files first."""
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
            f"{folder / 'features.json'}: not found; store voc/2007, voc/2012 or coco/2017 with `fasterrcnn-jax tfds`, "
            "another data set with TFDS, or give another folder with --data.root"
        )
    files = [*folder.iterdir()]
    for file in files:
        guard(file)
        check_regular(file)
    _check_info(folder / "dataset_info.json", len(files))
    _check_feature_types(folder / "features.json")
    try:
        builder = tfds.builder_from_directory(folder)
        stored_as = _format(builder)
    except Exception as error:  # the errors of TFDS and its dependencies have no common type
        raise InputError(f"{folder}: TFDS cannot read this folder: {first_sentence(error)}") from error
    if stored_as not in ("array_record", "tfrecord"):
        raise InputError(
            f"{folder / 'dataset_info.json'}, fileFormat: must be tfrecord or array_record, got {stored_as}; where "
            f"TensorFlow is installed, rewrite it with `tfds convert_format --dataset_version_dir={folder} "
            "--out_file_format=array_record`"
        )
    return builder


def _format(builder: Any) -> str:
    # Before 2021, TFDS wrote tfrecord only and no field for it.
    return "tfrecord" if builder.info.file_format is None else builder.info.file_format.value


# The allowed feature classes, and the field of features.json that contains the settings of each. TFDS imports any class
# that the file names, so all other classes are refused.
_FEATURES = "tensorflow_datasets.core.features."
_FIELD_OF = {
    "bounding_boxes.BBoxFeature": "boundingBox",
    "class_label_feature.ClassLabel": "classLabel",
    "dataset_feature.Dataset": "sequence",
    "features_dict.FeaturesDict": "featuresDict",
    "image_feature.Image": "image",
    "scalar.Scalar": "tensor",
    "sequence_feature.Sequence": "sequence",
    "tensor_feature.Tensor": "tensor",
    "text_feature.Text": "text",
}


# More classes than any published data set of objects has. TFDS makes a name for each that a file declares.
MAX_CLASSES = 100_000


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: the file is not JSON in UTF-8: {first_sentence(error)}") from None


def _check_info(path: Path, files: int) -> None:
    """Raises InputError if dataset_info.json has features too, or names more shards than the folder has files.

    TFDS would import the classes of the features, and computes the name of every shard.
    """
    content = _json(path)
    if not isinstance(content, dict) or "features" in content:
        raise InputError(f"{path}: must be an object without features, which features.json contains")
    stored = content.get("splits")
    splits = [split for split in stored if isinstance(split, dict)] if isinstance(stored, list) else []
    lengths = [split.get(key) for split in splits for key in ("shardLengths", "shard_lengths")]
    shards = sum(len(of_split) for of_split in lengths if isinstance(of_split, list))
    if shards > files:
        raise InputError(f"{path}, splits: have {shards:,} shards, but the folder has {files} files")


def _check_feature_types(path: Path) -> None:
    """Raises InputError if features.json contains anything except the classes in the table above."""
    top = _json(path)
    if isinstance(top, dict) and "type" in top:
        # TFDS writes its outermost feature so; a JSON string as content would hide features from this check.
        if top.keys() != {"type", "content", "proto_cls"} or top["proto_cls"] != "tensorflow_datasets.FeaturesDict":
            raise InputError(f"{path}: must contain a FeaturesDict with type, content and proto_cls as TFDS writes it")
        top = {"pythonClassName": top["type"], "featuresDict": top["content"]}
    pending = [("the outermost feature", top)]
    while pending:
        name, feature = pending.pop()
        where = f"{path}, {name}"
        if not isinstance(feature, dict):
            raise InputError(f"{where}: must be a feature, got {quoted(feature)}")
        kind = feature.get("pythonClassName")
        field = _FIELD_OF.get(str(kind).removeprefix(_FEATURES)) if str(kind).startswith(_FEATURES) else None
        if field is None:
            names = ", ".join(_FIELD_OF)
            raise InputError(f"{where}, pythonClassName: must be one of TFDS's own {names}, got {quoted(kind)}")
        if feature.keys() - {"description"} != {"pythonClassName", field} or not isinstance(feature[field], dict):
            raise InputError(f"{where}: must contain pythonClassName and {field}, got {quoted(sorted(feature))}")
        content = feature[field]
        if field == "featuresDict":
            features = content.get("features", {})
            if content.keys() - {"features"} or not isinstance(features, dict):
                raise InputError(f"{where}, {field}: must contain only features, got {quoted(sorted(content))}")
            pending += features.items()
        elif field == "sequence":
            if content.keys() - {"feature", "length"}:
                raise InputError(f"{where}, {field}: must contain feature and length, got {quoted(sorted(content))}")
            pending.append((f"{name}, {field}", content.get("feature")))
        elif field == "classLabel":
            count = str(content.get("numClasses", 0))
            if content.keys() - {"numClasses"} or not re.fullmatch("[0-9]{1,6}", count) or int(count) > MAX_CLASSES:
                raise InputError(
                    f"{where}, {field}: must contain only numClasses, of at most {MAX_CLASSES:,}, got {quoted(content)}"
                )


def _label_names(builder: Any) -> tuple[str, ...]:
    """Returns the class names; raises InputError for a data set without boxes or with another box format."""
    features, path = builder.info.features, builder.data_path
    objects = getattr(features["objects"], "feature", {}) if "objects" in features else {}
    if "image" not in features or not {"bbox", "label"} <= set(objects) or not hasattr(objects["label"], "names"):
        got = ", ".join(sorted(features)) + (f" with objects of {', '.join(sorted(objects))}" if objects else "")
        raise InputError(f"{path}: must have the features image and objects with bbox and a class label, got {got}")
    form = getattr(objects["bbox"], "bbox_format", None)
    form = str(getattr(form, "value", form))
    if form != "REL_YXYX":
        raise InputError(f"{path}, objects, bbox: must be in the format REL_YXYX, got {form}")
    return tuple(objects["label"].names)


def _open_source(builder: Any, split: str, guard: Guard) -> tuple[Sequence[Any], list[str]]:
    """Returns the examples of a split with encoded images, and the place "SHARD[POSITION]" of each example."""
    tfds = import_tfds()
    path, names = builder.data_path, ", ".join(builder.info.splits)
    features = builder.info.features
    images = [name for name in features if isinstance(features[name], tfds.features.Image)]
    decoders = {name: tfds.decode.SkipDecoding() for name in images}
    try:
        instructions = builder.info.splits[split].file_instructions
        for item in instructions:
            if not _is_inside(item.filename, path):
                raise ValueError(f"{item.filename} is outside the folder")
            guard(Path(item.filename))
            # A record takes at least one byte.
            size = os.path.getsize(item.filename)
            if item.skip + item.take > size:
                raise ValueError(f"{item.filename} cannot hold {item.skip + item.take:,} records in its {size:,} bytes")
        if _format(builder) == "tfrecord":
            source = _TfRecordExamples(builder, instructions, decoders)
        else:
            source = builder.as_data_source(split=split, decoders=decoders)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path}: split {split!r} cannot be read: {first_sentence(error)}; the splits are {names}"
        ) from error
    places = [
        f"{item.filename}[{position}]" for item in instructions for position in range(item.skip, item.skip + item.take)
    ]
    if not places:
        raise InputError(f"{path}: split {split!r} has no images")
    return source, places


class _TfRecordExamples(Sequence[Any]):
    """The examples of a split stored as tfrecord, which TFDS itself reads with TensorFlow only.

    TFDS decodes the records; they are the same as in array_record.

    Raises:
      InputError: a file is damaged, or does not have as many records as dataset_info.json says.
    """

    def __init__(self, builder: Any, instructions: Sequence[Any], decoders: dict[str, Any]):
        self._features, self._decoders = builder.info.features, decoders
        declared = {
            Path(name).name: count
            for split in builder.info.splits.values()
            for name, count in zip(sorted(split.filenames), split.shard_lengths, strict=True)
        }
        self._places: list[tuple[TfRecordFile, range]] = []
        for item in instructions:
            file = TfRecordFile(Path(item.filename))
            expected = declared.get(file.path.name, item.skip + item.take)
            if len(file) != expected:
                raise InputError(
                    f"{file.path}: must have {expected:,} records, the shardLengths of dataset_info.json, got "
                    f"{len(file):,}; copy the file again, or store the data set again with TFDS"
                )
            self._places.append((file, range(item.skip, item.skip + item.take)))

    def __len__(self) -> int:
        return sum(len(numbers) for _, numbers in self._places)

    def __getitem__(self, index: Any) -> Any:
        for file, numbers in self._places:
            if index < len(numbers):
                return self._features.deserialize_example_np(file[numbers[index]], decoders=self._decoders)
            index -= len(numbers)
        raise IndexError(index)


def _is_inside(filename: str, folder: Any) -> bool:
    return Path(os.path.abspath(filename)).is_relative_to(os.path.abspath(folder))


def _example(source: Sequence[Any], index: int, place: str) -> dict[str, Any]:
    try:
        return source[index]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{place}: the record cannot be read: {first_sentence(error)}") from error


def _image_bytes(source: Sequence[Any], index: int, place: str) -> bytes:
    return _example(source, index, place)["image"]


def _record_id(example: dict[str, Any], place: str) -> str:
    """Returns the image id in the data set, else the file name without extension, else the place."""
    if "image/id" in example:
        return str(example["image/id"])
    name = example.get("image/filename", b"")
    name = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
    return str(PurePosixPath(name).with_suffix("")) if name else PurePosixPath(place).name


def _objects(stored: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for number in range(len(stored["label"])):
        yield {name: values[number] for name, values in stored.items()}


def _label(
    index: Any, field: str, stored_names: tuple[str, ...], label_of: dict[int, int], class_names: tuple[str, ...]
) -> int:
    if not 0 <= index < len(stored_names):
        raise InputError(f"{field}, label: must be in 0..{len(stored_names) - 1}, got {index}")
    if index not in label_of:
        raise InputError(
            f"{field}, label: {quoted(stored_names[index])} is not one of the classes {joined_names(class_names)}"
        )
    return label_of[index]


def _box(
    stored: Float[np.ndarray, "4"], field: str, image_hw: tuple[int, int], one_based: bool, found: Found
) -> Float[np.ndarray, "4"] | None:
    """Returns xyxy in continuous pixels, clipped to the image, or None if the clipped box is too small."""
    if not np.isfinite(stored).all() or (stored[2:] < stored[:2]).any() or (np.abs(stored) > 2).any():
        raise InputError(
            f"{field}, bbox: must be [ymin, xmin, ymax, xmax] in fractions of the image with ymin <= ymax and "
            f"xmin <= xmax, got {stored.tolist()}"
        )
    sides = np.array([image_hw[1], image_hw[0]] * 2, np.float64)
    box = stored.astype(np.float64)[[1, 0, 3, 2]] * sides
    # Rounding to hundredths restores the pixels as annotated; the float32 rounding error is less than this bound.
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


def _arrays(rows: list[tuple]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns boxes, labels, difficult, crowd and area of a record."""
    boxes, labels, difficult, crowd, area = zip(*rows, strict=True) if rows else ((),) * 5
    boxes, area = np.array(boxes, np.float32).reshape(-1, 4), np.array(area, np.float64)
    flags = np.array(difficult, bool), np.array(crowd, bool)
    return boxes, np.array(labels, np.int32), *flags, np.where(np.isnan(area), box_areas(boxes), area)


def first_sentence(error: Exception) -> str:
    """Returns the first sentence of an error's message, cut after 300 characters, without the final punctuation."""
    return re.split(r"\.\s|\n", str(error).strip() or type(error).__name__)[0][:300].rstrip(".:")
