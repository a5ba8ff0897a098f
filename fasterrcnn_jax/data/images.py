"""Decoding of image files: always uint8 [H, W, 3], or an InputError that names the file.

The format follows from the content, never from the name. EXIF orientation is applied where it is asked for:
a reader knows from the annotated size in which frame the boxes are. Pillow's limit on the number of pixels
stays in force.
"""

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from fasterrcnn_jax.data.records import ImageRecord, StoredImage
from fasterrcnn_jax.errors import InputError

ImageFile = Path | str | StoredImage

# Named, because Pillow's full list holds formats that start other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")

# What Pillow's decoders were seen to raise, or say they raise, on bytes that are not what they seem.
_DECODER_ERRORS = (OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError)
_DECODER_ERRORS += (OverflowError, struct.error, zlib.error)

NOT_TURNED = "An EXIF orientation was not applied where the stated size does not tell"

# EXIF's orientations beside 1, "as stored": how the pixels [H, W, 3] become what viewers show.
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
    """Returns (height, width) as stored or, `upright`, turned as EXIF says; from the header alone.

    Raises:
      InputError: the file is absent, empty, no image, or larger than Pillow's pixel limit.
    """
    with _open(path) as image:
        turned = upright and _orientation(image) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def annotated_frame(
    path: ImageFile, stated_hw: tuple[float, float] | None, field: str, found: dict[str, list[str]]
) -> tuple[tuple[int, int], bool]:
    """Returns the (height, width) that annotated boxes are in, and whether it is of the image turned upright.

    The size that the annotation states tells: it is that of the stored pixels, or of what viewers show. Where it
    fits both, or is not stated, the boxes are taken to be in the stored frame, and that is kept in `found`.

    Args:
      stated_hw: None where the annotation states none.
      field: where it is stated.

    Raises:
      InputError: it fits neither.
    """
    with _open(path) as image:
        stored_hw, orientation = (image.height, image.width), _orientation(image)
    shown_hw = stored_hw[::-1] if orientation >= 5 else stored_hw
    if stated_hw is not None and stated_hw != stored_hw:
        if stated_hw == shown_hw:
            return shown_hw, True
        turned = " (the axes are swapped)" if stated_hw == stored_hw[::-1] else ""
        raise InputError(
            f"{field}: {stated_hw[1]:g} x {stated_hw[0]:g} (width x height) disagrees with the "
            f"{stored_hw[1]} x {stored_hw[0]} pixels stored in {path}{turned}"
        )
    if orientation != 1 and (stated_hw is None or shown_hw == stored_hw):
        found[NOT_TURNED].append(f"{path}: orientation {orientation}")
    return stored_hw, False


def read_image(path: ImageFile, *, upright: bool = False) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels as uint8 [H, W, 3], RGB, as stored or, `upright`, turned as EXIF says.

    Grey is repeated, palettes are expanded, alpha is dropped, CMYK is converted, and of 16-bit
    values the high byte is kept. Of an animation this is the first frame.

    Raises:
      InputError: as `image_size`, or the pixels are cut short or have no 8-bit meaning.
    """
    with _open(path) as image:
        # Before the pixels: behind them a PNG may hold more, which the header alone does not show.
        turn = _TURNS.get(_orientation(image)) if upright else None
        image.load()
        pixels = _rgb(image, path)
        return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def record_pixels(record: ImageRecord) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels that the boxes of `record` are in."""
    return read_image(record.path, upright=record.upright)


def _rgb(image: Image.Image, path: ImageFile) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        return _grey16_to_rgb(np.asarray(image), path)
    if image.mode == "F":
        raise InputError(f"{path}: the image holds floating point values, which have no 8-bit scale")
    if image.mode in ("P", "PA"):
        # By way of RGBA: a direct conversion warns when the palette has transparent entries.
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """Returns tag 0x0112 of EXIF's first directory (TIFF 6.0, section 2), or 1."""
    # Not by Pillow's getexif: of a PNG it decodes the pixels first, and broken tags make it warn or raise.
    # A TIFF has no such block; Pillow turns its pixels, and its size, by itself.
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
    # Pillow's own conversion of these modes clips at 255. The high byte is what it keeps of 16-bit RGB.
    if grey.size and (grey.min() < 0 or grey.max() > 0xFFFF):
        raise InputError(f"{path}: the image holds grey values of more than 16 bits ({grey.min()}..{grey.max()})")
    return np.repeat((grey.astype(np.int32) >> 8).astype(np.uint8)[..., None], 3, axis=2)


@contextlib.contextmanager
def _open(path: ImageFile):
    """Yields the opened image; whatever the decoder raises in the block becomes an InputError."""
    try:
        file = io.BytesIO(path.read_bytes()) if isinstance(path, StoredImage) else path
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such image file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path}: refused as too large to decode: {error}") from None
    except UnidentifiedImageError:
        size = len(path.read_bytes()) if isinstance(path, StoredImage) else Path(path).stat().st_size
        reason = "the file is empty" if size == 0 else "the content is no known image format"
        raise InputError(f"{path}: not an image: {reason}") from None
    except _DECODER_ERRORS as error:
        raise InputError(f"{path}: the image cannot be decoded: {error}") from None
