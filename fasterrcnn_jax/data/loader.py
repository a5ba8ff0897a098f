"""From records to batches: planned, decoded and resized in threads, ahead of the device.

Grain runs the threads and keeps the position: `iterator.get_state()` after a step and `set_state` in a
new process give the same next batch.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Float, UInt8

from fasterrcnn_jax.config import DataConfig, ImageConfig
from fasterrcnn_jax.data.augment import distort_colours, draw_placement, place_boxes
from fasterrcnn_jax.data.crop import crop, crop_boxes, crop_window, cropped_hw
from fasterrcnn_jax.data.image_cache import caching_reader
from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.plan import BatchPlan, plan_batches, plan_epoch, rows_of
from fasterrcnn_jax.data.records import Dataset, ImageProposals, ImageRecord
from fasterrcnn_jax.data.transforms import (
    Placement,
    canvas_for,
    draw,
    flip_boxes,
    flip_pixels,
    network_size,
    scale_boxes,
)
from fasterrcnn_jax.structures import Batch, GroundTruth, Proposals

# That decode for an evaluation; of training there is a setting.
THREADS = 2
BATCHES_AHEAD = 8


class Example(NamedTuple):
    """An image before the resize."""

    pixels: np.ndarray  # [h, w, 3] uint8
    boxes: np.ndarray  # [N, 4] float32, in these pixels
    labels: np.ndarray  # [N] int32
    placement: Placement | None = None  # on the canvas; None: as large as the model wants it, whole
    proposals: ImageProposals | None = None  # stored ones, in these pixels


class TrainingSource:
    """The plan of a whole run as a random-access source: element i is (epoch, batch plan) of step i."""

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
        self._epoch = lru_cache(2)(
            lambda epoch: plan_epoch(canvases, batch_size, seed=seed, epoch=epoch, aspects=aspects)
        )
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> tuple[int, BatchPlan]:
        epoch, position = divmod(step, len(self._epoch(0)))
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
) -> grain.DatasetIterator:
    """Returns an iterator over the `steps` batches of a run.

    Its position does not depend on the process, nor on how many there are.

    Args:
      dataset: prepared by `training_set`: every object in it is trained on.
      batch_size: over all processes.
      process: (index, count): the batches hold the rows of this process alone; count divides batch_size.
      proposals: of every image by its id; the batches carry them as the image is shown.
    """
    source = TrainingSource(dataset, data, image, batch_size=batch_size, seed=seed, steps=steps)
    read = caching_reader(data.cache_mb)

    def load(element: tuple[int, BatchPlan]) -> Batch:
        epoch, plan = element

        def example(index: int) -> Example:
            record, stream = dataset.records[index], (seed, epoch, index)
            stored = None if proposals is None else proposals[record.id]
            return training_example(record, read(record), data, image, plan.canvas, stream=stream, proposals=stored)

        slots = _most(proposals)
        return assemble(rows_of(plan, *process), image, example, max_boxes=data.max_boxes, max_proposals=slots)

    return _in_threads(source, load, data.threads)


def evaluation_batches(
    dataset: Dataset,
    image: ImageConfig,
    *,
    batch_size: int,
    process: tuple[int, int] = (0, 1),
    proposals: Mapping[str, ImageProposals] | None = None,
) -> grain.DatasetIterator:
    """Returns an iterator that meets every image once, whole; rows carry no ground truth.

    Args:
      process: (index, count): this process meets every count-th batch, no other one does, and there may be
        one batch less or none for it.
      proposals: as of `training_batches`.
    """
    index, count = process
    canvases = [canvas_for(record.image_hw, image) for record in dataset.records]
    plans = plan_batches(canvases, np.arange(len(canvases)), batch_size)[index::count]

    def example(index: int) -> Example:
        record = dataset.records[index]
        stored = None if proposals is None else proposals[record.id]
        return Example(record_pixels(record), np.zeros((0, 4), np.float32), np.zeros(0, np.int32), None, stored)

    slots = _most(proposals)
    return _in_threads(plans, lambda plan: assemble(plan, image, example, max_boxes=0, max_proposals=slots), THREADS)


def _most(proposals: Mapping[str, ImageProposals] | None) -> int | None:
    """Returns how many proposals an image has at most; None: there are none stored."""
    return None if proposals is None else max(len(found.boxes) for found in proposals.values())


def _in_threads(source, load, threads: int) -> grain.DatasetIterator:
    # Fewer batches ahead than threads would leave some without work.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(BATCHES_AHEAD, threads))
    return iter(grain.MapDataset.source(source).map(load).to_iter_dataset(options))


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
    """Returns an image as it is trained on: mirrored, cropped and varied where `data` says so.

    Args:
      pixels: of the record, as stored.
      canvas: what it will be drawn onto.
      stream: (seed, epoch, index of the image), from which all that is random follows.
      proposals: of the record, as stored; they go where the picture goes.
    """
    boxes, labels, placement, augment = record.boxes, record.labels, None, data.augment
    drawn = data.flip == "random" and np.random.default_rng(stream).random() < 0.5
    if drawn or record.flipped:
        pixels, boxes = flip_pixels(pixels), flip_boxes(boxes, pixels.shape[1])
        if proposals is not None:
            proposals = proposals._replace(boxes=flip_boxes(proposals.boxes, pixels.shape[1]))
    # Not 0: a stream that ends in it is the same as without. One for each, so that none moves the others.
    cropping, placing, colouring = (np.random.default_rng((*stream, number)) for number in (1, 2, 3))
    if data.crop_aspect is not None:
        if proposals is not None:
            # The same draw as the picture's.
            rng = np.random.default_rng((*stream, 1))
            window = crop_window(pixels.shape[:2], boxes, aspect=data.crop_aspect, rng=rng)
            proposals = _staying(proposals, *crop_boxes(proposals.boxes, window))
        pixels, boxes, labels = crop(pixels, boxes, labels, aspect=data.crop_aspect, rng=cropping)
    if augment.short_sides or augment.scale_jitter is not None:
        placement = draw_placement(pixels.shape[:2], canvas, image, augment, placing)
    if augment.photometric:
        pixels = distort_colours(pixels, colouring)
    return Example(pixels, boxes, labels, placement, proposals)


def _staying(proposals: ImageProposals, boxes: Float[np.ndarray, "n 4"], stay: Bool[np.ndarray, "n"]) -> ImageProposals:
    return ImageProposals(boxes[stay], proposals.scores[stay])


def _training_hw(record: ImageRecord, data: DataConfig) -> tuple[int, int]:
    return record.image_hw if data.crop_aspect is None else cropped_hw(record.image_hw, data.crop_aspect)


def assemble(
    plan: BatchPlan,
    image: ImageConfig,
    example: Callable[[int], Example],
    *,
    max_boxes: int,
    max_proposals: int | None = None,
) -> Batch:
    """Returns the planned batch as NumPy arrays; rows that only fill it are zeros.

    Args:
      max_proposals: slots for stored proposals; None: the examples have none.
    """
    size = len(plan.image_index)
    batch = Batch(
        images=np.zeros((size, *plan.canvas, 3), image.pixel_dtype),
        image_hw=np.zeros((size, 2), np.float32),
        scale=np.ones((size, 2), np.float32),
        image_index=plan.image_index,
        image_valid=plan.image_valid,
        ground_truth=GroundTruth(
            np.zeros((size, max_boxes, 4), np.float32),
            np.zeros((size, max_boxes), np.int32),
            np.zeros((size, max_boxes), bool),
        ),
        proposals=None
        if max_proposals is None
        else Proposals(
            np.zeros((size, max_proposals, 4), np.float32),
            np.zeros((size, max_proposals), np.float32),
            np.zeros((size, max_proposals), bool),
        ),
    )
    for row in np.flatnonzero(plan.image_valid):
        pixels, boxes, labels, placement, proposals = example(int(plan.image_index[row]))
        if placement is None:
            placement = Placement(network_size(pixels.shape[:2], image))
            boxes = scale_boxes(boxes, placement.scale(pixels.shape[:2]))
            if proposals is not None:
                proposals = proposals._replace(boxes=scale_boxes(proposals.boxes, placement.scale(pixels.shape[:2])))
        else:
            boxes, stay = place_boxes(boxes, pixels.shape[:2], plan.canvas, placement)
            boxes, labels = boxes[stay], labels[stay]
            if proposals is not None:
                placed = place_boxes(proposals.boxes, pixels.shape[:2], plan.canvas, placement)
                proposals = _staying(proposals, *placed)
        draw(batch.images[row], pixels, image, placement)
        batch.image_hw[row], batch.scale[row] = (
            placement.shown(plan.canvas),
            placement.scale(pixels.shape[:2]),
        )
        batch.ground_truth.boxes[row, : len(boxes)] = boxes
        batch.ground_truth.labels[row, : len(boxes)] = labels
        batch.ground_truth.valid[row, : len(boxes)] = True
        if proposals is not None:
            count = len(proposals.boxes)
            batch.proposals.boxes[row, :count], batch.proposals.scores[row, :count] = proposals
            batch.proposals.valid[row, :count] = True
    return batch
