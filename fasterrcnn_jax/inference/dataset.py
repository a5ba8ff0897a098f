"""Runs a model on every image of a data set: detections, detections in given proposals, or proposals.

All local devices take part, under the mapping of the training.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fasterrcnn_jax.data.loader import evaluation_batches
from fasterrcnn_jax.data.proposal_files import best_of_each
from fasterrcnn_jax.data.records import Dataset, ImageDetections, ImageProposals
from fasterrcnn_jax.inference.augmentation import View, merged, views
from fasterrcnn_jax.inference.prediction import to_original
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.models.faster_rcnn import detect, detect_in_proposals, find_proposals
from fasterrcnn_jax.printing import progress_bar
from fasterrcnn_jax.processes import Devices, gather_rows, over_devices, process, replicate
from fasterrcnn_jax.structures import Batch, Detections


@functools.cache
def on_devices(
    function: Callable[..., Any], implementation: Implementation, devices: tuple[Any, ...]
) -> Callable[[Detector, tuple], Any]:
    """Returns a function of (model, rows of the other arguments) that shares the rows among the devices.

    Cached, so that every evaluation of a process uses the same compiled programs.
    """
    mapped = over_devices(lambda model, rows: function(model, *rows, implementation=implementation), devices=devices)
    return lambda model, rows: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(mapped(model, rows)))


def detect_dataset(
    model: Detector, dataset: Dataset, *, batch_size: int, implementation: Implementation = None
) -> list[ImageDetections]:
    """Returns the detections of every image of a data set, in its order and in pixels of the original images.

    All processes must call this. Each process runs its share of the batches on all its devices, and all processes
    return the same list. `model.config.test_augment` applies.

    Args:
      batch_size: number of images that one device processes at once.
    """

    def find(model: Detector, batch: Batch, devices: Devices) -> Detections:
        found = on_devices(detect, implementation, tuple(devices))
        return found(model, (batch.images, batch.image_hw, batch.scale))

    found = [
        _over_dataset(model, dataset, find, view, batch_size=batch_size, title=f"{dataset.name}{view.name}")
        for view in views(model.config)
    ]
    return [
        merged(of_views, record.image_hw[1], model.config, implementation=implementation)
        for record, *of_views in zip(dataset.records, *found, strict=True)
    ]


def detect_dataset_in_proposals(
    model: Detector,
    dataset: Dataset,
    proposals: Mapping[str, ImageProposals],
    *,
    batch_size: int,
    implementation: Implementation = None,
) -> list[ImageDetections]:
    """Returns the detections of every image in the best of its stored proposals, as Fast R-CNN does.

    All processes must call this, like `detect_dataset`. The proposals belong to the image as it is:
    `model.config.test_augment` does not apply.

    Args:
      proposals: stored proposals by image id. For each image, the best `test_proposals.post_nms_top_n` are used.
    """
    limit = model.config.test_proposals.post_nms_top_n
    used = best_of_each(proposals, limit)

    def find(model: Detector, batch: Batch, devices: Devices) -> Detections:
        found = on_devices(detect_in_proposals, implementation, tuple(devices))
        return found(model, (batch.images, batch.image_hw, batch.proposals))

    view = views(model.config)[0]
    return _over_dataset(model, dataset, find, view, batch_size=batch_size, proposals=used)


def propose_dataset(
    model: Detector, dataset: Dataset, *, batch_size: int, implementation: Implementation = None
) -> list[ImageProposals]:
    """Returns the proposals of every image of a data set, in its order and in pixels of the original images.

    All processes must call this, like `detect_dataset`.
    """

    def find(model: Detector, batch: Batch, devices: Devices) -> Detections:
        found = on_devices(find_proposals, implementation, tuple(devices))
        proposals = found(model, (batch.images, batch.image_hw, batch.scale))
        labels: Any = np.zeros_like(proposals.valid, np.int32)
        return Detections(proposals.boxes, proposals.scores, labels, proposals.valid)

    title = f"proposals {dataset.name}"
    found = _over_dataset(model, dataset, find, views(model.config)[0], batch_size=batch_size, title=title)
    return [ImageProposals(image.boxes, image.scores) for image in found]


def _over_dataset(
    model: Detector,
    dataset: Dataset,
    find: Callable[[Detector, Batch, Devices], Detections],
    view: View,
    *,
    batch_size: int,
    proposals: Mapping[str, ImageProposals] | None = None,
    title: str | None = None,
) -> list[ImageDetections]:
    """Returns the results of `find` for every image, in the order of the data set and in pixels of the original images.

    Args:
      view: the version of each image.
      proposals: proposals by image id, to put into the batches.
      title: title of the progress bar; None: the name of the data set.
    """
    results = {}
    index, count = process()
    devices = jax.local_devices()
    batches = evaluation_batches(
        dataset,
        view.image,
        batch_size=batch_size * len(devices),
        process=(index, count),
        proposals=proposals,
        mirrored=view.flipped,
    )
    model = replicate(model, devices=devices)
    name = title or dataset.name
    with progress_bar(title=name, total=len(dataset.records) // count, unit="image", shown=index == 0) as bar:
        for batch in batches:
            found = find(model, batch, devices)
            for row in np.flatnonzero(batch.image_valid).tolist():
                position = int(batch.image_index[row])
                scale = np.asarray(batch.scale[row])
                results[position] = to_original(found, row, scale, dataset.records[position].image_hw)
            bar.update(int(batch.image_valid.sum()))
    return gathered(results)


def gathered(found: dict[int, ImageDetections]) -> list[ImageDetections]:
    """Returns the detections of all processes, in the order of the data set.

    Args:
      found: detections of this process, by position in the data set. Each position belongs to one process.
    """
    lengths = [(position, len(of.scores)) for position, of in found.items()]
    numbers = [np.column_stack((of.boxes, of.scores)) for of in found.values()]
    labels = [of.labels for of in found.values()]
    lengths = gather_rows(np.array(lengths, np.int32).reshape(-1, 2))
    numbers = gather_rows(np.concatenate([np.zeros((0, 5), np.float32), *numbers]))
    labels = gather_rows(np.concatenate([np.zeros(0, np.int32), *labels]))
    ends = np.cumsum(lengths[:, 1])
    images = zip(np.split(numbers, ends)[:-1], np.split(labels, ends)[:-1], strict=True)
    by_position = {
        int(position): ImageDetections(of[:, :4], of[:, 4], labels_of)
        for position, (of, labels_of) in zip(lengths[:, 0], images, strict=True)
    }
    return [by_position[position] for position in sorted(by_position)]
