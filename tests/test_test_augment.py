"""Test-time augmentation: the versions of an image, and the detections merged from all of them."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import oracles
import pytest
import tiny

from fasterrcnn_jax.config import ImageConfig, ModelConfig, TtaConfig
from fasterrcnn_jax.data.records import ImageDetections
from fasterrcnn_jax.inference.augmentation import merged, views
from fasterrcnn_jax.inference.dataset import detect_dataset
from fasterrcnn_jax.inference.prediction import predict
from fasterrcnn_jax.models.detector import Detector

FLIP, SCALES = TtaConfig(flip=True), TtaConfig(scales=(0.5,))


@pytest.fixture(scope="module", autouse=True)
def environment():
    with tiny.quick_compilation():
        yield


@pytest.fixture(scope="module")
def model(random_weights):
    proposals = dataclasses.replace(tiny.MODEL.test_proposals, min_size=0.0)
    config = dataclasses.replace(tiny.MODEL, test_proposals=proposals)
    return random_weights(lambda: Detector(config, tiny.CLASS_NAMES, rng=np.random.default_rng(0)), seed=1)


def with_augment(model, augment):
    other = copy.copy(model)
    other.config = dataclasses.replace(model.config, test_augment=augment)
    return other


def with_image(model, image):
    other = copy.copy(model)
    other.config = dataclasses.replace(model.config, image=image)
    return other


def photo():
    return tiny.rectangle_image((64, 96), (5, 6, 40, 30), seed=3)


def mirrored(boxes, width):
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)


def joined(model, parts):
    """NMS within each class over all detections, with the textbook loop."""
    boxes, scores, labels = (np.concatenate(column) for column in zip(*parts))
    config = model.config.postprocess
    kept = oracles.greedy_nms(
        boxes, scores, np.ones(len(boxes), bool), iou_threshold=config.nms_threshold, groups=labels
    )[: config.max_detections]
    return boxes[kept], scores[kept], labels[kept]


def assert_same(found, want):
    assert len(found.scores) > 2
    for ours, theirs in zip((found.boxes, found.scores, found.labels), want):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def columns(found):
    return found.boxes, found.scores, found.labels


def test_flip_adds_the_detections_of_the_mirror_image(model):
    plain = predict(model, photo())
    other = predict(model, np.ascontiguousarray(photo()[:, ::-1]))
    want = joined(model, [columns(plain), (mirrored(other.boxes, 96), other.scores, other.labels)])
    assert set(want[1].tolist()) - set(plain.scores.tolist()), "the mirror image adds nothing"
    assert_same(predict(with_augment(model, FLIP), photo()), want)


def test_scales_add_the_detections_of_the_image_in_another_size(model):
    image = dataclasses.replace(model.config.image, short_side=32, long_side=48, canvases=((64, 64),))
    parts = [columns(predict(model, photo())), columns(predict(with_image(model, image), photo()))]
    assert_same(predict(with_augment(model, SCALES), photo()), joined(model, parts))


def test_a_data_set_is_augmented_like_single_images(model, tmp_path):
    # All on one canvas, so that one program serves.
    sizes = (64, 96), (50, 90), (64, 80)
    images = [(tiny.rectangle_image(size, (5, 6, 40, 30), seed=number), [], []) for number, size in enumerate(sizes)]
    data = tiny.dataset(tmp_path, images, class_names=model.class_names)
    both = with_augment(model, FLIP)
    for record, found in zip(data.records, detect_dataset(both, data, batch_size=1)):
        assert_same(found, columns(predict(both, Path(record.path))))


def test_without_augmentation_the_detections_are_those_of_one_pass(model):
    assert [view.image for view in views(model.config)] == [model.config.image]
    rows = ImageDetections(np.float32([[0, 0, 9, 9]] * 2), np.float32([0.5, 0.4]), np.int32([1, 1]))
    assert merged([rows], 96, model.config) is rows  # not even NMS


def test_versions_are_every_scale_plain_and_mirrored():
    config = ModelConfig(test_augment=TtaConfig(flip=True, scales=(0.5,)))
    assert [(view.image.short_side, view.image.long_side, view.flipped) for view in views(config)] == [
        (600, 1000, False),
        (600, 1000, True),
        (300, 500, False),
        (300, 500, True),
    ]


@pytest.mark.parametrize("factor", [0.25, 0.7, 1.3, 2.9])
def test_canvases_of_another_scale_hold_every_image(factor):
    from fasterrcnn_jax.data.transforms import canvas_for

    image = ImageConfig(short_side=99, long_side=160, canvases=((112, 160), (160, 112)))
    for size in ((99, 160), (160, 99), (33, 44), (500, 777), (1000, 10)):
        canvas_for(size, image.scaled(factor))
    assert all(side % 32 == 0 for canvas in image.scaled(factor).canvases for side in canvas)


@pytest.mark.parametrize(
    "scales, message", [((1.0,), "differ"), ((0.5, 0.5), "differ"), ((0.1,), "0.25..4"), ((5.0,), "0.25..4")]
)
def test_scales_out_of_range_are_an_error(scales, message):
    with pytest.raises(ValueError, match=message):
        TtaConfig(scales=scales)


def test_scales_that_need_too_many_pixels_are_an_error():
    image = ImageConfig(short_side=1600, long_side=2000, canvases=((1600, 2016), (2016, 1600)))
    with pytest.raises(ValueError, match="at most 8388608 pixels"):
        ModelConfig(image=image, test_augment=TtaConfig(scales=(2.0,)))
