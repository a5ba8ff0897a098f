"""Detection in images of any size: `predict` prepares the images on the host and runs `detect` on the device.

With a JAX array, traced or not, all of it runs on the device, as one program.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped, UInt8

from fasterrcnn_jax.config import ImageConfig
from fasterrcnn_jax.config.checks import fitted
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
from fasterrcnn_jax.inference.given_images import (
    GivenImage,
    device_images,
    hold_grey_levels,
    is_traced,
    list_images,
)
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector, with_image_config
from fasterrcnn_jax.models.faster_rcnn import detect
from fasterrcnn_jax.ops.resizing import resized_onto_canvas
from fasterrcnn_jax.structures import Detections

jitted_detect = jax.jit(detect, static_argnames="implementation")

# The arguments images, image_hw and scale of `detect`, on the host.
OnCanvas = tuple[
    Float[np.ndarray, "b H W 3"] | UInt8[np.ndarray, "b H W 3"],
    Float[np.ndarray, "b 2"],
    Float[np.ndarray, "b 2"],
]
# The same on the device.
OnDeviceCanvas = tuple[
    Float[Array, "b H W 3"] | UInt8[Array, "b H W 3"],
    Float[Array, "b 2"],
    Float[Array, "b 2"],
]


def predict(
    model: Detector,
    images: Any,
    *,
    batch_size: int = 1,
    score_threshold: float | Shaped[Array, ""] = 0.0,
    implementation: Implementation = None,
) -> Prediction | list[Prediction] | Detections:
    """Returns the detections in one image, in a list of images of any sizes and kinds, or in a batch array.

    Images are grouped by canvas, and every group is split into batches of exactly `batch_size`. The detections in an
    image therefore do not depend on the other images. `model.config.test_augment` applies, but not to a JAX array.

    A JAX array stays on the device: resize, detection and boxes in pixels of the original image are one program, and
    the result is `Detections` in fixed shapes with a validity mask. It works under `jax.jit`, `jax.vmap`, `jax.pmap`
    and `lax.map`, and under `jax.grad` with respect to an image of floating-point values. Forward-mode derivatives
    (`jax.jvp`) stop with an error: the region features have a rule for reverse mode only. Each array shape is one
    compilation; for many sizes use `preprocess(size=...)`, or give NumPy arrays. A JAX array gets one pass, so a model
    whose `test_augment` asks for more is refused.

    Args:
      images: a path, which is turned as its EXIF data says; a PIL image; or a NumPy or JAX array: grey [height, width]
        or [height, width, 1], RGB [..., 3], or RGB with alpha [..., 4], which is dropped. Values are uint8 or bool, or
        floating-point: in 0..1, but in a JAX array in 0..255, the values of uint8. Or a list of them, or a batch array
        [batch, height, width, channels].
      batch_size: number of images that run at once; static under `jax.jit`.
      score_threshold: detections with a lower score are left out. `model.config.postprocess.score_threshold` applies
        before it. It may be traced, and its range is then not checked.
      implementation: implementation of NMS and region features, as in `detect`; static under `jax.jit`.
    Returns:
      For a JAX array, or where the model or `score_threshold` is traced: `Detections` in pixels of the original
      image, with a batch axis for a batch. If traced floating-point values are not in 0..255, or if all are in 0..1,
      no detection is valid and the scores are NaN. Otherwise one `Prediction` for one image, and a list of them for
      several.
    Raises:
      InputError: a file cannot be read as an image.
      TypeError: a forward-mode derivative is asked for.
      ValueError: an image is of another kind, `batch_size` or `score_threshold` is out of range, a list of images is
        traced, or `test_augment` asks for several passes over a JAX array.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if not is_traced(score_threshold) and not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must lie in 0..1, got {score_threshold}")
    if isinstance(images, jax.Array) or is_traced((model, images, score_threshold)):
        if len(views(model.config)) > 1:
            raise ValueError(
                f"predict of a JAX array is one pass; model.test_augment asks for {len(views(model.config))}: give "
                "NumPy arrays, or set model.test_augment to its defaults"
            )
        pixels, single = device_images(_traceable(images))
        found = _predicted(model, pixels, score_threshold, batch_size=batch_size, implementation=implementation)
        return jax.tree.map(lambda leaf: leaf[0], found) if single else found
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


def _traceable(images: Any) -> Array:
    """Returns a JAX array for images inside a traced function."""
    if isinstance(images, jax.Array):
        return images
    if not hasattr(images, "__array__"):
        kind = "a list of images" if isinstance(images, list | tuple) else f"an image of type {type(images).__name__}"
        raise ValueError(
            f"predict cannot trace {kind}, because a program has fixed shapes; give one array [batch, height, width, "
            "channels], or put images of several sizes into one and call detect with fasterrcnn_jax.preprocess(array, "
            "model.config.image, size=sizes)"
        )
    return _host_array(images)


def _host_array(images: Any) -> UInt8[Array, "*b h w 3"]:
    """Returns an array that is not JAX's on the device. Its values are known and read by the rules of the host."""
    listed, single = list_images(images)
    if single:
        return jnp.asarray(listed[0].pixels())
    if not listed:
        return jnp.zeros((0, *images.shape[1:3], 3), jnp.uint8)
    return jnp.asarray(np.stack([image.pixels() for image in listed]))


def _predicted(
    model: Detector,
    pixels: Array,
    score_threshold: float | Shaped[Array, ""],
    *,
    batch_size: int,
    implementation: Implementation,
) -> Detections:
    threshold = jnp.asarray(score_threshold, jnp.float32)
    try:
        return _jitted_prediction(model, pixels, threshold, batch_size=batch_size, implementation=implementation)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "predict and detect have no forward-mode derivative (jax.jvp, jax.jacfwd), because the region features "
            "have a rule for reverse mode only; use jax.grad, jax.vjp or jax.jacrev"
        ) from error


@functools.partial(jax.jit, static_argnames=("batch_size", "implementation"))
def _jitted_prediction(
    model: Detector,
    pixels: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"],
    score_threshold: Float[Array, ""],
    *,
    batch_size: int,
    implementation: Implementation,
) -> Detections:
    """Returns the detections in a batch in pixels of the original images; runs `batch_size` images at once."""
    count, height, width, _ = pixels.shape
    config, rounded = model.config.image, False
    canvas = canvas_for((height, width), config)
    if config.pixel_dtype == "uint8" and pixels.dtype != jnp.uint8:
        # The gradient ends at bytes. The same rounded values, normalised here, have one.
        rounded, config = True, dataclasses.replace(config, pixel_dtype="float32")
        model = with_image_config(model, config)

    def in_batch(rows: tuple[Array, Array]) -> Detections:
        found = detect_on_canvas(model, *rows, canvas, rounded=rounded, implementation=implementation)
        return found._replace(valid=found.valid & (found.scores >= score_threshold))

    # Empty images fill the last batch.
    size = np.zeros((count + -count % batch_size, 2), np.int32)
    size[:count] = height, width
    rows = jnp.pad(pixels, ((0, len(size) - count), (0, 0), (0, 0), (0, 0))), jnp.asarray(size)
    if len(size) == batch_size:
        found = in_batch(rows)
    else:
        batches = jax.tree.map(lambda leaf: leaf.reshape(-1, batch_size, *leaf.shape[1:]), rows)
        found = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), lax.map(in_batch, batches))
    found = jax.tree.map(lambda leaf: leaf[:count], found)
    valid, scores = found.valid, found.scores
    if pixels.dtype != jnp.uint8 and pixels.size:
        usual = hold_grey_levels(pixels)[:, None]
        valid, scores = valid & usual, jnp.where(usual, scores, jnp.nan)
    return blanked(found._replace(scores=scores, valid=valid))


def detect_on_canvas(
    model: Detector,
    pixels: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"],
    size: Int[Array, "b 2"],
    canvas: tuple[int, int],
    *,
    rounded: bool = False,
    implementation: Implementation = None,
) -> Detections:
    """Returns the detections of a batch in pixels of the original images, in one pass and without a call to the host.

    Args:
      pixels: RGB, values in 0..255; each image is in the upper left corner, and the rest is never read.
      size: (height, width) of each image; may be traced.
      canvas: (height, width) that each image is resized onto.
      rounded: as in `resized_onto_canvas`.
    """
    draw = functools.partial(resized_onto_canvas, config=model.config.image, canvas=canvas, rounded=rounded)
    images, image_hw, scale = jax.vmap(draw)(pixels, size)
    found = detect(model, images, image_hw, scale, implementation=implementation)
    boxes = found.boxes * jnp.tile(1.0 / scale[:, None, ::-1], 2)
    return found._replace(boxes=jnp.clip(boxes, 0.0, jnp.tile(size[:, None, ::-1].astype(jnp.float32), 2)))


def blanked(found: Detections) -> Detections:
    """Returns the detections with zeros where they are not valid. Scores that are NaN, for refused images, stay."""
    valid, scores = found.valid, found.scores
    return Detections(
        jnp.where(valid[..., None], found.boxes, 0.0),
        jnp.where(valid | jnp.isnan(scores), scores, 0.0),
        jnp.where(valid, found.labels, 0),
        valid,
    )


def preprocess(
    images: Any,
    config: ImageConfig,
    *,
    size: Int[Array, "*b 2"] | Int[np.ndarray, "*b 2"] | Sequence[Any] | None = None,
    canvas: Sequence[int] | None = None,
) -> OnCanvas | OnDeviceCanvas:
    """Returns the arguments (images, image_hw, scale) of `detect`, with all images on canvases of one size.

    Divide boxes by `scale` (y, x) to get pixels of the original image. A JAX array stays on the device, and the
    function can be traced; the resize has the formulas of the host and is differentiable.

    Args:
      images: as in `predict`, at least one image; a single image gives a batch of one. The values of a NumPy array have
        the same rules with `size` or `canvas` as without.
      config: the model's `model.config.image`.
      size: (height, width) of each image, whole numbers of shape [2] or [batch, 2], which may be traced. `images` is
        then one array, each image lies in its upper left corner, and the rest is never read. None: the whole array. An
        image of size zero gives an empty canvas.
      canvas: (height, width) of the result, one of `config.canvases`, where `images` is an array. An image that would
        not fit on it becomes as large as fits. None: the smallest canvas that holds the whole array after the resize.
    Raises:
      ValueError: there is no image, an image is of another kind, no single canvas is large enough for all images, or
        `size` or `canvas` is of another shape, of another type or out of range.
    """
    if isinstance(images, jax.Array) or size is not None or canvas is not None:
        return _on_device_canvas(images, config, size, canvas)
    listed, _ = list_images(images)
    if not listed:
        raise ValueError("preprocess needs at least one image")
    needed = [network_size(image.image_hw, config) for image in listed]
    height, width = (max(size[axis] for size in needed) for axis in (0, 1))
    return _on_canvas(listed, smallest_canvas((height, width), config), len(listed), config)


def _on_device_canvas(images: Any, config: ImageConfig, size: Any, canvas: Sequence[int] | None) -> OnDeviceCanvas:
    if not hasattr(images, "__array__"):
        raise ValueError(f"images must be one array where size or canvas is given, got {type(images).__name__}")
    pixels, single = device_images(images if isinstance(images, jax.Array) else _host_array(images))
    count, height, width, _ = pixels.shape
    canvases = fitted(config.canvases, "model.image.canvases")
    wanted = canvas_for((height, width), config) if canvas is None else tuple(canvas)
    chosen = next((one for one in canvases if one == wanted), None)
    if chosen is None:
        raise ValueError(f"canvas must be one of model.image.canvases = {canvases}, got {wanted}")
    if size is None:
        size = np.full((count, 2), (height, width), np.int32)
    size = jnp.asarray(size) if is_traced(size) else np.asarray(size)
    if size.shape not in ((2,) if single else (count, 2), (count, 2)) or not jnp.issubdtype(size.dtype, jnp.integer):
        raise ValueError(
            f"size must be (height, width) of each image, whole numbers [{count}, 2], got {size.dtype} "
            f"{list(size.shape)}"
        )
    if not is_traced(size) and ((size < 0).any() or (size > (height, width)).any()):
        raise ValueError(f"size must lie within the array, {height} x {width} pixels, got {size.tolist()}")
    draw = functools.partial(resized_onto_canvas, config=config, canvas=chosen)
    return jax.vmap(draw)(pixels, jnp.asarray(size, jnp.int32).reshape(count, 2))


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
