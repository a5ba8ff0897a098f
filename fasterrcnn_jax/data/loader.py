"""Makes batches from records. Threads decode and resize the images ahead of the device.

The iterators keep their position: `iterator.get_state()` after a step and `set_state` in a new process give the same
next batch.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from fasterrcnn_jax.config import DataConfig, ImageConfig
from fasterrcnn_jax.data import fast_input
from fasterrcnn_jax.data.augment import draw_colours, draw_placement, place_boxes
from fasterrcnn_jax.data.crop import crop_boxes, crop_pixels, crop_window, cropped_hw
from fasterrcnn_jax.data.image_cache import caching_reader
from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.plan import BatchPlan, plan_batches, plan_epoch, rows_of
from fasterrcnn_jax.data.read_ahead import ReadAhead
from fasterrcnn_jax.data.records import Dataset, ImageProposals, ImageRecord
from fasterrcnn_jax.data.transforms import (
    Colours,
    Placement,
    canvas_for,
    draw,
    flip_boxes,
    flip_pixels,
    network_size,
    scale_boxes,
)
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.structures import Batch, GroundTruth, Proposals

# Decoding threads in evaluation; training has `data.threads`.
THREADS = 2
BATCHES_AHEAD = 8


class Example(NamedTuple):
    """An image before the resize."""

    pixels: np.ndarray  # [h, w, 3] uint8
    boxes: np.ndarray  # [N, 4] float32, in these pixels
    labels: np.ndarray  # [N] int32
    placement: Placement | None = None  # on the canvas; None: the whole image at the network size
    proposals: ImageProposals | None = None  # stored proposals, in these pixels
    colours: Colours | None = None  # change of the resized image's colours; None: no change

    def moved(self, pixels: np.ndarray, move: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> "Example":
        """Returns the example with other pixels, and with its boxes and proposals moved along.

        Args:
          move: function from boxes to the boxes in the other pixels and a mask of the boxes to keep.
        """
        boxes, stay = move(self.boxes)
        proposals = self.proposals
        if proposals is not None:
            proposed, stay_proposed = move(proposals.boxes)
            proposals = ImageProposals(proposed[stay_proposed], proposals.scores[stay_proposed])
        return self._replace(pixels=pixels, boxes=boxes[stay], labels=self.labels[stay], proposals=proposals)


class TrainingSource:
    """The plan of a whole run as a random-access source: element i is the (epoch, batch plan) of step i."""

    def __init__(
        self,
        dataset: Dataset,
        data: DataConfig,
        image: ImageConfig,
        *,
        batch_size: int,
        seed: int,
        steps: int,
    ):
        sizes = [_training_hw(record, data) for record in dataset.records]
        canvases = [canvas_for(size, image) for size in sizes]
        aspects = np.array([width / height for height, width in sizes]) if data.rank_by_aspect else None
        self._epoch = functools.lru_cache(2)(
            lambda epoch: plan_epoch(canvases, batch_size, seed=seed, epoch=epoch, aspects=aspects)
        )
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[int, BatchPlan]:
        epoch, position = divmod(index, len(self._epoch(0)))
        return epoch, self._epoch(epoch)[position]


def training_batches(
    dataset: Dataset,
    data: DataConfig,
    image: ImageConfig,
    *,
    batch_size: int,
    seed: int,
    steps: int,
    process: tuple[int, int] = (0, 1),
    proposals: Mapping[str, ImageProposals] | None = None,
) -> ReadAhead[Any, Batch]:
    """Returns an iterator over the `steps` batches of a run.

    Its position depends neither on the process nor on the number of processes.

    Args:
      dataset: prepared by `prepare_training_set`: every object in it is trained on.
      batch_size: number of images over all processes.
      process: (index, count): the batches contain only the rows of this process; count must divide batch_size.
      proposals: stored proposals of every image by its id; they are transformed together with the image.
    Raises:
      InputError: `data.fast` needs a package that is not installed.
    """
    source = TrainingSource(dataset, data, image, batch_size=batch_size, seed=seed, steps=steps)
    if data.fast:
        fast_input.check_installed()
    read = caching_reader(data.cache_mb, fast=data.fast)

    def load(element: tuple[int, BatchPlan]) -> Batch:
        epoch, plan = element

        def example(index: int) -> Example:
            record, stream = dataset.records[index], (seed, epoch, index)
            stored = None if proposals is None else proposals[record.id]
            return training_example(record, read(record), data, image, plan.canvas, stream=stream, proposals=stored)

        slots = _most(proposals)
        rows = rows_of(plan, *process)
        return assemble(rows, image, example, max_boxes=data.max_boxes, max_proposals=slots, fast=data.fast)

    return _in_threads(source, load, data.threads)


def set_position(batches: ReadAhead[Any, Batch], position: Any, where: str) -> None:
    """Continues at a position that `get_state` returned.

    Args:
      where: the run, for messages.
    Raises:
      InputError: it is no position in these batches.
    """
    try:
        batches.set_state(position)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: the stored position of the data does not belong to this run ({type(error).__name__}: {error}); "
            "choose another --run"
        ) from error


def evaluation_batches(
    dataset: Dataset,
    image: ImageConfig,
    *,
    batch_size: int,
    process: tuple[int, int] = (0, 1),
    proposals: Mapping[str, ImageProposals] | None = None,
    mirrored: bool = False,
) -> ReadAhead[Any, Batch]:
    """Returns an iterator over batches with every image once, uncropped; the batches have no ground truth.

    Args:
      batch_size: number of images per batch.
      mirrored: give the mirror image of every image, for test-time augmentation.
      process: (index, count): this process gets every count-th batch and no other process gets it; some processes
        can get one batch fewer, or none.
      proposals: as in `training_batches`.
    """
    index, count = process
    canvases = [canvas_for(record.image_hw, image) for record in dataset.records]
    plans = plan_batches(canvases, np.arange(len(canvases)), batch_size)[index::count]

    def example(index: int) -> Example:
        record = dataset.records[index]
        stored = None if proposals is None else proposals[record.id]
        pixels = flip_pixels(record_pixels(record)) if mirrored else record_pixels(record)
        return Example(pixels, np.zeros((0, 4), np.float32), np.zeros(0, np.int32), None, stored)

    slots = _most(proposals)
    return _in_threads(plans, lambda plan: assemble(plan, image, example, max_boxes=0, max_proposals=slots), THREADS)


def _most(proposals: Mapping[str, ImageProposals] | None) -> int | None:
    """Returns the largest number of proposals of an image; None: there are no stored proposals."""
    return None if proposals is None else max(len(found.boxes) for found in proposals.values())


def _in_threads(
    source: Sequence[BatchPlan] | TrainingSource, load: Callable[[Any], Batch], threads: int
) -> ReadAhead[Any, Batch]:
    # At least as many batches ahead as threads, so that no thread is idle.
    return ReadAhead(source, load, threads=threads, ahead=max(BATCHES_AHEAD, threads))


def training_example(
    record: ImageRecord,
    pixels: UInt8[np.ndarray, "h w 3"],
    data: DataConfig,
    image: ImageConfig,
    canvas: tuple[int, int],
    *,
    stream: tuple[int, int, int],
    proposals: ImageProposals | None = None,
) -> Example:
    """Returns an image for training: flipped, cropped and augmented as `data` says.

    Args:
      pixels: original pixels of the record.
      canvas: (height, width) of the canvas that the image will be drawn onto.
      stream: (seed, epoch, index of the image), the seed of all random draws.
      proposals: stored proposals of the record; they are transformed together with the image.
    """
    example = Example(pixels, record.boxes, record.labels, proposals=proposals)
    drawn = data.flip == "random" and np.random.default_rng(stream).random() < 0.5
    if drawn or record.flipped:
        width = pixels.shape[1]
        flipped = fast_input.mirrored(pixels) if data.fast else flip_pixels(pixels)
        example = example.moved(flipped, lambda boxes: (flip_boxes(boxes, width), _all(boxes)))
    # Streams 1 to 3, because a stream that ends in 0 would equal the one above. Separate streams keep the draws
    # independent.
    cropping, placing, colouring = (np.random.default_rng((*stream, number)) for number in (1, 2, 3))
    if data.crop_aspect is not None:
        window = crop_window(example.pixels.shape[:2], example.boxes, aspect=data.crop_aspect, rng=cropping)
        example = example.moved(crop_pixels(example.pixels, window), lambda boxes: crop_boxes(boxes, window))
    augment = data.augment
    if augment.short_sides or augment.scale_jitter is not None:
        placement = draw_placement(example.pixels.shape[:2], canvas, image, augment, placing)
        example = example._replace(placement=placement)
    if augment.photometric:
        example = example._replace(colours=draw_colours(colouring))
    return example


def _all(boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, "n"]:
    return np.ones(len(boxes), bool)


def _training_hw(record: ImageRecord, data: DataConfig) -> tuple[int, int]:
    return record.image_hw if data.crop_aspect is None else cropped_hw(record.image_hw, data.crop_aspect)


def _on_host(array: np.ndarray) -> Any:
    """Returns `array`, as one of a batch: on the host, NumPy arrays stand where `Batch` says JAX arrays."""
    return array


def assemble(
    plan: BatchPlan,
    image: ImageConfig,
    example: Callable[[int], Example],
    *,
    max_boxes: int,
    max_proposals: int | None = None,
    fast: bool = False,
) -> Batch:
    """Returns the planned batch as NumPy arrays; the images of invalid rows are zeros.

    Args:
      example: function from the index of an image to its example.
      max_boxes: ground-truth slots per image.
      max_proposals: slots for stored proposals per image; None: the examples have no stored proposals.
      fast: as in `transforms.draw`.
    """
    size = len(plan.image_index)
    images = np.zeros((size, *plan.canvas, 3), image.pixel_dtype)
    batch = Batch(
        images=_on_host(images),
        image_hw=_on_host(np.zeros((size, 2), np.float32)),
        scale=_on_host(np.ones((size, 2), np.float32)),
        image_index=_on_host(plan.image_index),
        image_valid=_on_host(plan.image_valid),
        ground_truth=GroundTruth(
            _on_host(np.zeros((size, max_boxes, 4), np.float32)),
            _on_host(np.zeros((size, max_boxes), np.int32)),
            _on_host(np.zeros((size, max_boxes), bool)),
        ),
        proposals=None
        if max_proposals is None
        else Proposals(
            _on_host(np.zeros((size, max_proposals, 4), np.float32)),
            _on_host(np.zeros((size, max_proposals), np.float32)),
            _on_host(np.zeros((size, max_proposals), bool)),
        ),
    )
    for row in np.flatnonzero(plan.image_valid):
        found = example(int(plan.image_index[row]))
        image_hw, placement = found.pixels.shape[:2], found.placement
        if placement is None:
            placement = Placement(network_size(image_hw, image))
            scale = placement.scale(image_hw)
            found = found.moved(found.pixels, lambda boxes, scale=scale: (scale_boxes(boxes, scale), _all(boxes)))
        else:
            place = functools.partial(place_boxes, image_hw=image_hw, canvas=plan.canvas, placement=placement)
            found = found.moved(found.pixels, place)
        pixels, boxes, labels, proposals = found.pixels, found.boxes, found.labels, found.proposals
        draw(images[row], pixels, image, placement, colours=found.colours, fast=fast)
        batch.image_hw[row], batch.scale[row] = (
            placement.shown(plan.canvas),
            placement.scale(pixels.shape[:2]),
        )
        batch.ground_truth.boxes[row, : len(boxes)] = boxes
        batch.ground_truth.labels[row, : len(boxes)] = labels
        batch.ground_truth.valid[row, : len(boxes)] = True
        if proposals is not None:
            assert batch.proposals is not None, "the examples have proposals, so there are slots for them"
            count = len(proposals.boxes)
            batch.proposals.boxes[row, :count], batch.proposals.scores[row, :count] = proposals
            batch.proposals.valid[row, :count] = True
    return batch
