"""Keeps decoded images in memory from epoch to epoch."""

import logging
import threading
from collections.abc import Callable

from jaxtyping import UInt8
from numpy import ndarray

from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.records import ImageRecord

logger = logging.getLogger(__name__)

Reader = Callable[[ImageRecord], UInt8[ndarray, "h w 3"]]


def caching_reader(megabytes: int, *, fast: bool = False) -> Reader:
    """Returns a version of `record_pixels` that keeps decoded images, up to `megabytes` (2^20 bytes each).

    The cached arrays are read-only. The first images stay in the cache: an epoch reads every image once in a new
    order, so replacing an image would only mean decoding another one again. Mirrored copies of a record share one
    image. The reader can be called from several threads.

    Args:
      fast: as in `record_pixels`.
    """
    limit = megabytes * 2**20
    kept, lock = {}, threading.Lock()
    held, is_full = 0, limit == 0

    def read(record: ImageRecord) -> UInt8[ndarray, "h w 3"]:
        nonlocal held, is_full
        key = record.path, record.upright
        if key in kept:
            return kept[key]
        pixels = record_pixels(record, fast=fast)
        with lock:
            if key not in kept and held + pixels.nbytes <= limit:
                pixels.flags.writeable = False
                kept[key] = pixels
                held += pixels.nbytes
            elif key not in kept and not is_full:
                is_full = True
                logger.warning(
                    "the image cache (data.cache_mb = %d) is full with %d images; "
                    "the other images are decoded in every epoch",
                    megabytes,
                    len(kept),
                )
        return pixels

    return read
