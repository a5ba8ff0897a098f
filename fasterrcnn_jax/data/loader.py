"""From records to batches: planned, decoded and resized in threads, ahead of the device.

Grain runs the threads and keeps the position: `iterator.get_state()` after a step and `set_state` in a
new process give the same next batch.
"""

from collections.abc import Callable
from functools import lru_cache

import grain
import numpy as np

from fasterrcnn_jax.config import DataConfig, ImageConfig
from fasterrcnn_jax.data.crop import crop, cropped_hw
from fasterrcnn_jax.data.images import read_image
from fasterrcnn_jax.data.plan import BatchPlan, plan_batches, plan_epoch
from fasterrcnn_jax.data.records import Dataset, ImageRecord
from fasterrcnn_jax.data.transforms import canvas_for, flip_boxes, scale_boxes, to_canvas
from fasterrcnn_jax.structures import Batch, GroundTruth

THREADS = 2
BATCHES_AHEAD = 8

# Pixels, boxes and labels of an image, before the resize.
Example = tuple[np.ndarray, np.ndarray, np.ndarray]


class TrainingSource:
    """The plan of a whole run as a random-access source: element i is (epoch, batch plan) of step i."""

    def __init__(
        self, dataset: Dataset, data: DataConfig, image: ImageConfig, *, batch_size: int, seed: int, steps: int
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
    dataset: Dataset, data: DataConfig, image: ImageConfig, *, batch_size: int, seed: int, steps: int
) -> grain.DatasetIterator:
    """Returns an iterator over the `steps` batches of a run.

    Args:
      dataset: prepared by `training_set`: every object in it is trained on.
    """
    source = TrainingSource(dataset, data, image, batch_size=batch_size, seed=seed, steps=steps)

    def load(element: tuple[int, BatchPlan]) -> Batch:
        epoch, plan = element

        def example(index: int) -> Example:
            return training_example(dataset.records[index], data, stream=(seed, epoch, index))

        return assemble(plan, image, example, max_boxes=data.max_boxes)

    return _in_threads(source, load)


def evaluation_batches(dataset: Dataset, image: ImageConfig, *, batch_size: int) -> grain.DatasetIterator:
    """Returns an iterator that meets every image once, whole; rows carry no ground truth."""
    canvases = [canvas_for(record.image_hw, image) for record in dataset.records]
    plans = plan_batches(canvases, np.arange(len(canvases)), batch_size)

    def example(index: int) -> Example:
        return read_image(dataset.records[index].path), np.zeros((0, 4), np.float32), np.zeros(0, np.int32)

    return _in_threads(plans, lambda plan: assemble(plan, image, example, max_boxes=0))


def _in_threads(source, load) -> grain.DatasetIterator:
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    return iter(grain.MapDataset.source(source).map(load).to_iter_dataset(options))


def training_example(record: ImageRecord, data: DataConfig, *, stream: tuple[int, int, int]) -> Example:
    """Returns an image as it is trained on: mirrored and cropped where `data` says so.

    Args:
      stream: (seed, epoch, index of the image), from which all that is random follows.
    """
    pixels, boxes, labels = read_image(record.path), record.boxes, record.labels
    drawn = data.flip == "random" and np.random.default_rng(stream).random() < 0.5
    if drawn or record.flipped:
        pixels, boxes = pixels[:, ::-1], flip_boxes(boxes, pixels.shape[1])
    if data.crop_aspect is not None:
        # Not 0: a stream that ends in it is the same as without.
        rng = np.random.default_rng((*stream, 1))
        pixels, boxes, labels = crop(pixels, boxes, labels, aspect=data.crop_aspect, rng=rng)
    return pixels, boxes, labels


def _training_hw(record: ImageRecord, data: DataConfig) -> tuple[int, int]:
    return record.image_hw if data.crop_aspect is None else cropped_hw(record.image_hw, data.crop_aspect)


def assemble(
    plan: BatchPlan, image: ImageConfig, example: Callable[[int], Example], *, max_boxes: int
) -> Batch:
    """Returns the planned batch as NumPy arrays; rows that only fill it are zeros."""
    size = len(plan.image_index)
    batch = Batch(
        images=np.zeros((size, *plan.canvas, 3), np.float32),
        image_hw=np.zeros((size, 2), np.float32),
        scale=np.ones((size, 2), np.float32),
        image_index=plan.image_index,
        image_valid=plan.image_valid,
        ground_truth=GroundTruth(
            np.zeros((size, max_boxes, 4), np.float32),
            np.zeros((size, max_boxes), np.int32),
            np.zeros((size, max_boxes), bool),
        ),
    )
    for row in np.flatnonzero(plan.image_valid):
        pixels, boxes, labels = example(int(plan.image_index[row]))
        batch.images[row], batch.image_hw[row], batch.scale[row] = to_canvas(pixels, plan.canvas, image)
        batch.ground_truth.boxes[row, : len(boxes)] = scale_boxes(boxes, batch.scale[row])
        batch.ground_truth.labels[row, : len(boxes)] = labels
        batch.ground_truth.valid[row, : len(boxes)] = True
    return batch
