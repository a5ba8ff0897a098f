"""Reads the images that callers of `predict`, `preprocess` and `draw` give, as uint8 [height, width, 3], RGB.

| given | rule |
|---|---|
| path, str | the file is decoded as in the data sets and turned as its EXIF data says |
| PIL image | as Pillow's `convert("RGB")`, alpha dropped; not turned, because its pixels are what the caller sees |
| array [h, w], [h, w, 1] | grey, repeated for all channels |
| array [h, w, 3] | RGB |
| array [h, w, 4] | RGB and alpha; alpha is dropped, as by Pillow's `convert("RGB")` |
| array [b, h, w, channels] | a batch of such arrays |

Arrays are NumPy's or have `__array__`. uint8 values are used as they are. Floating-point values must lie in
0..1 up to rounding, and are multiplied by 255. In a bool array, True is 255, as in Pillow. Other integers are refused:
nothing tells whether their white is 255, 4095 or 65535.

A JAX array by itself, traced or not, stays on the device (`device_images`). Its floating-point values are the values of
uint8, 0..255, so that the gradient is per grey level. In a list, JAX arrays are read as NumPy's.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Shaped, UInt8
from PIL import Image

from fasterrcnn_jax.data.images import image_size, read_image
from fasterrcnn_jax.errors import InputError

# Values that are rounded to 0 or 255 are in 0..1 up to rounding.
HALF_STEP = 0.5 / 255

Rgb = UInt8[np.ndarray, "h w 3"]


class GivenImage(NamedTuple):
    """One image of the caller. A file is decoded when `pixels` is called, because all files may not fit into memory."""

    image_hw: tuple[int, int]
    pixels: Callable[[], np.ndarray]  # returns uint8 [height, width, 3], RGB


def list_images(images: Any) -> tuple[list[GivenImage], bool]:
    """Returns the images of one image, a list or a batch array, and whether a single image was given.

    Raises:
      ValueError: as in `given_image`; names the position in the list.
    """
    is_list = isinstance(images, (list, tuple))
    is_batch = not is_list and getattr(images, "ndim", 0) == 4
    listed = list(np.asarray(images)) if is_batch else list(images) if is_list else [images]
    return [given_image(image, f"image {position}") for position, image in enumerate(listed)], not is_list | is_batch


def given_image(image: Any, name: str) -> GivenImage:
    """Returns one image of the caller.

    Args:
      name: what to call the image in messages.
    Raises:
      InputError: a file cannot be read as an image.
      ValueError: the image is of another kind, shape or type of values, or a value is out of range.
    """
    if isinstance(image, (str, Path)):
        path = Path(image)
        if path.is_dir():
            raise InputError(f"{path}: is a folder, not an image; give its files as a list of paths")
        return GivenImage(image_size(path, upright=True), functools.partial(read_image, path, upright=True))
    if isinstance(image, Image.Image):
        pixels = _of_pillow(image, name)
    elif hasattr(image, "__array__"):
        pixels = _rgb(_bytes(_shaped(np.asarray(image), name), name))
    else:
        raise ValueError(
            f"{name} must be a path, a PIL image or an array, got {type(image).__name__}; give several images as a list"
        )
    height, width, _ = pixels.shape
    return GivenImage((height, width), lambda: pixels)


def _of_pillow(image: Image.Image, name: str) -> Rgb:
    if image.mode.startswith(("I", "F")):  # integers and floating-point values, which Pillow would clip at 255
        return _rgb(_bytes(_shaped(np.asarray(image), name), name))
    if image.mode in ("P", "PA"):
        # Converted to RGBA first: a direct conversion warns if the palette has transparent entries.
        image = image.convert("RGBA")
    return _shaped(np.asarray(image.convert("RGB")), name)


def is_traced(value: Any) -> bool:
    """Returns whether a tree of values holds one that a transformation of JAX is tracing."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def device_images(
    images: Array, name: str = "the array"
) -> tuple[UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"], bool]:
    """Returns a JAX array of one image or of a batch as a batch of RGB, and whether it is a single image.

    Nothing is copied to the host, except to check floating-point values that are not traced.

    Args:
      images: [h, w], [h, w, channels] or [b, h, w, channels] with 1, 3 or 4 channels; uint8, bool, or floating-point
        values in 0..255, which become float32.
      name: what to call the array in messages.
    Raises:
      ValueError: the array has another shape or type, or floating-point values that are not traced and not in 0..255.
    """
    single = images.ndim != 4
    shape = jax.ShapeDtypeStruct(images.shape[0 if single else 1 :], images.dtype)
    channels = _channels(shape, name)
    pixels = images.reshape(-1, *shape.shape[:2], channels)
    if pixels.dtype == jnp.bool:
        pixels = jnp.where(pixels, jnp.uint8(255), jnp.uint8(0))
    elif pixels.dtype != jnp.uint8:
        _check_type(pixels.dtype, name)
        pixels = pixels.astype(jnp.float32)
        if pixels.size and not is_traced(pixels) and not bool(hold_grey_levels(pixels).all()):
            values = np.asarray(pixels)
            low, high = float(values.min()), float(values.max())
            raise ValueError(
                f"{name} has floating-point values from {low:g} to {high:g}; in a JAX array they must be those of "
                "uint8, in 0..255; multiply values of 0..1 by 255, and give pixels that are not normalised"
            )
    return jnp.repeat(pixels, 3, axis=3) if channels == 1 else pixels[..., :3], single


def hold_grey_levels(pixels: Float[Array, "b h w _"]) -> Bool[Array, "b"]:
    """Returns which images have values of 0..255: not of 0..1, not normalised, not NaN."""
    low, high = pixels.min(axis=(1, 2, 3)), pixels.max(axis=(1, 2, 3))
    in_range = (low >= -0.5) & (high <= 255.5) & ((high > 1.0 + HALF_STEP) | (high == 0.0))
    # On a CPU, the minimum passes over NaN.
    return in_range & ~jnp.isnan(pixels).any(axis=(1, 2, 3))


def _shaped(pixels: np.ndarray, name: str) -> Shaped[np.ndarray, "h w _"]:
    """Returns the array with an axis of channels."""
    _channels(pixels, name)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _channels(pixels: np.ndarray | jax.ShapeDtypeStruct, name: str) -> int:
    """Returns the number of channels of one image."""
    shape, got = pixels.shape, f"got {pixels.dtype} {list(pixels.shape)}"
    if pixels.ndim == 2 and pixels.size:
        return 1
    if pixels.ndim == 3 and shape[2] in (1, 3, 4) and pixels.size:
        return shape[2]
    remedy = "use [batch, height, width, 1] for a batch of grey images"
    if pixels.ndim == 3 and shape[0] in (1, 3, 4):
        remedy = "move the channels to the end with image.transpose(1, 2, 0)"
    if 0 in shape:
        remedy = "give an image with at least one pixel"
    raise ValueError(
        f"{name} must have the shape [height, width] or [height, width, channels] with 1, 3 or 4 channels, {got}; "
        f"{remedy}"
    )


def _bytes(pixels: Shaped[np.ndarray, "h w c"], name: str) -> UInt8[np.ndarray, "h w c"]:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels * np.uint8(255)
    _check_type(pixels.dtype, name)
    low, high = float(pixels.min()), float(pixels.max())
    if not (low > -HALF_STEP and high < 1 + HALF_STEP):  # also refuses NaN
        raise ValueError(
            f"{name} has floating-point values from {low:g} to {high:g}, which must lie in 0..1; divide values of "
            "0..255 by 255, and give pixels that are not normalised"
        )
    values = np.rint(pixels.astype(np.float32) * np.float32(255))
    return np.clip(values, 0, 255).astype(np.uint8)


def _check_type(dtype: np.dtype, name: str) -> None:
    # NumPy's own test does not know JAX's bfloat16.
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} must have uint8, bool or floating-point values, got {dtype}; use image.astype(np.uint8) "
            "if they lie in 0..255, otherwise divide them by the value of white to get values in 0..1"
        )


def _rgb(pixels: UInt8[np.ndarray, "h w _"]) -> Rgb:
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3]
