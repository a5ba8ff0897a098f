"""uint8 images from the host, normalised on the device: the network gets the same input as from float images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fasterrcnn_jax.config import ImageConfig
from fasterrcnn_jax.inference import prediction
from fasterrcnn_jax.inference.prediction import predict, preprocess
from fasterrcnn_jax.models.detector import Detector, shared_features
from fasterrcnn_jax.models.faster_rcnn import training_losses
from fasterrcnn_jax.models.layers import normalised
from fasterrcnn_jax.structures import Batch, Detections, GroundTruth

BYTES = dataclasses.replace(tiny.IMAGE, pixel_dtype="uint8")


def on_canvas(seed=0):
    """Returns a batch of two canvases with images of other sizes, and the sizes."""
    images = np.zeros((2, 64, 96, 3), np.uint8)
    image_hw = np.float32([[64, 50], [33, 96]])
    for pixels, (height, width) in zip(images, image_hw.astype(int)):
        pixels[:height, :width] = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return images, image_hw


def by_numpy(images, image_hw, config):
    result = (images - np.float32(config.mean)) / np.float32(config.std)
    for pixels, (height, width) in zip(result, image_hw.astype(int)):
        pixels[height:], pixels[:, width:] = 0, 0
    return result


@pytest.mark.parametrize("config", [BYTES, ImageConfig(pixel_dtype="uint8")])
def test_bytes_are_normalised_in_the_image_and_the_padding_stays_zero(config):
    images, image_hw = on_canvas()
    found = normalised(jnp.asarray(images), jnp.asarray(image_hw), config)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, by_numpy(images, image_hw, config), rtol=1e-6, atol=1e-6)
    assert not found[0, :, 50:].any() and not found[1, 33:].any()


def test_float_images_are_not_changed():
    images = jnp.ones((1, 64, 96, 3))
    assert normalised(images, jnp.float32([[64, 96]]), tiny.IMAGE) is images


@pytest.mark.parametrize("config, given", [(tiny.IMAGE, np.uint8), (BYTES, np.float32)])
def test_images_of_the_other_type_are_refused(config, given):
    with pytest.raises(TypeError, match=f"images must be {config.pixel_dtype} .*got {np.dtype(given).name}"):
        normalised(jnp.zeros((1, 64, 96, 3), given), jnp.float32([[64, 96]]), config)


@pytest.fixture(scope="module")
def models(random_weights):
    """Returns two detectors with the same weights, the second for bytes; padding is not masked, to show errors."""
    backbone = dataclasses.replace(tiny.MODEL.backbone, mask_padding=False)
    plain = dataclasses.replace(tiny.MODEL, backbone=backbone)
    return [
        random_weights(lambda config=config: Detector(config, tiny.CLASS_NAMES, rng=np.random.default_rng(0)))
        for config in (plain, dataclasses.replace(plain, image=BYTES))
    ]


def test_features_of_bytes_equal_features_of_floats(models):
    images, image_hw = on_canvas()
    stored = by_numpy(images, image_hw, tiny.IMAGE), images
    with tiny.quick_compilation():
        plain, of_bytes = (
            jax.jit(shared_features)(model, jnp.asarray(pixels), jnp.asarray(image_hw))
            for model, pixels in zip(models, stored)
        )
    for level, other in zip(plain, of_bytes, strict=True):
        np.testing.assert_allclose(level, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(level).max()))


def test_predict_and_preprocess_make_the_images_the_model_asks_for(models, monkeypatch):
    """Both make bytes for a model of bytes, and both make the same images."""
    sent = []

    def nothing(model, images, image_hw, scale, *, implementation):
        sent.append(images)
        boxes, numbers = np.zeros((1, 1, 4), np.float32), np.zeros((1, 1), np.float32)
        return Detections(boxes, numbers, numbers.astype(np.int32), numbers.astype(bool))

    monkeypatch.setattr(prediction, "jitted_detect", nothing)
    pixels = tiny.rectangle_image((50, 70), (10, 12, 40, 44))
    for model, dtype in zip(models, (np.float32, np.uint8)):
        assert len(predict(model, pixels).boxes) == 0
        images, image_hw, scale = preprocess(pixels, model.config.image)
        assert images.dtype == sent[-1].dtype == dtype
        np.testing.assert_array_equal(images, sent[-1])


def test_training_takes_bytes(models):
    images, image_hw = on_canvas()
    truth = GroundTruth(np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.int32), np.zeros((2, 3), bool))
    rows = dict(image_index=np.arange(2, dtype=np.int32), image_valid=np.ones(2, bool))
    batch = Batch(images, image_hw, np.ones((2, 2), np.float32), ground_truth=truth, **rows)
    losses = jax.eval_shape(training_losses, models[1], batch, jax.random.key(0))
    assert losses.rpn_box.sum.dtype == jnp.float32
