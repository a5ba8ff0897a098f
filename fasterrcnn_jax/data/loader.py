"""From records to batches: planned, decoded and resized in threads, ahead of the device.

Grain runs the threads and keeps the position: `iterator.get_state()` after a step and `set_state` in a
new process give the same next batch.
"""

from functools import lru_cache

import grain
import numpy as np

from fasterrcnn_jax.config import DataConfig, ImageConfig
from fasterrcnn_jax.data.images import read_image
from fasterrcnn_jax.data.plan import BatchPlan, plan_batches, plan_epoch
from fasterrcnn_jax.data.records import Dataset, ImageRecord
from fasterrcnn_jax.data.transforms import canvas_for, flip_boxes, scale_boxes, to_canvas
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.structures import Batch, GroundTruth

THREADS = 2
BATCHES_AHEAD = 8


class TrainingSource:
    """The plan of a whole run as a random-access source: element i is (epoch, batch plan) of step i."""

    def __init__(self, dataset: Dataset, image: ImageConfig, *, batch_size: int, seed: int, steps: int):
        canvases = [canvas_for(record.image_hw, image) for record in dataset.records]
        self._epoch = lru_cache(2)(
            lambda epoch: plan_epoch(canvases, batch_size, seed=seed, epoch=epoch)
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

    Raises:
      InputError: no image has an object to train on, or one has more than `data.max_boxes`.
    """
    usable = [int((~record.difficult).sum()) for record in dataset.records]
    if not any(usable):
        raise InputError(f"{dataset.name}: no image has an object to train on")
    fullest = int(np.argmax(usable))
    if usable[fullest] > data.max_boxes:
        raise InputError(
            f"{dataset.name}: image {dataset.records[fullest].id} has {usable[fullest]} objects, "
            f"data.max_boxes is {data.max_boxes}"
        )
    source = TrainingSource(dataset, image, batch_size=batch_size, seed=seed, steps=steps)

    def load(element: tuple[int, BatchPlan]) -> Batch:
        epoch, plan = element
        flips = [
            data.random_flip and np.random.default_rng((seed, epoch, int(index))).random() < 0.5
            for index in plan.image_index
        ]
        return assemble(dataset, plan, image, max_boxes=data.max_boxes, flips=flips)

    return _in_threads(source, load)


def evaluation_batches(dataset: Dataset, image: ImageConfig, *, batch_size: int) -> grain.DatasetIterator:
    """Returns an iterator that meets every image once; rows carry no ground truth."""
    canvases = [canvas_for(record.image_hw, image) for record in dataset.records]
    plans = plan_batches(canvases, np.arange(len(canvases)), batch_size)
    return _in_threads(plans, lambda plan: assemble(dataset, plan, image, max_boxes=0))


def _in_threads(source, load) -> grain.DatasetIterator:
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    return iter(grain.MapDataset.source(source).map(load).to_iter_dataset(options))


def assemble(
    dataset: Dataset,
    plan: BatchPlan,
    image: ImageConfig,
    *,
    max_boxes: int,
    flips: list[bool] | None = None,
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
        record = dataset.records[plan.image_index[row]]
        pixels = read_image(record.path)
        boxes = record.boxes
        if flips is not None and flips[row]:
            pixels, boxes = pixels[:, ::-1], flip_boxes(boxes, pixels.shape[1])
        batch.images[row], batch.image_hw[row], batch.scale[row] = to_canvas(pixels, plan.canvas, image)
        if max_boxes:
            _write_ground_truth(batch.ground_truth, row, record, scale_boxes(boxes, batch.scale[row]))
    return batch


def _write_ground_truth(ground_truth: GroundTruth, row, record: ImageRecord, boxes: np.ndarray) -> None:
    # Difficult objects are not trained on: py-faster-rcnn's and the paper's line.
    boxes, labels = boxes[~record.difficult], record.labels[~record.difficult]
    ground_truth.boxes[row, : len(boxes)] = boxes
    ground_truth.labels[row, : len(boxes)] = labels
    ground_truth.valid[row, : len(boxes)] = True
