"""The only access to the Mosaic GPU back end of Pallas, which is imported when the first kernel is traced."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Threads of a block; a thread takes 1, 2 or 4 channels.
THREADS = 128
# Tests set this to `plgpu.InterpretGPUParams(...)`: kernels then run step by step on a CPU, with a check for races.
INTERPRET: Any = None


def padded_channels(x: jax.Array) -> jax.Array:
    """Returns `x` with zeros after its last axis, up to a multiple of THREADS: each thread of a block has channels."""
    missing = -x.shape[-1] % THREADS
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def channel_block(channels: int) -> int:
    """Returns the size of the blocks that a multiple of THREADS is split into: up to 4 elements per thread."""
    return next(block for block in (4 * THREADS, 2 * THREADS, THREADS) if channels % block == 0)


def kernel(body: Callable, **options: Any) -> Callable:
    """Returns `plgpu.kernel(body, **options)`; `body` takes references to inputs, outputs and scratch memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if INTERPRET is not None:
        options["interpret"] = INTERPRET
    return plgpu.kernel(body, **options)
