"""Fields that are "auto" get values from the data; other fields keep theirs."""

import dataclasses

import numpy as np
import pytest
import tiny

from fasterrcnn_jax.config import ImageConfig, TrainConfig
from fasterrcnn_jax.config.checks import fitted
from fasterrcnn_jax.data.fitting import fit, fitted_canvases, fitted_size, fitted_training
from fasterrcnn_jax.data.records import Dataset, ImageRecord, box_areas
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.ops.anchors import anchors_of


def record(number, image_hw, boxes):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    flags = np.zeros(len(boxes), bool)
    return ImageRecord(
        f"{number}", None, image_hw, boxes, np.ones(len(boxes), np.int32), flags, flags, box_areas(boxes)
    )


def dataset(*records):
    return Dataset("made", tiny.CLASS_NAMES, records, (), (1, 2))


def image(side, canvases="auto"):
    return dataclasses.replace(tiny.IMAGE, short_side=side, long_side=side, canvases=canvases)


# ---------------------------------------------------------------- canvases


def test_one_size_gets_one_canvas_and_the_square_that_holds_every_image():
    assert fitted_canvases([(480, 640)] * 5, image(320), 16) == ((240, 320), (320, 320))


def test_canvas_sides_are_rounded_up():
    assert fitted_canvases([(500, 640)], image(320), 32) == ((256, 320), (320, 320))


def test_both_orientations_keep_their_canvases():
    assert fitted_canvases([(480, 640), (640, 480)], image(320), 16) == ((240, 320), (320, 240), (320, 320))


def test_many_sizes_share_few_canvases_with_little_padding():
    rng = np.random.default_rng(0)
    sizes = [(int(height), 640) for height in rng.integers(200, 640, 200)]
    canvases = fitted_canvases(sizes, image(320), 16)
    assert len(canvases) <= 4
    areas = [min(h * w for h, w in canvases if h >= height / 2 and w >= 320) for height, _ in sizes]
    assert sum(areas) < 1.25 * sum(height / 2 * 320 for height, _ in sizes)


def test_a_rare_size_does_not_get_a_canvas_of_its_own():
    assert fitted_canvases([(480, 640)] * 500 + [(470, 640)], image(320), 16) == ((240, 320), (320, 320))


# ---------------------------------------------------------------- input size


def test_the_smallest_size_is_taken_where_objects_are_large_enough():
    assert fitted_size([record(0, (640, 640), [[0, 0, 40, 40]])]) == (320, "")


def test_small_objects_get_a_larger_input_and_a_reason():
    size, why = fitted_size([record(0, (640, 640), [[0, 0, 24, 24]])])
    assert size == 448 and "a side of 12 pixels at 320" in why
    assert fitted_size([record(0, (640, 640), [[0, 0, 4, 4]])])[0] == 640


# ---------------------------------------------------------------- length

AUTO = dict(
    steps="auto",
    batch_size=4,
    learning_rate=0.1,
    warmup_steps="auto",
    checkpoint_every="auto",
    evaluate_every="auto",
)


@pytest.mark.parametrize(
    ("images", "steps", "warmup", "checkpoint", "evaluate"),
    [(50, 600, 30, 100, 100), (114, 600, 30, 100, 100), (5000, 15000, 500, 1000, 2000)],
)
def test_the_length_follows_the_number_of_images(images, steps, warmup, checkpoint, evaluate):
    train = fitted_training(TrainConfig(**AUTO), images)
    got = train.steps, train.warmup_steps, train.checkpoint_every, train.evaluate_every
    assert got == (steps, warmup, checkpoint, evaluate)


def test_epochs_decide_the_steps_and_scale_the_schedule():
    train = fitted_training(
        TrainConfig(steps=1000, epochs=2, batch_size=4, learning_rate=0.1, decay_steps=(600, 800)), 101
    )
    assert train.steps == 51 and train.decay_steps == (31, 41)


def test_a_short_training_has_a_short_warm_up():
    train = fitted_training(TrainConfig(**AUTO, epochs=1), 5)
    assert (train.steps, train.warmup_steps, train.checkpoint_every, train.evaluate_every) == (2, 0, 1, 1)


def test_given_values_are_kept():
    given = TrainConfig(steps=7, batch_size=2, learning_rate=0.1, warmup_steps=3, checkpoint_every=5, evaluate_every=5)
    assert fitted_training(given, 1000) == given


# ---------------------------------------------------------------- the whole configuration


def config(tmp_path, *, scales="auto", size="auto", canvases="auto"):
    whole = tiny.config(tmp_path)
    model = dataclasses.replace(
        whole.model,
        image=dataclasses.replace(whole.model.image, canvases=canvases),
        rpn=dataclasses.replace(whole.model.rpn, anchor_scales=scales, anchor_base=16.0, anchor_ratios=(1.0,)),
    )
    return dataclasses.replace(whole, model=model, size=size, train=TrainConfig(**AUTO))


def test_every_auto_is_replaced_and_said(tmp_path):
    rng = np.random.default_rng(0)
    sides = rng.choice([40.0, 120.0, 300.0], 80)
    records = [record(i, (480, 640), [[0, 0, side, side]]) for i, side in enumerate(sides)]
    found = fit(config(tmp_path), [dataset(*records)], dataset(*records))
    image, rpn = found.config.model.image, found.config.model.rpn
    assert (image.short_side, image.long_side) == (320, 320) and image.canvases == ((240, 320), (320, 320))
    # Boxes of 20, 60 and 150 network pixels.
    bases = 16.0 * np.array(rpn.anchor_scales)
    assert len(bases) == 4 and all(np.abs(bases / side - 1).min() < 0.1 for side in (20, 60, 150))
    assert found.config.train.steps == 600
    assert [sentence.split()[0] for sentence in found.sentences] == ["input", "canvases", "anchors", "schedule"]


def test_a_configuration_without_auto_keeps_its_model(tmp_path):
    whole = tiny.config(tmp_path)
    records = dataset(record(0, (48, 72), [[0, 0, 20, 20]]))
    assert fit(whole, [records], records).config == whole


def test_canvases_that_hold_the_size_win(tmp_path):
    whole = config(tmp_path, size=64, canvases=((64, 96), (96, 64), (128, 128)))
    records = dataset(record(0, (48, 72), [[0, 0, 20, 20]]))
    assert fit(whole, [records], records).config.model.image.canvases == ((64, 96), (96, 64), (128, 128))
    assert fit(dataclasses.replace(whole, size=256), [records], records).config.model.image.canvases == (
        (176, 256),
        (256, 256),
    )


def test_what_is_not_fitted_cannot_be_used():
    assert fitted(3, "field") == 3
    with pytest.raises(InputError, match="model.rpn.anchor_scales is auto, which only a training can fit"):
        anchors_of(
            dataclasses.replace(tiny.MODEL, rpn=dataclasses.replace(tiny.MODEL.rpn, anchor_scales="auto")), ((4, 6),)
        )
    with pytest.raises(ValueError, match="canvas sides must be positive multiples of 16"):
        ImageConfig(short_side=30, long_side=30, canvases=((30, 30),))
