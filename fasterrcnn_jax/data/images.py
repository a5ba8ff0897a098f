"""Decodes image files to uint8 [H, W, 3], or raises an InputError that names the file.

The content decides the format, never the file name. The EXIF orientation is applied only with `upright`: a data set
reader knows from the annotated size whether the boxes refer to the stored or to the upright image.

`max_pixels` bounds the memory: a file of some bytes can declare any number of pixels. It is compared with the header
before anything is decoded, and takes the place of Pillow's own limit, which does not change.
"""

import contextlib
import io
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile as Opened

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import fast_input
from fasterrcnn_jax.data.records import ImageRecord, StoredImage
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.regular_files import check_regular

ImageFile = Path | str | StoredImage

# Each format with the bytes that its files start with. An explicit list, because some of Pillow's formats start other
# programs (EPS runs Ghostscript).
_PLUGINS: dict[str, tuple[bytes, type[Opened]]] = {
    "JPEG": (rb"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    "PNG": (rb"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    "BMP": (rb"BM", BmpImagePlugin.BmpImageFile),
    "GIF": (rb"GIF8[79]a", GifImagePlugin.GifImageFile),
    "TIFF": (rb"II[*+]\0|MM\0[*+]|MM[*]\0|II\0[*]", TiffImagePlugin.TiffImageFile),
    "WEBP": (rb"RIFF....WEBPVP8[ LX]", WebPImagePlugin.WebPImageFile),
    "PPM": (rb"P[1-6]\s", PpmImagePlugin.PpmImageFile),
}
FORMATS = tuple(_PLUGINS)

# A JPEG can repeat a scan of a few bytes without end, and each passes over all pixels. Writers of progressive files
# use about 10 scans; no image may need more passes than this, nor more pixels in all its passes.
MAX_SCANS, MAX_SCANNED_PIXELS = 100, 1_500_000_000

# Pillow keeps a pointer for each row, and no network sees a pixel of such an image.
MAX_SIDE = 1_000_000

# Exceptions that Pillow's decoders raise on damaged or mislabelled bytes, as observed or documented.
_DECODER_ERRORS = (OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError)
_DECODER_ERRORS += (OverflowError, struct.error, zlib.error, MemoryError)

NOT_TURNED = "The EXIF orientation was not applied because the annotated size fits both orientations or is missing"

GREY_16 = "Grey images of 16 bits are divided by 16 if no value is above 4095, as in 12 bits, and otherwise by 256"
_MODES_16 = ("I", "I;16", "I;16B", "I;16L", "I;16N")

# For each EXIF orientation except 1 ("as stored"): turns the stored pixels [H, W, 3] upright.
_TURNS = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


def image_size(
    path: ImageFile,
    *,
    upright: bool = False,
    max_pixels: int = DataConfig.max_pixels,
    found: dict[str, list[str]] | None = None,
) -> tuple[int, int]:
    """Returns (height, width) as stored or, with `upright`, turned as EXIF says; reads only the header.

    Args:
      found: receives the note about 16 bits.
    Raises:
      InputError: the file is missing, empty, not an image, or has more than `max_pixels` pixels.
    """
    with _open(path, max_pixels) as image:
        if found is not None and image.mode in _MODES_16:
            found[GREY_16].append(str(path))
        return _shown_hw(image, upright)


def annotated_frame(
    path: ImageFile,
    stated_hw: tuple[float, float] | None,
    field: str,
    found: dict[str, list[str]],
    *,
    max_pixels: int = DataConfig.max_pixels,
) -> tuple[tuple[int, int], bool]:
    """Returns the (height, width) that the annotated boxes refer to, and whether it is that of the upright image.

    The size in the annotation decides: it is the size of the stored pixels or of the upright image. If it fits both,
    or is missing, the boxes are taken to refer to the stored pixels; `found` records images with an orientation.

    Args:
      stated_hw: the (height, width) in the annotation; None: the annotation has none.
      field: file and field of the size, for messages.
      found: receives the notes about an EXIF orientation that was not applied and about 16 bits.

    Raises:
      InputError: as in `image_size`, or the annotated size fits neither.
    """
    with _open(path, max_pixels) as image:
        stored_hw, turned_hw, orientation = (
            (image.height, image.width),
            (image.width, image.height),
            _orientation(image),
        )
        if image.mode in _MODES_16:
            found[GREY_16].append(str(path))
    shown_hw = turned_hw if orientation >= 5 else stored_hw
    if stated_hw is not None and stated_hw != stored_hw:
        if stated_hw == shown_hw:
            return shown_hw, True
        turned = " (the axes are swapped)" if stated_hw == turned_hw else ""
        raise InputError(
            f"{field}: {stated_hw[1]:g} x {stated_hw[0]:g} (width x height) differs from the size of {path}, "
            f"{stored_hw[1]} x {stored_hw[0]}{turned}"
        )
    if orientation != 1 and (stated_hw is None or shown_hw == stored_hw):
        found[NOT_TURNED].append(f"{path}: orientation {orientation}")
    return stored_hw, False


def read_image(
    path: ImageFile, *, upright: bool = False, max_pixels: int = DataConfig.max_pixels
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels as uint8 [H, W, 3], RGB, as stored or, with `upright`, turned as EXIF says.

    Grey is repeated for all channels, palettes are expanded, alpha is dropped, CMYK is converted, and 16-bit values
    are reduced to their high byte; grey values of at most 12 bits are reduced to the high 8 of the 12. An animation
    gives its first frame.

    Raises:
      InputError: as in `image_size`, or the pixels are incomplete or cannot be converted to 8 bits.
    """
    with _open(path, max_pixels) as image:
        return _pixels(image, path, upright)


def record_pixels(record: ImageRecord, *, fast: bool = False) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels that the boxes of `record` refer to.

    Args:
      fast: decode JPEG with simplejpeg, which gives the same pixels.
    Raises:
      InputError: as in `read_image`, or the file now has another size than in the record, to which its boxes refer.
    """
    height, width = record.image_hw
    with _open(record.path, height * width, was=record.image_hw) as image:
        now = _shown_hw(image, record.upright)
        if now != record.image_hw:
            raise _changed(record.path, record.image_hw, now)
        return _pixels(image, record.path, record.upright, fast=fast)


def _shown_hw(image: Opened, upright: bool) -> tuple[int, int]:
    turned = upright and _orientation(image) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def _pixels(image: Opened, path: ImageFile, upright: bool, *, fast: bool = False) -> UInt8[np.ndarray, "h w 3"]:
    # Read before the pixels: a PNG can have an orientation after its pixels, which `image_size` does not see.
    turn = _TURNS.get(_orientation(image)) if upright else None
    passes = min(MAX_SCANS, MAX_SCANNED_PIXELS // (image.width * image.height))
    if image.format == "JPEG" and _scans(image) > passes:
        raise InputError(
            f"{path}: the image is refused because more than {passes} scans pass over its {image.width} x "
            f"{image.height} pixels; convert it to a JPEG with fewer scans"
        )
    pixels = _jpeg_pixels(image) if fast and image.format == "JPEG" else None
    if pixels is None:
        pixels = _pillow_pixels(image, path)
    image.close()  # gives its memory back
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _jpeg_pixels(image: Opened) -> UInt8[np.ndarray, "h w 3"] | None:
    """Returns the pixels that simplejpeg decodes; None: it refuses the file, or Pillow converts other colours."""
    if image.mode not in ("L", "RGB"):
        return None
    assert image.fp is not None, "the image is open"
    image.fp.seek(0)
    pixels = fast_input.decoded_jpeg(image.fp.read())
    # A file can hold several images, of which Pillow opens the first.
    return pixels if pixels is not None and pixels.shape[:2] == (image.height, image.width) else None


def _pillow_pixels(image: Opened, path: ImageFile) -> UInt8[np.ndarray, "h w 3"]:
    image.load()
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    # In parts, because each conversion is a copy of its part.
    rows = max(1, _PART // image.width)
    tops = range(0, image.height, rows)
    parts = {top: (0, top, image.width, min(top + rows, image.height)) for top in tops}
    is_16 = image.mode in _MODES_16
    # Cameras, microscopes and thermal imagers store 12 bits in 16; their high byte would be nearly black.
    shift = 4 if is_16 and all(np.asarray(image.crop(box)).max() < 4096 for box in parts.values()) else 8
    for top, box in parts.items():
        part = image.crop(box)
        pixels[top : top + rows] = _grey16_to_8(np.asarray(part), path, shift) if is_16 else _rgb(part, path)
    return pixels


# Pixels that are converted at once.
_PART = 2**22


def _rgb(image: Image.Image, path: ImageFile) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode == "F":
        raise InputError(f"{path}: the image has floating point values; convert it to 8 bits per channel")
    if image.mode in ("P", "PA"):
        # Converted to RGBA first: a direct conversion warns if the palette has transparent entries.
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _scans(image: Opened) -> int:
    """Returns the number of scans of a JPEG, or more than `MAX_SCANS`; decodes nothing."""
    assert image.fp is not None, "the image is open"
    image.fp.seek(0)
    content, place, scans = image.fp.read(), 2, 0
    while scans <= MAX_SCANS and (marker := _MARKER.search(content, place)) is not None and marker[1] != b"\xd9":
        # A segment has its length behind its marker; the pixels of a scan follow its segment.
        place = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2])
        scans += marker[1] == b"\xda"
    return scans


# All markers of JPEG except those without a segment, and the zero behind a pixel byte of 255 (ITU T.81, B.1.1.3).
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])", re.DOTALL)


def _orientation(image: Opened) -> int:
    """Returns tag 0x0112 of EXIF's first directory (TIFF 6.0, section 2), or 1."""
    # Pillow's getexif is not used: for a PNG it decodes the pixels first, and broken tags make it warn or raise.
    # A TIFF has no EXIF block; Pillow itself turns its pixels and its size.
    exif = image.info.get("exif", b"")
    exif = exif.removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else b""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (entries,) = struct.unpack_from(f"{order}H", exif, start) if start + 2 <= len(exif) else (0,)
    for entry in range(start + 2, min(start + 2 + 12 * entries, len(exif) - 11), 12):
        tag, kind, count, value = struct.unpack_from(f"{order}HHIH", exif, entry)
        if (tag, kind, count) == (0x0112, 3, 1):
            return value if value in _TURNS else 1
    return 1


def _grey16_to_8(grey: np.ndarray, path: ImageFile, shift: int) -> UInt8[np.ndarray, "h w 1"]:
    # Pillow's own conversion of these modes clips at 255. A shift of 8 leaves the high byte, as Pillow does for 16-bit
    # RGB.
    if grey.size and (grey.min() < 0 or grey.max() > 0xFFFF):
        raise InputError(f"{path}: grey values must have at most 16 bits (0..65535), got {grey.min()}..{grey.max()}")
    return (grey.astype(np.int32) >> shift).astype(np.uint8)[..., None]


@contextlib.contextmanager
def _open(path: ImageFile, max_pixels: int, *, was: tuple[int, int] | None = None) -> Iterator[Opened]:
    """Yields the opened image; an exception of the decoder in the block becomes an InputError.

    Args:
      max_pixels: an image with more pixels is refused.
      was: (height, width) of the image in its record, whose pixels `max_pixels` are; None: the image has no record.
    """
    if not isinstance(path, StoredImage):
        check_regular(Path(path))
    try:
        with io.BytesIO(path.read_bytes()) if isinstance(path, StoredImage) else open(path, "rb") as file:
            start = file.read(30)
            name = next((name for name, (magic, _) in _PLUGINS.items() if re.match(magic, start, re.DOTALL)), None)
            if name is None:
                reason = f"the content has none of the formats {', '.join(FORMATS)}" if start else "the file is empty"
                raise InputError(f"{path}: not an image: {reason}")
            if name == "WEBP":
                # Opening it already takes the memory of its pixels.
                _check_size(_webp_size(start), path, max_pixels, was, name)
            file.seek(0)
            image = _PLUGINS[name][1](file, str(path))
            _check_size(image.size, path, max_pixels, was, _kind(image, max_pixels))
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                # Tiles are decoded whole, and can be larger than their image.
                tile = int(_largest(image, 322)), int(_largest(image, 323))
                _check_size(tile, f"{path}, tile", max(max_pixels, image.width * image.height), None, name)
            yield image
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such image file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Memory that Pillow checks by itself: a frame beyond its image, a WebP, a TIFF that is not compressed.
        raise InputError(
            f"{path}: the image is refused because it is too large for PIL.Image.MAX_IMAGE_PIXELS = "
            f"{Image.MAX_IMAGE_PIXELS}"
        ) from None
    except _DECODER_ERRORS as error:
        raise InputError(f"{path}: the image cannot be decoded: {error or type(error).__name__}") from None


# Parts of `max_pixels` that these kinds may have, because Pillow decodes them through more copies of the pixels, or in
# Python pixel by pixel.
_SEVERAL_SCANS, _MORE_BITS, _RUN_LENGTHS = "JPEG of several scans", "TIFF of more than 8 bits", "BMP of run lengths"
_SHARES = {"WEBP": 0.6, _SEVERAL_SCANS: 0.8, _MORE_BITS: 0.8, _RUN_LENGTHS: 0.1}


def _kind(image: Opened, max_pixels: int) -> str:
    """Returns the format of an opened image, or its kind in `_SHARES`; a JPEG is searched only if that decides."""
    name = str(image.format)
    if name == "JPEG" and image.width * image.height > max_pixels * _SHARES[_SEVERAL_SCANS] and _scans(image) > 1:
        return _SEVERAL_SCANS
    if isinstance(image, TiffImagePlugin.TiffImageFile) and _largest(image, 258) > 8:
        return _MORE_BITS
    if name == "BMP" and image.tile and image.tile[0][0] == "bmp_rle":
        return _RUN_LENGTHS
    return name


def _largest(image: TiffImagePlugin.TiffImageFile, tag: int) -> float:
    """Returns the largest value of a tag, or 0."""
    values = image.tag_v2.get(tag, 0)
    return max((value for value in np.ravel(values).tolist() if isinstance(value, int | float)), default=0)


def _check_size(
    size: tuple[int, int], path: ImageFile, max_pixels: int, was: tuple[int, int] | None, kind: str
) -> None:
    width, height = size
    if max(width, height) > MAX_SIDE:
        raise InputError(
            f"{path}: the image is refused because it is too large: a side has at most {MAX_SIDE:,} pixels, got "
            f"{width} x {height}"
        )
    allowed = max_pixels if was is not None else int(max_pixels * _SHARES.get(kind, 1.0))
    if width * height <= allowed:
        return
    if was is not None:
        raise _changed(path, was, (height, width))
    raise InputError(
        f"{path}: the image is refused because it is too large: {width} x {height} = {width * height:,} pixels, but "
        f"data.max_pixels = {max_pixels:,} allows {allowed:,} in a {kind}; raise max_pixels if you trust the file"
    )


def _changed(path: ImageFile, was: tuple[int, int], now: tuple[int, int]) -> InputError:
    return InputError(
        f"{path}: the image has changed: {was[1]} x {was[0]} pixels (width x height) when the data set was read, now "
        f"{now[1]} x {now[0]}; start again when no program writes to the data set"
    )


def _webp_size(start: bytes) -> tuple[int, int]:
    """Returns the (width, height) in the first 30 bytes of a WebP file (RFC 9649, sections 2.5 to 2.7)."""
    kind = start[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(start[at : at + 3], "little") for at in (24, 27))
        return width + 1, height + 1
    if kind == b"VP8L":
        bits = int.from_bytes(start[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", start, 26)
    return width & 0x3FFF, height & 0x3FFF
