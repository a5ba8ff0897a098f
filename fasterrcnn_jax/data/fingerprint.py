"""Notices that the data of a run has changed between two starts; docs/decisions/0014-fingerprint-of-the-data.md.

The fingerprint is a JSON text. For each split it holds, by image id, a digest of the labels and the size, modification
time and content digest of the image file. It holds no paths, so a moved or copied folder with equal contents is equal.
For a split with given proposals, it holds a digest of those of each image.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fasterrcnn_jax.data.faults import THREADS, watched
from fasterrcnn_jax.data.records import Dataset, ImageProposals, ImageRecord, StoredImage
from fasterrcnn_jax.errors import InputError

# Digests are compared with the digest of the same image at an earlier start, so 64 bits are enough.
DIGITS = 16
UNKNOWN = ""  # digest of a file that is not read yet


class _File(NamedTuple):
    path: Path
    size: int  # bytes
    modified: int  # nanoseconds


class Fingerprint:
    """The contents of every split of a run. File contents are read by one thread while the training runs."""

    def __init__(
        self, splits: Mapping[str, Dataset], proposals: Mapping[str, Mapping[str, ImageProposals]] | None = None
    ):
        """Digests the labels and the proposals and looks at every image file; reads no image.

        Args:
          proposals: given proposals by split and image id.
        Raises:
          InputError: an image file has disappeared.
        """
        self._names = {split: dataset.name for split, dataset in splits.items()}
        self._labels = {
            split: {record.id: _label_digest(record) for record in dataset.records} for split, dataset in splits.items()
        }
        self._files = {split: _files_of(dataset) for split, dataset in splits.items()}
        for split, given in (proposals or {}).items():
            name = f"proposals of {split}"
            self._names[name], self._files[name] = name, {}
            self._labels[name] = {image: _proposals_digest(found) for image, found in given.items()}
        self._digests: dict[Path, str] = {}
        self._reader: threading.Thread | None = None

    def text(self) -> str:
        """Returns the fingerprint. A file that the thread has not read yet has no digest."""
        splits = {}
        for split, labels in self._labels.items():
            files = self._files[split]
            splits[split] = {image: [label, *self._entry(files.get(image))] for image, label in labels.items()}
        return json.dumps(splits, separators=(",", ":"))

    def changes(self, stored: str) -> list[str]:
        """Returns one sentence for each kind of change since `stored`, the fingerprint of an earlier start.

        Reads the files whose size is equal and whose modification time differs. Splits that are not in both are not
        compared.

        Raises:
          InputError: `stored` is not a fingerprint.
        """
        found = []
        for split, before in _parsed(stored).items():
            if split in self._labels:
                found += [f"{self._names[split]}: {change}" for change in self._changes_of(split, before)]
        return found

    def read_in_background(self) -> None:
        """Starts the thread that reads the files without a digest, unless it runs already.

        The process may end at any time; what is not read then is read after the next start.
        """
        if self._reader is None:
            self._reader = threading.Thread(target=self._read_all, daemon=True)
            self._reader.start()

    def _read_all(self) -> None:
        for files in self._files.values():
            for file in files.values():
                self._digest(file.path)

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = _file_digest(path)
        return self._digests[path]

    def _entry(self, file: _File | None) -> tuple[int, int, str] | tuple[()]:
        return () if file is None else (file.size, file.modified, self._digests.get(file.path, UNKNOWN))

    def _changes_of(self, split: str, before: dict[str, tuple[str, _File | None, str]]) -> list[str]:
        labels, files = self._labels[split], self._files[split]
        common = [image for image in labels if image in before]
        kinds = {
            "images were added": [image for image in labels if image not in before],
            "images were removed": [image for image in before if image not in labels],
            "images are at another place of the list": [
                image for image, other in zip(common, (i for i in before if i in labels), strict=True) if image != other
            ],
            "images have other sizes, boxes, labels or flags": [
                image for image in common if labels[image] != before[image][0]
            ],
        }
        changed, unsure, touched = [], [], []
        for image in common:
            now, (_, then, digest) = files.get(image), before[image]
            if now is None or then is None:
                continue
            if now.size != then.size:
                changed.append(str(now.path))
            elif now.modified == then.modified:
                if digest != UNKNOWN:
                    self._digests[now.path] = digest
            elif digest == UNKNOWN:
                unsure.append(str(now.path))
            else:
                touched.append((now.path, digest))
        with ThreadPoolExecutor(THREADS) as pool:
            read = pool.map(self._digest, (path for path, _ in touched))
            shown = watched(read, f"comparing images of {self._names[split]}", len(touched))
            changed += [str(path) for (path, digest), found in zip(touched, shown, strict=True) if found != digest]
        kinds["image files have other contents"] = changed
        kinds["image files were written again before the checkpoint knew their contents"] = unsure
        return [f"{kind}: {len(where)}, the first is {where[0]}" for kind, where in kinds.items() if where]


def short_digest(dataset: Dataset) -> str:
    """Returns a digest of a data set, twelve hexadecimal digits: its classes, labels and image files, in order.

    Reads every image file. Two folders with equal contents have equal digests, wherever they are.

    Raises:
      InputError: an image file has disappeared.
    """
    digest = hashlib.sha256(json.dumps(dataset.class_names).encode())
    for record in dataset.records:
        digest.update(json.dumps([record.id, _label_digest(record)]).encode())
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map(_file_digest, [file.path for file in _files_of(dataset).values()])
        for content in watched(read, f"reading images of {dataset.name}", len(dataset.records)):
            digest.update(content.encode())
    return digest.hexdigest()[:12]


def _files_of(dataset: Dataset) -> dict[str, _File]:
    """Returns each file once, by the id of its first image: a file of TFDS holds many images."""
    first = {}
    for record in dataset.records:
        path = record.path.file if isinstance(record.path, StoredImage) else record.path
        first.setdefault(path, record.id)
    files = {}
    for path, image in first.items():
        try:
            found = path.stat()
        except OSError as error:
            raise InputError(f"{path}: the file cannot be read: {error.strerror}") from None
        files[image] = _File(path, found.st_size, found.st_mtime_ns)
    return files


def _label_digest(record: ImageRecord) -> str:
    digest = hashlib.sha256(repr((record.image_hw, record.upright, record.labels.shape)).encode())
    for array in (record.boxes, record.labels, record.difficult, record.crowd, record.area):
        digest.update(array.tobytes())
    return digest.hexdigest()[:DIGITS]


def _proposals_digest(found: ImageProposals) -> str:
    return hashlib.sha256(found.boxes.tobytes() + found.scores.tobytes()).hexdigest()[:DIGITS]


def _file_digest(path: Path) -> str:
    """Returns the digest of a file's contents, or UNKNOWN if it cannot be read: the loader reports that file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:DIGITS]
    except OSError:
        return UNKNOWN


def _parsed(text: str) -> dict[str, dict[str, tuple[str, _File | None, str]]]:
    """Returns (digest of the labels, file, digest of the file) by split and image id; the file has no path."""
    try:
        return {
            split: {
                image: (str(label), _File(Path(), int(file[0]), int(file[1])), str(file[2]))
                if file
                else (str(label), None, UNKNOWN)
                for image, (label, *file) in images.items()
            }
            for split, images in json.loads(text).items()
        }
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise InputError(f"the fingerprint of the data is damaged ({type(error).__name__})") from None
