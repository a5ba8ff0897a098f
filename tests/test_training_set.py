"""Tests the training set: removed objects and images are counted once and logged; mirrored copies come last."""

import logging
from pathlib import Path

import numpy as np
import pytest
from handmade import dataset, record

from fasterrcnn_jax.config import AugmentConfig, DataConfig
from fasterrcnn_jax.data.training_set import prepare_training_set
from fasterrcnn_jax.errors import InputError

BOXES = [(10 * n, 5, 10 * n + 8, 30) for n in range(9)]


def data(**options):
    return DataConfig(root=Path("unused"), class_names=("class1",), **{"flip": "none", **options})


def plain(count, *, image_id, hard=()):
    """Returns an image with `count` objects; the objects in `hard` are difficult."""
    return record(*((BOXES[n], 1 + n % 2, n in hard) for n in range(count)), image_id=image_id)


def prepared(records, **options):
    """Returns the records of the training set by id, and its notes; checks that each note is logged once."""
    result = prepare_training_set(dataset(*records, classes=2), data(**options))
    assert result.name == "hand made" and result.class_names == ("class1", "class2")
    return {entry.id: entry for entry in result.records}, result.notes


def boxes_of(entry):
    lengths = {len(field) for field in (entry.boxes, entry.labels, entry.difficult, entry.crowd, entry.area)}
    assert lengths == {len(entry.boxes)}
    return [BOXES.index(tuple(box)) for box in entry.boxes.tolist()]


def test_a_clean_set_is_kept_whole_without_a_message(caplog):
    with caplog.at_level(logging.WARNING):
        records, notes = prepared([plain(3, image_id="a"), plain(1, image_id="b")])
    assert [boxes_of(entry) for entry in records.values()] == [[0, 1, 2], [0]]
    assert notes == () and caplog.messages == []


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(crop_aspect=None), "2 images to train on; flip none"),
        (dict(crop_aspect=2.0, flip="random"), "2 images to train on; flip random, crop_aspect 2"),
        (
            dict(crop_aspect=None, fast=True, augment=AugmentConfig(short_sides=(480, 600), photometric=True)),
            "2 images to train on; flip none, short_sides 480, 600, photometric distortion, "
            "read by simplejpeg and OpenCV (data.fast)",
        ),
        (
            dict(crop_aspect=None, flip="double", augment=AugmentConfig(scale_jitter=(0.1, 2.0))),
            "4 images to train on; flip double, scale_jitter 0.1 to 2",
        ),
    ],
)
def test_the_log_says_how_the_images_are_changed(caplog, options, said):
    with caplog.at_level(logging.INFO, "fasterrcnn_jax"):
        prepared([plain(1, image_id="a"), plain(1, image_id="b")], **options)
    assert caplog.messages == [f"hand made: {said}"]


def test_difficult_objects_are_left_out_and_counted():
    images = [plain(2, image_id="a"), plain(4, image_id="b", hard={0, 2}), plain(3, image_id="c", hard={1})]
    records, notes = prepared(images)
    assert [boxes_of(entry) for entry in records.values()] == [[0, 1], [1, 3], [0, 2]]
    np.testing.assert_array_equal(records["b"].labels, [2, 2])
    assert notes == ("hand made: Difficult objects are not trained on: 3, the first in image b.",)


def test_difficult_objects_are_kept_when_asked_for():
    records, notes = prepared([plain(4, image_id="b", hard={0, 2})], use_difficult=True)
    assert boxes_of(records["b"]) == [0, 1, 2, 3] and notes == ()


@pytest.mark.parametrize("use_difficult", [False, True])
def test_crowds_are_always_left_out(use_difficult):
    image = record((BOXES[0], 1, False), (BOXES[1], 1, False), image_id="a", crowd=[False, True])
    records, notes = prepared([image], use_difficult=use_difficult)
    assert boxes_of(records["a"]) == [0]
    assert notes == ("hand made: Crowds are not trained on: 1, the first in image a.",)


def test_objects_under_two_pixels_are_left_out():
    image = record((BOXES[0], 1, False), ((3, 3, 4.5, 30), 1, False), ((3, 3, 5, 5), 1, False), image_id="a")
    records, notes = prepared([image])
    assert records["a"].boxes.tolist() == [list(BOXES[0]), [3, 3, 5, 5]]
    assert notes == ("hand made: Objects under two pixels are not trained on: 1, the first in image a.",)


def test_objects_beyond_the_slots_are_left_out_with_one_warning_over_all_images(caplog):
    images = [plain(2, image_id="a"), plain(5, image_id="b"), plain(4, image_id="c")]
    with caplog.at_level(logging.WARNING, logger="fasterrcnn_jax"):
        records, notes = prepared(images, max_boxes=2)
    assert [boxes_of(entry) for entry in records.values()] == [[0, 1]] * 3  # the first of the file
    (note,) = notes
    assert note == (
        "hand made: Objects beyond the first data.max_boxes = 2 of an image are not trained on: 5, "
        "the first in image b."
    )
    assert [(r.levelname, r.message) for r in caplog.records] == [("WARNING", note)]


def test_objects_that_are_not_trained_on_need_no_slots():
    images = [plain(5, image_id="a", hard={0, 1}), record(*((b, 1, False) for b in BOXES[:3]), crowd=[1, 1, 0])]
    records, notes = prepared(images, max_boxes=3)
    assert boxes_of(records["a"]) == [2, 3, 4]
    assert not any("max_boxes" in note for note in notes) and len(notes) == 2


def test_images_without_an_object_are_left_out_and_counted():
    images = [
        record(image_id="bare"),
        plain(1, image_id="a"),
        plain(2, image_id="hard", hard={0, 1}),
        record((BOXES[0], 1, False), image_id="crowd", crowd=[True]),
    ]
    records, notes = prepared(images)
    assert list(records) == ["a"]
    assert notes[-1] == (
        "hand made: Images without an object to train on were left out (data.keep_empty keeps them): 3, "
        "the first in image bare."
    )


def test_images_without_an_object_are_kept_when_asked_for():
    images = [record(image_id="bare"), plain(1, image_id="a"), plain(1, image_id="hard", hard={0})]
    records, notes = prepared(images, keep_empty=True)
    assert {name: len(entry.boxes) for name, entry in records.items()} == {"bare": 0, "a": 1, "hard": 0}
    assert records["bare"].boxes.shape == (0, 4) and len(notes) == 1


def test_with_double_the_mirrored_copies_follow_all_originals():
    images = [plain(2, image_id="a"), record(image_id="bare"), plain(3, image_id="b")]
    result = prepare_training_set(dataset(*images, classes=2), data(flip="double"))
    assert [(entry.id, entry.flipped) for entry in result.records] == [
        ("a", False), ("b", False), ("a", True), ("b", True)
    ]  # fmt: skip
    for entry, copy in zip(result.records[:2], result.records[2:]):
        np.testing.assert_array_equal(entry.boxes, copy.boxes)  # of the stored image


@pytest.mark.parametrize("flip", ["random", "none"])
def test_only_flip_double_makes_copies(flip):
    result = prepare_training_set(dataset(plain(2, image_id="a"), classes=2), data(flip=flip))
    assert [(entry.id, entry.flipped) for entry in result.records] == [("a", False)]


@pytest.mark.parametrize("keep_empty", [False, True])
@pytest.mark.parametrize("records", [[], [record()], [plain(2, image_id="a", hard={0, 1})]])
def test_a_set_without_objects_is_refused(records, keep_empty):
    with pytest.raises(InputError, match="hand made: no image has an object to train on"):
        prepared(records, keep_empty=keep_empty)


def test_notes_of_the_reader_stay_and_the_set_that_is_evaluated_is_untouched():
    images = [plain(2, image_id="a", hard={0}), record(image_id="bare")]
    original = dataset(*images, classes=2)._replace(notes=("clipped: 1",))
    result = prepare_training_set(original, data())
    assert result.notes[0] == "clipped: 1" and len(result.notes) == 3
    assert len(original.records) == 2 and len(original.records[0].boxes) == 2
