"""Tests decoding: every kind of image file gives uint8 [H, W, 3] or an error with the file name."""

import io
import struct
import warnings
from collections import defaultdict

import budget
import hostile_images
import numpy as np
import pytest
from PIL import Image, ImageOps

from fasterrcnn_jax.data.images import GREY_16, annotated_frame, image_size, read_image, record_pixels
from fasterrcnn_jax.data.records import ImageRecord
from fasterrcnn_jax.errors import InputError

HEIGHT, WIDTH = 20, 30

# Pillow knows the format, and would start Ghostscript to decode it.
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def rgb():
    """Returns uint8 [20, 30, 3] in which every pixel differs from its neighbours."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 8, y * 12, (x + y) * 5], axis=2).astype(np.uint8)


def test_png_pixels_come_back_exactly(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), rgb)


def test_result_is_writable_contiguous_uint8(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.jpg")
    pixels = read_image(tmp_path / "a.jpg")
    assert pixels.dtype == np.uint8 and pixels.flags.writeable and pixels.flags.c_contiguous


def test_size_is_height_then_width(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert image_size(tmp_path / "a.png") == (HEIGHT, WIDTH)
    assert image_size(str(tmp_path / "a.png")) == (HEIGHT, WIDTH)


def test_format_follows_content_not_name(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.jpg", format="PNG")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), rgb)


def test_grey_is_repeated_in_three_channels(tmp_path, rgb):
    Image.fromarray(rgb[..., 0]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.repeat(rgb[..., :1], 3, axis=2))


def test_one_bit_image_becomes_black_and_white(tmp_path):
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[..., 2], np.eye(8, dtype=np.uint8) * 255)


def test_alpha_is_dropped_and_colour_below_it_kept(tmp_path, rgb):
    alpha = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    Image.fromarray(np.concatenate([rgb, alpha], axis=2)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), rgb)


def test_grey_with_alpha_is_grey(tmp_path, rgb):
    Image.fromarray(np.stack([rgb[..., 0], np.zeros_like(rgb[..., 0])], axis=2)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.repeat(rgb[..., :1], 3, axis=2))


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])])
def test_palette_is_expanded_without_a_warning(tmp_path, transparency):
    image = Image.fromarray((np.indices((6, 9)).sum(0) % 3).astype(np.uint8))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read_image(tmp_path / "a.png")
    assert pixels.shape == (6, 9, 3)
    np.testing.assert_array_equal(pixels[0, :3], [[255, 0, 0], [0, 255, 0], [0, 0, 255]])


def test_cmyk_jpeg_keeps_red_red(tmp_path):
    red = Image.new("RGB", (32, 16), (220, 20, 20)).convert("CMYK")
    red.save(tmp_path / "a.jpg", quality=95)
    pixels = read_image(tmp_path / "a.jpg")
    assert pixels.shape == (16, 32, 3)
    np.testing.assert_allclose(pixels.mean((0, 1)), [220, 20, 20], atol=6)


def test_sixteen_bit_grey_is_rescaled_not_clipped(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (4, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png")
    assert pixels.dtype == np.uint8 and pixels.shape == (4, 64, 3)
    np.testing.assert_array_equal(pixels[0, :, 1], ramp[0] // 256)


@pytest.mark.parametrize("most, divisor", [(4095, 16), (4096, 256), (300, 16)])
def test_grey_of_twelve_bits_keeps_its_contrast(most, divisor, tmp_path):
    ramp = np.tile(np.linspace(0, most, 64).astype(np.uint16), (4, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0, :, 1], ramp[0] // divisor)
    found = defaultdict(list)
    annotated_frame(tmp_path / "a.png", None, "", found)
    assert found == {GREY_16: [str(tmp_path / "a.png")]}


def test_float_image_is_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="a.tif.*floating point"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_where_asked_for_as_viewers_do(tmp_path, rgb, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / name, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
    stored = read_image(tmp_path / name)
    assert image_size(tmp_path / name) == stored.shape[:2] == (HEIGHT, WIDTH)
    shown = np.array(ImageOps.exif_transpose(Image.open(tmp_path / name)).convert("RGB"))
    upright = read_image(tmp_path / name, upright=True)
    np.testing.assert_array_equal(upright, shown)
    assert upright.flags.c_contiguous and upright.flags.writeable
    assert image_size(tmp_path / name, upright=True) == shown.shape[:2]
    assert np.array_equal(upright, stored) == (orientation == 1)


def block(order, *, entries=1, tag=0x0112, kind=3, count=1, value=6, start=8):
    """Returns an EXIF block with one directory of one entry, in TIFF layout."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    body = struct.pack(f"{order}HHHIHH", entries, tag, kind, count, value, 0) + bytes(4)
    return b"Exif\0\0" + mark + struct.pack(f"{order}I", start) + body


@pytest.mark.parametrize(
    "exif, turned",
    [
        (block("<"), True),
        (block(">"), True),
        (block("<", value=0), False),
        (block("<", value=9), False),
        (block("<", tag=0x0113), False),
        (block("<", kind=4), False),
        (block("<", entries=0), False),
        (block("<", entries=65535), True),
        (block("<", start=2**32 - 1), False),
        (block("<", start=30), False),
        (block("<")[:17], False),
        (b"Exif\0\0II", False),
        (b"Exif\0\0" + b"\xff" * 40, False),
        (b"", False),
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, when it opens the file
def test_broken_exif_is_ignored(tmp_path, rgb, exif, turned):
    Image.fromarray(rgb).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", upright=True).shape[:2] == ((WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH))


def test_tiff_is_turned_by_its_own_orientation_once(tmp_path, rgb):
    """Pillow turns it while reading, so the turned pixels count as the stored pixels."""
    Image.fromarray(rgb).save(tmp_path / "a.tif", tiffinfo={0x0112: 6})
    turned = np.rot90(rgb, -1)
    for upright in (False, True):
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif", upright=upright), turned)
        assert image_size(tmp_path / "a.tif", upright=upright) == (WIDTH, HEIGHT)


def test_one_pixel_image_is_read(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), [[[1, 2, 3]]])


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_truncated_file_is_refused_by_name(tmp_path, rgb, name):
    Image.fromarray(rgb).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(InputError, match=f"{name}: the image cannot be decoded"):
        read_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow's, of TIFF
def test_every_truncation_gives_pixels_or_an_input_error(tmp_path, rgb):
    """The cut can be after the last pixel; no other error than InputError is allowed."""
    for image_format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(rgb).save(buffer, format=image_format)
        content = buffer.getvalue()
        for end in range(0, len(content) - 1, max(1, len(content) // 40)):
            (tmp_path / "a").write_bytes(content[:end])
            try:
                assert read_image(tmp_path / "a").shape == (HEIGHT, WIDTH, 3)
            except InputError as error:
                assert str(tmp_path / "a") in str(error)


@pytest.mark.parametrize("read", [read_image, image_size])
@pytest.mark.parametrize(
    "content, reason",
    [(b"", "empty"), (b"<html>404</html>", "none of the formats JPEG"), (EPS, "none of the formats JPEG")],
)
def test_file_that_is_no_image_is_refused_by_name(tmp_path, read, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(InputError, match=f"a.jpg: not an image: .*{reason}"):
        read(tmp_path / "a.jpg")


@pytest.mark.parametrize("read", [read_image, image_size])
def test_absent_file_and_folder_are_refused_by_name(tmp_path, read):
    with pytest.raises(InputError, match="absent.jpg: no such image"):
        read(tmp_path / "absent.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(InputError, match="folder.jpg"):
        read(tmp_path / "folder.jpg")


FORMATS = ("png", "jpg", "bmp", "gif", "tif", "webp", "ppm")


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("read", [read_image, image_size])
def test_an_image_of_more_pixels_than_allowed_is_refused(tmp_path, rgb, read, extension):
    path = tmp_path / f"a.{extension}"
    Image.fromarray(rgb).save(path)
    most = HEIGHT * WIDTH if extension != "webp" else HEIGHT * WIDTH * 10 // 6
    read(path, max_pixels=most)
    said = f"a.{extension}: the image is refused because it is too large: 30 x 20 = 600 pixels, but data.max_pixels ="
    with pytest.raises(InputError, match=said):
        read(path, max_pixels=most - 1)


@pytest.mark.parametrize("extension", FORMATS)
def test_pillows_own_limit_does_not_change_and_is_named_where_it_refuses(tmp_path, rgb, extension, monkeypatch):
    Image.fromarray(rgb).save(tmp_path / f"a.{extension}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    # Pillow checks some memory by itself and cannot be told not to.
    if extension in ("tif", "webp"):
        with pytest.raises(InputError, match="PIL.Image.MAX_IMAGE_PIXELS = 100"):
            read_image(tmp_path / f"a.{extension}")
    else:
        assert read_image(tmp_path / f"a.{extension}").shape == (HEIGHT, WIDTH, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_small_hostile_images_cost_little():
    """Each is under 1 MB and takes less than 10 seconds and 1 GB in a process of its own."""
    contents, says = zip(*hostile_images.HOSTILE.values(), strict=True)
    assert max(map(len, contents)) < 1_000_000
    ended = budget.check("hostile_images:read", contents)
    for name, said, found in zip(hostile_images.HOSTILE, says, ended, strict=True):
        assert (found == "returned") if said is None else (said in found), (name, found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "image_format, side, options",
    [
        ("PNG", 9999, {}),
        ("WEBP", 7745, {"lossless": True, "method": 0}),
        ("JPEG", 8944, {"progressive": True, "subsampling": 0, "quality": 10}),
        ("TIFF", 9999, {"compression": "tiff_lzw"}),
    ],
)
def test_the_largest_images_stay_below_a_gigabyte(image_format, side, options):
    image = Image.new("RGB", (side, side), "white")
    content = hostile_images.encoded(image, image_format, **options)
    (found,) = budget.outcomes("hostile_images:read", [content])
    assert found.ended == "returned" and found.megabytes < budget.MAX_MEGABYTES


def test_honest_jpegs_are_not_taken_for_repeated_scans(tmp_path, rgb):
    """Progressive files have up to 18 scans; a film behind the end, as phones write it, holds what looks like scans."""
    for mode in ("L", "RGB", "CMYK"):
        Image.fromarray(rgb).convert(mode).save(tmp_path / "a.jpg", progressive=True, quality=95)
        content = (tmp_path / "a.jpg").read_bytes()
        assert 6 <= content.count(b"\xff\xda") <= 18
        (tmp_path / "a.jpg").write_bytes(content + b"\0\2" + b"\xff\xda\0\2" * 200)
        assert read_image(tmp_path / "a.jpg").shape == (HEIGHT, WIDTH, 3)


def test_an_image_that_changed_its_size_since_it_was_read_is_named(tmp_path, rgb):
    """Its boxes refer to the old size; nothing larger than that is decoded."""
    path = tmp_path / "a.webp"
    Image.fromarray(rgb).save(path)
    none = np.zeros(0, bool)
    boxes = np.zeros((0, 4), np.float32)
    record = ImageRecord("a", path, image_size(path, upright=True), boxes, none, none, none, none, upright=True)
    for new in (rgb[:, :-1], rgb.swapaxes(0, 1), np.zeros((900, 900, 3), np.uint8)):
        Image.fromarray(new).save(path)
        said = f"a.webp: the image has changed: 30 x 20 pixels .* now {new.shape[1]} x {new.shape[0]}"
        with pytest.raises(InputError, match=said):
            record_pixels(record)
