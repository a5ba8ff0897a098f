"""`data.fast`: simplejpeg decodes the pixels that Pillow decodes, and OpenCV resizes as NumPy does."""

import dataclasses
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import fast_input, loader, transforms
from fasterrcnn_jax.data.images import image_size, read_image, record_pixels
from fasterrcnn_jax.data.records import Dataset, ImageRecord
from fasterrcnn_jax.data.transforms import Placement, draw
from fasterrcnn_jax.errors import InputError

HEIGHT, WIDTH = 37, 53
# Grey levels by which the two resizes may differ: OpenCV rounds its weights in another place.
RESIZE_TOLERANCE = 0.05


@pytest.fixture(scope="module")
def photo():
    """Returns a smooth image with noise, [37, 53, 3], whose sides are no multiples of a block of JPEG."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    smooth = np.stack([x * 4, y * 6, (x + y) * 2], axis=2)
    noise = np.random.default_rng(0).integers(0, 30, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def as_record(path, upright=False):
    none = np.zeros(0)
    size = image_size(path, upright=upright)
    return ImageRecord("a", path, size, np.zeros((0, 4)), none, none, none, none, upright=upright)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


JPEGS = {
    "every second chroma sample": dict(subsampling=2, quality=75),
    "every chroma sample": dict(subsampling=0, quality=95),
    "chroma halved in rows": dict(subsampling=1, quality=60),
    "progressive": dict(progressive=True, quality=80),
    "colours stored as RGB": dict(keep_rgb=True, quality=90),
    "turned by EXIF": dict(exif=exif(6), quality=80),
    "restart markers": dict(restart_marker_blocks=2, quality=80),
}


@pytest.mark.parametrize("name", JPEGS)
def test_the_pixels_of_a_jpeg_are_those_of_pillow(name, photo, tmp_path, decoded):
    path = tmp_path / "a.jpg"
    Image.fromarray(photo).save(path, **JPEGS[name])
    for upright in (False, True):
        np.testing.assert_array_equal(
            record_pixels(as_record(path, upright), fast=True), read_image(path, upright=upright)
        )
    assert decoded == [True, True]


@pytest.fixture
def decoded(monkeypatch):
    """Returns a list that holds, for each file given to simplejpeg, whether it decoded the file."""
    answers, decode = [], fast_input.decoded_jpeg

    def spy(content):
        pixels = decode(content)
        answers.append(pixels is not None)
        return pixels

    monkeypatch.setattr(fast_input, "decoded_jpeg", spy)
    return answers


def test_a_grey_jpeg_has_three_equal_channels(photo, tmp_path, decoded):
    Image.fromarray(photo[..., 0]).save(tmp_path / "a.jpg")
    np.testing.assert_array_equal(
        record_pixels(as_record(tmp_path / "a.jpg"), fast=True), read_image(tmp_path / "a.jpg")
    )
    assert decoded == [True]


@pytest.mark.parametrize("mode, suffix", [("CMYK", "jpg"), ("RGB", "png"), ("P", "png"), ("RGB", "webp")])
def test_pillow_decodes_the_other_kinds(mode, suffix, photo, tmp_path, decoded):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(photo).convert(mode).save(path)
    np.testing.assert_array_equal(record_pixels(as_record(path), fast=True), read_image(path))
    assert decoded == []


def test_a_damaged_jpeg_is_treated_as_without_the_fast_decoder(photo, tmp_path, decoded):
    """A file that ends early is refused with the known sentence; unknown bytes between segments are read over."""
    path = tmp_path / "a.jpg"
    Image.fromarray(photo).save(path, quality=90)
    content = path.read_bytes()
    record = as_record(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError) as plain:
        record_pixels(record)
    with pytest.raises(InputError) as fast:
        record_pixels(record, fast=True)
    assert str(fast.value) == str(plain.value)
    table = content.index(b"\xff\xdb")
    path.write_bytes(content[:table] + b"\x00\x01\x02" + content[table:])
    np.testing.assert_array_equal(record_pixels(record, fast=True), record_pixels(record))
    assert decoded == [False, False]


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize(
    "before, placement",
    [
        ((48, 64), Placement((48, 64))),
        ((30, 41), Placement((64, 87))),
        ((190, 301), Placement((61, 96))),
        ((1, 9), Placement((3, 96))),
        ((120, 70), Placement((150, 101), (40, 5))),  # a part of the image is on the canvas
    ],
)
def test_the_canvas_is_that_of_numpy(before, placement, order):
    image = np.random.default_rng(1).integers(0, 256, (*before, 3), dtype=np.uint8)
    config = dataclasses.replace(tiny.IMAGE, channel_order=order, mean=(10.0, 20.0, 30.0), std=(1.0, 1.0, 1.0))
    plain, fast = np.zeros((2, 64, 96, 3), np.float32)
    draw(plain, image, config, placement)
    draw(fast, image, config, placement, fast=True)
    assert plain.any()
    np.testing.assert_allclose(fast, plain, rtol=0, atol=RESIZE_TOLERANCE)


def test_opencv_mirrors_as_numpy_does(photo):
    np.testing.assert_array_equal(fast_input.mirrored(photo), transforms.flip_pixels(photo))


def test_a_very_large_image_is_resized_by_numpy_to_save_memory(monkeypatch):
    monkeypatch.setattr(transforms, "MOST_PIXELS", 99)
    monkeypatch.setattr(fast_input, "resized", lambda *_, **__: pytest.fail("OpenCV was called"))
    draw(np.zeros((64, 96, 3), np.float32), np.zeros((10, 10, 3), np.uint8), tiny.IMAGE, Placement((5, 5)), fast=True)


@pytest.fixture
def dataset(tmp_path, photo):
    """Returns two JPEG files with one box each, as a data set, and its configuration."""
    records = []
    for number in range(2):
        path = tmp_path / f"{number}.jpg"
        Image.fromarray(np.roll(photo, number, axis=1)).save(path, quality=80)
        boxes, flags = np.array([[2, 3, 20, 30]], np.float32), np.zeros(1, bool)
        record = as_record(path)._replace(id=str(number), boxes=boxes, labels=np.ones(1, np.int32))
        records.append(record._replace(difficult=flags, crowd=flags, area=np.ones(1)))
    data = DataConfig(root=tmp_path, class_names=("thing",), flip="random", crop_aspect=None)
    return Dataset("two", ("thing",), tuple(records), (), (1,)), data


@pytest.mark.parametrize("cache_mb", [0, 1])
def test_training_batches_are_the_same_but_for_the_rounding_of_the_resize(dataset, cache_mb, decoded):
    dataset, data = dataset
    options = dict(batch_size=2, seed=0, steps=3)
    plain = list(loader.training_batches(dataset, data, tiny.IMAGE, **options))
    assert decoded == []
    data = dataclasses.replace(data, fast=True, cache_mb=cache_mb)
    fast = list(loader.training_batches(dataset, data, tiny.IMAGE, **options))
    assert len(decoded) >= 2 and all(decoded)
    for mine, theirs in zip(fast, plain, strict=True):
        np.testing.assert_allclose(mine.images, theirs.images, rtol=0, atol=RESIZE_TOLERANCE / min(tiny.IMAGE.std))
        np.testing.assert_array_equal(mine.ground_truth.boxes, theirs.ground_truth.boxes)
    assert any(np.any(mine.images != theirs.images) for mine, theirs in zip(fast, plain, strict=True))


@pytest.mark.parametrize("module", ["simplejpeg", "cv2"])
def test_a_missing_package_is_named_before_the_first_batch(dataset, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    dataset, data = dataset
    with pytest.raises(InputError, match=r"data\.fast needs simplejpeg and OpenCV; run pip install 'fasterrcnn_jax\[f"):
        loader.training_batches(
            dataset, dataclasses.replace(data, fast=True), tiny.IMAGE, batch_size=2, seed=0, steps=1
        )
    loader.training_batches(dataset, data, tiny.IMAGE, batch_size=2, seed=0, steps=1)
