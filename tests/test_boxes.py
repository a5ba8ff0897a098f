"""Areas, intersections over union and clipping."""

from pathlib import Path

import jax
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import arrays

from fasterrcnn_jax.boxes import area, clip, min_side, pairwise_iou

GOLDEN = np.load(Path(__file__).parent / "golden" / "geometry.npz")

iou = jax.jit(pairwise_iou)
jitted_clip = jax.jit(clip)
jitted_area = jax.jit(area)
jitted_min_side = jax.jit(min_side)


def corners(n):
    """Boxes on half pixels, many of them touching, equal or empty."""
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


def test_iou_equals_torchvision():
    expected = np.nan_to_num(GOLDEN["iou"])  # 0 / 0 is NaN there and 0 here
    np.testing.assert_allclose(iou(GOLDEN["iou_boxes"], GOLDEN["iou_others"]), expected, rtol=1e-6)


@given(corners(7))
def test_area_and_min_side_equal_width_and_height(boxes):
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    np.testing.assert_array_equal(jitted_area(boxes), width * height)
    np.testing.assert_array_equal(jitted_min_side(boxes), np.minimum(width, height))


@given(corners(7), st.integers(0, 10), st.integers(0, 10))
def test_clip_limits_x_by_the_width_and_y_by_the_height(boxes, height, width):
    clipped = jitted_clip(boxes, np.array([height, width], np.float32))
    np.testing.assert_array_equal(clipped, [oracles.clip(box, height, width) for box in boxes])


@given(corners(7))
def test_clip_leaves_boxes_inside_alone(boxes):
    boxes = np.abs(boxes)
    np.testing.assert_array_equal(jitted_clip(boxes, np.array([12.0, 12.0], np.float32)), boxes)


@pytest.mark.parametrize("n, m", [(1, 1), (1, 3), (3, 1)])
def test_iou_of_single_boxes_keeps_its_shape(n, m):
    box = np.array([[0, 0, 2, 2]], np.float32)
    assert iou(box.repeat(n, 0), box.repeat(m, 0)).shape == (n, m)
