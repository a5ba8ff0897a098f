"""Runs a model on every image of a data set: detections, detections in given proposals, or proposals."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fasterrcnn_jax.data.loader import evaluation_batches
from fasterrcnn_jax.data.records import Dataset, ImageDetections, ImageProposals
from fasterrcnn_jax.inference.augmentation import View, merged, views
from fasterrcnn_jax.inference.prediction import jitted_detect, to_original
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.models.faster_rcnn import detect_in_proposals, find_proposals
from fasterrcnn_jax.printing import progress_bar
from fasterrcnn_jax.processes import gather_rows, process
from fasterrcnn_jax.structures import Batch, Detections

jitted_find_proposals = jax.jit(find_proposals, static_argnames="implementation")
jitted_detect_in_proposals = jax.jit(detect_in_proposals, static_argnames="implementation")


def detect_dataset(
    model: Detector, dataset: Dataset, *, batch_size: int, implementation: Implementation = None
) -> list[ImageDetections]:
    """Returns the detections of every image of a data set, in its order and in pixels of the original images.

    All processes must call this. Each process runs its share of the batches on one device, and all processes return
    the same list. `model.config.test_augment` applies.
    """

    def find(batch: Batch) -> Detections:
        return jitted_detect(model, batch.images, batch.image_hw, batch.scale, implementation=implementation)

    found = [
        _over_dataset(dataset, find, view, batch_size=batch_size, title=f"{dataset.name}{view.name}")
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
    best = {name: ImageProposals(boxes[:limit], scores[:limit]) for name, (boxes, scores) in proposals.items()}

    def find(batch: Batch) -> Detections:
        return jitted_detect_in_proposals(
            model, batch.images, batch.image_hw, batch.proposals, implementation=implementation
        )

    return _over_dataset(dataset, find, views(model.config)[0], batch_size=batch_size, proposals=best)


def propose_dataset(
    model: Detector, dataset: Dataset, *, batch_size: int, implementation: Implementation = None
) -> list[ImageProposals]:
    """Returns the proposals of every image of a data set, in its order and in pixels of the original images.

    All processes must call this, like `detect_dataset`.
    """

    def find(batch: Batch) -> Detections:
        found = jitted_find_proposals(model, batch.images, batch.image_hw, batch.scale, implementation=implementation)
        return Detections(found.boxes, found.scores, jnp.zeros_like(found.valid, jnp.int32), found.valid)

    title = f"proposals {dataset.name}"
    found = _over_dataset(dataset, find, views(model.config)[0], batch_size=batch_size, title=title)
    return [ImageProposals(image.boxes, image.scores) for image in found]


def _over_dataset(
    dataset: Dataset,
    find: Callable[[Batch], Detections],
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
    batches = evaluation_batches(
        dataset,
        view.image,
        batch_size=batch_size,
        process=(index, count),
        proposals=proposals,
        mirrored=view.flipped,
    )
    name = title or dataset.name
    with progress_bar(title=name, total=len(dataset.records) // count, unit="image", shown=index == 0) as bar:
        for batch in batches:
            found = jax.device_get(find(batch))
            for row in np.flatnonzero(batch.image_valid).tolist():
                position = int(batch.image_index[row])
                results[position] = to_original(found, row, batch.scale[row], dataset.records[position].image_hw)
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
