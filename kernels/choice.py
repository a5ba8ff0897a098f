"""Chooses the implementation of an operation: plain JAX ("xla") or the kernel of this package ("mosaic").

The choice is made while tracing and depends on JAX's default device. If you export a program for another device,
name the implementation.
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
# Compute capabilities: the kernels are written for Hopper, and they compile for Ampere and later.
HOPPER, AMPERE = (9, 0), (8, 0)
# GPUs newer than data-centre Blackwell have less shared memory per multiprocessor; the kernels were never compiled for
# them.
NEWEST = (11, 0)


def choose(operation: str, implementation: Implementation, *, unsupported: str | None) -> Literal["xla", "mosaic"]:
    """Returns the named implementation or, for None, the kernel if it can run and plain JAX otherwise.

    Args:
      operation: name of the operation, for messages.
      unsupported: why the kernel cannot take the arguments of this call; None: it can.
    Raises:
      NotImplementedError: the kernel is named and cannot run; the message states the reason.
      ValueError: `implementation` is not one of these three values.
    """
    if implementation not in (None, "xla", "mosaic"):
        raise ValueError(f"implementation must be None, 'xla' or 'mosaic', got {implementation!r}")
    if implementation == "xla":
        return "xla"
    reason = unsupported or (not_chosen_here() if implementation is None else unsupported_here(AMPERE))
    if implementation == "mosaic":
        if reason:
            raise NotImplementedError(f"the Mosaic kernel of {operation} was asked for, but {reason}")
        return "mosaic"
    chosen = "xla" if reason else "mosaic"
    _log_once(operation, chosen, reason)
    return chosen


def not_chosen_here() -> str | None:
    """Returns why kernels are not chosen here unless they are named; None if they are chosen."""
    # The kernels were never run on GPUs from Ampere up to Hopper or on the newest ones: users must name them there.
    reason = unsupported_here(HOPPER)
    if reason is None and device()[1] >= NEWEST:
        reason = "it was never run on compute capability {}.{}".format(*device()[1])
    return reason


def unsupported_here(oldest: tuple[int, int]) -> str | None:
    """Returns why no kernel can run here: platform, JAX, or a compute capability below `oldest`; None if they can."""
    platform, capability = device()
    # Before JAX's version: on another platform or an older GPU a newer JAX would not help.
    if platform != "cuda":
        return f"it runs on CUDA devices and the platform of this device is {platform}"
    if capability < oldest:
        return "it needs compute capability {}.{} or newer and this device has {}.{}".format(*oldest, *capability)
    if jax.__version_info__[:2] < OLDEST_JAX:
        return f"it needs JAX {OLDEST_JAX[0]}.{OLDEST_JAX[1]} or newer and the installed JAX is {jax.__version__}"
    return None


def unsupported_features(dtype: DTypeLike) -> str | None:
    """Returns why the kernels cannot take feature maps of this type; None if they can."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16 features and these features are {jnp.dtype(dtype).name}"
    return None


def device() -> tuple[str, tuple[int, int]]:
    """Returns the platform ("cuda", "rocm", "cpu", ...) and the compute capability of the default device."""
    # JAX adds its options to the class while it is imported.
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
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
