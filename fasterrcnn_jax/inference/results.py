"""The folder that `fasterrcnn-jax predict` writes: results as they come, and what a job needs to continue after a kill.

`detections.jsonl` has one line per image, which is written when everything else about the image is on the disk. It is
the list of what is done, and COCO's file and the table are made from it at the end.
"""

import contextlib
import csv
import io
import json
import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from fasterrcnn_jax.atomic_write import is_temporary, whole_file, write_atomically
from fasterrcnn_jax.data.file_names import without_extension
from fasterrcnn_jax.data.given_files import GivenFile
from fasterrcnn_jax.data.records import ImageDetections, Prediction, joined_names
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.files import (
    CSV_HEADER,
    coco_entries,
    csv_rows,
    fits_a_file_name,
    shortest,
    voc_xml,
    yolo_text,
)
from fasterrcnn_jax.inference.drawing import Pixels, draw, save_image
from fasterrcnn_jax.printing import printable

logger = logging.getLogger(__name__)

Format = Literal["coco", "csv", "yolo", "voc"]
Pictures = Literal["png", "jpeg", "none"]

IMAGE_FOLDERS = ("images", "crops")
"""Folders in the folder of results that hold images."""


class Result(NamedTuple):
    """The detections of one image, or of one frame of a video."""

    id: str
    file: str  # absolute path
    stamp: tuple[int, int]  # size of the file in bytes, and the time of its last change in nanoseconds
    image_hw: tuple[int, int]
    detections: ImageDetections
    frame: int | None = None  # of a video, counted from 0
    time: float | None = None  # of a frame, in seconds

    @property
    def source(self) -> str:
        """The id of the given file: the video of a frame."""
        return self.id if self.frame is None else posixpath.dirname(self.id)


class ResultFolder:
    """Writes results into a folder. Keep it open (`with`) while a job runs: it holds the lock of the folder.

    Args:
      out: the folder.
      class_names: all classes of the model; label k is class_names[k - 1].
      files: the files of the job.
      formats: what to write beside detections.jsonl.
      pictures: kind of the images with boxes.
      crops: write each detection as an image of its own.
      score_threshold: detections with a lower score are in detections.jsonl and COCO's file only.
    Raises:
      InputError: another process writes into this folder, or a file cannot be written.
    """

    def __init__(
        self,
        out: Path,
        class_names: tuple[str, ...],
        files: Sequence[GivenFile],
        *,
        formats: tuple[Format, ...],
        pictures: Pictures,
        crops: bool,
        score_threshold: float,
    ):
        self.out, self.class_names = out, class_names
        self._formats, self._pictures, self._crops, self._threshold = formats, pictures, crops, score_threshold
        # Readers find the labels of a.jpg in a.txt; a.jpg and a.png of one folder cannot both have that name, and
        # a.jpg.png cannot have the name of a.jpg then.
        stems, ids = Counter(without_extension(file.id) for file in files), {file.id for file in files}
        self._label_names = {
            id: stem if stems[stem] == 1 and stem not in ids else id
            for id, stem in ((id, without_extension(id)) for id in ids)
        }
        self._labelled = {name: id for id, name in self._label_names.items()}
        self._lock = FileLock(out / ".lock")
        self._lines: BinaryIO | None = None

    def __enter__(self) -> "ResultFolder":
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"--out {self.out}: another process writes into this folder; wait for it, or choose another --out"
            ) from None
        except NotImplementedError:
            logger.warning("%s: this file system has no locks; make sure that no other process writes here", self.out)
        except OSError as error:
            raise InputError(
                f"--out {self.out}: {error.filename or self.out} cannot be written: {error.strerror or error}"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()
        self._lock.release()

    @property
    def journal(self) -> Path:
        return self.out / "detections.jsonl"

    def begin(self, job: Mapping[str, Any], files: Iterable[GivenFile]) -> set[str]:
        """Returns the ids that an earlier process of the same job has finished, and opens the list of results.

        Results of another job are dropped with the files that it wrote, and so are those of images that are not given
        now or that have changed.

        Args:
          job: what the results depend on beside the images.
        """
        self._remove_temporary_files()
        self._say_label_names()
        stored = self.out / "job.json"
        earlier = _read_job(stored)
        same = earlier.get("job") == json.loads(json.dumps(job))
        kinds = _Kinds.of(earlier)
        if not same:
            if self.journal.exists():
                logger.warning("%s: results of another model or of other settings are replaced", self.out)
                for _, result in read_results(self.journal, kinds.class_names):
                    self._remove_files(result, kinds)
            for name, format in (("detections.json", "coco"), ("detections.csv", "csv")):
                if format in kinds.formats:
                    (self.out / name).unlink(missing_ok=True)
            self.journal.unlink(missing_ok=True)
            kinds = _Kinds((), (), False, self._threshold, ())
        kinds = _Kinds(
            tuple(sorted({*kinds.formats, *self._formats})),
            tuple(sorted({*kinds.pictures, self._pictures})),
            kinds.crops or self._crops,
            self._threshold,
            self.class_names,
        )
        text = json.dumps({"job": job, "written": kinds._asdict()}, indent=1)
        if earlier != json.loads(text):
            write_atomically(stored, text)
        paths, done = {file.id: file.path for file in files}, set()
        # Whole or not at all: a kill in this moment must not lose what is done.
        with whole_file(self.journal) as kept:
            for line, result in read_results(self.journal, self.class_names):
                if result.id in done:
                    continue
                if self._is_current(result, paths.get(result.source)):
                    kept.write(line)
                    done.add(result.id)
                else:
                    self._remove_files(result, kinds)
        try:
            self._lines = open(self.journal, "ab")  # noqa: SIM115 - until the job ends
        except OSError as error:
            raise InputError(f"{self.journal} cannot be written: {error.strerror or error}") from error
        return done

    def _remove_temporary_files(self) -> None:
        """Removes the files that a killed process was writing."""
        below = (self.out / name for name in (*IMAGE_FOLDERS, "labels", "annotations"))
        for place in (*self.out.glob(".*.tmp"), *(place for folder in below for place in folder.rglob(".*.tmp"))):
            if is_temporary(place):
                place.unlink(missing_ok=True)

    def _say_label_names(self) -> None:
        if {"yolo", "voc"} & set(self._formats):
            whole = sorted(id for id, name in self._label_names.items() if name == id != without_extension(id))
            if whole:
                logger.warning(
                    "%d images share their name without the extension with others: %s; their label files have the "
                    "extension in their names, such as %s.txt",
                    len(whole),
                    joined_names(whole, 3),
                    whole[0],
                )

    def _remove_files(self, result: Result, kinds: "_Kinds") -> None:
        """Removes the files of an earlier result, in all kinds that were written."""
        id = result.id
        if posixpath.normpath(id) != id or id.startswith(("/", "..")):  # nothing that a job has written
            return
        places = []
        # Its label file had one of two names, as the other images of the job required.
        for name in (without_extension(id), id):
            if self._labelled.get(name, id) == id:
                places += [self.out / "labels" / f"{name}.txt"] if "yolo" in kinds.formats else []
                places += [self.out / "annotations" / f"{name}.xml"] if "voc" in kinds.formats else []
        kept = result.detections.scores >= kinds.score_threshold
        folders = [_crop_folder(label, kinds.class_names) for label in result.detections.labels[kept].tolist()]
        for extension in (_EXTENSIONS[kind] for kind in kinds.pictures if kind in _EXTENSIONS):
            places.append(self.out / "images" / f"{id}{extension}")
        if kinds.crops:
            # "none" stands for crops in PNG.
            for extension in sorted({_EXTENSIONS.get(kind, ".png") for kind in kinds.pictures}):
                for number, folder in enumerate(folders, start=1):
                    places.append(self.out / "crops" / folder / f"{id}.{number}{extension}")
        for place in places:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                place.unlink()
                for folder in place.parents:
                    if folder == self.out or any(folder.iterdir()):
                        break
                    folder.rmdir()

    def _is_current(self, result: Result, path: Path | None) -> bool:
        """Returns whether a result belongs to the file and everything about it is there; writes missing labels."""
        try:
            if path is None or result.file != absolute(path) or result.stamp != stamp_of(path):
                return False
        except OSError:
            return False
        shown = self._shown(result)
        if not all(place.exists() for place in [*self._drawings(result), *self._crop_places(result, shown)]):
            return False
        for place, text in self._labels(result, shown).items():
            if not place.exists():
                write_atomically(place, text)
        return True

    def write_files(self, result: Result, pixels: Pixels | None) -> None:
        """Writes the files of one image; may be called in threads.

        Args:
          pixels: the image; needed if `needs_pixels`.
        """
        shown = self._shown(result)
        for place, text in self._labels(result, shown).items():
            write_atomically(place, text)
        if pixels is None:
            return
        for place in self._drawings(result):
            names = tuple(self.class_names[label - 1] for label in shown.labels)
            save_image(place, draw(pixels, Prediction(*shown, names), score_threshold=self._threshold))
        # Without crops there is no place.
        for place, box in zip(self._crop_places(result, shown), shown.boxes, strict=False):
            height, width = pixels.shape[:2]
            # The pixels that the box touches, at least one.
            x1, y1 = min(int(box[0]), width - 1), min(int(box[1]), height - 1)
            x2, y2 = max(int(np.ceil(box[2])), x1 + 1), max(int(np.ceil(box[3])), y1 + 1)
            save_image(place, np.ascontiguousarray(pixels[y1:y2, x1:x2]))

    @property
    def needs_pixels(self) -> bool:
        return self._pictures != "none" or self._crops

    def add(self, result: Result) -> None:
        """Appends the line of an image; call it after `write_files`."""
        assert self._lines is not None, "`begin` comes first"
        try:
            self._lines.write(_line(result, self.class_names))
            self._lines.flush()
        except OSError as error:
            raise InputError(f"{self.journal} cannot be written: {error.strerror or error}") from error

    def finish(self) -> tuple[int, int]:
        """Writes COCO's file and the table from the list of results; returns the numbers of images and detections.

        Reads one line at a time, because the list may be larger than the memory.
        """
        images = detections = 0
        category_ids = range(1, len(self.class_names) + 1)
        with contextlib.ExitStack() as files:
            coco = files.enter_context(whole_file(self.out / "detections.json")) if "coco" in self._formats else None
            table = files.enter_context(whole_file(self.out / "detections.csv")) if "csv" in self._formats else None
            before = b"["
            if table is not None:
                table.write(_csv_lines([CSV_HEADER]))
            for _, result in read_results(self.journal, self.class_names):
                images, detections = images + 1, detections + len(result.detections.scores)
                if coco is not None:
                    for entry in coco_entries(result.detections, result.id, category_ids):
                        coco.write(before + json.dumps(entry, allow_nan=False).encode())
                        before = b", "
                if table is not None:
                    rows = csv_rows(self._shown(result), result.id, result.image_hw, self.class_names)
                    table.write(_csv_lines(rows))
            if coco is not None:
                coco.write(b"[]" if before == b"[" else b"]")
        return images, detections

    def _shown(self, result: Result) -> ImageDetections:
        kept = result.detections.scores >= self._threshold
        return ImageDetections(*(values[kept] for values in result.detections))

    def _labels(self, result: Result, shown: ImageDetections) -> dict[Path, str]:
        """Returns the label files of an image, with their contents."""
        # A frame has no extension.
        name = self._label_names.get(result.id, result.id)
        found = {}
        if "yolo" in self._formats:
            found[self.out / "labels" / f"{name}.txt"] = yolo_text(shown, result.image_hw)
        if "voc" in self._formats:
            xml = voc_xml(shown, result.file, result.image_hw, self.class_names)
            found[self.out / "annotations" / f"{name}.xml"] = xml
        return found

    def _drawings(self, result: Result) -> list[Path]:
        # Keep the whole file name: the folder may hold both a.jpg and a.png.
        return [self.out / "images" / f"{result.id}{self._extension}"] if self._pictures != "none" else []

    def _crop_places(self, result: Result, shown: ImageDetections) -> list[Path]:
        if not self._crops:
            return []
        folders = [_crop_folder(label, self.class_names) for label in shown.labels.tolist()]
        return [
            self.out / "crops" / folder / f"{result.id}.{number}{self._extension}"
            for number, folder in enumerate(folders, start=1)
        ]

    @property
    def _extension(self) -> str:
        return _EXTENSIONS.get(self._pictures, ".png")


_EXTENSIONS = {"png": ".png", "jpeg": ".jpg"}


class _Kinds(NamedTuple):
    """What the processes of a job have written, as job.json says; needed to remove it."""

    formats: tuple[str, ...]
    pictures: tuple[str, ...]
    crops: bool
    score_threshold: float
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "_Kinds":
        try:
            formats, pictures, crops, threshold, names = (stored["written"][name] for name in cls._fields)
            return cls(tuple(formats), tuple(pictures), bool(crops), float(threshold), tuple(map(str, names)))
        except (KeyError, TypeError, ValueError):
            return cls((), (), False, 0.0, ())  # an earlier version or a damaged file: nothing else is removed


def _read_job(path: Path) -> dict[str, Any]:
    """Returns the content of job.json; {} if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _crop_folder(label: int, class_names: Sequence[str]) -> str:
    name = class_names[label - 1]
    return name if fits_a_file_name(name) and not name.startswith(".") else f"class {label}"


def image_folders(out: Path, *, pictures: Pictures, crops: bool) -> list[Path]:
    """Returns the folders that a job writes images into, and those that an earlier job in `out` has written."""
    kinds = _Kinds.of(_read_job(out / "job.json"))
    drawn = any(kind != "none" for kind in (pictures, *kinds.pictures))
    return [out / name for name, used in zip(IMAGE_FOLDERS, (drawn, crops or kinds.crops), strict=True) if used]


def absolute(path: Path) -> str:
    """Returns the absolute path of a file, printable, as it stands in results."""
    return printable(Path(path).absolute())


def stamp_of(path: Path) -> tuple[int, int]:
    """Returns the size of a file and the time of its last change: another pair means another content.

    Raises:
      OSError: the file cannot be reached.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _line(result: Result, class_names: tuple[str, ...]) -> bytes:
    content: dict[str, Any] = {"image": result.id, "file": result.file, "stamp": result.stamp}
    if result.frame is not None:
        content |= {"frame": result.frame, "time": result.time}
    content |= json_fields(result.image_hw, result.detections, class_names)
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def json_fields(
    image_hw: tuple[int, int], detections: ImageDetections, class_names: Sequence[str]
) -> dict[str, int | list[Any]]:
    """Returns the size of an image and its detections as values for JSON, with the names of detections.jsonl."""
    boxes, scores, labels = detections
    height, width = image_hw
    return {
        "width": width,
        "height": height,
        "boxes": [list(map(shortest, box)) for box in boxes],
        "scores": list(map(shortest, scores)),
        "labels": labels.tolist(),
        "class_names": [class_names[label - 1] for label in labels],
    }


def read_results(path: Path, class_names: tuple[str, ...]) -> Iterator[tuple[bytes, Result]]:
    """Yields each line of a list of results with its result; a line that a kill cut short is left out.

    Raises:
      InputError: the file cannot be opened.
    """
    try:
        lines = open(path, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    with lines:
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                content = json.loads(line)
                detections = ImageDetections(
                    np.array(content["boxes"], np.float32).reshape(-1, 4),
                    np.array(content["scores"], np.float32),
                    np.array(content["labels"], np.int32),
                )
                size, changed = content["stamp"]
                image_hw = int(content["height"]), int(content["width"])
                frame = content.get("frame"), content.get("time")
                if line.endswith(b"\n") and detections.labels.max(initial=1) <= len(class_names):
                    result = Result(content["image"], content["file"], (size, changed), image_hw, detections, *frame)
                    yield line, result


def _csv_lines(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
