"""Communication between the processes of one run.

Every process runs the same program on its local devices. Arrays are local: each local device has a copy of the state,
and a batch has only the rows of this process. This module gathers the values that must be the same in all processes.
"""

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped

from fasterrcnn_jax.config import DistributedConfig
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.kernels import choice

AXIS = "batch"
# The class is in JAX's compiled part, which has no types for checkers.
Devices: TypeAlias = Sequence[jax.Device]  # pyright: ignore[reportInvalidTypeForm]
TIMEOUT = 300  # seconds that processes wait for one another at the start
# Exists where the driver of an NVIDIA GPU is loaded.
NVIDIA_DRIVER = Path("/dev/nvidiactl")


def initialize(config: DistributedConfig) -> None:
    """Connects this process to the other processes of the run. Call it before anything asks JAX for its devices.

    Raises:
      InputError: no cluster is found, the coordinator cannot be reached, or this process does not belong to it.
    """
    if config.coordinator is None:
        return
    # JAX's handler of SIGTERM would replace ours. `preemption` and `any_process` do the same work.
    jax.config.update("jax_enable_preemption_service", False)
    explicit = config.coordinator != "detect"
    if explicit and config.process_id:
        _wait_for(config.coordinator)
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator if explicit else None,
            num_processes=config.num_processes,
            process_id=config.process_id,
            # Otherwise JAX would take the local devices, which we do not give, from the cluster's environment.
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=TIMEOUT,
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"distributed.coordinator = {config.coordinator!r}: {_reason(error)}") from error


def _wait_for(coordinator: str) -> None:
    """Returns when process 0 answers, and raises InputError after TIMEOUT.

    Without this check, JAX would end the program with a stack trace if process 0 never answers.
    """
    host, _, port = coordinator.rpartition(":")
    until = time.monotonic() + TIMEOUT
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise InputError(
                    f"distributed.coordinator = {coordinator!r} did not answer within {TIMEOUT} seconds "
                    f"({error.strerror or error})"
                ) from error
            time.sleep(0.2)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "coordinator_address should be defined" in text:
        return "this process does not run under SLURM, Open MPI, Kubernetes or Cloud TPU; give HOST:PORT"
    return text


def process() -> tuple[int, int]:
    """Returns (index of this process, number of processes); (0, 1) in a run of one process."""
    return jax.process_index(), jax.process_count()


def device_line() -> str:
    """Returns the line that names the devices; says where a GPU is installed that JAX does not use."""
    devices = jax.devices()
    line = f"device     {len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    if devices[0].platform == "cpu" and NVIDIA_DRIVER.exists():
        line += "; this computer has an NVIDIA GPU, but JAX does not see it: pip install 'jax[cuda13]'"
    return line


def kernel_line(implementation: choice.Implementation) -> str | None:
    """Returns the line that says why a GPU runs without the kernels of this package, or that they are checked first;
    None if it runs with them.

    Args:
      implementation: as in `detect`. Who names one has chosen, and is told nothing.
    """
    if implementation is not None or choice.device()[0] != "cuda":
        return None
    reason = choice.not_chosen_here()
    capability = choice.device()[1]
    if reason is None and choice.is_checked_here():
        return (
            "kernels    checked: no GPU kernel was ever run on compute capability {}.{}, so each is compared with "
            "plain JAX first, and a warning says which of the two runs".format(*capability)
        )
    if reason is None:
        return None
    line = f"kernels    none: NMS and region features run as plain JAX; the GPU kernels are not used here: {reason}"
    if jax.__version_info__[:2] < choice.OLDEST_JAX and choice.AMPERE <= capability < choice.NEWEST:
        line += (
            "; use Python 3.12 or newer and pip install 'fasterrcnn_jax[cuda13]' or, for CUDA 12, "
            "'fasterrcnn_jax[cuda12]'"
        )
    return line


def is_main() -> bool:
    """Returns True in the one process that writes files and prints."""
    return jax.process_index() == 0


def per_device(batch_size: int) -> int:
    """Returns the number of images of a batch that one device gets, at least one."""
    return max(1, batch_size // jax.device_count())


def check_batch_size(batch_size: int, *, accumulate: int = 1, field: str = "train.batch_size") -> None:
    """Raises InputError unless every device gets the same number of images in each of `accumulate` micro-batches.

    Args:
      field: configuration field that holds `batch_size`, for the message.
    """
    devices, processes = jax.device_count(), jax.process_count()
    if batch_size % (devices * accumulate):
        among = "" if processes == 1 else f" of {processes} processes"
        parts = "" if accumulate == 1 else f" times {accumulate} micro-batches"
        raise InputError(f"{field} is {batch_size}, not a multiple of the {devices} devices{among}{parts}")


def over_devices(
    function: Callable[[Any, Any], Any], *, devices: Devices, out_axes: Any = 0, donate_argnums: Any = ()
) -> Callable[[PyTree, PyTree], Any]:
    """Returns `function` of (state, rows) mapped over devices with `pmap`; training and evaluation are mapped by this.

    It takes the rows of this process, which its devices share evenly, and the state once for all devices. Place the
    state with `replicate`.

    Args:
      out_axes: as in `pmap`. A result with axis 0 has the device axis first.
      donate_argnums: as in `pmap`.
    """
    mapped = jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=out_axes,
        devices=devices,
        donate_argnums=donate_argnums,
    )
    local = len(_local(devices))

    def run(state: PyTree, rows: PyTree) -> Any:
        return mapped(state, jax.tree.map(lambda x: x.reshape(local, -1, *x.shape[1:]), rows))

    return run


def replicate(state: PyTree, *, devices: Devices | None = None) -> Any:
    """Returns the state on every local device among `devices`, placed like the state that a mapped function returns.

    With another placement, the second call would compile the program again, or copy the state again.
    """
    mesh = Mesh(np.array(_local(jax.devices() if devices is None else devices)), (AXIS,))
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))


def _local(devices: Devices) -> Devices:
    return [device for device in devices if device.process_index == jax.process_index()]


def any_process(flag: bool) -> bool | jax.Array:
    """Returns a bool scalar: whether `flag` is true in any process. The result is the same in all processes.

    All processes must call this at the same point between their steps. The device runs it after the step before it,
    so the caller waits only when it reads the result.
    """
    if jax.process_count() == 1:
        return flag
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    flags = np.full(jax.local_device_count(), flag)
    return _any(multihost_utils.host_local_array_to_global_array(flags, mesh, PartitionSpec(AXIS)))


@jax.jit
def _any(flags: Shaped[jax.Array, "n"]) -> Shaped[jax.Array, ""]:
    return flags.any()


def gather_rows(rows: Shaped[np.ndarray, "n ..."]) -> Shaped[np.ndarray, "m ..."]:
    """Returns the rows of all processes, in the order of the processes. Their numbers of rows may differ."""
    if jax.process_count() == 1:
        return rows
    counts = multihost_utils.process_allgather(np.int32(len(rows)))
    # Rounded up to a power of two, so that evaluations with similar numbers of rows share one compiled program.
    slots = 1 << int(counts.max() - 1).bit_length()
    padded = np.zeros((slots, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    gathered = multihost_utils.process_allgather(padded)
    return np.concatenate([of[:count] for of, count in zip(gathered, counts, strict=True)])
