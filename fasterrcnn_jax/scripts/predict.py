"""Detects objects in images and videos: fasterrcnn-jax predict IMAGES --ckpt runs/shapes --out OUT

IMAGES are image files, video files, folders, quoted patterns such as 'photos/**/*.jpg', and - for a list on standard
input. IMAGES may also be given as --images IMAGES. Writes into OUT: detections.jsonl, one line per image as soon as it
is done; detections.json in COCO's result format, with file names as image_id; classes.txt, where line k names
category_id k; and images/, with the boxes drawn on each image. Images are rotated as their EXIF data says.

The same command continues a job that was killed. Files that cannot be read are counted and listed at the end, and the
exit status is then 3.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.config import Config, DataConfig
from fasterrcnn_jax.config.text import to_json
from fasterrcnn_jax.data.given_files import GivenFile, list_given
from fasterrcnn_jax.data.images import read_image
from fasterrcnn_jax.data.read_ahead import in_threads
from fasterrcnn_jax.data.records import ImageDetections, joined_names
from fasterrcnn_jax.data.video import read_frames
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.exported import is_exported, load_exported
from fasterrcnn_jax.inference.proposal_store import digest
from fasterrcnn_jax.inference.results import Format, Pictures, Result, ResultFolder, absolute, image_folders, stamp_of
from fasterrcnn_jax.inference.stream import (
    ExportedRunner,
    Found,
    ModelRunner,
    Runner,
    Unreadable,
    core_count,
    detect_stream,
)
from fasterrcnn_jax.inference.tiling import TILED_MAX_PIXELS
from fasterrcnn_jax.printing import print_lines, printable, progress_bar
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.training import checkpoint

logger = logging.getLogger(__name__)

# Exit status where some files could not be read and the others are done.
UNREADABLE_STATUS = 3
# Unreadable files that are printed; unreadable.txt has all.
LISTED = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    images: tuple[Path, ...]
    """image files, video files (pip install 'fasterrcnn_jax[video]'), folders whose images are read, quoted patterns
    such as 'photos/**/*.jpg', and - for a list of files on standard input, one per line (videos in a folder are not
    read; use a pattern); no labels are needed"""
    ckpt: Path
    """run folder (uses its best checkpoint), one checkpoint folder RUN/checkpoints/STEP, a weights file, or a file of
    fasterrcnn-jax export"""
    backbone: str | None = None
    """MODULE:CLASS of your own backbone, if the model was trained with one; the class is imported"""
    out: Path
    """folder for the results; a job that was killed continues there"""
    recursive: bool = False
    """read the folders inside a folder too"""
    formats: tuple[Format, ...] = ("coco",)
    """more result files; detections.jsonl is always written: coco (detections.json), csv (detections.csv), yolo
    (labels/NAME.txt), voc (annotations/NAME.xml)"""
    score_threshold: float = 0.5
    """detections with a lower score are left out of images, crops, csv, yolo and voc; detections.jsonl and
    detections.json contain all detections"""
    classes: tuple[str, ...] = ()
    """classes to keep; all if not given"""
    pictures: Pictures = "png"
    """kind of the images with boxes: png, jpeg (smaller), or none"""
    crops: bool = False
    """write each detection as an image: crops/CLASS/NAME.NUMBER.png, or .jpg with --pictures jpeg"""
    tile: int | None = None
    """side in pixels of overlapping windows that images are cut into, for small objects in large images; the image as a
    whole is detected in too; None: no windows"""
    overlap: float = 0.2
    """share of a window that two neighbours have in common, 0 to 0.9; choose it so that overlap x tile is larger than a
    small object"""
    faults: Literal["error", "skip"] = "skip"
    """what to do with a file that cannot be read. skip: leave it out, list it at the end and exit with status 3. error:
    stop."""
    max_pixels: int | None = None
    """largest number of pixels (width times height) of an image; a larger one is refused before it is decoded; None:
    100,000,000, and 400,000,000 with --tile"""
    batch_size: int = 1
    """number of images, or windows, that each device detects in at once"""
    threads: int | None = None
    """threads that decode, resize and write; None: one per core"""
    implementation: Literal["xla", "mosaic"] | None = None
    """implementation of NMS and region features: xla: plain JAX; mosaic: GPU kernels; None: GPU kernels where they can
    run; an exported file holds its own"""


class _Model(NamedTuple):
    """What --ckpt names."""

    runner: Runner
    class_names: tuple[str, ...]
    job: dict[str, Any]  # what the results depend on
    check_size: Callable[[tuple[int, int], str], None]  # (height, width) and name of an image; raises ValueError


class _Work(NamedTuple):
    """One image to detect in."""

    id: str
    path: Path
    stamp: tuple[int, int]  # of the file before it was read
    pixels: Callable[[], np.ndarray]  # raises InputError
    frame: int | None = None
    time: float | None = None


@cli.script
def main(argv: list[str] | None = None) -> None:
    usage = ("IMAGES --ckpt RUN --out OUT [--FLAG VALUE ...]",)
    arguments = cli.parse(Arguments, argv=argv, usage=usage, description=__doc__, subject="--images")
    _check(arguments)
    max_pixels = arguments.max_pixels or (DataConfig.max_pixels if arguments.tile is None else TILED_MAX_PIXELS)
    model = _exported(arguments) if is_exported(arguments.ckpt) else _loaded(arguments)
    labels = _labels(arguments.classes, model.class_names)
    files, notes = list_given(
        arguments.images,
        recursive=arguments.recursive,
        written=image_folders(arguments.out, pictures=arguments.pictures, crops=arguments.crops),
    )
    for note in notes:
        logger.warning("%s", note)
    if arguments.tile is not None:
        print_lines(f"windows    {arguments.tile} pixels, images of at most {max_pixels:,} pixels")
    folder = ResultFolder(
        arguments.out,
        model.class_names,
        files,
        formats=arguments.formats,
        pictures=arguments.pictures,
        crops=arguments.crops,
        score_threshold=arguments.score_threshold,
    )
    with folder, _pillow_allows(max_pixels):
        done = folder.begin(model.job | _job(arguments), files)
        write_atomically(arguments.out / "classes.txt", "".join(f"{printable(name)}\n" for name in model.class_names))
        began = time.monotonic()
        added, unreadable = _detect(arguments, folder, model, files, done, labels, max_pixels)
        seconds = time.monotonic() - began
        images, detections = folder.finish()
    before = f", of which {images - added} were done before" if images > added else ""
    print_lines(f"images     {images}{before}")
    print_lines(f"detections {detections}")
    if added:
        print_lines(f"speed      {added / seconds:.1f} images/s, with compilation")
    print_lines(f"files      {arguments.out}")
    if unreadable:
        print_lines(f"unreadable {unreadable.count}, listed in {arguments.out / _UNREADABLE}")
        print_lines(*(f"  {error}" for error in unreadable.first))
        if unreadable.count > len(unreadable.first):
            print_lines(f"  and {unreadable.count - len(unreadable.first)} more")
        sys.exit(UNREADABLE_STATUS)


def _loaded(arguments: Arguments) -> _Model:
    """Returns the detector of a run folder, of one checkpoint, or of a weights file."""
    model = cli.load_model(arguments.ckpt, arguments.backbone)
    if arguments.ckpt.is_dir():
        check_detects(arguments.ckpt, checkpoint.load_run_config(arguments.ckpt))
    runner = ModelRunner(model, batch_size=arguments.batch_size, implementation=arguments.implementation)
    settings = to_json(model.config) + json.dumps(model.class_names)
    job = {"weights": digest(model), "settings": hashlib.sha256(settings.encode()).hexdigest()}
    return _Model(runner, model.class_names, job, lambda size, name: None)


def _exported(arguments: Arguments) -> _Model:
    """Returns the detector of a file of fasterrcnn-jax export."""
    for name in ("backbone", "implementation"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name} has no effect on {arguments.ckpt}: an exported file holds the whole program")
    try:
        detector = load_exported(arguments.ckpt)
    except ValueError as error:
        raise InputError(str(error)) from error
    runner = ExportedRunner(detector, batch_size=arguments.batch_size)
    return _Model(runner, detector.class_names, {"exported": detector.digest}, detector.check_size)


_UNREADABLE = "unreadable.txt"


class _UnreadableFiles:
    """Counts the files that could not be read and writes them into a list; keeps the first ones only."""

    def __init__(self, path: Path):
        self._path, self.count = path, 0
        self.first: list[str] = []
        path.unlink(missing_ok=True)

    def add(self, error: InputError) -> None:
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append(str(error))
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f"{error}\n")
        except OSError as failed:
            raise InputError(f"{self._path} cannot be written: {failed.strerror or failed}") from failed

    def __bool__(self) -> bool:
        return self.count > 0


def _detect(
    arguments: Arguments,
    folder: ResultFolder,
    model: _Model,
    files: Sequence[GivenFile],
    done: set[str],
    labels: np.ndarray,
    max_pixels: int,
) -> tuple[int, _UnreadableFiles]:
    """Detects in all images that are not done and writes their results as they come; returns the number of images."""
    added, unreadable = 0, _UnreadableFiles(folder.out / _UNREADABLE)
    total = None if any(file.is_video for file in files) else len(files)
    threads = arguments.threads or core_count()

    def pixels_of(work: _Work) -> np.ndarray:
        pixels = work.pixels()
        height, width = pixels.shape[:2]
        try:
            model.check_size((height, width), str(work.path))
        except ValueError as error:
            raise InputError(str(error)) from error
        return pixels

    found = detect_stream(
        _works(files, done, max_pixels),
        pixels_of,
        model.runner,
        tile=arguments.tile,
        overlap=arguments.overlap,
        threads=threads,
    )

    def write(one: Found | Unreadable) -> Result | InputError:
        if isinstance(one, Unreadable):
            return one.error
        work: _Work = one.item
        kept, pixels = np.isin(one.detections.labels, labels), None
        if folder.needs_pixels:
            try:
                # Decoded again, because keeping the pixels of all images in work would take more memory.
                pixels = work.pixels()
            except InputError as error:
                return error
            if pixels.shape[:2] != one.image_hw:
                return InputError(f"{work.path}: the image was changed while it was read")
        result = Result(
            work.id,
            absolute(work.path),
            work.stamp,
            one.image_hw,
            ImageDetections(*(values[kept] for values in one.detections)),
            work.frame,
            work.time,
        )
        folder.write_files(result, pixels)
        return result

    title = joined_names([str(place) for place in arguments.images], 3)
    with (
        ThreadPoolExecutor(threads) as pool,
        progress_bar(title=title, total=total, unit="image", done=len(done), rate=True) as bar,
    ):
        for _, result in in_threads(pool, write, found, threads):
            if isinstance(result, Result):
                folder.add(result)
                added += 1
            elif arguments.faults == "error":
                raise result
            else:
                unreadable.add(result)
            bar.update()
    return added, unreadable


def _works(files: Sequence[GivenFile], done: set[str], max_pixels: int) -> Iterator[_Work]:
    """Yields the images that are not done: files, and frames of videos."""
    for file in files:
        path = file.path
        if not file.is_video:
            if file.id not in done:
                read = functools.partial(read_image, path, upright=True, max_pixels=max_pixels)
                yield _Work(file.id, path, _stamp(path), read)
            continue
        stamp = _stamp(path)
        try:
            for index, seconds, pixels in read_frames(path, max_pixels=max_pixels):
                name = f"{file.id}/{index:06d}"
                if name not in done:
                    # The frame is kept until its result is written: it cannot be decoded by itself.
                    yield _Work(name, path, stamp, functools.partial(np.asarray, pixels), index, seconds)
        except InputError as error:
            yield _Work(file.id, path, stamp, functools.partial(_raise, error))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        return stamp_of(path)
    except OSError:  # reading it reports the error later
        return 0, 0


def _raise(error: InputError) -> np.ndarray:
    raise error


def _check(arguments: Arguments) -> None:
    for name, lowest in (("batch_size", 1), ("max_pixels", 1), ("threads", 1), ("tile", 16)):
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            least = "must be positive" if lowest == 1 else f"must be at least {lowest} pixels"
            raise InputError(f"--{name} {least}, got {value}")
    if not 0 <= arguments.overlap <= 0.9:
        raise InputError(f"--overlap must lie in 0..0.9, got {arguments.overlap}")


def _labels(classes: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    """Returns the labels of the classes to keep."""
    for name in classes:
        if name not in class_names:
            raise InputError(f"--classes: the model has no class {name!r}; its classes are {joined_names(class_names)}")
    return np.array([k for k, name in enumerate(class_names, start=1) if not classes or name in classes], np.int32)


def _job(arguments: Arguments) -> dict[str, Any]:
    """Returns what the results depend on beside the images and the model."""
    return {
        "tile": arguments.tile,
        "overlap": arguments.overlap if arguments.tile else None,
        "classes": sorted(arguments.classes),
        "score_threshold": arguments.score_threshold,
    }


@contextlib.contextmanager
def _pillow_allows(max_pixels: int) -> Iterator[None]:
    """Raises Pillow's own limit to `max_pixels` while the body runs; it refuses twice its limit."""
    before = Image.MAX_IMAGE_PIXELS
    if before is not None:
        Image.MAX_IMAGE_PIXELS = max(before, max_pixels)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def check_detects(ckpt: Path, config: Config) -> None:
    """Raises InputError if a part of the detector was not trained in its run."""
    if config.train.scheme == "fast_rcnn":
        raise InputError(
            f"--ckpt {ckpt}: this is a box head trained alone, without an RPN; fasterrcnn-jax evaluate detects in "
            "given proposals"
        )
    if config.train.scheme == "rpn":
        raise InputError(f"--ckpt {ckpt}: this is an RPN trained alone, which detects no classes")


if __name__ == "__main__":
    cli.run_as_program(main)
