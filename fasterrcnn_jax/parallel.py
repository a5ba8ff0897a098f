"""Maps the step of one device over all local devices. The only module that knows how."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.structures import Batch
from fasterrcnn_jax.training import StepMetrics, TrainState

AXIS = "batch"


def data_parallel(
    step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Returns `step` under `pmap`: whole batches in, one unstacked state in and out, state donated.

    Args:
      devices: default: all local ones.
    """
    devices = jax.local_devices() if devices is None else devices
    mapped = jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0), out_axes=(None, None), devices=devices, donate_argnums=0
    )

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return mapped(state, jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch))

    return run


def replicate(state: TrainState, *, devices: Sequence[jax.Device] | None = None) -> TrainState:
    """Returns the state on every device (default: all local ones), placed as the mapped step returns it.

    Placed otherwise, the second step would compile the program again.
    """
    mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), (AXIS,))
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))


def per_device(batch_size: int) -> int:
    """Returns how many images of a batch one local device gets, at least one."""
    return max(1, batch_size // jax.local_device_count())


def check_batch_size(batch_size: int) -> None:
    """Raises InputError unless every local device gets the same number of images."""
    devices = jax.local_device_count()
    if batch_size % devices:
        raise InputError(f"train.batch_size is {batch_size}, not a multiple of the {devices} local devices")
