"""Detection in images of any size, with boxes in pixels of the original image, and drawing of boxes."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

import fasterrcnn_jax
from fasterrcnn_jax.data.records import Prediction
from fasterrcnn_jax.inference.dataset import detect_dataset
from fasterrcnn_jax.inference.drawing import (
    draw,
    draw_boxes,
    label_colour,
    side_by_side,
)
from fasterrcnn_jax.inference.prediction import (
    jitted_detect,
    predict,
    preprocess,
    to_original,
)
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.models.faster_rcnn import detect
from fasterrcnn_jax.structures import Detections

SIZES = [(64, 96), (50, 90), (96, 64), (60, 60), (40, 44), (128, 190)]


@pytest.fixture(scope="module", autouse=True)
def environment():
    with tiny.quick_compilation():
        yield


@pytest.fixture(scope="module")
def model(random_weights):
    # No minimum size: it counts in pixels of the original image, so an enlarged image would have more proposals.
    proposals = dataclasses.replace(tiny.MODEL.test_proposals, min_size=0.0)
    config = dataclasses.replace(tiny.MODEL, test_proposals=proposals)
    return random_weights(lambda: Detector(config, tiny.CLASS_NAMES, rng=np.random.default_rng(0)), seed=1)


def sample_images():
    return [
        tiny.rectangle_image((height, width), (5, 6, width // 2, height // 2), seed=index)
        for index, (height, width) in enumerate(SIZES)
    ]


@pytest.fixture(scope="module")
def alone(model):
    """Returns the predictions of each image alone, in a batch of two with one empty row."""
    return [predict(model, image, batch_size=2) for image in sample_images()]


def assert_same(found, expected):
    for field, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(field, other)


def test_a_prediction_is_in_the_pixels_of_its_image_best_first(alone):
    for found, (height, width) in zip(alone, SIZES):
        count = len(found.scores)
        assert count > 0 and found.boxes.shape == (count, 4) and found.labels.shape == (count,)
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 0::2] <= width).all() and (found.boxes[:, 1::2] <= height).all()
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
        assert (np.diff(found.scores) <= 0).all() and (found.scores > 0).all() and (found.scores <= 1).all()
        assert found.class_names == tuple(tiny.CLASS_NAMES[label - 1] for label in found.labels)
    widest = max(found.boxes[:, 2].max() for found in alone)
    assert widest > 96  # a box of the image that was shrunk


def test_predictions_do_not_depend_on_the_other_images(model, alone):
    together = predict(model, sample_images(), batch_size=2)
    backwards = predict(model, sample_images()[::-1], batch_size=2)[::-1]
    for found, other, expected in zip(together, backwards, alone, strict=True):
        assert_same(found, expected)
        assert_same(other, expected)


def test_one_image_a_list_and_a_batch_array_agree(model, alone):
    image = sample_images()[0]
    assert isinstance(predict(model, image, batch_size=2), Prediction)
    (listed,) = predict(model, [image], batch_size=2)
    stacked = predict(model, np.stack([image, image[::-1], image]), batch_size=2)
    assert len(stacked) == 3
    for found in (listed, stacked[0], stacked[2]):
        assert_same(found, alone[0])
    assert np.any(stacked[1].scores != alone[0].scores)


def test_no_images_give_an_empty_list(model):
    assert predict(model, []) == []
    assert predict(model, np.zeros((0, 20, 30, 3), np.uint8)) == []


def test_predict_does_not_change_its_images(model):
    images = sample_images()[:2]
    copies = [image.copy() for image in images]
    for image in images:
        image.setflags(write=False)
    predict(model, images, batch_size=2)
    for image, copy in zip(images, copies):
        np.testing.assert_array_equal(image, copy)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(model, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be positive, got {batch_size}"):
        predict(model, sample_images()[:1], batch_size=batch_size)


def test_detections_below_the_score_threshold_are_left_out(model, alone):
    everything = alone[0]
    threshold = float(everything.scores[1])
    found = predict(model, sample_images()[0], batch_size=2, score_threshold=threshold)
    assert 2 <= len(found.scores) < len(everything.scores) and len(found.class_names) == len(found.scores)
    assert_same(found[:3], [values[: len(found.scores)] for values in everything[:3]])
    with pytest.raises(ValueError, match="score_threshold must lie in 0..1, got 50"):
        predict(model, [], score_threshold=50)


def test_kinds_of_images_may_be_mixed_in_one_list(model, alone, tmp_path):
    pixels = sample_images()
    Image.fromarray(pixels[0]).save(tmp_path / "first.png")
    mixed = [tmp_path / "first.png", Image.fromarray(pixels[1]), jnp.asarray(pixels[2]), pixels[3] / 255]
    for found, expected in zip(predict(model, mixed, batch_size=2), alone, strict=False):
        assert_same(found, expected)
    assert_same(predict(model, str(tmp_path / "first.png"), batch_size=2), alone[0])


def test_boxes_of_an_enlarged_image_are_enlarged(model):
    """Columns and rows are repeated, so the resized images are nearly the same; the boxes double."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[:] = np.linspace(40, 200, 96, dtype=np.uint8)[None, :, None]
    small = predict(model, image, batch_size=2)
    large = predict(model, image.repeat(2, axis=0).repeat(2, axis=1), batch_size=2)
    assert len(small.scores) == len(large.scores) > 0
    np.testing.assert_array_equal(large.labels, small.labels)
    np.testing.assert_allclose(large.scores, small.scores, atol=0.01)
    np.testing.assert_allclose(large.boxes, 2 * small.boxes, atol=1.0)


def test_boxes_are_divided_by_both_scales_and_clipped_to_the_image():
    boxes = jnp.float32([[[10, 20, 30, 40], [0, 0, 64.2, 96], [1, 1, 2, 2]]])
    found = Detections(boxes, jnp.float32([[0.9, 0.8, 0.7]]), jnp.int32([[2, 1, 0]]), jnp.array([[True, True, False]]))
    original = to_original(found, 0, np.float32([4.0, 2.0]), (24, 32))
    np.testing.assert_array_equal(original.boxes, [[5, 5, 15, 10], [0, 0, 32, 24]])
    assert original.labels.tolist() == [2, 1]


def test_one_program_serves_all_images_of_a_canvas(model, alone, caplog):
    jitted_detect.clear_cache()
    with caplog.at_level(logging.INFO, logger="fasterrcnn_jax"):
        for number in (1, 5):
            for image in sample_images()[:number]:
                jax.eval_shape(jitted_detect, model, *preprocess([image], tiny.IMAGE))
    assert len([line for line in caplog.messages if "compiling detection" in line]) == 2


def test_preprocess_takes_the_smallest_canvas_that_holds_all():
    def canvas(*sizes):
        return preprocess([np.zeros((*size, 3), np.uint8) for size in sizes], tiny.IMAGE)[0].shape

    assert canvas((64, 96)) == (1, 64, 96, 3)
    assert canvas((96, 64), (90, 50)) == (2, 96, 64, 3)
    # A square image fits both canvases, but the portrait in the same batch fits only one.
    assert canvas((64, 64), (96, 64)) == (2, 96, 64, 3)
    with pytest.raises(ValueError, match="no canvas of .* 96 x 96"):
        canvas((64, 96), (96, 64))


@pytest.mark.parametrize("images", [np.zeros((5, 6, 3), np.int32), [np.zeros((5, 6, 2), np.uint8)], []])
def test_preprocess_refuses_invalid_images_and_an_empty_list(images):
    with pytest.raises(ValueError, match="image"):
        fasterrcnn_jax.preprocess(images, tiny.IMAGE)


def test_preprocess_makes_a_batch_of_one_from_a_single_image():
    image = sample_images()[0]
    for one, other in zip(
        fasterrcnn_jax.preprocess(image, tiny.IMAGE), fasterrcnn_jax.preprocess([image], tiny.IMAGE), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_detect_runs_inside_a_users_own_jit(model, alone):
    """The model is an argument, so one program serves any weights; weights as constants would be in its text."""

    @jax.jit
    def best_score(model, images, image_hw, scale):
        found = fasterrcnn_jax.detect(model, images, image_hw, scale)
        return jnp.where(found.valid, found.scores, 0.0).max(axis=1), found

    images, image_hw, scale = fasterrcnn_jax.preprocess(sample_images()[:2], tiny.IMAGE)
    best, found = best_score(model, images, image_hw, scale)
    for row, expected in enumerate(alone[:2]):
        original = to_original(found, row, scale[row], SIZES[row])
        assert len(original.scores) == len(expected.scores)
        np.testing.assert_allclose(original.boxes, expected.boxes, atol=1e-2)
        np.testing.assert_allclose(best[row], expected.scores[0], rtol=1e-4)
    text = best_score.lower(model, images, image_hw, scale).as_text()
    assert len(text) < 4 * 10**6 and len(jax.tree.leaves(model)) < text.count("%arg")


def test_detect_under_vmap_equals_detect_row_by_row(model):
    inputs = fasterrcnn_jax.preprocess(sample_images()[:2], tiny.IMAGE)
    together = jax.jit(jax.vmap(detect, in_axes=(None, 0, 0, 0)))(model, *(leaf[:, None] for leaf in inputs))
    alone = jax.jit(detect)(model, *inputs)
    assert together.valid.any()
    np.testing.assert_array_equal(together.valid[:, 0], alone.valid)
    np.testing.assert_array_equal(together.labels[:, 0], alone.labels)
    np.testing.assert_allclose(together.boxes[:, 0], alone.boxes, atol=1e-2)


def test_detections_of_a_data_set_are_in_its_order_and_equal_those_of_predict(model, alone, tmp_path):
    images = [(pixels, [(5, 6, 20, 20)], [1]) for pixels in sample_images()]
    dataset = tiny.dataset(tmp_path / "images", images)
    found = detect_dataset(model, dataset, batch_size=2)
    assert len(found) == len(SIZES)
    # To rounding, with the tolerances of test_evaluation_devices.py: the program is mapped over several devices.
    for detections, expected in zip(found, alone, strict=True):
        np.testing.assert_array_equal(detections.labels, expected.labels)
        np.testing.assert_allclose(detections.scores, expected.scores, atol=1e-4)
        np.testing.assert_allclose(detections.boxes, expected.boxes, atol=1e-2)


def found_at(*boxes, scores=None, labels=None):
    count = len(boxes)
    return Prediction(
        np.float32(boxes).reshape(-1, 4),
        np.float32(scores or [0.9] * count),
        np.int32(labels or [1] * count),
        ("ring",) * count,
    )


def test_draw_returns_a_new_image_and_does_not_change_its_argument():
    image = tiny.rectangle_image((60, 90), (0, 0, 5, 5))
    before = image.copy()
    image.setflags(write=False)
    drawn = draw(image, found_at((10, 12, 50, 44)))
    np.testing.assert_array_equal(image, before)
    assert drawn.dtype == np.uint8 and drawn.shape == image.shape and np.any(drawn != image)
    drawn[0, 0] = 0  # the caller may write to it


def test_a_box_is_drawn_on_its_own_outermost_pixels_and_nowhere_else():
    image = np.zeros((60, 90, 3), np.uint8)
    x1, y1, x2, y2 = 10, 12, 50, 44
    drawn = draw_boxes(image, np.float32([(x1, y1, x2, y2)]), np.int32([2]), [""])
    border = np.zeros((60, 90), bool)
    border[y1:y2, x1:x2] = True
    border[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] = False
    assert (drawn[border] == label_colour(2)).all()
    # The caption is empty here, but its background colours the upper left corner of the box.
    changed = drawn.any(axis=2) & ~border
    rows, columns = np.nonzero(changed)
    assert changed.sum() < 60 and rows.max(initial=0) < y1 + 14 and columns.max(initial=0) < x1 + 5


@pytest.mark.parametrize(
    "box, rows",
    [
        ((10, 25, 80, 50), (5, 25)),  # above
        ((60, 25, 88, 50), (5, 26)),  # above, moved left to stay in the image
        ((10, 2, 80, 50), (0, 22)),  # no room above: inside
    ],
)
def test_a_caption_is_above_its_box_if_there_is_room(box, rows):
    image = np.zeros((60, 90, 3), np.uint8)
    plain = draw_boxes(image, np.float32([box]), np.int32([1]), [""])
    drawn = draw(image, found_at(box))
    changed_rows, columns = np.nonzero((drawn != plain).any(axis=2))
    assert len(columns) > 200 and np.ptp(columns) > 30  # the whole caption is visible
    assert rows[0] <= changed_rows.min() and changed_rows.max() < rows[1]


def test_detections_below_the_threshold_are_not_drawn():
    image = np.zeros((60, 90, 3), np.uint8)
    found = found_at((10, 12, 50, 44), (5, 5, 20, 20), scores=[0.5, 0.49])
    only = found_at((10, 12, 50, 44), scores=[0.5])
    np.testing.assert_array_equal(draw(image, found), draw(image, only))
    assert draw(image, only).any()  # a score equal to the threshold is drawn
    assert not draw(image, found, score_threshold=0.95).any()
    assert np.any(draw(image, found, score_threshold=0.1) != draw(image, only))
    np.testing.assert_array_equal(draw(image, found_at()), image)


@pytest.mark.parametrize("box", [(0, 0, 90, 60), (89.5, 59.2, 90, 60), (3.2, 4.7, 3.3, 4.8), (0, 0, 0, 0)])
def test_boxes_at_the_border_and_of_size_zero_are_drawn_without_error(box):
    image = np.zeros((60, 90, 3), np.uint8)
    assert draw(image, found_at(box)).shape == image.shape


def test_neighbouring_labels_have_different_bright_colours():
    colours = np.array([label_colour(label) for label in range(1, 21)], int)
    assert colours.min() >= 80 and colours.max(axis=1).min() == 255
    assert np.abs(np.diff(colours, axis=0)).max(axis=1).min() > 60


def test_images_of_a_row_are_side_by_side_on_white():
    left, right = np.full((4, 6, 3), 10, np.uint8), np.full((5, 3, 3), 20, np.uint8)
    sheet = side_by_side([(left, right), (right, left)])
    assert sheet.shape == (5 + 5 + 3 * 8, 2 * 6 + 3 * 8, 3)
    assert (sheet == 10).sum() == 2 * left.size and (sheet == 20).sum() == 2 * right.size
    assert ((sheet == 10) | (sheet == 20) | (sheet == 255)).all()
    assert (sheet[8:12, 8:14] == 10).all() and (sheet[8:13, 22:25] == 20).all()


def test_draw_refuses_a_list_and_an_invalid_image():
    image = np.zeros((8, 9, 3), np.uint8)
    with pytest.raises(ValueError, match="one Prediction, got list"):
        fasterrcnn_jax.draw(image, [found_at((1, 1, 4, 4))])
    with pytest.raises(ValueError, match="the image must have uint8, bool or floating-point values, got int32"):
        fasterrcnn_jax.draw(image.astype(np.int32), found_at((1, 1, 4, 4)))
