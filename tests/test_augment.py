"""Tests augmentation: boxes stay on painted objects to half a pixel; draws depend only on seed, epoch and image."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from fasterrcnn_jax.config import AugmentConfig, Config, DataConfig, ImageConfig
from fasterrcnn_jax.data import augment as augment_module
from fasterrcnn_jax.data import loader
from fasterrcnn_jax.data.augment import (
    colours_of,
    draw_colours,
    draw_placement,
    place_boxes,
)
from fasterrcnn_jax.data.plan import BatchPlan, plan_epoch
from fasterrcnn_jax.data.records import ImageRecord
from fasterrcnn_jax.data.training_set import prepare_training_set
from fasterrcnn_jax.data.transforms import Placement, canvas_for, draw, network_size

# Grey levels as they are: what is on the canvas can be looked at.
PLAIN = ImageConfig(short_side=64, long_side=96, canvases=((64, 96), (96, 64)), mean=(0.0, 0.0, 0.0))
OFF = DataConfig(root=Path("unused"), class_names=("object",), flip="none", crop_aspect=None)
EVERYTHING = AugmentConfig(short_sides=(40, 52, 64), scale_jitter=(0.5, 2.0), photometric=True)


def varied(data=OFF, **fields):
    return dataclasses.replace(data, augment=AugmentConfig(**fields))


def shown(pixels, boxes, data, *, image=PLAIN, stream=(0, 0, 0)):
    """Returns a training batch with one image; the label of a box is its number, from 1."""
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels, flags = np.arange(1, len(boxes) + 1, dtype=np.int32), np.zeros(len(boxes), bool)
    record = ImageRecord("a", Path("a"), pixels.shape[:2], boxes, labels, flags, flags, np.zeros(len(boxes)))
    canvas = canvas_for(loader._training_hw(record, data), image)
    plan = BatchPlan(canvas, np.zeros(1, np.int32), np.ones(1, bool))

    def example(_):
        return loader.training_example(record, pixels, data, image, canvas, stream=stream)

    return loader.assemble(plan, image, example, max_boxes=len(boxes))


def extent(canvas):
    """Returns xyxy of the pixels brighter than half of white."""
    rows, columns = (np.flatnonzero((canvas[..., 0] > 127.5).any(axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


GEOMETRY = {
    "flip": dict(flip="random"),
    "crop": dict(crop_aspect=1.2),
    "short sides": dict(augment=AugmentConfig(short_sides=(32, 45, 64))),
    "jitter": dict(augment=AugmentConfig(scale_jitter=(0.3, 2.0))),
    "all": dict(
        flip="random", crop_aspect=1.2, augment=AugmentConfig(short_sides=(32, 45, 64), scale_jitter=(0.5, 2.0))
    ),
}
# Where an object begins and ends on an axis, in parts of what there is.
PART = st.tuples(st.floats(0, 0.6), st.floats(0.35, 1.0))


@pytest.mark.parametrize("kind", GEOMETRY)
@given(st.integers(20, 150), st.integers(20, 150), PART, PART, st.integers(0, 1000))
def test_boxes_lie_on_the_object_to_half_a_pixel(kind, height, width, across, down, epoch):
    """After interpolation a pixel is bright if its centre is in the object, so an edge is at most half a pixel off."""
    data = dataclasses.replace(OFF, **GEOMETRY[kind])
    x1, y1 = int(across[0] * width), int(down[0] * height)
    x2, y2 = (min(low + max(int(part[1] * side), 6), side) for low, part, side in
              ((x1, across, width), (y1, down, height)))  # fmt: skip
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y1:y2, x1:x2] = 255
    batch = shown(pixels, [(x1, y1, x2, y2)], data, stream=(0, epoch, 0))
    inside = batch.images[0][: int(batch.image_hw[0, 0]), : int(batch.image_hw[0, 1])]
    if batch.ground_truth.valid[0, 0]:
        np.testing.assert_allclose(batch.ground_truth.boxes[0, 0], extent(inside), atol=0.501)
    else:
        # Dropped is what has less than two pixels left: three may look so where both edges are off by half.
        bright = inside[..., 0] > 127.5
        assert min(bright.any(1).sum(), bright.any(0).sum()) <= 3
    outside = batch.images[0].copy()
    outside[: inside.shape[0], : inside.shape[1]] = 0
    assert not outside.any() and (batch.image_hw[0] <= batch.images.shape[1:3]).all()


@pytest.mark.parametrize("kind", GEOMETRY)
def test_all_kinds_of_augmentation_occur(kind):
    """Over several epochs the image is mirrored, cropped, shrunk and enlarged, and sometimes loses a box."""
    data = dataclasses.replace(OFF, **GEOMETRY[kind])
    pixels = tiny.rectangle_image((60, 90), (4, 6, 24, 30), colour=(255, 255, 255))
    boxes = set()
    for epoch in range(40):
        batch = shown(pixels, [(4, 6, 24, 30)], data, stream=(0, epoch, 0))
        boxes.add(tuple(batch.ground_truth.boxes[0, 0].tolist()))
    assert len(boxes) >= {"flip": 2, "crop": 3, "short sides": 3, "jitter": 30, "all": 30}[kind]


def test_a_short_side_is_drawn_for_each_image_and_stays_on_its_canvas():
    image = dataclasses.replace(PLAIN, short_side=60)
    pixels = np.full((50, 60, 3), 9, np.uint8)
    data = varied(short_sides=(30, 45, 60))
    batches = [shown(pixels, [(5, 5, 40, 40)], data, image=image, stream=(0, epoch, 0)) for epoch in range(40)]
    sizes = [tuple(batch.image_hw[0].astype(int).tolist()) for batch in batches]
    assert set(sizes) == {(30, 36), (45, 54), (60, 72)}
    assert {batch.images.shape for batch in batches} == {(1, 64, 96, 3)}
    for batch, size in zip(batches, sizes):
        np.testing.assert_allclose(batch.scale[0], np.array(size) / (50, 60), rtol=1e-6)
        np.testing.assert_allclose(batch.ground_truth.boxes[0, 0], np.array([5, 5, 40, 40]) * batch.scale[0, 0])


def test_the_long_side_bounds_a_drawn_short_side_too():
    data = varied(short_sides=(64,))
    batch = shown(np.full((30, 90, 3), 9, np.uint8), [(0, 0, 30, 30)], data)
    assert tuple(batch.image_hw[0]) == network_size((30, 90), PLAIN) == (32, 96)


def test_jitter_draws_the_scale_and_the_place_of_the_crop_uniformly():
    rng = np.random.default_rng(0)
    augment = AugmentConfig(scale_jitter=(0.1, 2.0))
    drawn = [draw_placement((64, 96), (64, 96), PLAIN, augment, rng) for _ in range(8000)]
    factors = np.array([placement.size[0] / 64 for placement in drawn])
    assert 0.1 <= factors.min() + 0.01 and factors.min() < 0.12 and 1.98 < factors.max() < 2.01
    np.testing.assert_allclose(np.quantile(factors, [0.25, 0.5, 0.75]), [0.575, 1.05, 1.525], atol=0.06)
    for placement in drawn:
        assert abs(placement.size[1] - 1.5 * placement.size[0]) <= 1.5  # one factor for both axes
    places = [
        [origin / (size - limit) for origin, size, limit in zip(placement.origin, placement.size, (64, 96))]
        for placement in drawn
        if placement.size[0] > 80
    ]
    assert np.min(places) == 0 and np.max(places) == 1 and np.all(np.abs(np.mean(places, 0) - 0.5) < 0.03)
    assert all(placement.origin == (0, 0) for placement in drawn if placement.size[0] < 64)


def test_boxes_with_less_than_two_pixels_left_are_dropped_with_their_labels():
    boxes = np.float32([[0, 0, 20, 20], [0, 0, 11.9, 20], [0, 0, 12, 20], [30, 30, 31.9, 60], [95, 0, 120, 50]])
    # 10 pixels are cut on the left, and the canvas ends at 10 + 96.
    placed, stay = place_boxes(boxes, (64, 200), (64, 96), Placement((64, 200), (0, 10)))
    assert stay.tolist() == [True, False, True, False, True]
    np.testing.assert_array_equal(placed[4], [85, 0, 96, 50])
    pixels = np.zeros((64, 96, 3), np.uint8)
    batch = shown(pixels, [(0, 0, 10, 10), (0, 0, 60, 60)], varied(scale_jitter=(0.19, 0.19)))
    assert batch.ground_truth.valid[0].tolist() == [True, False]
    assert batch.ground_truth.labels[0].tolist() == [2, 0]
    np.testing.assert_allclose(batch.ground_truth.boxes[0, 0], [0, 0, 60 * 18 / 96, 60 * 12 / 64], rtol=1e-6)


def test_an_image_whose_objects_are_all_cut_off_trains_as_background():
    pixels, data = np.zeros((64, 96, 3), np.uint8), varied(scale_jitter=(2.0, 2.0))
    batches = [shown(pixels, [(0, 0, 25, 25)], data, stream=(0, epoch, 0)) for epoch in range(20)]
    counts = {int(batch.ground_truth.valid.sum()) for batch in batches}
    assert counts == {0, 1}


def test_without_augmentation_boxes_are_neither_cut_nor_dropped():
    batch = shown(np.zeros((64, 96, 3), np.uint8), [(10, 10, 11, 60)], OFF)
    np.testing.assert_array_equal(batch.ground_truth.boxes[0, 0], [10, 10, 11, 60])


COLOURS = np.random.default_rng(0).integers(60, 190, (16, 16, 3)).astype(np.float32)
LUMA = np.array([0.299, 0.587, 0.114])


def test_brightness_is_added_and_contrast_multiplies_and_both_end_at_the_range():
    same = functools.partial(np.testing.assert_allclose, atol=1e-3)
    same(colours_of(20.0, 1.0, 1.0, 0.0).change(COLOURS), COLOURS + 20)
    same(colours_of(-100.0, 1.0, 1.0, 0.0).change(COLOURS), np.maximum(COLOURS, 100) - 100)
    same(colours_of(0.0, 2.0, 1.0, 0.0).change(COLOURS), np.minimum(COLOURS * 2, 255))
    same(colours_of(10.0, 0.5, 1.0, 0.0).change(COLOURS), (COLOURS + 10) / 2)


def test_saturation_stretches_away_from_grey_and_none_leaves_the_luma():
    luma = (COLOURS @ LUMA)[..., None]
    grey = colours_of(0.0, 1.0, 0.0, 0.0).change(COLOURS)
    np.testing.assert_allclose(grey, np.repeat(luma, 3, 2), atol=1e-2)
    stretched = colours_of(0.0, 1.0, 1.25, 0.0).change(COLOURS)
    np.testing.assert_allclose(stretched, np.clip(luma + 1.25 * (COLOURS - luma), 0, 255), atol=1e-2)


@pytest.mark.parametrize("degrees", [-18.0, 7.0, 90.0])
def test_hue_turns_colours_about_grey(degrees):
    """Luma and distance from grey do not change; a positive angle moves red towards yellow."""
    angle = np.radians(degrees)
    # Not so far from grey that a turned colour leaves the range.
    soft = 128 + (COLOURS - 128) / 3
    turned = colours_of(0.0, 1.0, 1.0, angle).change(soft)
    np.testing.assert_allclose(turned @ LUMA, soft @ LUMA, atol=1e-2)
    axes = np.array([[0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    before, after = (pixels @ axes.T @ [1, 1j] for pixels in (soft, turned))
    np.testing.assert_allclose(after, before * np.exp(1j * angle), atol=1e-2)
    grey = np.full((2, 2, 3), 77, np.float32)
    np.testing.assert_allclose(colours_of(0.0, 1.0, 1.0, angle).change(grey), grey, atol=1e-3)


def test_each_colour_change_is_drawn_with_probability_one_half_from_its_range(monkeypatch):
    drawn = []
    monkeypatch.setattr(augment_module, "colours_of", lambda *values: drawn.append(values) or colours_of(*values))
    for seed in range(1000):
        draw_colours(np.random.default_rng(seed))
    ranges = [(-32, 32), (0.5, 1.5), (0.5, 1.5), (-np.radians(18), np.radians(18))]
    for values, neutral, (low, high) in zip(np.array(drawn).T, (0, 1, 1, 0), ranges):
        assert 0.45 < (values != neutral).mean() < 0.55
        assert low <= values.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < values.max() <= high
    changed = np.array(drawn) != (0, 1, 1, 0)
    assert len(np.unique(changed, axis=0)) == 16  # each for itself


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("fast", [False, True])
def test_the_colours_of_the_resized_image_are_changed_in_rgb(order, dtype, fast):
    if fast:
        pytest.importorskip("cv2")
    config = dataclasses.replace(PLAIN, channel_order=order, pixel_dtype=dtype)
    pixels = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    colours, place = colours_of(9.0, 1.3, 0.7, 0.2), Placement((60, 80))
    drawn, plain = np.zeros((64, 96, 3), dtype), np.zeros((64, 96, 3), np.float32)
    draw(drawn, pixels, config, place, colours=colours, fast=fast)
    draw(plain, pixels, dataclasses.replace(PLAIN, channel_order="rgb"), place)
    expected = colours.change(plain[:60, :80])
    expected = expected[..., ::-1] if order == "bgr" else expected
    np.testing.assert_allclose(drawn[:60, :80].astype(np.float32), expected, atol=0.6 if dtype == "uint8" else 0.05)
    assert not drawn[60:].any() and not drawn[:, 80:].any()


def test_colours_change_and_the_boxes_and_the_padding_do_not():
    pixels = tiny.rectangle_image((40, 90), (4, 6, 24, 30))
    plain = shown(pixels, [(4, 6, 24, 30)], OFF)
    batches = [shown(pixels, [(4, 6, 24, 30)], varied(photometric=True), stream=(0, epoch, 0)) for epoch in range(12)]
    for batch in batches:
        np.testing.assert_array_equal(batch.ground_truth.boxes, plain.ground_truth.boxes)
        height = int(batch.image_hw[0, 0])
        assert not batch.images[0, height:].any()
    assert len({batch.images.tobytes() for batch in batches}) > 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    images = []
    for index in range(7):
        box = (index, 3, index + 30, 33)
        hw = [(48, 72), (72, 48), (50, 110)][index % 3]
        images.append((tiny.rectangle_image(hw, box, seed=index), [box], [1 + index % 2]))
    return tiny.dataset(tmp_path_factory.mktemp("images"), images)


def by_image(dataset, *, batch_size, threads=2, processes=1, epochs=3, seed=0, augment=EVERYTHING):
    """Returns {(epoch, image): the image's rows of all arrays}."""
    data = DataConfig(
        root=Path("unused"), class_names=tiny.CLASS_NAMES, max_boxes=2, flip="random", crop_aspect=1.8,
        threads=threads, augment=augment,
    )  # fmt: skip
    prepared = prepare_training_set(dataset, data)
    canvases = [canvas_for(loader._training_hw(record, data), tiny.IMAGE) for record in prepared.records]
    per_epoch = len(plan_epoch(canvases, batch_size, seed=seed, epoch=0))
    found = {}
    for process in range(processes):
        batches = loader.training_batches(
            prepared, data, tiny.IMAGE, batch_size=batch_size, seed=seed, steps=epochs * per_epoch,
            process=(process, processes),
        )  # fmt: skip
        for step, batch in enumerate(batches):
            for row in np.flatnonzero(batch.image_valid):
                leaves = (batch.images, batch.image_hw, batch.scale, *batch.ground_truth)
                key = step // per_epoch, int(batch.image_index[row])
                assert key not in found
                found[key] = b"".join(np.ascontiguousarray(leaf[row]).tobytes() for leaf in leaves)
    assert len(found) == 7 * epochs
    return found


@pytest.mark.parametrize(
    "other", [dict(threads=1), dict(threads=4), dict(batch_size=1), dict(batch_size=2, processes=2)]
)
def test_random_draws_depend_on_neither_threads_nor_batch_mates_nor_processes(dataset, other):
    assert by_image(dataset, **(dict(batch_size=4) | other)) == by_image(dataset, batch_size=4)


def test_random_draws_differ_over_epochs_images_and_seeds(dataset):
    found = by_image(dataset, batch_size=4)
    for image in range(7):
        assert len({found[epoch, image] for epoch in range(3)}) == 3
    other = by_image(dataset, batch_size=4, seed=1)
    assert all(other[key] != value for key, value in found.items())


def test_one_augmentation_does_not_change_the_draws_of_another():
    """The sizes are the same with and without flips, crops and colour changes."""
    pixels, jitter = tiny.rectangle_image((64, 90), (40, 6, 50, 30)), AugmentConfig(scale_jitter=(0.3, 2.0))
    everything = DataConfig(
        root=Path("unused"),
        class_names=("object",),
        flip="random",
        crop_aspect=1.2,
        augment=dataclasses.replace(jitter, photometric=True),
    )
    for epoch in range(5):
        stream = (0, epoch, 0)
        alone = shown(pixels, [(40, 6, 50, 30)], dataclasses.replace(OFF, augment=jitter), stream=stream)
        together = shown(pixels, [(40, 6, 50, 30)], everything, stream=stream)
        assert alone.scale[0, 0] == together.scale[0, 0]


def test_a_short_side_beyond_the_models_is_refused(tmp_path):
    config = tiny.config(tmp_path)
    data = dataclasses.replace(config.data, augment=AugmentConfig(short_sides=(40, 65)))
    with pytest.raises(ValueError, match=r"short_sides must be at most model.image.short_side, got 65 and 64"):
        Config(run=config.run, data=data, model=config.model, train=config.train)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(short_sides=(0, 40)), "short_sides must be positive, got 0"),
        (dict(scale_jitter=(2.0, 0.1)), "scale_jitter must be 0 < low <= high"),
        (dict(scale_jitter=(0.0, 1.0)), "scale_jitter must be 0 < low <= high"),
        (dict(scale_jitter=(0.5, float("inf"))), "scale_jitter must be 0 < low <= high"),
    ],
)
def test_an_invalid_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**fields)
