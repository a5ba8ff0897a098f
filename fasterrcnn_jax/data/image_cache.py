"""Decoded images kept in memory from epoch to epoch."""

import logging
import threading
from collections.abc import Callable

from jaxtyping import UInt8
from numpy import ndarray

from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.records import ImageRecord

logger = logging.getLogger(__name__)

Reader = Callable[[ImageRecord], UInt8[ndarray, "h w 3"]]


def caching_reader(megabytes: int) -> Reader:
    """Returns `record_pixels` that keeps what it has read, as read-only arrays, up to `megabytes` (2^20 bytes).

    The first images stay: an epoch meets every one once in a new order, so that to make room for one means to
    decode another again. Mirrored copies of a record share one image. Safe to call from several threads.
    """
    limit = megabytes * 2**20
    kept, lock = {}, threading.Lock()
    held, is_full = 0, limit == 0

    def read(record: ImageRecord) -> UInt8[ndarray, "h w 3"]:
        nonlocal held, is_full
        key = record.path, record.upright
        if key in kept:
            return kept[key]
        pixels = record_pixels(record)
        with lock:
            if key not in kept and held + pixels.nbytes <= limit:
                pixels.flags.writeable = False
                kept[key] = pixels
                held += pixels.nbytes
            elif key not in kept and not is_full:
                is_full = True
                logger.warning(
                    "data.cache_mb = %d is full with %d decoded images; the others are decoded in every epoch",
                    megabytes,
                    len(kept),
                )
        return pixels

    return read
