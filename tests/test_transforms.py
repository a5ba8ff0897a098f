"""Tests resizing onto a canvas: sizes, pixels against two references, boxes that stay on objects."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import rectangle_image

from fasterrcnn_jax.config import ImageConfig
from fasterrcnn_jax.data.transforms import (
    Placement,
    canvas_for,
    draw,
    flip_boxes,
    flip_pixels,
    network_size,
    resize_bilinear,
    scale_boxes,
    to_canvas,
)

PUBLISHED = ImageConfig()
SMALL = ImageConfig(short_side=64, long_side=96, canvases=((64, 96), (96, 64), (64, 64)))
PUBLISHED_SMALL = ImageConfig(short_side=64, long_side=96, canvases=((64, 96), (96, 64)))
SIDES = st.integers(1, 9000)


@pytest.mark.parametrize(
    "image_hw, expected",
    [
        ((375, 500), (600, 800)),  # short side to 600
        ((500, 375), (800, 600)),
        ((600, 600), (600, 600)),
        ((300, 600), (500, 1000)),  # the long side would be 1200
        ((600, 1000), (600, 1000)),
        ((40, 6000), (7, 1000)),
        ((6000, 40), (1000, 7)),
        ((1, 9000), (1, 1000)),  # never zero pixels
        ((1, 1), (600, 600)),
    ],
)
def test_network_size_brings_the_short_side_up_and_caps_the_long_one(image_hw, expected):
    assert network_size(image_hw, PUBLISHED) == expected


@given(SIDES, SIDES)
def test_network_size_reaches_one_bound_keeps_the_other_and_keeps_the_aspect(height, width):
    resized = network_size((height, width), PUBLISHED)
    assert min(resized) <= 600 and max(resized) <= 1000
    assert min(resized) == 600 or max(resized) == 1000
    scale = max(resized) / max(height, width)
    assert all(abs(new - max(1, old * scale)) <= 1 for new, old in zip(resized, (height, width)))


@given(SIDES, SIDES)
def test_canvas_holds_the_image_and_no_smaller_one_does(height, width):
    canvas = canvas_for((height, width), SMALL)
    resized = np.array(network_size((height, width), SMALL))
    assert (resized <= canvas).all()
    fitting = [h * w for h, w in SMALL.canvases if (resized <= (h, w)).all()]
    assert canvas[0] * canvas[1] == min(fitting)


def test_canvas_follows_the_orientation():
    assert [canvas_for(hw, SMALL) for hw in ((50, 90), (90, 50), (70, 70))] == [(64, 96), (96, 64), (64, 64)]


def test_canvases_of_equal_area_are_taken_in_the_order_given():
    square = (32, 32)
    for canvases in (((64, 96), (96, 64)), ((96, 64), (64, 96))):
        config = ImageConfig(short_side=64, long_side=96, canvases=canvases)
        assert canvas_for(square, config) == canvases[0]


def bilinear_oracle(image, size):
    """Resizes pixel by pixel in float64, with half-pixel centres and repeated borders."""
    height, width = image.shape[:2]
    result = np.zeros((*size, 3))
    for row in range(size[0]):
        for column in range(size[1]):
            y = min(max((row + 0.5) * height / size[0] - 0.5, 0), height - 1)
            x = min(max((column + 0.5) * width / size[1] - 0.5, 0), width - 1)
            for dy in (0, 1):
                for dx in (0, 1):
                    at = min(int(y) + dy, height - 1), min(int(x) + dx, width - 1)
                    weight = abs(1 - dy - (y - int(y))) * abs(1 - dx - (x - int(x)))
                    result[row, column] += weight * image[at]
    return result


SIZES = [((7, 9), (7, 9)), ((5, 8), (13, 11)), ((17, 23), (6, 7)), ((1, 6), (4, 3)), ((12, 5), (3, 20))]


@pytest.mark.parametrize("before, after", SIZES)
def test_resize_matches_a_loop_over_pixels(before, after):
    image = np.random.default_rng(0).integers(0, 256, (*before, 3), dtype=np.uint8)
    resized = resize_bilinear(image, after)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, bilinear_oracle(image, after), atol=1e-3)


@pytest.mark.parametrize("before, after", SIZES)
def test_resize_matches_jax_without_antialias(before, after):
    image = np.random.default_rng(1).integers(0, 256, (*before, 3), dtype=np.uint8)
    expected = jax.image.resize(jnp.float32(image), (*after, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(resize_bilinear(image, after), expected, atol=1e-3)


def plain_resize(image, size):
    """Resizes the whole image one axis after the other; published results use exactly this arithmetic."""
    for axis in (0, 1):
        length = image.shape[axis]
        points = (np.arange(size[axis], dtype=np.float32) + 0.5) * (length / size[axis]) - 0.5
        points = np.clip(points, 0.0, length - 1.0)
        low = points.astype(np.int64)
        high = np.minimum(low + 1, length - 1)
        weight = (points - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        image = np.take(image, low, axis) * (1.0 - weight) + np.take(image, high, axis) * weight
    return image.astype(np.float32)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 90), st.integers(1, 90), st.integers(0, 99))
def test_resize_has_the_bits_of_the_plain_formula(height, width, new_height, new_width, seed):
    """Also if several blocks of rows are needed and the last block is not full."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = new_height, new_width
    np.testing.assert_array_equal(resize_bilinear(image, size), plain_resize(image, size))


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 99))
def test_the_canvas_has_the_bits_of_resizing_then_normalising(order, height, width, seed):
    config = dataclasses.replace(PUBLISHED_SMALL, channel_order=order, std=(58.395, 57.12, 57.375))
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = network_size((height, width), config)
    channels = image if order == "rgb" else image[..., ::-1]
    expected = (plain_resize(channels, size) - np.float32(config.mean)) / np.float32(config.std)
    pixels, _, _ = to_canvas(image, canvas_for((height, width), config), config)
    np.testing.assert_array_equal(pixels[: size[0], : size[1]], expected)


@given(st.integers(5, 90), st.integers(5, 90), st.integers(5, 150), st.integers(5, 150), st.integers(0, 99))
def test_a_part_of_an_image_has_the_bits_of_the_whole(height, width, new_height, new_width, seed):
    """The placement crops the image: only pixels on the canvas are computed, and they are the same."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    canvas = (64, 96)
    origin = tuple(int(rng.integers(max(side - limit, 0) + 1)) for side, limit in zip((new_height, new_width), canvas))
    placement = Placement((new_height, new_width), origin)
    rows, columns = placement.shown(canvas)
    pixels = np.zeros((*canvas, 3), np.float32)
    draw(pixels, image, dataclasses.replace(SMALL, channel_order="rgb", mean=(0.0, 0.0, 0.0)), placement)
    whole = resize_bilinear(image, placement.size)
    part = whole[origin[0] : origin[0] + rows, origin[1] : origin[1] + columns]
    np.testing.assert_array_equal(pixels[:rows, :columns], part)
    assert part.shape == (rows, columns, 3) and not pixels[rows:].any() and not pixels[:, columns:].any()


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_rounded_to_bytes_the_image_is_the_nearest_grey_level_of_the_same_resize(order):
    image = np.random.default_rng(0).integers(0, 256, (70, 83, 3), dtype=np.uint8)
    config = dataclasses.replace(SMALL, channel_order=order, pixel_dtype="uint8")
    pixels, image_hw, scale = to_canvas(image, (64, 96), config)
    rows, columns = (int(side) for side in image_hw)
    channels = image if order == "rgb" else image[..., ::-1]
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels[:rows, :columns], np.rint(plain_resize(channels, (rows, columns))))
    assert not pixels[rows:].any() and not pixels[:, columns:].any()


def test_a_mirrored_image_is_a_reversed_copy():
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(flip_pixels(image), image[:, ::-1])
    assert flip_pixels(image).flags.c_contiguous


def test_resize_of_a_long_image_stays_exact():
    """The float32 sample points of a side of 6000 pixels are exact to a thousandth of a pixel."""
    ramp = np.repeat((np.arange(6000) % 256).astype(np.uint8)[None, :, None], 3, axis=2)
    resized = resize_bilinear(ramp, (1, 1000))
    points = (np.arange(1000) + 0.5) * 6 - 0.5
    expected = np.interp(points, np.arange(6000), ramp[0, :, 0].astype(np.float64))
    assert np.abs(resized[0, :, 0] - expected).max() < 0.26  # 255 grey levels at the wrap, 1e-3 px


@pytest.mark.parametrize("order, expected", [("rgb", [50, 25, 20]), ("bgr", [60, 25, 16])])
def test_the_image_is_normalised_in_its_channel_order_and_the_rest_of_the_canvas_is_zero(order, expected):
    config = ImageConfig(
        short_side=64,
        long_side=96,
        canvases=SMALL.canvases,
        channel_order=order,
        mean=(10.0, 20.0, 30.0),
        std=(2.0, 4.0, 5.0),
    )
    # Red, green and blue as decoded.
    image = np.full((32, 40, 3), (110, 120, 130), np.uint8)
    pixels, image_hw, scale = to_canvas(image, (64, 96), config)
    assert pixels.dtype == image_hw.dtype == scale.dtype == np.float32
    assert image_hw.tolist() == [64, 80] and scale.tolist() == [2, 2]
    np.testing.assert_allclose(pixels[:64, :80], np.broadcast_to(expected, (64, 80, 3)), rtol=1e-6)
    assert not pixels[:, 80:].any()


@given(st.integers(20, 200), st.integers(20, 200))
def test_scale_carries_each_axis_onto_the_network_size(height, width):
    """The two axes are rounded separately; a box over the whole image becomes a box over the whole network image."""
    image = np.zeros((height, width, 3), np.uint8)
    _, image_hw, scale = to_canvas(image, canvas_for((height, width), SMALL), SMALL)
    assert tuple(image_hw) == network_size((height, width), SMALL)
    whole = scale_boxes(np.float32([[0, 0, width, height]]), scale)
    np.testing.assert_allclose(whole, [[0, 0, image_hw[1], image_hw[0]]], rtol=1e-6)


def extent(bright):
    """Returns xyxy of a rectangle with subpixel precision from a map of its coverage 0..1."""
    rows, columns = bright.max(axis=1), bright.max(axis=0)
    first = [np.flatnonzero(line > 0.5)[0] for line in (columns, rows)]
    last = [np.flatnonzero(line > 0.5)[-1] + 1 for line in (columns, rows)]
    return np.array([*first, *last], np.float32)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("image_hw", [(32, 48), (48, 32), (150, 200), (77, 131)])
def test_boxes_stay_on_their_object_through_flip_and_resize(image_hw, flip):
    height, width = image_hw
    box = [width // 8, height // 4, width // 2, height - height // 8]
    pixels, boxes = rectangle_image(image_hw, box, colour=(255, 255, 255)), np.float32([box])
    if flip:
        pixels, boxes = pixels[:, ::-1], flip_boxes(boxes, width)
        np.testing.assert_array_equal(extent(pixels[..., 0] > 200), boxes[0])
    canvas, _, scale = to_canvas(pixels, canvas_for(image_hw, SMALL), SMALL)
    grey = canvas[..., 0] * SMALL.std[0] + SMALL.mean[0]
    found = extent(np.where(canvas[..., 0] == 0, 0, grey) / 255 > 0.62)
    # Half a pixel of rounding to whole pixels, and the blur of the border.
    np.testing.assert_allclose(found, scale_boxes(boxes, scale)[0], atol=1.01)


BOX = st.tuples(*[st.integers(0, 1000)] * 4)


@given(st.lists(BOX, max_size=5), st.integers(1, 1000))
def test_flipping_twice_changes_nothing(corners, width):
    boxes = np.array(corners, np.float32).reshape(-1, 4)
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    flipped = flip_boxes(boxes, width)
    assert (flipped[:, 2] >= flipped[:, 0]).all()
    np.testing.assert_array_equal(flip_boxes(flipped, width), boxes)
    np.testing.assert_array_equal(flipped[:, [1, 3]], boxes[:, [1, 3]])


@pytest.mark.parametrize("rounding, size", [("nearest", (75, 101)), ("down", (75, 100))])
def test_sides_are_rounded_as_configured(rounding, size):
    """40 x 53.8 of 100: 53.8 * 1.875 = 100.9."""
    config = ImageConfig(short_side=75, long_side=112, canvases=((80, 112), (112, 80)), size_rounding=rounding)
    assert network_size((400, 538), config) == size
