"""`preprocess` and `predict` inside programs: equal to the host, differentiable, and without a call to the host.

The tolerances were fixed before the first comparison. Sampling points of float32 in an image of at most 1024 pixels per
side are off by at most 1.2e-4 pixels per axis, which is 0.06 grey levels between black and white.
"""

import copy
import dataclasses
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from PIL import Image

from fasterrcnn_jax.config import ImageConfig, TtaConfig
from fasterrcnn_jax.data.transforms import network_size
from fasterrcnn_jax.inference.prediction import predict, preprocess
from fasterrcnn_jax.models.detector import with_image_config
from fasterrcnn_jax.models.faster_rcnn import detect
from fasterrcnn_jax.ops.resizing import traced_network_size
from fasterrcnn_jax.structures import Detections

GREY_LEVELS = 0.1  # between the host's resized pixels and the device's, before the division by std
SCORE, PIXELS = 1e-3, 0.05  # between detections; pixels of the original image

GENERATOR = np.random.default_rng(7)
SIZES = [
    (64, 96),
    (50, 90),
    (96, 64),
    (60, 60),
    (40, 44),
    (128, 190),
    (1, 7),
    (300, 211),
    (33, 200),
    (65, 97),
    (96, 96),
    (81, 72),
]


def smooth(height, width, seed):
    """Returns a random image with structure on several scales."""
    generator = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for cells in (3, 12):
        small = generator.integers(0, 128, (cells, cells, 3), dtype=np.uint8)
        image += np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), float)
    return np.clip(image, 0, 255).astype(np.uint8)


PHOTOS = [
    np.asarray(Image.open(path).convert("RGB")) for path in sorted((Path(__file__).parent / "photos").glob("*.jpg"))
]
IMAGES = [smooth(*size, seed) for seed, size in enumerate(SIZES)]
IMAGES += [tiny.rectangle_image(size, (5, 1, 30, 28), seed=3) for size in ((70, 50), (64, 64), (47, 333))] + PHOTOS


@pytest.fixture(scope="module", autouse=True)
def environment():
    with tiny.quick_compilation():
        yield


@pytest.fixture(scope="module")
def model(random_weights):
    return tiny.quick_model(random_weights)[0]


@pytest.fixture(scope="module")
def byte_model(model):
    image = dataclasses.replace(tiny.IMAGE, pixel_dtype="uint8")
    return with_image_config(model, image)


@pytest.mark.parametrize("rounding", ["nearest", "down"])
@given(st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), min_size=30, max_size=30))
def test_a_traced_size_is_resized_to_the_very_size_of_the_host(rounding, sizes):
    config = ImageConfig(short_side=800, long_side=1333, size_rounding=rounding, canvases=((1344, 1344),))
    found = jax.vmap(lambda size: traced_network_size(size, config))(jnp.asarray(sizes, jnp.int32))
    assert found.tolist() == [list(network_size(size, config)) for size in sizes]


def test_sizes_with_a_side_that_comes_out_whole_are_not_a_pixel_short():
    """With a scale rounded to a double, 149 * (1333 / 149) is below 1333."""
    config = ImageConfig(short_side=800, long_side=1333, size_rounding="down", canvases=((1344, 1344),))
    sizes = [(20, 149), (311, 20), (20, 317)]
    found = jax.vmap(lambda size: traced_network_size(size, config))(jnp.asarray(sizes, jnp.int32))
    assert found.tolist() == [list(network_size(size, config)) for size in sizes]
    assert [max(size) for size in found.tolist()] == [1333] * 3


@pytest.mark.parametrize("order, dtype", [("rgb", "float32"), ("bgr", "float32"), ("rgb", "uint8")])
def test_pixels_on_the_device_equal_those_of_the_host(order, dtype):
    config = dataclasses.replace(tiny.IMAGE, channel_order=order, pixel_dtype=dtype)
    unit = 1.0 if dtype == "uint8" else GREY_LEVELS / np.asarray(config.std)
    for image in IMAGES:
        expected = preprocess(image, config)
        found = preprocess(jnp.asarray(image), config)
        assert found[0].dtype == expected[0].dtype == dtype and isinstance(found[0], jax.Array)
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[2], expected[2])
        error = np.abs(np.asarray(found[0], np.float64) - expected[0])
        assert (error <= unit).all(), (image.shape, error.max())
        assert (error > 0).mean() < 0.02 or dtype == "float32"


def test_every_usual_kind_of_array_is_read_as_on_the_host():
    image = IMAGES[1]
    alpha = np.concatenate([image, image[..., :1]], axis=2)
    for given_image in (
        image,
        image[..., 0],
        image[..., :1],
        alpha,
        image[..., 0] > 128,
        image[None],
        alpha[None, ..., :1],
    ):
        for one, other in zip(preprocess(jnp.asarray(given_image), tiny.IMAGE), preprocess(given_image, tiny.IMAGE)):
            np.testing.assert_allclose(one, other, atol=GREY_LEVELS / min(tiny.IMAGE.std))
    for dtype in (jnp.float32, jnp.bfloat16):  # bfloat16 holds every whole number up to 256
        floats = preprocess(jnp.asarray(image).astype(dtype), tiny.IMAGE)[0]
        np.testing.assert_array_equal(floats, preprocess(jnp.asarray(image), tiny.IMAGE)[0])


CANVAS = ImageConfig(short_side=64, long_side=96, canvases=((64, 96), (96, 64), (96, 96)), std=(50.0, 60.0, 70.0))


def test_one_program_takes_images_of_any_size_on_one_canvas():
    """The size is an array, so the program is compiled once; pixels beyond the image are never read."""
    compiled = []

    @jax.jit
    def prepare(pixels, size):
        compiled.append(pixels.shape)
        return preprocess(pixels, CANVAS, size=size, canvas=(96, 96))

    for image in IMAGES:
        height, width = image.shape[:2]
        if height > 224 or width > 224:
            continue
        canvas = np.full((1, 224, 224, 3), 255, np.uint8)
        canvas[0, :height, :width] = image
        found = prepare(canvas, np.int32([(height, width)]))
        expected = preprocess(image, CANVAS)
        shown = tuple(int(side) for side in expected[1][0])
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[2], expected[2])
        inside = np.asarray(found[0])[0, : shown[0], : shown[1]]
        np.testing.assert_allclose(inside, expected[0][0, : shown[0], : shown[1]], atol=GREY_LEVELS / 50)
        assert not np.asarray(found[0])[0, shown[0] :].any() and not np.asarray(found[0])[0, :, shown[1] :].any()
    assert len(compiled) == 1


def test_an_image_that_does_not_fit_on_the_canvas_is_resized_until_it_does():
    image = smooth(90, 60, 0)
    pixels, image_hw, scale = preprocess(jnp.asarray(image), CANVAS, canvas=(64, 96))
    assert pixels.shape == (1, 64, 96, 3) and image_hw.tolist() == [[64, 42]]
    np.testing.assert_allclose(scale, [[64 / 90, 42 / 60]], rtol=1e-6)
    # The whole image is there: its mean is that of the original.
    shown = np.asarray(pixels)[0, :64, :42] * np.asarray(CANVAS.std) + np.asarray(CANVAS.mean)
    np.testing.assert_allclose(shown.mean((0, 1)), image[..., ::-1].mean((0, 1)), atol=1.5)


def test_a_size_of_zero_gives_the_empty_row_of_the_loader():
    canvas = np.full((2, 40, 50, 3), 200, np.uint8)
    pixels, image_hw, scale = preprocess(jnp.asarray(canvas), CANVAS, size=np.int32([(0, 0), (40, 50)]))
    assert not np.asarray(pixels[0]).any() and np.asarray(pixels[1]).any()
    assert image_hw[0].tolist() == [0, 0] and scale[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    "size, canvas, said",
    [
        (np.int32([(41, 50)]), None, r"size must lie within the array, 40 x 50 pixels, got \[\[41, 50\]\]"),
        (np.int32([(-1, 50)]), None, r"got \[\[-1, 50\]\]"),
        (np.float32([(40, 50)]), None, r"whole numbers \[1, 2\], got float32 \[1, 2\]"),
        (np.int32([(40, 50)] * 2), None, r"got int32 \[2, 2\]"),
        (None, (64, 64), r"canvas must be one of model.image.canvases = .*, got \(64, 64\)"),
    ],
)
def test_a_size_or_canvas_that_is_out_of_range_is_refused(size, canvas, said):
    with pytest.raises(ValueError, match=said):
        # Without the tests' type checker, as users run it.
        inspect.unwrap(preprocess)(jnp.zeros((1, 40, 50, 3), jnp.uint8), CANVAS, size=size, canvas=canvas)


def test_size_and_canvas_are_for_one_array():
    with pytest.raises(ValueError, match="images must be one array where size or canvas is given, got list"):
        preprocess([np.zeros((4, 5, 3), np.uint8)], CANVAS, canvas=(64, 96))


def test_floats_of_the_host_have_the_same_rules_with_a_canvas_as_without():
    image = smooth(64, 96, 3)
    unit = np.float32(image) / 255
    expected = preprocess(unit, CANVAS)
    for options in (dict(canvas=(64, 96)), dict(size=np.int32([(64, 96)]))):
        found = preprocess(unit, CANVAS, **options)
        np.testing.assert_allclose(found[0], expected[0], atol=GREY_LEVELS / 50)
        np.testing.assert_array_equal(found[1], expected[1])
    for options in ({}, dict(canvas=(64, 96)), dict(size=np.int32([(64, 96)]))):
        with pytest.raises(ValueError, match="values from .*, which must lie in 0..1; divide values of 0..255 by 255"):
            preprocess(np.float32(image), CANVAS, **options)
    assert preprocess(np.zeros((0, 8, 9, 3), np.uint8), CANVAS, canvas=(64, 96))[0].shape == (0, 64, 96, 3)


def test_size_and_canvas_may_be_lists():
    image = smooth(64, 96, 3)
    expected = preprocess(image, CANVAS, size=np.int32([(40, 50)]), canvas=(64, 96))
    found = preprocess(image, CANVAS, size=[(40, 50)], canvas=[64, 96])
    traced = jax.jit(lambda height: preprocess(image, CANVAS, size=[height, 50], canvas=[64, 96]))(40)
    for one, two, three in zip(expected, found, traced, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, three, atol=1e-5)


def assert_equal_detections(found, expected):
    """Compares `Detections` of one image with a `Prediction`."""
    valid = np.asarray(found.valid)
    assert valid.sum() == len(expected.scores) and valid[: valid.sum()].all()
    np.testing.assert_array_equal(np.asarray(found.labels)[valid], expected.labels)
    np.testing.assert_allclose(np.asarray(found.scores)[valid], expected.scores, atol=SCORE)
    np.testing.assert_allclose(np.asarray(found.boxes)[valid], expected.boxes, atol=PIXELS)
    assert not np.asarray(found.boxes)[~valid].any() and not np.asarray(found.scores)[~valid].any()


def assert_same_as_on_the_host(model, images):
    boxes = 0
    for image in images:
        found = predict(model, jnp.asarray(image))
        assert isinstance(found, Detections)
        expected = predict(model, image)
        assert_equal_detections(found, expected)
        boxes += len(expected.scores)
    assert boxes > 3 * len(images)


def test_boxes_of_a_program_equal_those_of_predict_on_the_host_in_20_images(model):
    images = [smooth(*size, seed) for size in ((50, 70), (128, 90), (64, 96)) for seed in range(5)] + PHOTOS
    assert len(images) == 20
    assert_same_as_on_the_host(model, images)


@pytest.mark.slow
def test_boxes_of_a_program_equal_those_of_predict_on_the_host_in_images_of_any_size(model):
    assert_same_as_on_the_host(model, IMAGES)


def test_a_device_array_gives_detections_without_jit_and_a_batch_has_its_axis(model):
    batch = np.stack([IMAGES[1], IMAGES[1][::-1], IMAGES[1][:, ::-1]])
    expected = predict(model, batch)
    for size in (1, 2, 3):  # two batches of 2 with one empty row
        found = predict(model, jnp.asarray(batch), batch_size=size)
        assert isinstance(found, Detections) and found.boxes.shape == (3, 6, 4)
        for row, of_host in enumerate(expected):
            assert_equal_detections(jax.tree.map(lambda leaf, row=row: leaf[row], found), of_host)
    assert predict(model, jnp.zeros((0, 20, 30, 3), jnp.uint8)).valid.shape == (0, 6)


def test_the_score_threshold_leaves_out_the_same_detections(model):
    image = IMAGES[0]
    scores = predict(model, image).scores
    threshold = float(scores[1] + scores[2]) / 2
    assert_equal_detections(
        predict(model, jnp.asarray(image), score_threshold=threshold), predict(model, image, score_threshold=threshold)
    )


def test_a_traced_score_threshold_leaves_out_the_same_detections(model):
    image = jnp.asarray(IMAGES[0])
    scores = predict(model, IMAGES[0]).scores
    threshold = float(scores[1] + scores[2]) / 2
    found = jax.jit(predict)(model, image, score_threshold=threshold)
    expected = predict(model, image, score_threshold=threshold)
    assert 0 < found.valid.sum() < len(scores)
    np.testing.assert_array_equal(found.valid, expected.valid)
    with pytest.raises(ValueError, match="score_threshold must lie in 0..1, got 1.5"):
        predict(model, image, score_threshold=1.5)


@pytest.mark.parametrize("augment, passes", [(TtaConfig(flip=True), 2), (TtaConfig(scales=(0.5, 2.0)), 3)])
def test_a_model_with_several_passes_is_refused_on_the_device(model, augment, passes):
    several = copy.copy(model)
    several.config = dataclasses.replace(model.config, test_augment=augment)
    with pytest.raises(ValueError, match=f"is one pass; model.test_augment asks for {passes}: give NumPy"):
        predict(several, jnp.asarray(IMAGES[0]))
    with pytest.raises(ValueError, match="of a JAX array is one pass"):
        jax.jit(lambda image: predict(several, image))(IMAGES[0])


def test_no_operation_of_the_program_calls_the_host(model):
    """Neither a callback nor a transfer: XLA's names for them are the targets of custom calls, and these operations."""
    text = jax.jit(predict).lower(model, IMAGES[0]).compile().as_text()
    assert re.search(r"u8\[64,96,3\]", text), "the program does not start from bytes"
    targets = set(re.findall(r'custom_call_target="([^"]*)"', text))
    assert not {name for name in targets if re.search("callback|python|host", name, re.IGNORECASE)}, targets
    assert not re.search(r"= \S+ (infeed|outfeed|send|recv|send-done|recv-done)\(", text)

    def with_callback(model, image):
        image = jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(image.shape, image.dtype), image)
        return predict(model, image)

    text = jax.jit(with_callback).lower(model, IMAGES[0]).compile().as_text()
    targets = re.findall(r'custom_call_target="([^"]*)"', text)
    assert [name for name in targets if re.search("callback|python|host", name, re.IGNORECASE)], (
        "the check sees nothing"
    )


@pytest.fixture(scope="module")
def four(model):
    images = np.stack([smooth(50, 70, seed) for seed in range(4)])
    return images, [predict(model, image) for image in images]


def assert_rows(found, expected):
    for row, of_host in enumerate(expected):
        assert_equal_detections(jax.tree.map(lambda leaf, row=row: leaf[row], found), of_host)


def test_vmap_and_map_over_images(model, four):
    images, expected = four
    assert_rows(jax.vmap(lambda image: predict(model, image))(jnp.asarray(images)), expected)
    assert_rows(jax.jit(lambda model, x: lax.map(lambda image: predict(model, image), x))(model, images), expected)


@pytest.mark.skipif(jax.local_device_count() < 4, reason="needs four devices")
def test_pmap_over_images(model, four):
    images, expected = four
    assert_rows(jax.pmap(predict, in_axes=(None, 0))(model, images), expected)


jitted_predict = jax.jit(predict)


def best_score(model, image):
    return predict(model, image).scores[0]


def by_jax(model, image):
    """Returns the best score through JAX's own resize, with a canvas that the image fills."""
    config = model.config.image
    resized = jax.image.resize(image, (*network_size(image.shape[:2], config), 3), "bilinear", antialias=False)
    assert resized.shape == (64, 96, 3)
    mean, std = (jnp.asarray(values, jnp.float32)[None, None, None] for values in (config.mean, config.std))
    image_hw, scale = jnp.float32([[64, 96]]), jnp.float32([[64 / 32, 96 / 48]])
    return detect(model, (resized[None] - mean) / std, image_hw, scale).scores[0, 0]


def test_the_gradient_of_a_score_reaches_the_grey_levels_of_the_image(model):
    """Values in 0..255. The oracle is the same gradient through JAX's own resize."""
    image = jnp.asarray(smooth(32, 48, 5), jnp.float32)
    score, gradient = jax.jit(jax.value_and_grad(best_score, argnums=1))(model, image)
    expected_score, expected = jax.jit(jax.value_and_grad(by_jax, argnums=1))(model, image)
    np.testing.assert_allclose(score, expected_score, atol=SCORE)
    assert gradient.shape == image.shape and float(jnp.linalg.norm(expected)) > 0
    assert float(jnp.linalg.norm(gradient - expected)) <= 1e-3 * float(jnp.linalg.norm(expected))


def test_a_model_of_bytes_has_a_gradient_too(byte_model):
    """Bytes have none: the rounding is passed over."""
    image = jnp.asarray(smooth(32, 48, 5), jnp.float32)
    gradient = jax.jit(jax.grad(best_score, argnums=1))(byte_model, image)
    assert np.isfinite(gradient).all() and float(jnp.abs(gradient).max()) > 0
    # Without a gradient, floats give the boxes of bytes.
    found, expected = predict(byte_model, image), predict(byte_model, image.astype(jnp.uint8))
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=PIXELS)
    np.testing.assert_allclose(found.scores, expected.scores, atol=SCORE)


def test_the_gradient_passes_the_resize_with_its_transposed_weights():
    """The resize is linear, so the gradient of a sum over pixels is the sum of the weights of each source pixel."""
    config = dataclasses.replace(tiny.IMAGE, std=(1.0, 1.0, 1.0), mean=(0.0, 0.0, 0.0))

    def total(image):
        return preprocess(image, config)[0].sum()

    gradient = jax.grad(total)(jnp.full((30, 40, 3), 100.0))
    pixels, image_hw, _ = preprocess(jnp.full((30, 40, 3), 100.0), config)
    np.testing.assert_allclose(gradient.sum(), image_hw[0].prod() * 3, rtol=1e-5)
    np.testing.assert_allclose(float(pixels.sum()), 100.0 * float(gradient.sum()), rtol=1e-5)


def test_the_gradient_with_respect_to_the_model_takes_an_image_of_the_host(model):
    gradient = jax.eval_shape(jax.grad(lambda model: best_score(model, IMAGES[0])), model)
    assert len(jax.tree.leaves(gradient)) == len(jax.tree.leaves(model))


def test_a_forward_mode_derivative_says_why_there_is_none(model):
    image = jnp.asarray(IMAGES[0], jnp.float32)
    with pytest.raises(TypeError, match="no forward-mode derivative .* reverse mode only; use jax.grad"):
        jax.jvp(lambda x: best_score(model, x), (image,), (image,))


def test_a_list_that_is_traced_is_refused_in_one_sentence_that_names_detect(model):
    images = [jnp.asarray(image) for image in IMAGES[:2]]
    with pytest.raises(ValueError, match="predict cannot trace a list of images, .* call detect with") as caught:
        jax.jit(predict)(model, images)
    assert "\n" not in str(caught.value) and ". " not in str(caught.value)
    with pytest.raises(ValueError, match="cannot trace an image of type PosixPath, .* call detect"):
        jax.jit(lambda model: predict(model, Path("image.jpg")))(model)


@pytest.mark.parametrize(
    "values, said",
    [
        (np.linspace(0, 1, 60), "values from 0 to 1; in a JAX array they must be those of uint8, .* of 0..1 by 255"),
        (np.linspace(-2, 2.6, 60), "values from -2 to 2.6; .* not normalised"),
        (np.append(np.arange(59.0), np.nan), "values from nan to nan"),
        (np.linspace(0, 300, 60), "values from 0 to 300"),
    ],
)
def test_floats_that_are_no_grey_levels_are_refused_or_give_scores_that_are_nan(model, values, said):
    image = np.float32(np.resize(values, (32, 48, 3)))
    with pytest.raises(ValueError, match=said):
        predict(model, jnp.asarray(image))
    found = jitted_predict(model, image)
    assert not found.valid.any() and np.isnan(found.scores).all() and not np.isnan(found.boxes).any()


def test_integers_of_other_types_are_refused_while_tracing(model):
    with pytest.raises(ValueError, match="must have uint8, bool or floating-point values, got int32"):
        jax.jit(predict)(model, jnp.zeros((8, 9, 3), jnp.int32))


def test_images_of_several_sizes_on_one_canvas_give_the_boxes_of_predict(model):
    """What the sentence about lists recommends."""
    images = [image for image in IMAGES if max(image.shape[:2]) <= 96 and image.shape[1] > image.shape[0]]
    pixels, sizes = np.zeros((len(images), 96, 96, 3), np.uint8), np.int32([image.shape[:2] for image in images])
    for row, image in enumerate(images):
        pixels[row, : image.shape[0], : image.shape[1]] = image

    @jax.jit
    def boxes_of(model, pixels, sizes):
        canvases, image_hw, scale = preprocess(pixels, model.config.image, size=sizes, canvas=(64, 96))
        found = detect(model, canvases, image_hw, scale)
        return found._replace(boxes=found.boxes / jnp.tile(scale[:, None, ::-1], 2))

    found = boxes_of(model, pixels, sizes)
    assert len(images) >= 3
    assert_rows(found, [predict(model, image) for image in images])
