"""The training step: four losses, one update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector, split, use_batch_statistics
from fasterrcnn_jax.models.faster_rcnn import training_losses
from fasterrcnn_jax.models.layers import Running
from fasterrcnn_jax.processes import AXIS, Devices, over_devices
from fasterrcnn_jax.structures import Batch, Losses, LossTerms
from fasterrcnn_jax.training.state import (
    PARTS,
    StepMetrics,
    TrainState,
    split_moved,
    step_key,
)

# One training step: maps the state and a batch to the next state and its metrics.
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def create_state(
    model: Detector,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    averages: bool = False,
    parts: tuple[str, ...] = PARTS,
) -> tuple[nnx.GraphDef, TrainState]:
    """Returns the static part of `model` and the state at step 0.

    Args:
      averages: keep a moving average of the weights too.
      parts: the parts of the detector that are trained.
    """
    graphdef, params, rest = split(model)
    running, frozen = nnx.split_state(rest, Running, ...)
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        averaged=jax.tree.map(jnp.copy, params) if averages else None,
        frozen=frozen,
        running=running,
        opt_state=optimizer.init(split_moved(params, parts)[0]),
        key=jax.random.key_data(jax.random.key(seed)),
    )
    return graphdef, state


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str = AXIS,
    accumulate: int = 1,
    ema_decay: float | None = None,
    losses: Callable[..., Losses] = training_losses,
    parts: tuple[str, ...] = PARTS,
    implementation: Implementation = None,
) -> TrainStep:
    """Returns the training step of one device; `data_parallel` maps it over devices with the axis `axis_name`.

    Each device differentiates its local sums divided by the global counts, and the gradients are added. The result
    is the gradient of the global mean. No `psum` of a loss is differentiated: that would count the loss once per
    device. Batch normalisation uses the statistics of the images of all devices.

    Args:
      accumulate: number of micro-batches that a device's images are split into. They run one after the other, each
        divides by its own counts, and the gradient is their mean. Batch normalisation sees one micro-batch at a time.
      ema_decay: decay of the averaged weights. In the first steps the average forgets faster. The running averages
        of batch normalisation are not averaged again.
      losses: the function to differentiate: `training_losses`, `rpn_training_losses` or `box_training_losses`.
      parts: the parts of the detector that are trained, as in `create_state`.
    """

    def gradients_of(
        state: TrainState, running: PyTree, key: PRNGKeyArray, batch: Batch
    ) -> tuple[tuple[PyTree, tuple[LossTerms, Array, Array]], PyTree]:
        """Returns what is added over devices, and the next running averages, which are the same on all devices."""
        # `rois_per_batch` is divided among micro-batches as it is among devices.
        shares = lax.axis_size(axis_name) * accumulate
        moved, fixed = split_moved(state.params, parts)

        def local_loss(moved: PyTree) -> tuple[Array, tuple[tuple[LossTerms, Array, Array], PyTree]]:
            # Copied, because the layers of this copy write into it.
            model = nnx.merge(graphdef, moved, fixed, state.frozen, running, copy=True)
            use_batch_statistics(model, axes=(axis_name,), parts=parts)
            found = losses(model, batch, key, num_devices=shares, implementation=implementation)
            terms = found.terms(lambda count: lax.psum(count, axis_name))
            return terms.total, ((terms, found.rpn_foreground, found.box_foreground), nnx.state(model, Running))

        gradients, (summed, running) = jax.grad(local_loss, has_aux=True)(moved)
        return (gradients, summed), running

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = step_key(state)
        if accumulate == 1:
            summed, running = gradients_of(state, state.running, key, batch)
        else:
            micro_batches = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
            one = jax.tree.map(lambda x: x[0], micro_batches)
            shapes, _ = jax.eval_shape(gradients_of, state, state.running, key, one)

            def add(carry: tuple[PyTree, PyTree], micro_batch: Batch) -> tuple[tuple[PyTree, PyTree], None]:
                total, running = carry
                found, running = gradients_of(state, running, key, micro_batch)
                return (jax.tree.map(jnp.add, total, found), running), None

            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            (summed, running), _ = lax.scan(add, (nothing, state.running), micro_batches)
        gradients, (terms, rpn_foreground, box_foreground) = lax.psum(summed, axis_name)
        gradients, terms = jax.tree.map(lambda x: x / accumulate, (gradients, terms))
        moved, fixed = split_moved(state.params, parts)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, moved)
            moved: PyTree = optax.apply_updates(moved, updates)
        params = nnx.merge_state(moved, fixed)
        averaged = state.averaged
        if averaged is not None:
            assert ema_decay is not None, "the state has averaged weights, so it needs a decay for them"
            passed = state.step.astype(jnp.float32) + 1.0
            decay = jnp.minimum(ema_decay, passed / (passed + 9.0))
            # Weights that are not trained keep their exact bits: averaging would round them.
            average, fixed = split_moved(averaged, parts)
            average = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, average, moved)
            averaged = nnx.merge_state(average, fixed)
        metrics = StepMetrics(
            **terms._asdict(),
            gradient_norm=_norm(gradients),
            parameter_norm=_norm((params, running)),
            rpn_foreground=rpn_foreground,
            box_foreground=box_foreground,
        )
        state = state._replace(
            step=state.step + 1, params=params, averaged=averaged, running=running, opt_state=opt_state
        )
        return state, metrics

    return train_step


def _norm(arrays: PyTree) -> Float[Array, ""]:
    """Returns the root of the sum of all squares.

    Each array is summed over its last axis; then one sum adds the results of all arrays. A sum of each array to a
    scalar would take a GPU two launches: two hundred for the two norms of a ResNet-50.
    """
    rows = [jnp.square(jnp.atleast_1d(x)).sum(axis=-1).reshape(-1) for x in jax.tree.leaves(arrays)]
    # Without the barrier XLA would sum each array by itself again.
    return jnp.sqrt(lax.optimization_barrier(jnp.concatenate(rows)).sum())


def data_parallel(
    step: TrainStep,
    *,
    devices: Devices | None = None,
) -> TrainStep:
    """Returns `step` mapped over devices.

    It takes the batch rows of this process. The state goes in and out as one copy, without a device axis, and its
    memory is donated.

    Args:
      devices: devices to use; None: all devices of all processes.
    """
    devices = jax.devices() if devices is None else devices
    return over_devices(step, devices=devices, out_axes=(None, None), donate_argnums=0)
