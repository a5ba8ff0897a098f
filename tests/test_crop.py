"""Tests crops of long images: every case of the reference, and properties of all crops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasterrcnn_jax.data.crop import crop_boxes, crop_pixels, crop_start, crop_window, cropped_hw
from fasterrcnn_jax.data.records import MIN_SIDE


def crop(pixels, boxes, labels, *, aspect, rng):
    """Returns the image, its boxes and their labels, cropped as in `training_example`."""
    window = crop_window(pixels.shape[:2], boxes, aspect=aspect, rng=rng)
    boxes, stay = crop_boxes(boxes, window)
    return crop_pixels(pixels, window), boxes[stay], labels[stay]


def starts(edges, length, kept, draws=400):
    """Returns the set of crop positions over many draws."""
    low, high = np.float32(edges).reshape(-1, 2).T
    rng = np.random.default_rng(0)
    return {crop_start(low, high, length, kept, rng) for _ in range(draws)}


@pytest.mark.parametrize(
    "image_hw, aspect, expected",
    [
        ((200, 100), 2.0, (200, 100)),  # at the limit
        ((201, 100), 2.0, (200, 100)),
        ((100, 201), 2.0, (100, 200)),
        ((500, 101), 1.5, (151, 101)),  # 151.5 rounded down
        ((300, 100), 1.0, (100, 100)),
        ((40, 6000), 2.0, (40, 80)),
        ((1, 9000), 2.0, (1, 2)),
        ((90, 160), 2.0, (90, 160)),
    ],
)
def test_size_after_cropping(image_hw, aspect, expected):
    assert cropped_hw(image_hw, aspect) == expected


@given(st.integers(1, 9000), st.integers(1, 9000), st.floats(1.0, 5.0))
def test_size_after_cropping_is_within_the_aspect_and_cuts_one_side(height, width, aspect):
    size = cropped_hw((height, width), aspect)
    assert max(size) <= aspect * min(size)
    assert min(size) == min(height, width) and size <= (height, width) and size[1] <= width
    # No more is cut than has to be.
    assert max(size) == max(height, width) or max(size) + 1 > aspect * min(size)


def test_boxes_from_the_first_pixel_keep_the_beginning():
    assert starts([(0, 10), (500, 520)], 600, 100) == {0}
    assert starts([(0.9, 10)], 600, 100) == {0}  # the reference drops the fraction
    assert 0 not in starts([(1, 600)], 600, 100)


def test_boxes_that_fit_are_all_kept_anywhere_they_do():
    # From the last box's end - 100 to the first box's start, that one left out.
    assert starts([(150, 170), (180, 220)], 600, 100) == set(range(120, 150))
    assert starts([(30, 60)], 600, 100) == set(range(0, 30))  # not before the image
    assert starts([(550, 590)], 600, 100) == set(range(490, 500))  # nor beyond it


def test_boxes_that_fit_in_one_place_only_are_kept_there():
    assert starts([(1, 50)], 101, 100) == {0}  # earliest 0, end 1
    assert starts([(20, 120)], 600, 100) == {20}
    assert starts([(540, 600)], 600, 100) == {500}  # earliest and end are the same


def test_fractions_of_pixels_stay_inside():
    assert starts([(20.5, 119.5)], 600, 100) == {20}
    assert starts([(20.5, 118.5)], 600, 100) == {19}


def test_boxes_that_do_not_fit_begin_at_the_first_and_end_before_half_of_the_rest():
    # 160 of which 100 are kept: half of 60 are the places.
    assert starts([(50, 80), (190, 210)], 600, 100) == set(range(50, 80))
    assert starts([(50, 80), (100, 151)], 600, 100) == {50}  # half of 1 is none
    assert starts([(50, 152)], 600, 100) == {50}


def test_image_without_boxes_is_cropped_anywhere():
    assert starts([], 120, 100) == set(range(21))


# Near corner and size, as parts in a thousand of the image and of what lies beyond the corner.
BOXES = st.lists(st.tuples(*[st.integers(0, 1000)] * 2, *[st.integers(1, 1000)] * 2), max_size=4)


@given(st.integers(4, 60), st.integers(4, 60), st.sampled_from([1.0, 1.3, 2.0]), BOXES, st.integers(0, 9))
def test_crop_is_a_part_of_the_image_and_boxes_stay_on_their_pixels(height, width, aspect, parts, seed):
    corner, beyond = np.split(np.array(parts).reshape(-1, 4) / 1000, 2, axis=1)
    boxes = np.concatenate([corner, corner + (1 - corner) * beyond], axis=1)
    boxes = (boxes * [width, height, width, height]).astype(np.float32)
    labels = np.arange(1, len(boxes) + 1, dtype=np.int32)
    # Every pixel says where it is from.
    pixels = np.stack([*np.mgrid[:height, :width], np.zeros((height, width))], axis=2).astype(np.uint8)
    cut, kept, kept_labels = crop(pixels, boxes, labels, aspect=aspect, rng=np.random.default_rng(seed))

    assert cut.shape[:2] == cropped_hw((height, width), aspect)
    y, x = cut[0, 0, :2].astype(int)
    np.testing.assert_array_equal(cut, pixels[y : y + cut.shape[0], x : x + cut.shape[1]])
    end = np.tile(np.float32(cut.shape[1::-1]), 2)
    assert (kept >= 0).all() and (kept <= end).all() and kept.dtype == np.float32
    inside = np.clip(boxes - np.float32([x, y, x, y]), 0, end)
    large = (inside[:, 2:] - inside[:, :2] >= MIN_SIDE).all(axis=1)
    np.testing.assert_array_equal(kept, inside[large])
    np.testing.assert_array_equal(kept_labels, labels[large])

    axis = int(height >= width)  # of the boxes' columns, x or y
    length = cut.shape[1 - axis]
    if len(boxes) and ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all():
        first, last = np.floor(boxes[:, axis].min()), np.ceil(boxes[:, axis + 2].max())
        if last - first <= length and (first > 0 or last <= length):
            np.testing.assert_allclose(kept + np.float32([x, y, x, y]), boxes, atol=1e-4)  # all, and whole
        if last - first <= length or first == 0 or len(boxes) == 1:
            assert len(kept) > 0


def test_nothing_is_drawn_for_an_image_that_is_not_cropped():
    rng = np.random.default_rng(0)
    pixels, boxes, labels = np.zeros((20, 40, 3), np.uint8), np.float32([[1, 1, 5, 5]]), np.int32([1])
    same, *_ = crop(pixels, boxes, labels, aspect=2.0, rng=rng)
    assert same.shape == pixels.shape
    assert rng.random() == np.random.default_rng(0).random()


def test_no_box_may_be_left_when_the_crop_falls_between_them():
    """As in the reference; the image then trains as background."""
    pixels, boxes = np.zeros((600, 50, 3), np.uint8), np.float32([[5, 10, 40, 15], [5, 500, 40, 505]])
    left = {
        len(crop(pixels, boxes, np.int32([1, 2]), aspect=2.0, rng=np.random.default_rng(seed))[1]) for seed in range(50)
    }
    assert left == {0, 1}
