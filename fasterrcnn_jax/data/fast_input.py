"""Decodes and resizes training images with the packages of the extra `fast`: simplejpeg and OpenCV.

They are imported here alone, and only with `data.fast`. Pillow (`data/images.py`) and NumPy (`data/transforms.py`) are
the default and the reference. Pillow still opens every file, and its size and kind are checked, before simplejpeg
decodes it.
"""

from types import ModuleType

import numpy as np
from jaxtyping import Float, UInt8

from fasterrcnn_jax.errors import InputError

# NumPy resizes larger images: it converts a few rows at once to float32, and we give OpenCV the whole image.
MOST_PIXELS = 2**24


def check_installed() -> None:
    """Imports the packages, and keeps OpenCV to the thread that calls it: the loader has threads of its own.

    Raises:
      InputError: one of them is not installed.
    """
    _package("simplejpeg")
    _package("cv2").setNumThreads(1)


def _package(name: str) -> ModuleType:
    try:
        if name == "cv2":
            import cv2

            return cv2
        import simplejpeg

        return simplejpeg
    except ImportError as error:
        raise InputError(
            f"data.fast needs simplejpeg and OpenCV; run pip install 'fasterrcnn_jax[fast]' ({error})"
        ) from error


def decoded_jpeg(content: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
    """Returns the pixels of a JPEG file in RGB, or None if the decoder refuses it."""
    try:
        return _package("simplejpeg").decode_jpeg(content, "RGB", fastdct=False, fastupsample=False)
    except ValueError:
        # It refuses files with faults that Pillow reads over. Pillow decides, and its message is the known one.
        return None


def mirrored(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the image mirrored left to right, as `transforms.flip_pixels` does."""
    return _package("cv2").flip(image, 1)


def resized(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], *, reverse: bool = False
) -> Float[np.ndarray, "h2 w2 3"]:
    """Returns the float32 image resized to the (height, width) `size`, as `transforms.resize_bilinear` does.

    Args:
      reverse: return the channels in the reverse order.
    """
    cv2 = _package("cv2")
    resized = cv2.resize(image.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)
    return cv2.cvtColor(resized, cv2.COLOR_RGB2BGR) if reverse else resized
