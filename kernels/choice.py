"""Chooses the implementation of an operation: plain JAX ("xla") or the kernel of this package ("mosaic").

The choice is made while tracing and depends on JAX's default device. If you export a program for another device,
name the implementation.
"""

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Implementation = Literal["xla", "mosaic"] | None

logger = logging.getLogger(__name__)

OLDEST_JAX = (0, 11)
# Compute capabilities: the kernels are written for Hopper, and they compile for Ampere and later.
HOPPER, AMPERE = (9, 0), (8, 0)
# The first that is newer than data-centre Blackwell; the kernels were never compiled for it.
NEWEST = (11, 0)
# Consumer Blackwell: ptxas refuses what Mosaic makes for it ("PTX with .target 'sm_120a' cannot be compiled for
# architecture 'sm_120'").
NOT_COMPILED = {12: "the kernels do not compile for compute capability {}.{} in JAX 0.11.2 and 0.12.0.1"}
KIB = 1024
# Shared memory that a block can have, in KiB (CUDA C++ Programming Guide, technical specifications per compute
# capability): by compute capability, else by its first number.
SHARED_KIB = {(8, 0): 163, (8, 7): 163, 8: 99, 9: 227, 10: 227, 12: 99}


def choose(
    operation: str,
    implementation: Implementation,
    *,
    unsupported: str | None,
    check: Callable[[], str | None] | None = None,
) -> Literal["xla", "mosaic"]:
    """Returns the named implementation or, for None, the kernel if it can run and plain JAX otherwise.

    The kernels were never run on GPUs from Ampere up to Hopper. There `check` decides, once per process and device,
    and a warning says what it decided.

    Args:
      operation: name of the operation, for messages.
      unsupported: why the kernel cannot take the arguments of this call; None: it can.
      check: compares the kernel with plain JAX on a small input; returns how they differ, or None if they agree.
        None: there is no such comparison, and the kernel is not chosen where it was never run.
    Raises:
      NotImplementedError: the kernel is named and cannot run; the message states the reason.
      ValueError: `implementation` is not one of these three values.
    """
    if implementation not in (None, "xla", "mosaic"):
        raise ValueError(f"implementation must be None, 'xla' or 'mosaic', got {implementation!r}")
    if implementation == "xla":
        return "xla"
    reason = unsupported or (not_chosen_here() if implementation is None else unsupported_here())
    if implementation == "mosaic":
        if reason:
            raise NotImplementedError(f"the Mosaic kernel of {operation} was asked for, but {reason}")
        return "mosaic"
    level = logging.INFO
    if reason is None and is_checked_here():
        agrees = "it agrees with plain JAX in a check on this device"
        differs = _difference(operation, _default_device(), check) if check else "it is not checked"
        chosen, reason, level = "xla" if differs else "mosaic", differs or agrees, logging.WARNING
    else:
        chosen = "xla" if reason else "mosaic"
        # On a GPU without the kernels, everybody is told. Without a GPU nobody is.
        if reason and not unsupported and device()[0] == "cuda" and not HOPPER <= device()[1] < NEWEST:
            level = logging.WARNING
    _log_once(level, operation, chosen, reason)
    return chosen


def not_chosen_here() -> str | None:
    """Returns why kernels are not chosen here unless they are named; None if they are chosen, or checked first."""
    reason = unsupported_here()
    if reason is None and device()[1] >= NEWEST:
        reason = "it was never run on compute capability {}.{}".format(*device()[1])
    return reason


def is_checked_here() -> bool:
    """Returns whether a kernel is compared with plain JAX before it is chosen: on GPUs from Ampere up to Hopper."""
    platform, capability = device()
    return platform == "cuda" and AMPERE <= capability < HOPPER


def unsupported_here() -> str | None:
    """Returns why no kernel can run here: platform, compute capability, or JAX; None if they can."""
    platform, capability = device()
    # Before JAX's version: on another platform or an older GPU a newer JAX would not help.
    if platform != "cuda":
        return f"it needs a CUDA device and the platform of this device is {platform}"
    if capability < AMPERE:
        return "it needs compute capability {}.{} or newer and this device has {}.{}".format(*AMPERE, *capability)
    if capability[0] in NOT_COMPILED:
        return NOT_COMPILED[capability[0]].format(*capability)
    if jax.__version_info__[:2] < OLDEST_JAX:
        return f"it needs JAX {OLDEST_JAX[0]}.{OLDEST_JAX[1]} or newer and the installed JAX is {jax.__version__}"
    return None


def unsupported_features(dtype: DTypeLike) -> str | None:
    """Returns why the kernels cannot take feature maps of this type; None if they can."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16 features and these features are {jnp.dtype(dtype).name}"
    return None


def shared_memory() -> int:
    """Returns the bytes of shared memory that a block can have on the default device.

    The device says it itself; otherwise its compute capability does, and of an unknown one the fewest are taken.
    """
    platform, capability = device()
    said = getattr(_default_device(), "shared_memory_per_block_optin", None)
    if platform == "cuda" and said:
        return said
    if platform != "cuda":
        capability = HOPPER  # what the kernels are written for: a program may be made for another device
    return KIB * SHARED_KIB.get(capability, SHARED_KIB.get(capability[0], min(SHARED_KIB.values())))


def device() -> tuple[str, tuple[int, int]]:
    """Returns the platform ("cuda", "rocm", "cpu", ...) and the compute capability of the default device."""
    default = _default_device()
    if default.platform != "gpu":
        return default.platform, (0, 0)
    if "rocm" in default.client.platform_version.lower():
        return "rocm", (0, 0)
    major, minor = default.compute_capability.split(".")
    return "cuda", (int(major), int(minor))


def _default_device() -> Any:
    # JAX adds its options to the class while it is imported.
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return jax.devices(default)[0] if default is None or isinstance(default, str) else default


@functools.cache
def _difference(operation: str, on: Any, check: Callable[[], str | None]) -> str | None:
    """Returns how a kernel differs from plain JAX on a device, or how it fails; None if they agree."""
    found = []

    def run() -> None:
        try:
            with jax.default_device(on):
                found.append(check())
        except Exception as error:  # of the compiler or of the device: plain JAX runs instead
            lines = str(error).strip().splitlines()
            found.append(f"the kernel fails on this device: {type(error).__name__}: {lines[0] if lines else ''}")

    # In a thread of its own, because the caller is being traced, and what it traces does not reach other threads.
    thread = threading.Thread(target=run, name=f"check of {operation}")
    thread.start()
    thread.join()
    return found[0]


@functools.cache
def _log_once(level: int, operation: str, chosen: str, reason: str | None) -> None:
    logger.log(level, "%s runs as %s%s", operation, chosen, f": {reason}" if reason else "")
