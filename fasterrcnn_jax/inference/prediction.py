"""Detection in images of any size: `predict` prepares the images on the host and runs `detect` on the device."""

from collections import defaultdict
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from fasterrcnn_jax.config import ImageConfig
from fasterrcnn_jax.data.records import ImageDetections, Prediction
from fasterrcnn_jax.data.transforms import (
    canvas_for,
    flip_pixels,
    network_size,
    scale_boxes,
    smallest_canvas,
    to_canvas,
)
from fasterrcnn_jax.inference.augmentation import View, merged, views
from fasterrcnn_jax.inference.given_images import GivenImage, list_images
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.models.faster_rcnn import detect
from fasterrcnn_jax.structures import Detections

jitted_detect = jax.jit(detect, static_argnames="implementation")

# The arguments images, image_hw and scale of `detect`, on the host.
OnCanvas = tuple[
    Float[np.ndarray, "b H W 3"] | UInt8[np.ndarray, "b H W 3"],
    Float[np.ndarray, "b 2"],
    Float[np.ndarray, "b 2"],
]


def predict(
    model: Detector,
    images: Any,
    *,
    batch_size: int = 1,
    score_threshold: float = 0.0,
    implementation: Implementation = None,
) -> Prediction | list[Prediction]:
    """Returns the detections in one image, in a list of images of any sizes and kinds, or in a batch array.

    Images are grouped by canvas, and every group is split into batches of exactly `batch_size`. The detections in an
    image therefore do not depend on the other images. `model.config.test_augment` applies.

    Args:
      images: a path, which is turned as its EXIF data says; a PIL image; or a NumPy or JAX array: grey [height, width]
        or [height, width, 1], RGB [..., 3], or RGB with alpha [..., 4], which is dropped. Values are uint8, or
        floating-point in 0..1, or bool. Or a list of them, or a batch array [batch, height, width, channels].
      score_threshold: detections with a lower score are left out. `model.config.postprocess.score_threshold` applies
        before it.
      implementation: implementation of NMS and region features, as in `detect`.
    Returns:
      One `Prediction` for one image, otherwise a list of them.
    Raises:
      InputError: a file cannot be read as an image.
      ValueError: an image is of another kind, or `batch_size` or `score_threshold` is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must lie in 0..1, got {score_threshold}")
    listed, single = list_images(images)
    found = [_detected(model, listed, view, batch_size, implementation) for view in views(model.config)]
    predictions = []
    for image, *of_views in zip(listed, *found, strict=True):
        best = merged(of_views, image.image_hw[1], model.config, implementation=implementation)
        kept = best.scores >= score_threshold
        boxes, scores, labels = (values[kept] for values in best)
        names = tuple(model.class_names[label - 1] for label in labels)
        predictions.append(Prediction(boxes, scores, labels, names))
    return predictions[0] if single else predictions


def _detected(
    model: Detector, listed: list[GivenImage], view: View, batch_size: int, implementation: Implementation
) -> list[ImageDetections]:
    """Returns the detections in one version of each image, in pixels of the original image or its mirror image."""
    by_position: dict[int, ImageDetections] = {}
    groups = defaultdict(list)
    for position, image in enumerate(listed):
        groups[canvas_for(image.image_hw, view.image)].append(position)
    for canvas, positions in groups.items():
        for start in range(0, len(positions), batch_size):
            chosen = positions[start : start + batch_size]
            images = [listed[position] for position in chosen]
            pixels, image_hw, scale = _on_canvas(images, canvas, batch_size, view.image, flipped=view.flipped)
            found = jax.device_get(jitted_detect(model, pixels, image_hw, scale, implementation=implementation))
            for row, position in enumerate(chosen):
                by_position[position] = to_original(found, row, scale[row], listed[position].image_hw)
    return [by_position[position] for position in range(len(listed))]


def preprocess(images: Any, config: ImageConfig) -> OnCanvas:
    """Returns the arguments (images, image_hw, scale) of `detect`, with all images on canvases of one size.

    Divide boxes by `scale` (y, x) to get pixels of the original image.

    Args:
      images: as in `predict`, at least one image; a single image gives a batch of one.
      config: the model's `model.config.image`.
    Raises:
      ValueError: there is no image, an image is of another kind, or no single canvas is large enough for all images.
    """
    listed, _ = list_images(images)
    if not listed:
        raise ValueError("preprocess needs at least one image")
    needed = [network_size(image.image_hw, config) for image in listed]
    height, width = (max(size[axis] for size in needed) for axis in (0, 1))
    return _on_canvas(listed, smallest_canvas((height, width), config), len(listed), config)


def _on_canvas(
    images: list[GivenImage], canvas: tuple[int, int], rows: int, config: ImageConfig, *, flipped: bool = False
) -> OnCanvas:
    """Returns (pixels, image_hw, scale) of the images; any further rows are empty images of size zero."""
    pixels = np.zeros((rows, *canvas, 3), config.pixel_dtype)
    image_hw = np.zeros((rows, 2), np.float32)
    scale = np.ones((rows, 2), np.float32)
    for row, image in enumerate(images):
        given = flip_pixels(image.pixels()) if flipped else image.pixels()
        pixels[row], image_hw[row], scale[row] = to_canvas(given, canvas, config)
    return pixels, image_hw, scale


def to_original(
    found: Detections, row: int, scale: Float[np.ndarray, "2"], original_hw: tuple[int, int]
) -> ImageDetections:
    """Returns the valid detections of one image, in pixels of the original image."""
    valid = np.asarray(found.valid[row])
    boxes = scale_boxes(np.asarray(found.boxes[row])[valid], 1.0 / np.asarray(scale, np.float32))
    height, width = original_hw
    boxes = np.clip(boxes, 0.0, np.asarray([width, height, width, height], np.float32))
    return ImageDetections(boxes, np.asarray(found.scores[row])[valid], np.asarray(found.labels[row])[valid])
