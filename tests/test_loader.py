"""Batches for training: exact resume, flips that take boxes along, faults named, one shape per canvas."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
import tiny

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import loader
from fasterrcnn_jax.data.plan import plan_epoch
from fasterrcnn_jax.data.transforms import canvas_for, flip_boxes, scale_boxes
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import Detector, training_losses

SIZES = [(48, 72), (72, 48), (50, 90), (64, 64), (30, 70), (90, 40), (55, 56)]
STEPS, BATCH_SIZE = 20, 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Eleven pictures of many sizes; the box of picture i is i pixels from the left."""
    images = []
    for index in range(11):
        box = (index, 3, index + 12, 20)
        images.append((tiny.picture(SIZES[index % len(SIZES)], box, seed=index), [box], [1 + index % 2]))
    return tiny.dataset(tmp_path_factory.mktemp("images"), images)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return DataConfig(root=tmp_path_factory.mktemp("unused"), class_names=tiny.CLASS_NAMES, max_boxes=3)


def batches_of(dataset, data, *, seed=0, steps=STEPS, batch_size=BATCH_SIZE):
    return loader.training_batches(
        dataset, data, tiny.IMAGE, batch_size=batch_size, seed=seed, steps=steps
    )


def assert_same_bits(batch, other):
    jax.tree.map(np.testing.assert_array_equal, batch, other)


@pytest.mark.parametrize("done", [0, 1, 7, STEPS - 1])
def test_the_position_resumes_in_a_new_iterator_bit_for_bit(dataset, data, done):
    first = batches_of(dataset, data)
    for _ in range(done):
        next(first)
    position = first.get_state()
    expected = list(first)
    resumed = batches_of(dataset, data)
    resumed.set_state(position)
    rest = list(resumed)
    assert len(rest) == len(expected) == STEPS - done
    for batch, other in zip(rest, expected):
        assert_same_bits(batch, other)


def test_the_position_is_plain_data(dataset, data):
    iterator = batches_of(dataset, data)
    next(iterator)
    position = iterator.get_state()
    assert json.loads(json.dumps(position)) == position


def test_the_position_after_the_last_batch_is_the_end(dataset, data):
    iterator = batches_of(dataset, data, steps=3)
    assert len(list(iterator)) == 3
    resumed = batches_of(dataset, data, steps=3)
    resumed.set_state(iterator.get_state())
    assert list(resumed) == []


@pytest.mark.parametrize("threads", [1, 5])
def test_batches_do_not_depend_on_the_number_of_threads(dataset, data, threads, monkeypatch):
    expected = list(batches_of(dataset, data))
    monkeypatch.setattr(loader, "THREADS", threads)
    for batch, other in zip(batches_of(dataset, data), expected, strict=True):
        assert_same_bits(batch, other)


def test_batches_follow_the_plan_over_epochs(dataset, data):
    canvases = [canvas_for(record.image_hw, tiny.IMAGE) for record in dataset.records]
    planned = [plan for epoch in range(5) for plan in plan_epoch(canvases, BATCH_SIZE, seed=0, epoch=epoch)]
    for batch, plan in zip(batches_of(dataset, data), planned):
        assert batch.images.shape == (BATCH_SIZE, *plan.canvas, 3)
        np.testing.assert_array_equal(batch.image_index, plan.image_index)
        np.testing.assert_array_equal(batch.image_valid, plan.image_valid)


def flipped_images(dataset, batches):
    """Returns {image index: list of whether it was flipped}, judged by the boxes."""
    found = {}
    for batch in batches:
        for row in np.flatnonzero(batch.image_valid):
            record = dataset.records[batch.image_index[row]]
            width = record.image_hw[1]
            truth = batch.ground_truth.boxes[row, :1]
            plain = scale_boxes(record.boxes, batch.scale[row])
            mirrored = scale_boxes(flip_boxes(record.boxes, width), batch.scale[row])
            assert not np.array_equal(plain, mirrored)
            is_flipped = np.array_equal(truth, mirrored)
            assert is_flipped or np.array_equal(truth, plain)
            found.setdefault(int(batch.image_index[row]), []).append(is_flipped)
    return found


def test_flips_follow_seed_epoch_and_image_and_not_the_batch(dataset, data):
    epochs = 6
    runs = {}
    for batch_size in (1, 2, 4):
        canvases = [canvas_for(record.image_hw, tiny.IMAGE) for record in dataset.records]
        steps = epochs * len(plan_epoch(canvases, batch_size, seed=0, epoch=0))
        batches = batches_of(dataset, data, steps=steps, batch_size=batch_size)
        runs[batch_size] = flipped_images(dataset, batches)
    assert runs[1] == runs[2] == runs[4]
    flips = np.array([runs[1][index] for index in range(11)])
    assert flips.shape == (11, epochs)
    assert 0.25 < flips.mean() < 0.75
    assert (flips != flips[:, :1]).any()  # differs over epochs
    assert (flips != flips[:1]).any()  # differs over images
    other = flipped_images(dataset, batches_of(dataset, data, seed=1, steps=66, batch_size=1))
    assert [other[index] for index in range(11)] != flips.tolist()


def test_without_random_flip_nothing_is_mirrored(dataset, data):
    plain = dataclasses.replace(data, random_flip=False)
    assert not any(any(flips) for flips in flipped_images(dataset, batches_of(dataset, plain)).values())


def test_boxes_lie_on_the_objects_in_the_pixels(dataset, data):
    """In flipped pictures and in plain ones: the bright rectangle is where the box says."""
    seen = set()
    for batch in batches_of(dataset, data):
        for row in np.flatnonzero(batch.image_valid):
            red = batch.images[row, ..., 0] * tiny.IMAGE.std[0] + tiny.IMAGE.mean[0]
            height, width = batch.image_hw[row].astype(int)
            bright = red[:height, :width] > 150
            rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
            extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(batch.ground_truth.boxes[row, 0], extent, atol=1.01)
            seen.add(int(batch.image_index[row]))
    assert seen == set(range(11))


def test_filling_rows_and_empty_slots_are_zero(dataset, data):
    filled = 0
    for batch in batches_of(dataset, data):
        truth = batch.ground_truth
        for leaf in (truth.boxes, truth.labels, truth.valid):
            assert not leaf[~truth.valid].any()
        for leaf in (batch.images, batch.image_hw, *truth):
            assert not leaf[~batch.image_valid].any()
        assert (batch.scale[~batch.image_valid] == 1).all()
        filled += int((~batch.image_valid).sum())
    assert filled  # otherwise nothing was shown


def test_difficult_objects_are_left_out(tmp_path, data):
    boxes = [(2, 3, 20, 30), (25, 8, 40, 38), (5, 5, 30, 20)]
    pixels = tiny.picture((48, 72), boxes[0])
    dataset = tiny.dataset(tmp_path / "images", [(pixels, boxes, [1, 2, 1])], difficult=[[False, True, False]])
    plain = dataclasses.replace(data, random_flip=False)
    (batch,) = batches_of(dataset, plain, steps=1, batch_size=1)
    truth = batch.ground_truth
    assert truth.valid[0].tolist() == [True, True, False]
    assert truth.labels[0].tolist() == [1, 1, 0]
    np.testing.assert_allclose(truth.boxes[0, :2], scale_boxes(np.float32(boxes)[[0, 2]], batch.scale[0]))


def crowd(tmp_path, count, hard):
    boxes = [(x, 2, x + 5, 9) for x in range(count)]
    return tiny.dataset(
        tmp_path / "crowd",
        [(tiny.picture((48, 72), (0, 0, 5, 5)), boxes, [1] * count)],
        difficult=[[False] * (count - hard) + [True] * hard],
    )


def test_more_objects_than_slots_name_image_field_and_numbers(tmp_path, data):
    with pytest.raises(InputError, match=r"image 000 has 4 objects, data\.max_boxes is 3"):
        batches_of(crowd(tmp_path, 4, 0), data)


def test_difficult_objects_need_no_slots(tmp_path, data):
    (batch,) = batches_of(crowd(tmp_path, 5, 2), data, steps=1, batch_size=1)
    assert batch.ground_truth.valid.all()


@pytest.mark.parametrize("count, hard", [(0, 0), (2, 2)])
def test_a_training_set_without_objects_is_refused(tmp_path, data, count, hard):
    with pytest.raises(InputError, match=r"crowd .*no image has an object to train on"):
        batches_of(crowd(tmp_path, count, hard), data)


def test_a_training_set_without_images_is_refused(tmp_path, data):
    with pytest.raises(InputError, match="tiny.*no image has an object"):
        batches_of(tiny.dataset(tmp_path / "none", []), data)


@pytest.mark.parametrize("training", [True, False])
def test_an_image_that_breaks_when_decoded_names_its_file(tmp_path, data, training):
    box = (3, 3, 20, 20)
    dataset = tiny.dataset(tmp_path / "images", [(tiny.picture((48, 72), box), [box], [1])] * 2)
    broken = dataset.records[1].path
    broken.write_bytes(broken.read_bytes()[:400])
    if training:
        iterator = batches_of(dataset, data, steps=4, batch_size=2)
    else:
        iterator = loader.evaluation_batches(dataset, tiny.IMAGE, batch_size=2)
    with pytest.raises(InputError, match="001.png") as caught:
        list(iterator)
    assert "\n" not in str(caught.value)


def test_an_evaluation_meets_every_image_once_in_its_own_pixels(dataset):
    batches = list(loader.evaluation_batches(dataset, tiny.IMAGE, batch_size=4))
    index = np.concatenate([batch.image_index[batch.image_valid] for batch in batches])
    assert sorted(index) == list(range(11))
    for batch in batches:
        assert batch.ground_truth.boxes.shape == (4, 0, 4)
        for row in np.flatnonzero(batch.image_valid):
            size = np.array(dataset.records[batch.image_index[row]].image_hw, np.float32)
            np.testing.assert_allclose(size * batch.scale[row], batch.image_hw[row], rtol=1e-6)


def test_an_epoch_of_many_sizes_has_one_shape_per_canvas(dataset, data, random_weights, caplog):
    """And the jitted losses are traced once for each of them: the number of programs in a run."""
    model = random_weights(lambda: Detector(tiny.MODEL, tiny.CLASS_NAMES, rng=np.random.default_rng(0)))
    canvases = {canvas_for(record.image_hw, tiny.IMAGE) for record in dataset.records}
    batches = list(batches_of(dataset, data))
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(batch)) for batch in batches}
    assert len({record.image_hw for record in dataset.records}) == 7
    assert len(shapes) == len(canvases) == 2
    traced = jax.jit(lambda batch: training_losses(model, batch, jax.random.key(0)))
    with caplog.at_level(logging.INFO, logger="fasterrcnn_jax"):
        for batch in batches:
            traced.trace(batch)
    lines = [line for line in caplog.messages if line.startswith("compiling the training step")]
    assert len(lines) == len(set(lines)) == len(canvases)
