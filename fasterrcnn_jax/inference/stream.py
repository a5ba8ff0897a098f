"""Detection in any number of images, one after another: threads decode and resize, all local devices detect.

Nothing accumulates: at any time there are a few decoded images per thread and one unfinished batch per canvas.
"""

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import UInt8

from fasterrcnn_jax.config.checks import fitted
from fasterrcnn_jax.data.read_ahead import in_threads
from fasterrcnn_jax.data.records import ImageDetections
from fasterrcnn_jax.data.transforms import canvas_for, flip_pixels, to_canvas
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.exported import ExportedDetector
from fasterrcnn_jax.inference.augmentation import View, merged, views
from fasterrcnn_jax.inference.dataset import on_devices
from fasterrcnn_jax.inference.prediction import to_original
from fasterrcnn_jax.inference.tiling import Window, joined, windows_of
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.models.faster_rcnn import detect
from fasterrcnn_jax.processes import replicate

Item = TypeVar("Item")
Pixels = UInt8[np.ndarray, "h w 3"]

# An unfinished batch runs when so many batches have run since it began: results keep the order of the images, and no
# image waits forever for others of its canvas.
PATIENCE = 4


class Found(NamedTuple):
    """What was found in one image."""

    item: Any  # of the iterable that was given
    image_hw: tuple[int, int]
    detections: ImageDetections  # in pixels of the image


class Unreadable(NamedTuple):
    """An image whose pixels could not be read."""

    item: Any
    error: InputError


class Drawn(NamedTuple):
    """One part of an image as the network gets it."""

    canvas: tuple[int, int]  # parts with equal canvases run in one batch
    arrays: tuple[np.ndarray, ...]  # what the network gets, without the axis of the batch
    original_hw: tuple[int, int]  # of the part


@runtime_checkable
class Runner(Protocol):
    """A detector on all local devices. `detect_stream` calls all but `warm_up`, which a service calls."""

    rows: int  # parts in a batch

    @property
    def views(self) -> Sequence[Any]:
        """The versions of each part to detect in."""
        ...

    def draw(self, pixels: Pixels, view: Any) -> Drawn:
        """Returns a part of an image in one of `views`; called in threads."""
        ...

    def detect(self, parts: list[Drawn]) -> list[ImageDetections]:
        """Returns the detections in at most `rows` parts of one canvas, in pixels of each part."""
        ...

    def merged(self, found: list[list[ImageDetections]], windows: tuple[Window, ...]) -> ImageDetections:
        """Merges the detections of all views and windows into those of the image."""
        ...

    def warm_up(self) -> Iterator[tuple[int, int]]:
        """Compiles the programs of all canvases, one after the other, and yields each canvas when it is done."""
        ...


class ModelRunner:
    """Runs a detector on all local devices."""

    def __init__(self, model: Detector, *, batch_size: int, implementation: Implementation = None):
        devices = tuple(jax.local_devices())
        self.rows = batch_size * len(devices)
        self.views = views(model.config)
        self.config = model.config
        self._implementation: Implementation = implementation
        self._model = replicate(model, devices=devices)
        self._detect = on_devices(detect, implementation, devices)

    def draw(self, pixels: Pixels, view: View) -> Drawn:
        canvas = canvas_for(pixels.shape[:2], view.image)
        given = flip_pixels(pixels) if view.flipped else pixels
        height, width = pixels.shape[:2]
        return Drawn(canvas, to_canvas(given, canvas, view.image), (height, width))

    def detect(self, parts: list[Drawn]) -> list[ImageDetections]:
        arrays = []
        for values in zip(*(part.arrays for part in parts), strict=True):
            # Empty images fill the batch, as in `evaluation_batches`. A scale of zero would divide by zero.
            whole = np.zeros((self.rows, *values[0].shape), values[0].dtype)
            whole[: len(parts)] = values
            arrays.append(whole)
        arrays[2][len(parts) :] = 1.0
        found = self._detect(self._model, tuple(arrays))
        return [to_original(found, row, part.arrays[2], part.original_hw) for row, part in enumerate(parts)]

    def merged(self, found: list[list[ImageDetections]], windows: tuple[Window, ...]) -> ImageDetections:
        of_windows = [
            merged(of, window.width, self.config, implementation=self._implementation)
            for of, window in zip(found, windows, strict=True)
        ]
        threshold = self.config.postprocess.nms_threshold
        return joined(of_windows, windows, threshold, implementation=self._implementation)

    def warm_up(self) -> Iterator[tuple[int, int]]:
        nothing = ImageDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
        self.merged([[nothing] * len(self.views)], windows_of((1, 1), None, 0.0))
        for view in self.views:
            for canvas in fitted(view.image.canvases, "model.image.canvases"):
                pixels = np.zeros((*canvas, 3), view.image.pixel_dtype)
                whole = pixels, np.asarray(canvas, np.float32), np.ones(2, np.float32)
                self.detect([Drawn(canvas, whole, canvas)])
                yield canvas


class ExportedRunner:
    """Runs an exported detector on all local devices."""

    views = (None,)  # the program makes one pass

    def __init__(self, detector: ExportedDetector, *, batch_size: int):
        devices = jax.local_devices()
        self.rows = batch_size * len(devices)
        self._batch_size = batch_size
        self._detectors = [detector.on_device(device) for device in devices]

    def draw(self, pixels: Pixels, view: None) -> Drawn:
        """Returns a part of an image; called in threads.

        Raises:
          InputError: the part is larger than the canvas of the file.
        """
        height, width = pixels.shape[:2]
        try:
            self._detectors[0].check_size((height, width), "the image")
        except ValueError as error:
            raise InputError(error) from None
        canvas = self._detectors[0].network_canvas((height, width))
        return Drawn(canvas, (pixels,), (height, width))

    def detect(self, parts: list[Drawn]) -> list[ImageDetections]:
        size = self._batch_size
        batches = [[part.arrays[0] for part in parts[start : start + size]] for start in range(0, len(parts), size)]

        def found(detector: ExportedDetector, batch: list[np.ndarray]) -> list[ImageDetections]:
            return [ImageDetections(*of[:3]) for of in detector.predict(batch, batch_size=size)]

        used = self._detectors[: len(batches)]
        with ThreadPoolExecutor(len(used)) as pool:
            return [of for of_batch in pool.map(found, used, batches) for of in of_batch]

    def merged(self, found: list[list[ImageDetections]], windows: tuple[Window, ...]) -> ImageDetections:
        threshold = self._detectors[0].manifest["thresholds"]["nms_threshold"]
        return joined([of for (of,) in found], windows, threshold)

    def warm_up(self) -> Iterator[tuple[int, int]]:
        for canvas in self._detectors[0].network_canvases:
            for detector in self._detectors:
                pixels = np.zeros((self._batch_size, *detector.canvas, 3), np.uint8)
                # An image of size zero has no detections.
                jax.block_until_ready(detector.on_canvas(canvas, pixels, np.zeros((self._batch_size, 2), np.int32)))
            yield canvas


class _Open:
    """An image with parts that were not detected yet."""

    def __init__(self, item: Any, image_hw: tuple[int, int], windows: tuple[Window, ...], views: int):
        self.item, self.image_hw, self.windows = item, image_hw, windows
        self.found: list[list[Any]] = [[None] * views for _ in windows]
        self.missing = views * len(windows)


def detect_stream(
    images: Iterable[Item],
    pixels: Callable[[Item], Pixels],
    runner: Runner,
    *,
    tile: int | None = None,
    overlap: float = 0.2,
    threads: int | None = None,
) -> Iterator[Found | Unreadable]:
    """Yields the detections of each image, in the order of the images, soon after it was read.

    Detections equal those of `predict` with `batch_size` = `runner.rows` where the image is not tiled. An image that
    cannot be read is yielded as `Unreadable`; the others go on.

    Args:
      pixels: returns the pixels of an image, or raises InputError; called in threads.
      tile: side of the windows in pixels, as in `windows_of`; None: each image is detected in as a whole.
      overlap: share of a window that two neighbours have in common.
      threads: number of threads that decode and resize; None: one per core of this process.
    """
    threads = threads or core_count()
    waiting: deque[_Open | Unreadable] = deque()
    batches: defaultdict[tuple[int, int], list[tuple[_Open, int, int, Drawn]]] = defaultdict(list)
    begun: dict[tuple[int, int], int] = {}

    def read(item: Item) -> Pixels | InputError:
        try:
            return pixels(item)
        except InputError as error:
            return error

    def parts() -> Iterator[tuple[_Open, int, int, Pixels] | None]:
        # Of images that are cut into windows one waits decoded, because they are large.
        for item, of_item in in_threads(pool, read, images, threads if tile is None else 1):
            if isinstance(of_item, InputError):
                waiting.append(Unreadable(item, of_item))
                yield None  # nothing to detect in, but the caller learns of it now and not at the next good image
                continue
            height, width = of_item.shape[:2]
            image = _Open(item, (height, width), windows_of((height, width), tile, overlap), len(runner.views))
            waiting.append(image)
            for place, (y, x, tall, wide) in enumerate(image.windows):
                for view in range(len(runner.views)):
                    yield image, place, view, of_item[y : y + tall, x : x + wide]

    def drawn(part: tuple[_Open, int, int, Pixels] | None) -> Drawn | None:
        if part is None:
            return None
        return runner.draw(np.ascontiguousarray(part[3]), runner.views[part[2]])

    def run(canvas: tuple[int, int]) -> None:
        batch = batches.pop(canvas)
        del begun[canvas]
        for (image, place, view, _), of in zip(batch, runner.detect([part[3] for part in batch]), strict=True):
            image.found[place][view] = of
            image.missing -= 1

    def finished() -> Iterator[Found | Unreadable]:
        while waiting:
            first = waiting[0]
            if isinstance(first, Unreadable):
                yield first
            elif first.missing == 0:
                yield Found(first.item, first.image_hw, runner.merged(first.found, first.windows))
            else:
                return
            waiting.popleft()

    with ThreadPoolExecutor(threads) as pool:
        # As many drawn parts as threads wait beside the batch that is being filled.
        for count, (part, of_part) in enumerate(in_threads(pool, drawn, parts(), threads + runner.rows)):
            full = []
            if part is not None and of_part is not None:
                batch = batches[of_part.canvas]
                begun.setdefault(of_part.canvas, count)
                batch.append((*part[:3], of_part))
                full = [of_part.canvas] if len(batch) == runner.rows else []
            due = [canvas for canvas, since in begun.items() if count - since >= PATIENCE * runner.rows]
            for canvas in {*due, *full}:
                run(canvas)
            yield from finished()
        for canvas in list(batches):
            run(canvas)
        yield from finished()


def core_count() -> int:
    """Returns the number of cores that this process may use, which a container or a scheduler can limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
