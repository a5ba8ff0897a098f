"""The kinds of images that `predict`, `preprocess` and `draw` take, and the messages about others."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from fasterrcnn_jax.data.records import Prediction
from fasterrcnn_jax.inference.drawing import draw
from fasterrcnn_jax.inference.given_images import list_images
from fasterrcnn_jax.inference.prediction import preprocess

RGB = np.random.default_rng(0).integers(0, 256, (48, 72, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = np.concatenate([RGB, RGB[..., :1]], axis=2)
GREY_RGB = np.stack([GREY] * 3, axis=2)


def pixels_of(images):
    return [image.pixels() for image in list_images(images)[0]]


def as_palette(pixels):
    return Image.fromarray(pixels).quantize(8)


@pytest.mark.parametrize(
    "given, expected",
    [
        (RGB, RGB),
        (GREY, GREY_RGB),
        (GREY[..., None], GREY_RGB),
        (ALPHA, RGB),
        (RGB / 255, RGB),
        ((RGB / 255).astype(np.float32), RGB),
        ((ALPHA / 255).astype(np.float16), RGB),
        (RGB / 255 + 1e-7, RGB),  # above 1 by rounding
        (GREY > 128, (GREY_RGB > 128) * np.uint8(255)),
        (jnp.asarray(RGB), RGB),
        (jnp.asarray(RGB > 128, jnp.bfloat16), (RGB > 128) * np.uint8(255)),
        (RGB[::-1, ::2], RGB[::-1, ::2]),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GREY), GREY_RGB),
        (Image.fromarray(ALPHA), RGB),
        (Image.fromarray(GREY > 128), (GREY_RGB > 128) * np.uint8(255)),
        (as_palette(RGB), np.asarray(as_palette(RGB).convert("RGB"))),
        (Image.fromarray((GREY / 255).astype(np.float32)), GREY_RGB),
    ],
)
def test_every_usual_kind_gives_rgb_bytes_to_all_three_functions(given, expected):
    (pixels,) = pixels_of(given)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)
    # A JAX array by itself stays on the device: tests/test_device_prediction.py.
    for one, other in zip(preprocess([given], tiny.IMAGE), preprocess(np.ascontiguousarray(expected), tiny.IMAGE)):
        np.testing.assert_array_equal(one, other)
    nothing = Prediction(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32), ())
    np.testing.assert_array_equal(draw(given, nothing), expected)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_path_is_read_upright_and_decoded_only_when_it_is_needed(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.png"
    Image.fromarray(RGB).save(path, exif=exif)
    ((image,), single) = list_images(kind(path))
    assert single and image.image_hw == (72, 48)
    np.testing.assert_array_equal(image.pixels(), np.rot90(RGB, -1))
    # Pillow's image keeps the orientation that its own pixels have.
    np.testing.assert_array_equal(pixels_of(Image.open(path))[0], RGB)
    path.unlink()
    with pytest.raises(ValueError, match="photo.png: no such image file"):
        image.pixels()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_batch_array_is_a_list_of_its_images(channels):
    batch = np.stack([ALPHA, ALPHA[::-1]])[..., :channels]
    listed, single = list_images(batch)
    assert not single
    for image, expected in zip(listed, batch, strict=True):
        np.testing.assert_array_equal(image.pixels(), pixels_of(expected)[0])


@pytest.mark.parametrize(
    "image, said",
    [
        (RGB.astype(np.int64), r"image 0 must have uint8, .* got int64; use image.astype\(np.uint8\)"),
        (GREY.astype(np.uint16), "got uint16; .* divide them by the value of white"),
        (Image.fromarray(GREY.astype(np.uint16)), "got uint16; .* divide them by the value of white"),
        (RGB.astype(np.complex64), "got complex64"),
        (RGB.astype(np.float32), "floating-point values from 0 to 255, which must lie in 0..1; divide .* by 255"),
        ((RGB - 128.0) / 64, "values from -2 to 1.98438, which must lie in 0..1; .* not normalised"),
        ([jnp.full((4, 4, 3), 2, jnp.bfloat16)], "values from 2 to 2"),
        (np.full((4, 4), 1e300), "values from 1e"),
        (np.full((4, 4), np.nan), "values from nan to nan"),
        (np.zeros((3, 8, 9), np.uint8), r"got uint8 \[3, 8, 9\]; move the channels to the end with image.transpose"),
        (np.zeros((2, 3, 8, 9), np.float32), r"image 0 .* got float32 \[3, 8, 9\]; move the channels"),
        (np.zeros((7, 8, 9), np.uint8), r"got uint8 \[7, 8, 9\]; use \[batch, height, width, 1\]"),
        (np.zeros((0, 9, 3), np.uint8), r"got uint8 \[0, 9, 3\]; give an image with at least one pixel"),
        (np.zeros((1, 1, 8, 9, 3), np.uint8), r"got uint8 \[1, 1, 8, 9, 3\]"),
        ([RGB, GREY[None, None]], "image 1 must have the shape"),
        ([RGB, [1, 2, 3]], "image 1 must be a path, a PIL image or an array, got list"),
        (None, "image 0 must be a path, a PIL image or an array, got NoneType"),
        ((image for image in [RGB]), "got generator; give several images as a list"),
        (b"\x89PNG", "got bytes"),
        ("photo.jpg", "photo.jpg: no such image file"),
        ("", "is a folder, not an image; give its files as a list of paths"),
    ],
)
def test_another_kind_is_refused_with_its_position_its_kind_and_a_remedy(image, said):
    # Without the tests' type checker, as users run it.
    with pytest.raises(ValueError, match=said):
        inspect.unwrap(preprocess)(image, tiny.IMAGE)
