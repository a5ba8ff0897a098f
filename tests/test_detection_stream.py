"""Detection in a stream of images, and in windows of large images."""

import dataclasses
import weakref

import jax
import numpy as np
import oracles
import pytest
import tiny

from fasterrcnn_jax.data.records import ImageDetections
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference import tiling
from fasterrcnn_jax.inference.prediction import predict, to_original
from fasterrcnn_jax.inference.stream import ModelRunner, Unreadable, detect_stream
from fasterrcnn_jax.inference.tiling import joined, windows_of
from fasterrcnn_jax.structures import Detections


@pytest.fixture(scope="module")
def model(random_weights):
    return tiny.quick_model(random_weights)[0]


class Watched(ModelRunner):
    """Counts batches. `find` stands for the network: from a canvas to boxes and scores in its pixels."""

    def __init__(self, model, *, batch_size=1, find=None):
        super().__init__(model, batch_size=batch_size)
        self.batches, self.find = [], find or (lambda canvas: (np.zeros((0, 4), np.float32), np.zeros(0, np.float32)))

    def detect(self, parts):
        assert len({part.canvas for part in parts}) == 1 and len(parts) <= self.rows
        self.batches.append(len(parts))
        results = []
        for part in parts:
            boxes, scores = self.find(part.arrays[0])
            labels = np.ones((1, len(scores)), np.int32)
            found = Detections(boxes[None], scores[None], labels, labels > 0)
            results.append(to_original(found, 0, part.arrays[2], part.original_hw))
        return results


def photo(image_hw, seed):
    return np.random.default_rng(seed).integers(0, 255, (*image_hw, 3), dtype=np.uint8)


def same(found, expected):
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-4)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_images_of_any_sizes_get_the_detections_of_predict_in_their_order_on_all_devices(model):
    """An image that cannot be read takes its place and stops nothing."""
    images = [photo(((48, 72), (40, 70), (60, 64))[number % 3], number) for number in range(10)]

    def pixels(number):
        if number == 4:
            raise InputError("image 4 is damaged")
        return images[number]

    with tiny.quick_compilation():
        runner = ModelRunner(model, batch_size=2)
        assert runner.rows == 2 * jax.local_device_count() and jax.local_device_count() > 1
        found = list(detect_stream(range(10), pixels, runner))
        expected = [predict(model, image, batch_size=2) for image in images]
    assert [one.item for one in found] == list(range(10))
    for number, (one, of) in enumerate(zip(found, expected, strict=True)):
        if number == 4:
            assert isinstance(one, Unreadable) and "damaged" in str(one.error)
        else:
            assert one.image_hw == images[number].shape[:2] and len(of.scores)
            same(one.detections, of)


def test_a_batch_is_full_where_it_can_be_and_no_image_waits_for_ever(model):
    """The results of many upright images must not wait for a second wide one."""
    shapes = [(48, 72)] + [(72, 48)] * 60
    runner = Watched(model)
    read = []

    def images():
        for number in range(len(shapes)):
            read.append(number)
            yield number

    stream = detect_stream(images(), lambda number: photo(shapes[number], number), runner, threads=2)
    first = next(stream)
    assert first.item == 0 and len(read) < 40
    assert [first.item, *(one.item for one in stream)] == list(range(61))
    assert sorted(runner.batches) == [1] + [runner.rows] * (60 // runner.rows)


def test_memory_does_not_grow_with_the_number_of_images(model):
    """The decoded images and canvases that are alive at once, over 300 images."""
    alive, most = set(), 0

    def noted(array):
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        return array

    class Noting(Watched):
        def draw(self, pixels, view):
            drawn = super().draw(pixels, view)
            noted(drawn.arrays[0])
            return drawn

    runner = Noting(model)
    # A whole stack of canvases is free only when all of them are, so each image has its own array.
    for _ in detect_stream(range(300), lambda number: noted(photo((48, 72), number)), runner, threads=2):
        most = max(most, len(alive))
    # 2 + 1 decoded, 2 + rows + 1 drawn with the image that each was drawn from, and the canvases of a batch.
    assert 0 < most <= 3 + 2 * (3 + runner.rows) + runner.rows


@pytest.mark.parametrize("height, width, tile, overlap", [(100, 260, 64, 0.25), (64, 65, 64, 0.0), (30, 500, 100, 0.9)])
def test_windows_cover_the_image_and_overlap(height, width, tile, overlap):
    whole, *windows = windows_of((height, width), tile, overlap)
    assert whole == (0, 0, height, width)
    covered = np.zeros((height, width), int)
    for y, x, tall, wide in windows:
        assert (tall, wide) == (min(tile, height), min(tile, width)) and y + tall <= height and x + wide <= width
        covered[y : y + tall, x : x + wide] += 1
    assert covered.min() >= 1
    for axis in (0, 1):
        starts = sorted({window[axis] for window in windows})
        steps = np.diff(starts)
        assert (steps > 0).all() and (steps <= max(1, tile * (1 - overlap))).all()
    assert windows_of((tile, tile), tile, overlap) == windows_of((300, 300), None, overlap)[:0] + ((0, 0, tile, tile),)


def test_detections_of_windows_are_merged_by_the_nms_of_the_model(model):
    """Against greedy NMS in a loop, within each class, over all windows in pixels of the image."""
    config = dataclasses.replace(
        model.config, postprocess=dataclasses.replace(model.config.postprocess, nms_threshold=0.4, max_detections=3)
    )
    rng = np.random.default_rng(0)
    windows = windows_of((96, 160), 64, 0.25)
    parts = []
    for _ in windows:
        # Away from the borders of the windows, where a box counts as cut.
        near = rng.uniform(4, 36, (6, 2)) + rng.uniform(0, 3, (6, 2))
        boxes = np.concatenate([near, near + rng.uniform(8, 22, (6, 2))], axis=1).astype(np.float32)
        parts.append(ImageDetections(boxes, rng.random(6, np.float32), rng.integers(1, 3, 6).astype(np.int32)))
    with tiny.quick_compilation():
        together = joined(parts, windows, config.postprocess.nms_threshold)
    boxes = np.concatenate([of.boxes + np.float32([w.x, w.y, w.x, w.y]) for of, w in zip(parts, windows)])
    scores, labels = (np.concatenate([of[field] for of in parts]) for field in (1, 2))
    kept = oracles.greedy_nms(boxes, scores, np.ones(len(scores), bool), iou_threshold=0.4, groups=labels)
    assert len(scores) > len(kept) > 3
    np.testing.assert_array_equal(together.boxes, boxes[kept])
    np.testing.assert_array_equal(together.scores, scores[kept])


def in_windows(*boxes_of_windows):
    """Returns detections of an image of 60 x 100 pixels and its windows, from rows of box, score and label."""
    windows = windows_of((60, 100), 60, 0.5)
    assert windows == ((0, 0, 60, 100), (0, 0, 60, 60), (0, 30, 60, 60), (0, 40, 60, 60))
    parts = []
    for boxes in (*boxes_of_windows, *[[]] * (4 - len(boxes_of_windows))):
        rows = np.array(boxes, np.float32).reshape(-1, 6)
        parts.append(ImageDetections(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int32)))
    return parts, windows


def test_a_part_that_a_window_cuts_is_left_out_where_a_better_box_covers_it():
    """NMS alone keeps all of these boxes: the part is 0.4 of the whole."""
    whole, part = (50, 10, 75, 40, 0.9, 1), (50, 10, 60, 40, 0.6, 1)
    with tiny.quick_compilation():
        for name, parts, windows, kept in (
            ("covered", *in_windows([whole], [part]), [0.9]),
            ("covered by the box of a window", *in_windows([], [part], [(20, 10, 45, 40, 0.9, 1)]), [0.9]),
            ("covered by a part", *in_windows([], [], [], [(0, 9, 35, 40, 0.5, 1), (0, 9, 9, 25, 0.4, 1)]), [0.5]),
            ("the part is better", *in_windows([(*whole[:4], 0.5, 1)], [part]), [0.6, 0.5]),
            ("another class", *in_windows([(*whole[:5], 2)], [part]), [0.9, 0.6]),
            ("nothing covers it", *in_windows([], [part]), [0.6]),
            ("half of it is covered", *in_windows([(55, 10, 80, 40, 0.9, 1)], [part]), [0.9, 0.6]),
            # The border of the image cuts what it cuts in every window.
            ("at the border of the image", *in_windows([(0, 5, 30, 45, 0.9, 1)], [(0, 10, 8, 40, 0.6, 1)]), [0.9, 0.6]),
            ("inside of a window", *in_windows([(5, 5, 50, 55, 0.9, 1)], [(20, 20, 30, 30, 0.6, 1)]), [0.9, 0.6]),
        ):  # fmt: skip
            np.testing.assert_allclose(joined(parts, windows, 0.5).scores, kept, err_msg=name)


def test_the_number_of_detections_that_are_compared_is_bounded_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(tiling, "MOST_DETECTIONS", 10)
    rows = [(5 * number, 10, 5 * number + 4, 20, (number + 1) / 20, 1) for number in range(12)]
    for count, kept in ((10, 10), (12, 10)):
        caplog.clear()
        parts, windows = in_windows(rows[:count])
        with tiny.quick_compilation():
            found = joined(parts, windows, 0.5)
        best = sorted((row[4] for row in rows[:count]), reverse=True)[:kept]
        np.testing.assert_allclose(found.scores, best)
        said = "an image of 60 x 100 pixels (height x width) has 12 detections in 4 windows; the 10 best are used"
        assert [record.getMessage() for record in caplog.records] == [said] * (count > 10)


def bright_spots(canvas):
    """Returns the boxes of bright spots of at least 5 pixels per side, each with the share of bright pixels in it."""
    bright = canvas.mean(axis=2) > 0.5
    boxes, scores = [], []
    while bright.any():
        y, x = np.argwhere(bright)[0]
        y1, y2, x1, x2 = y, y + 1, x, x + 1
        while True:  # grows until its border is dark
            around = bright[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1]
            rows, columns = np.argwhere(around).T
            top, left = max(0, y1 - 1), max(0, x1 - 1)
            grown = top + rows.min(), top + rows.max() + 1, left + columns.min(), left + columns.max() + 1
            if grown == (y1, y2, x1, x2):
                break
            y1, y2, x1, x2 = grown
        if min(y2 - y1, x2 - x1) >= 5:
            boxes.append((x1, y1, x2, y2))
            # The larger the better, so that NMS prefers a whole object to a part of it.
            scores.append((y2 - y1) * (x2 - x1) / bright.size)
        bright[y1:y2, x1:x2] = False
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32)


def test_small_objects_of_a_large_image_are_found_with_windows_and_have_the_coordinates_of_the_image(model):
    """The network is replaced by one that finds bright spots of at least 5 pixels on its canvas of 64 x 96 pixels.

    In the whole image, of 640 x 960 pixels, objects of 16 pixels are smaller than that.
    """
    image = np.zeros((640, 960, 3), np.uint8)
    truth = [(x, y, x + 16, y + 16) for y in (3, 90, 301, 500, 620) for x in (2, 70, 333, 600, 941)]
    for x1, y1, x2, y2 in truth:
        image[y1:y2, x1:x2] = 255

    def found(**options):
        runner = Watched(model, find=bright_spots)
        with tiny.quick_compilation():
            (one,) = detect_stream([image], lambda image: image, runner, **options)
        assert one.image_hw == (640, 960)
        return one.detections.boxes

    assert len(found()) == 0
    boxes = found(tile=96, overlap=0.25)
    near = np.abs(boxes[:, None] - np.float32(truth)).max(axis=2)
    # Two pixels of the image are a little more than one of the canvas.
    assert (near.min(axis=0) <= 2).all(), "each object has its box"
    assert len(boxes) == len(truth), "no part of an object that a window cuts has a box of its own"


def test_windows_get_the_detections_of_predict_on_each_part(model):
    image = photo((100, 150), 7)
    windows = windows_of(image.shape[:2], 72, 0.2)
    with tiny.quick_compilation():
        (one,) = detect_stream([image], lambda image: image, ModelRunner(model, batch_size=2), tile=72, overlap=0.2)
        parts = [
            predict(model, np.ascontiguousarray(image[y : y + tall, x : x + wide]), batch_size=2)
            for y, x, tall, wide in windows
        ]
    assert len(windows) > 4
    same(
        one.detections,
        joined([ImageDetections(*part[:3]) for part in parts], windows, model.config.postprocess.nms_threshold),
    )
