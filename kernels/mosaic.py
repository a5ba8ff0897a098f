"""The one door to Pallas' Mosaic GPU back end, opened when the first kernel is traced."""

from collections.abc import Callable
from typing import Any

# A test sets it to `plgpu.InterpretGPUParams(...)`: kernels then run step by step on a CPU, watched for races.
INTERPRET: Any = None


def kernel(body: Callable, **options: Any) -> Callable:
    """Returns `plgpu.kernel(body, **options)`, where `body` takes references to inputs, outputs and scratch."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if INTERPRET is not None:
        options["interpret"] = INTERPRET
    return plgpu.kernel(body, **options)
