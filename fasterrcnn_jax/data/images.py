"""Decodes image files to uint8 [H, W, 3], or raises an InputError that names the file.

The content decides the format, never the file name. The EXIF orientation is applied only with `upright`: a data set
reader knows from the annotated size whether the boxes refer to the stored or to the upright image. Pillow's limit on
the number of pixels stays in force.
"""

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from fasterrcnn_jax.data.records import ImageRecord, StoredImage
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.regular_files import check_regular

ImageFile = Path | str | StoredImage

# An explicit list, because some of Pillow's formats start other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")

# Exceptions that Pillow's decoders raise on damaged or mislabelled bytes, as observed or documented.
_DECODER_ERRORS = (OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError)
_DECODER_ERRORS += (OverflowError, struct.error, zlib.error)

NOT_TURNED = "The EXIF orientation was not applied because the annotated size fits both orientations or is missing"

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


def image_size(path: ImageFile, *, upright: bool = False) -> tuple[int, int]:
    """Returns (height, width) as stored or, with `upright`, turned as EXIF says; reads only the header.

    Raises:
      InputError: the file is missing, empty, not an image, or larger than Pillow's pixel limit.
    """
    with _open(path) as image:
        turned = upright and _orientation(image) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def annotated_frame(
    path: ImageFile, stated_hw: tuple[float, float] | None, field: str, found: dict[str, list[str]]
) -> tuple[tuple[int, int], bool]:
    """Returns the (height, width) that the annotated boxes refer to, and whether it is that of the upright image.

    The size in the annotation decides: it is the size of the stored pixels or of the upright image. If it fits both,
    or is missing, the boxes are taken to refer to the stored pixels; `found` records images with an orientation.

    Args:
      stated_hw: the (height, width) in the annotation; None: the annotation has none.
      field: file and field of the size, for messages.
      found: receives the note about an EXIF orientation that was not applied.

    Raises:
      InputError: the annotated size fits neither.
    """
    with _open(path) as image:
        stored_hw, turned_hw, orientation = (
            (image.height, image.width),
            (image.width, image.height),
            _orientation(image),
        )
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


def read_image(path: ImageFile, *, upright: bool = False) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels as uint8 [H, W, 3], RGB, as stored or, with `upright`, turned as EXIF says.

    Grey is repeated for all channels, palettes are expanded, alpha is dropped, CMYK is converted, and 16-bit values
    are reduced to their high byte. An animation gives its first frame.

    Raises:
      InputError: as in `image_size`, or the pixels are incomplete or cannot be converted to 8 bits.
    """
    with _open(path) as image:
        # Read before the pixels: a PNG can have an orientation after its pixels, which `image_size` does not see.
        turn = _TURNS.get(_orientation(image)) if upright else None
        image.load()
        pixels = _rgb(image, path)
        return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def record_pixels(record: ImageRecord) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels that the boxes of `record` refer to."""
    return read_image(record.path, upright=record.upright)


def _rgb(image: Image.Image, path: ImageFile) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        return _grey16_to_rgb(np.asarray(image), path)
    if image.mode == "F":
        raise InputError(f"{path}: the image has floating point values; convert it to 8 bits per channel")
    if image.mode in ("P", "PA"):
        # Converted to RGBA first: a direct conversion warns if the palette has transparent entries.
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
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


def _grey16_to_rgb(grey: np.ndarray, path: ImageFile) -> np.ndarray:
    # Pillow's own conversion of these modes clips at 255. The high byte is used, as Pillow does for 16-bit RGB.
    if grey.size and (grey.min() < 0 or grey.max() > 0xFFFF):
        raise InputError(f"{path}: grey values must have at most 16 bits (0..65535), got {grey.min()}..{grey.max()}")
    return np.repeat((grey.astype(np.int32) >> 8).astype(np.uint8)[..., None], 3, axis=2)


@contextlib.contextmanager
def _open(path: ImageFile) -> Iterator[Image.Image]:
    """Yields the opened image; an exception of the decoder in the block becomes an InputError."""
    if not isinstance(path, StoredImage):
        check_regular(Path(path))
    try:
        file = io.BytesIO(path.read_bytes()) if isinstance(path, StoredImage) else path
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such image file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path}: the image is refused because it is too large to decode: {error}") from None
    except UnidentifiedImageError:
        size = len(path.read_bytes()) if isinstance(path, StoredImage) else Path(path).stat().st_size
        reason = "the file is empty" if size == 0 else f"the content has none of the formats {', '.join(FORMATS)}"
        raise InputError(f"{path}: not an image: {reason}") from None
    except _DECODER_ERRORS as error:
        raise InputError(f"{path}: the image cannot be decoded: {error}") from None
