"""Test-time augmentation: the versions of an image to detect in, and one list of detections from all of them.

The detections are merged as in detectron2's `GeneralizedRCNNWithTTA`: each version is detected in by itself, the boxes
are mapped back to the image, and NMS within each class runs over all of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fasterrcnn_jax.config import ImageConfig, ModelConfig
from fasterrcnn_jax.data.records import ImageDetections
from fasterrcnn_jax.data.transforms import flip_boxes
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.ops.suppression import nms

_jitted_nms = jax.jit(nms, static_argnames=("iou_threshold", "max_output", "implementation"))


class View(NamedTuple):
    """One version of every image."""

    image: ImageConfig  # its preprocessing
    flipped: bool  # mirrored left to right
    name: str  # for the progress bar; empty: the image as it is


def views(config: ModelConfig) -> tuple[View, ...]:
    """Returns the versions that `config.test_augment` asks for, the image as it is first."""
    augment = config.test_augment
    return tuple(
        View(config.image.scaled(scale), flipped, f" x {scale:g}" * (scale != 1.0) + " mirrored" * flipped)
        for scale in (1.0, *augment.scales)
        for flipped in ((False, True) if augment.flip else (False,))
    )


def merged(
    found: Sequence[ImageDetections], width: int, config: ModelConfig, *, implementation: Implementation = None
) -> ImageDetections:
    """Returns the best detections of one image after NMS within each class, best first, in pixels of the image.

    Args:
      found: detections in each of `views(config)`, in pixels of the original image or of its mirror image.
      width: width of the original image.
      implementation: implementation of NMS, as in `nms`.
    """
    of_views = views(config)
    if len(of_views) == 1:
        return found[0]
    limit = config.postprocess.max_detections
    parts = [
        of._replace(boxes=flip_boxes(of.boxes, width)) if view.flipped else of
        for view, of in zip(of_views, found, strict=True)
    ]
    room, threshold = len(of_views) * limit, config.postprocess.nms_threshold  # one program for all images
    return suppressed(concatenated(parts), room, limit, threshold, implementation=implementation)


def concatenated(parts: Sequence[ImageDetections]) -> ImageDetections:
    """Returns all detections of several lists as one list."""
    boxes, scores, labels = (np.concatenate(values) for values in zip(*parts, strict=True))
    return ImageDetections(boxes, scores, labels)


def suppressed(
    found: ImageDetections, room: int, limit: int, nms_threshold: float, *, implementation: Implementation = None
) -> ImageDetections:
    """Returns the `limit` best detections of one image after NMS within each class, best first.

    Args:
      room: number of detections that the compiled program takes, at least as many as there are.
      implementation: implementation of NMS, as in `nms`.
    """
    count = len(found.scores)
    boxes, scores = np.zeros((room, 4), np.float32), np.zeros(room, np.float32)
    labels = np.zeros(room, np.int32)
    boxes[:count], scores[:count], labels[:count] = found
    kept, is_kept = _jitted_nms(
        jnp.asarray(boxes),
        jnp.asarray(scores),
        jnp.arange(room) < count,
        iou_threshold=nms_threshold,
        max_output=limit,
        groups=jnp.asarray(labels),
        implementation=implementation,
    )
    kept = np.asarray(kept)[np.asarray(is_kept)]
    return ImageDetections(boxes[kept], scores[kept], labels[kept])
