"""One run on several devices of several processes. The only module that knows how a step is mapped over them.

Every process runs the same program on its local devices. Arrays are local: a state has a copy on each local
device, a batch the rows of this process. What must not differ between processes is gathered here.
"""

import socket
import time

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Shaped

from fasterrcnn_jax.config import DistributedConfig
from fasterrcnn_jax.errors import InputError

AXIS = "batch"
TIMEOUT = 300  # seconds that processes wait for one another at the start


def initialize(config: DistributedConfig) -> None:
    """Joins the other processes of the run; call it before anything asks JAX for its devices.

    Raises:
      InputError: no cluster is found, the coordinator cannot be reached, or this process is no part of it.
    """
    if config.coordinator is None:
        return
    # Its handler of SIGTERM would take the place of ours; `preemption` and `any_process` do its work.
    jax.config.update("jax_enable_preemption_service", False)
    explicit = config.coordinator != "detect"
    if explicit and config.process_id > 0:
        _wait_for(config.coordinator)
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator if explicit else None,
            num_processes=config.num_processes,
            process_id=config.process_id,
            # Otherwise the environment of a cluster would be asked for what is missing: the local devices.
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=TIMEOUT,
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"distributed.coordinator = {config.coordinator!r}: {_reason(error)}") from error


def _wait_for(coordinator: str) -> None:
    """Returns when process 0 answers; of one that never does, JAX would end the program with a stack trace."""
    host, _, port = coordinator.rpartition(":")
    until = time.monotonic() + TIMEOUT
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise InputError(
                    f"distributed.coordinator = {coordinator!r} is not reached within {TIMEOUT} seconds "
                    f"({error.strerror or error})"
                ) from error
            time.sleep(0.2)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "coordinator_address should be defined" in text:
        return "none of SLURM, Open MPI, Kubernetes or Cloud TPU is found around this process; give HOST:PORT"
    return text


def process() -> tuple[int, int]:
    """Returns (index, count) of this process; (0, 1) where there is one alone."""
    return jax.process_index(), jax.process_count()


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return jax.process_index() == 0


def per_device(batch_size: int) -> int:
    """Returns how many images of a batch one device gets, at least one."""
    return max(1, batch_size // jax.device_count())


def check_batch_size(batch_size: int, *, accumulate: int = 1, field: str = "train.batch_size") -> None:
    """Raises InputError unless every device gets the same number of images in each of `accumulate` parts.

    Args:
      field: of the configuration that says `batch_size`.
    """
    devices, processes = jax.device_count(), jax.process_count()
    if batch_size % (devices * accumulate):
        among = "" if processes == 1 else f" of {processes} processes"
        parts = "" if accumulate == 1 else f" times {accumulate} parts"
        raise InputError(f"{field} is {batch_size}, not a multiple of the {devices} devices{among}{parts}")


def any_process(flag: bool) -> bool | jax.Array:
    """Returns, as a bool scalar, whether `flag` is true in any process; the same in all of them.

    All processes must call it, in the same place among their steps. It is queued behind the step before it
    like any work of the device: only who reads the result waits.
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
    """Returns the rows of all processes, those of process 0 first; each may have another number of them."""
    if jax.process_count() == 1:
        return rows
    counts = multihost_utils.process_allgather(np.int32(len(rows)))
    # Rounded up: evaluations that find about as much share one program.
    slots = 1 << int(counts.max() - 1).bit_length()
    padded = np.zeros((slots, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    gathered = multihost_utils.process_allgather(padded)
    return np.concatenate([of[:count] for of, count in zip(gathered, counts, strict=True)])
