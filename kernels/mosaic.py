"""The only access to the Mosaic GPU back end of Pallas, which is imported when the first kernel is traced."""

from collections.abc import Callable
from typing import Any

# Tests set this to `plgpu.InterpretGPUParams(...)`: kernels then run step by step on a CPU, with a check for races.
INTERPRET: Any = None


def kernel(body: Callable, **options: Any) -> Callable:
    """Returns `plgpu.kernel(body, **options)`; `body` takes references to inputs, outputs and scratch memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if INTERPRET is not None:
        options["interpret"] = INTERPRET
    return plgpu.kernel(body, **options)
