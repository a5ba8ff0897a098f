"""Areas, intersections over union and clipping."""

import functools

import jax
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import arrays

from fasterrcnn_jax.data.records import box_iou
from fasterrcnn_jax.ops.boxes import area, clip, larger_than, min_side, pairwise_iou

iou = jax.jit(pairwise_iou)
jitted_clip = functools.partial(jax.jit, static_argnames="far_corner_offset")(clip)
jitted_area = jax.jit(area)
jitted_min_side = jax.jit(min_side)
jitted_larger_than = functools.partial(jax.jit, static_argnames="min_size")(larger_than)


def corners(n):
    """Returns boxes on half pixels; many of them touch, are equal or are empty."""
    points = arrays(np.int32, (n, 2, 2), elements=st.integers(-4, 24))
    return points.map(lambda p: (np.sort(p, axis=1) / 2).reshape(n, 4).astype(np.float32))


@given(corners(7), corners(5))
def test_iou_equals_the_loop_over_pairs(boxes, others):
    np.testing.assert_array_equal(iou(boxes, others), oracles.iou_matrix(boxes, others))


@given(corners(7), corners(5))
def test_iou_is_symmetric_and_between_0_and_1(boxes, others):
    found = np.asarray(iou(boxes, others))
    np.testing.assert_array_equal(found, np.asarray(iou(others, boxes)).T)
    assert (found >= 0).all() and (found <= 1).all()


@given(corners(7))
def test_iou_with_itself_is_1_unless_empty(boxes):
    np.testing.assert_array_equal(np.diag(iou(boxes, boxes)), (oracles.area(boxes) > 0))


@given(corners(7))
def test_iou_with_padding_is_0(boxes):
    boxes[::2] = 0.0
    found = np.asarray(iou(boxes, np.zeros((3, 4), np.float32)))
    np.testing.assert_array_equal(found, np.zeros((7, 3)))


@given(corners(7))
def test_area_and_min_side_equal_width_and_height(boxes):
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    np.testing.assert_array_equal(jitted_area(boxes), width * height)
    np.testing.assert_array_equal(jitted_min_side(boxes), np.minimum(width, height))


@pytest.mark.parametrize("offset", [0, 1])
@given(corners(7), st.integers(0, 10), st.integers(0, 10))
def test_clip_limits_x_by_the_width_and_y_by_the_height(offset, boxes, height, width):
    clipped = jitted_clip(boxes, np.array([height, width], np.float32), far_corner_offset=offset)
    expected = [oracles.clip(box, height, width, far_corner_offset=offset) for box in boxes]
    np.testing.assert_array_equal(clipped, expected)


def test_clip_with_an_offset_is_the_clip_of_inclusive_corners():
    """Inclusive corners are clipped to [0, side - 1]; a box beyond the image keeps at least one pixel."""
    inclusive = np.float32([[-5, -5, 2, 3], [-9, 30, -4, 40], [50, -7, 60, -1]])
    expected = np.clip(inclusive, 0, np.float32([19, 9, 19, 9]))
    far = np.float32([0, 0, 1, 1])
    clipped = jitted_clip(inclusive + far, np.float32([10, 20]), far_corner_offset=1)
    np.testing.assert_array_equal(clipped, expected + far)
    assert (oracles.area(np.asarray(clipped)) >= 1).all()


@given(corners(7))
def test_clip_does_not_change_boxes_inside_the_image(boxes):
    boxes = np.abs(boxes)
    np.testing.assert_array_equal(jitted_clip(boxes, np.array([12.0, 12.0], np.float32)), boxes)


@pytest.mark.parametrize("n, m", [(1, 1), (1, 3), (3, 1)])
def test_iou_of_single_boxes_keeps_its_shape(n, m):
    box = np.array([[0, 0, 2, 2]], np.float32)
    assert iou(box.repeat(n, 0), box.repeat(m, 0)).shape == (n, m)


@given(corners(7), st.sampled_from([0.0, 2.0, 3.5]), st.sampled_from([(1.0, 1.0), (2.0, 0.5), (0.5, 2.0)]))
def test_larger_than_measures_each_axis_in_the_original_image(boxes, min_size, scale):
    found = jitted_larger_than(boxes, min_size, np.float32(scale))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    expected = (width / scale[1] >= min_size) & (height / scale[0] >= min_size)
    np.testing.assert_array_equal(found, expected)


def test_the_iou_of_the_data_tools_is_the_same_in_float64():
    known = box_iou(np.array([[0.0, 0, 4, 4], [0, 0, 0, 0]]), np.array([[2.0, 0, 6, 4], [4, 0, 6, 4], [0, 0, 0, 0]]))
    np.testing.assert_allclose(known, [[8 / 24, 0, 0], [0, 0, 0]], rtol=1e-15)
    corners = np.random.default_rng(0).uniform(0, 100, (2, 50, 2, 2))
    boxes, others = np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=-1).astype(np.float32)
    found = box_iou(boxes, others)
    assert found.dtype == np.float64
    np.testing.assert_allclose(
        found, pairwise_iou(jax.numpy.asarray(boxes), jax.numpy.asarray(others)), rtol=1e-4, atol=1e-6
    )
