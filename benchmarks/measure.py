"""Shared parts of the benchmarks: interleaved timing, the ceilings of the device, the report, optional torchvision.

A time is the wall-clock time of a run of calls, divided by their number. Each call uses the next of several input sets,
and there is one wait at the end of the run. This is the cost per call in a loop that keeps the device busy. Both
libraries are timed in the same way and take turns.
"""

import collections
import functools
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

# Two libraries share the card: neither may take all of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# A checkout need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from isolated import DeviceLost, one_line  # noqa: E402
from launch_counts import launched, launches_of  # noqa: E402

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "torchvision", "triton")


class Effort(NamedTuple):
    """Limits of the time that a measurement takes."""

    rounds: int  # medians are over these; sides take turns in each
    seconds: float  # of a run of calls
    calls: int  # at most, in a run


THOROUGH, QUICK = Effort(rounds=9, seconds=0.04, calls=200), Effort(rounds=3, seconds=0.005, calls=4)
# Of a side alone, before the next one is prepared: a case that is cut has at least these times.
FIRST = Effort(rounds=1, seconds=0.0, calls=1)


class Side(NamedTuple):
    """One implementation of an operation, ready to be called on any of several input sets."""

    calls: Sequence[Callable[[], Any]]  # one per input set; a call may return before the device is done
    wait: Callable[[Any], None]  # until what a call returned is there


class Times(NamedTuple):
    """Milliseconds of one call."""

    ms: float  # in a run of calls: median of the rounds
    fastest_ms: float
    slowest_ms: float
    alone_ms: float  # waited for each time: median


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def block(result: Any) -> None:
    """Waits for arrays of JAX."""
    jax.block_until_ready(result)


def interleaved(
    sides: dict[str, Side],
    effort: Effort,
    turn: Callable[[str], None],
    keep: Callable[[dict[str, Times]], None] = lambda times: None,
) -> tuple[dict, dict]:
    """Returns the times of each side that finished, and the reason for each side that did not.

    Args:
      turn: called with a side's name before each of its turns.
      keep: called with the times so far after each round.
    Raises:
      DeviceLost: a side broke the device.
    """
    lengths, runs, alone, failed = {}, collections.defaultdict(list), collections.defaultdict(list), {}
    for number in range(effort.rounds + 1):
        for name, side in sides.items():
            if name in failed:
                continue
            turn(name)
            try:
                if number == 0:
                    for call in side.calls:
                        side.wait(call())
                    seconds = _run(side, len(side.calls)) / len(side.calls)
                    wanted = int(effort.seconds / max(seconds, 1e-7))
                    lengths[name] = min(max(wanted, len(side.calls)), effort.calls)
                else:
                    runs[name].append(1e3 * _run(side, lengths[name]) / lengths[name])
                    alone[name].append(1e3 * _run(side._replace(calls=side.calls[:1]), 1))
            except Exception as error:
                failed[name] = one_line(error)
                require_device()
        median = statistics.median
        times = {
            name: Times(median(runs[name]), min(runs[name]), max(runs[name]), median(alone[name]))
            for name in sides
            if name not in failed and number > 0
        }
        if times:
            keep(times)
    return times, failed


def _run(side: Side, count: int) -> float:
    """Returns the seconds of `count` calls; as many are in flight as there are input sets."""
    in_flight = collections.deque()
    start = time.perf_counter()
    for i in range(count):
        if len(in_flight) == len(side.calls):
            side.wait(in_flight.popleft())
        in_flight.append(side.calls[i % len(side.calls)]())
    while in_flight:
        side.wait(in_flight.popleft())
    return time.perf_counter() - start


def require_device() -> None:
    """Raises DeviceLost if the device does not compute any more after an error."""
    gc.collect()
    try:
        block(jnp.zeros(8) + 1)
        torch, _ = peer()
        if torch is not None:
            (torch.zeros(8, device=torch_device()) + 1).cpu()
    except Exception as error:
        raise DeviceLost(one_line(error)) from error


class Ceilings(NamedTuple):
    """Measured rates of this device, used for the floors of the times."""

    bytes_per_second: float  # of a large copy, read and written bytes counted
    flops_per_second: float  # of float32 multiply-adds outside of the matrix units

    def floor_ms(self, num_bytes: float, flops: float) -> float:
        return 1e3 * max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


@functools.cache
def measure_ceilings(*, tiny: bool) -> Ceilings:
    """Returns the best of several runs of a copy and of a chain of multiply-adds."""
    size = 2**16 if tiny else 2**28
    steps = 256

    def chain(x, factor, term):
        for _ in range(steps):
            x = x * factor + term
        return x

    def best(function, *arguments):
        compiled = jax.jit(function).lower(*arguments).compile()
        side = Side([lambda: compiled(*arguments)], block)
        block(compiled(*arguments))
        return min(_run(side, 4) / 4 for _ in range(5))

    large, small = jnp.ones(size), jnp.ones(size // 16)
    copied = best(lambda x: x + 1.0, large)
    multiplied = best(chain, small, jnp.float32(0.999), jnp.float32(0.001))
    return Ceilings(8 * size / copied, 2 * steps * small.size / multiplied)


@functools.cache
def peer() -> tuple[Any, Any]:
    """Returns (torch, torchvision), or (None, the reason why they cannot be used)."""
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    # Binaries that do not fit each other raise whatever they like.
    except Exception as error:
        return None, one_line(error)
    if on_gpu() and not torch.cuda.is_available():
        return None, "torch sees no GPU and JAX does"
    # Convolutions may use it by default, matrix products not; JAX takes it for both.
    torch.set_float32_matmul_precision("high")
    # Beyond its default of 8 variants of a function, what is called compiled would silently not be.
    torch._dynamo.config.recompile_limit = 64
    return torch, torchvision


def torch_device() -> str:
    return "cuda" if on_gpu() else "cpu"


def to_torch(x: Any) -> Any:
    """Returns an array of JAX or NumPy as a tensor on torch's device; an array on a GPU does not leave it."""
    torch, _ = peer()
    if isinstance(x, jax.Array):
        block(x)
        try:
            return torch.from_dlpack(x)
        except Exception as error:  # of a version that does not fit; the values are the same through the host
            print(f"a copy through the host: {one_line(error)}", file=sys.stderr)
    return torch.from_numpy(np.array(x)).to(torch_device())


def from_torch(x: Any) -> jax.Array:
    """Returns a tensor of floating-point values as an array of JAX; one on a GPU does not leave it."""
    x = x.detach().contiguous()
    torch_wait()
    try:
        return jnp.from_dlpack(x)
    except Exception as error:
        print(f"a copy through the host: {one_line(error)}", file=sys.stderr)
    return jnp.asarray(x.cpu().numpy())


def torch_wait(_: Any = None) -> None:
    """Waits for all work that torch has started."""
    if on_gpu():
        peer()[0].cuda.synchronize()


def environment() -> dict:
    """Returns the device, the versions and the precision settings of this process."""
    torch, reason = peer()
    device = jax.devices()[0]
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "versions": {"python": platform.python_version(), "driver": device.client.platform_version, **versions},
        "torchvision": "present" if torch else f"absent: {reason}",
        "float32_products": {
            "jax": str(jax.config.jax_default_matmul_precision or "default (TF32 on GPUs that have it)"),
            "torch": torch
            and f"TF32 in matrix products: {torch.backends.cuda.matmul.allow_tf32}, "
            f"in convolutions: {torch.backends.cudnn.allow_tf32}",
        },
    }


def profiled_kernels(call: Callable[[], Any], wait: Callable[[Any], None]) -> int | None:
    """Returns how many kernels one call launches on the GPU, counted by torch's profiler; None without either.

    The profiler listens to the driver, so it hears JAX's launches too.
    """
    torch, _ = peer()
    if torch is None or not on_gpu():
        return None
    wait(call())
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        wait(call())
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def compiled_kernels(optimised: str) -> int:
    """Returns how many kernels an optimised HLO program launches; those of a loop count once, a sort once per pass."""
    return sum(map(launches_of, launched(optimised)))


def write_report(path: Path, report: dict) -> None:
    """Writes the report as JSON now, so that an interrupted benchmark keeps its results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dated = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **report}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(dated, indent=2, default=_plain) + "\n", encoding="utf-8")
    part.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not fit into JSON")


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows in columns, with a dash for None."""
    cells = [["-" if cell is None else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
