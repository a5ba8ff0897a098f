"""Which implementation of an operation runs: plain JAX ("xla") or the kernel of this package ("mosaic").

Decided while tracing, from the device that programs go to by default. A program that is exported for another
one must name its implementation.
"""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Implementation = Literal["xla", "mosaic"] | None

logger = logging.getLogger(__name__)

OLDEST_JAX = (0, 11)
# Compute capabilities: the kernels are written for the first, and compile from the second on.
HOPPER, AMPERE = (9, 0), (8, 0)
# Beyond the data centre's Blackwell a multiprocessor has less shared memory again, and nobody has compiled for it.
NEWEST = (11, 0)


def choose(operation: str, implementation: Implementation, *, unsupported: str | None) -> Literal["xla", "mosaic"]:
    """Returns the implementation that is named, or, for None, the kernel where it can run.

    Args:
      operation: its name, for messages.
      unsupported: what the kernel cannot do in the arguments at hand; None: it can.
    Raises:
      NotImplementedError: the kernel is named and cannot run; the message says why.
      ValueError: `implementation` is none of the three.
    """
    if implementation not in (None, "xla", "mosaic"):
        raise ValueError(f"implementation must be None, 'xla' or 'mosaic', got {implementation!r}")
    if implementation == "xla":
        return "xla"
    # From Ampere to Hopper, and on what is newer than both, nobody has run them: there a user must ask.
    reason = unsupported or unsupported_here(HOPPER if implementation is None else AMPERE)
    if reason is None and implementation is None and device()[1] >= NEWEST:
        reason = "on compute capability {}.{} nobody has run it".format(*device()[1])
    if implementation == "mosaic":
        if reason:
            raise NotImplementedError(f"the Mosaic kernel of {operation} was asked for, but {reason}")
        return "mosaic"
    chosen = "xla" if reason else "mosaic"
    _log_once(operation, chosen, reason)
    return chosen


def unsupported_here(oldest: tuple[int, int]) -> str | None:
    """Returns why no kernel can run here: JAX, platform or a capability below `oldest`; None if they can."""
    if jax.__version_info__[:2] < OLDEST_JAX:
        return f"it needs JAX {OLDEST_JAX[0]}.{OLDEST_JAX[1]} or newer and this is {jax.__version__}"
    platform, capability = device()
    if platform != "cuda":
        return f"it runs on CUDA devices and this one's platform is {platform}"
    if capability < oldest:
        return "it needs compute capability {}.{} or newer and this device has {}.{}".format(*oldest, *capability)
    return None


def unsupported_features(dtype: DTypeLike, channels: int) -> str | None:
    """Returns why the kernels on feature maps cannot take these; None if they can."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16 features and these are {jnp.dtype(dtype).name}"
    if channels % 128:
        return f"it takes channels in multiples of 128 and there are {channels}"
    return None


def device() -> tuple[str, tuple[int, int]]:
    """Returns platform ("cuda", "rocm", "cpu", ...) and compute capability of the default device."""
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        default = jax.devices(default)[0]
    if default.platform != "gpu":
        return default.platform, (0, 0)
    if "rocm" in default.client.platform_version.lower():
        return "rocm", (0, 0)
    major, minor = default.compute_capability.split(".")
    return "cuda", (int(major), int(minor))


@functools.cache
def _log_once(operation: str, chosen: str, reason: str | None) -> None:
    logger.info("%s runs as %s%s", operation, chosen, f": {reason}" if reason else "")
