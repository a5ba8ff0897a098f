"""Reads the frames of video files, with PyAV, which brings FFmpeg (`pip install 'fasterrcnn_jax[video]'`).

FFmpeg recognises some hundred formats by their content, among them playlists that open other files and addresses. The
extension therefore decides the container, and FFmpeg gets an open file and no name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.regular_files import check_regular

# FFmpeg's name of the container of each extension of `given_files.VIDEO_EXTENSIONS`.
_CONTAINERS = {".mp4": "mov", ".m4v": "mov", ".mov": "mov", ".mkv": "matroska", ".webm": "matroska", ".avi": "avi"}


class Frame(NamedTuple):
    """One frame of a video."""

    number: int  # counts from 0, in the order in which frames are shown
    time: float | None  # seconds from the start of the video; None: the file does not say
    pixels: np.ndarray  # [height, width, 3] uint8, RGB, turned as the file says


def read_frames(path: Path, *, max_pixels: int = DataConfig.max_pixels) -> Iterator[Frame]:
    """Yields the frames of a video file one after another.

    Args:
      max_pixels: a video with larger frames is refused before a frame is decoded. Where the size changes within the
        video, the first larger frame is refused before its pixels are copied.
    Raises:
      InputError: PyAV is not installed, or the file is missing, no video, damaged, or too large. Frames before the
        damage have been yielded.
    """
    av = _av(path)
    check_regular(path)
    try:
        with (
            open(path, "rb") as file,
            av.open(file, format=_CONTAINERS[path.suffix.lower()], metadata_errors="replace") as container,
        ):
            if not container.streams.video:
                raise InputError(f"{path}: the file has no video stream")
            stream = container.streams.video[0]
            _check_size(path, stream.codec_context.width, stream.codec_context.height, max_pixels)
            stream.thread_type = "AUTO"
            for index, frame in enumerate(container.decode(stream)):
                _check_size(path, frame.width, frame.height, max_pixels)
                yield Frame(index, frame.time, _upright(frame.to_ndarray(format="rgb24"), frame.rotation))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path}: the video cannot be decoded: {error.strerror or error}") from None


def _check_size(path: Path, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise InputError(
            f"{path}: the video is refused because its frames are too large: {width} x {height} = "
            f"{width * height:,} pixels, but max_pixels is {max_pixels:,}; raise it if you trust the file"
        )


def _upright(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """Returns a frame turned counterclockwise; cameras write quarter turns; other angles are ignored."""
    quarters, rest = divmod(round(degrees), 90)
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if rest == 0 else pixels


def _av(path: Path) -> Any:
    try:
        import av
        import av.error
    except ImportError:
        raise InputError(
            f"{path}: videos need PyAV, which is not installed; pip install 'fasterrcnn_jax[video]'"
        ) from None
    return av
