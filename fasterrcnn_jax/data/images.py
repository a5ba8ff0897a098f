"""Decoding of image files: always uint8 [H, W, 3], or an InputError that names the file.

The format follows from the content, never from the name. EXIF orientation is not applied: annotated
boxes are in the frame of the stored pixels, and a reader that knows the annotated size notices the
sets in which they are not. Pillow's limit on the number of pixels stays in force.
"""

import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fasterrcnn_jax.errors import InputError

# Named, because Pillow's full list holds formats that start other programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")

# What Pillow's decoders were seen to raise, or say they raise, on bytes that are not what they seem.
_DECODER_ERRORS = (OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError)
_DECODER_ERRORS += (OverflowError, struct.error, zlib.error)


def image_size(path: Path | str) -> tuple[int, int]:
    """Returns (height, width) in stored pixels, from the header alone.

    Raises:
      InputError: the file is absent, empty, no image, or larger than Pillow's pixel limit.
    """
    with _open(path) as image:
        return image.height, image.width


def read_image(path: Path | str) -> np.ndarray:
    """Returns the pixels as uint8 [H, W, 3], RGB.

    Grey is repeated, palettes are expanded, alpha is dropped, CMYK is converted, and of 16-bit
    values the high byte is kept. Of an animation this is the first frame.

    Raises:
      InputError: as `image_size`, or the pixels are cut short or have no 8-bit meaning.
    """
    with _open(path) as image:
        image.load()
        if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
            return _grey16_to_rgb(np.asarray(image), path)
        if image.mode == "F":
            raise InputError(f"{path}: the image holds floating point values, which have no 8-bit scale")
        if image.mode in ("P", "PA"):
            # By way of RGBA: a direct conversion warns when the palette has transparent entries.
            image = image.convert("RGBA")
        return np.array(image.convert("RGB"))


def _grey16_to_rgb(grey: np.ndarray, path: Path | str) -> np.ndarray:
    # Pillow's own conversion of these modes clips at 255. The high byte is what it keeps of 16-bit RGB.
    if grey.size and (grey.min() < 0 or grey.max() > 0xFFFF):
        raise InputError(f"{path}: the image holds grey values of more than 16 bits ({grey.min()}..{grey.max()})")
    return np.repeat((grey.astype(np.int32) >> 8).astype(np.uint8)[..., None], 3, axis=2)


@contextlib.contextmanager
def _open(path: Path | str):
    """Yields the opened image; whatever the decoder raises in the block becomes an InputError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such image file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path}: refused as too large to decode: {error}") from None
    except UnidentifiedImageError:
        reason = "the file is empty" if Path(path).stat().st_size == 0 else "the content is no known image format"
        raise InputError(f"{path}: not an image: {reason}") from None
    except _DECODER_ERRORS as error:
        raise InputError(f"{path}: the image cannot be decoded: {error}") from None
