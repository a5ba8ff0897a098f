"""The training step: four losses, one update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, UInt32

from fasterrcnn_jax.config import TrainConfig
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector, split, training_losses
from fasterrcnn_jax.structures import Batch


class TrainState(NamedTuple):
    """Everything that a step changes or needs; a pytree of arrays."""

    step: Int[Array, ""]
    params: PyTree  # what the optimizer moves
    frozen: PyTree  # constants and fixed stages of the network, saved and never moved
    opt_state: PyTree
    key: UInt32[Array, "2"]  # never changes; each step folds its number into it


class StepMetrics(NamedTuple):
    """Scalars of one step over all devices."""

    rpn_objectness: Float[Array, ""]
    rpn_box: Float[Array, ""]
    box_class: Float[Array, ""]
    box_delta: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    parameter_norm: Float[Array, ""]  # after the update: a state that is not finite must not be saved


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Returns a linear warm-up, whose first step already moves, followed by steps down or a cosine to zero."""
    if config.schedule == "cosine":
        first = config.learning_rate / max(config.warmup_steps, 1)
        return optax.warmup_cosine_decay_schedule(
            first, config.learning_rate, config.warmup_steps, config.steps, 0.0
        )

    def schedule(step):
        passed = jnp.asarray(step, jnp.float32)
        first = 1.0 / max(config.warmup_steps, 1)
        warmup = jnp.minimum(first + (1.0 - first) * passed / max(config.warmup_steps, 1), 1.0)
        falls = (passed >= jnp.asarray(config.decay_steps, jnp.float32)).sum()
        return config.learning_rate * warmup * config.decay_factor ** falls.astype(jnp.float32)

    return schedule


def create_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Returns the optimizer: clipping by global norm, weight decay, SGD or Adam(W), rates per kind of weight.

    Kernels are all that is convolved or multiplied with, biases what is named so; the scales of
    normalisation layers are neither and get no decay.
    """

    def masked(transformation, choose):
        def mask(params):
            return jax.tree_util.tree_map_with_path(lambda path, leaf: choose(_names(path), leaf), params)

        return optax.masked(transformation, mask)

    def decay(weight):
        """Adds `weight` times the value to the gradient, as the reference's frameworks do."""

        def kernels(*, of_objectness):
            return lambda names, leaf: leaf.ndim > 1 and _is_objectness(names) == of_objectness

        halved = weight * (0.5 if config.double_objectness else 1.0)
        chain = [
            masked(optax.add_decayed_weights(weight), kernels(of_objectness=False)),
            masked(optax.add_decayed_weights(halved), kernels(of_objectness=True)),
        ]
        if config.bias_decay:
            chain.append(masked(optax.add_decayed_weights(weight), lambda names, _: _is_bias(names)))
        return optax.chain(*chain)

    chain = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    if config.optimizer == "adamw":
        chain += [optax.scale_by_adam(), decay(config.weight_decay)]
    elif config.optimizer == "adam":
        chain += [decay(config.weight_decay), optax.scale_by_adam()]
    else:
        chain += [decay(config.weight_decay), optax.trace(decay=config.momentum)]
    chain.append(optax.scale_by_learning_rate(learning_rate_schedule(config)))
    if config.double_bias:
        chain.append(masked(optax.scale(2.0), lambda names, _: _is_bias(names)))
    if config.double_objectness:
        chain.append(masked(optax.scale(2.0), lambda names, _: _is_objectness(names)))
    return optax.chain(*chain)


def _names(path) -> tuple[str, ...]:
    return tuple(str(part.key) for part in path if hasattr(part, "key"))


def _is_bias(names: tuple[str, ...]) -> bool:
    return "bias" in names


def _is_objectness(names: tuple[str, ...]) -> bool:
    return "objectness" in names


def create_state(
    model: Detector, optimizer: optax.GradientTransformation, *, seed: int
) -> tuple[nnx.GraphDef, TrainState]:
    """Returns the static part of `model` and the state at step 0."""
    graphdef, params, frozen = split(model)
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        frozen=frozen,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(seed)),
    )
    return graphdef, state


def merge(graphdef: nnx.GraphDef, state: TrainState) -> Detector:
    """Returns the detector of a state, on the first local device."""
    params, frozen = jax.device_put((state.params, state.frozen), jax.local_devices()[0])
    return nnx.merge(graphdef, params, frozen)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str,
    implementation: Implementation = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the step of one device; map it over devices with the axis `axis_name`.

    Each device differentiates its local sums over the global counts and the gradients are added, which
    is the gradient of the global mean. No `psum` is differentiated: that would count it once per device.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        num_devices = lax.axis_size(axis_name)

        def local_loss(params):
            model = nnx.merge(graphdef, params, state.frozen)
            losses = training_losses(model, batch, key, num_devices=num_devices, implementation=implementation)
            counts = [jnp.maximum(lax.psum(lax.stop_gradient(mean.count), axis_name), 1.0) for mean in losses]
            parts = [mean.sum / count for mean, count in zip(losses, counts, strict=True)]
            return sum(parts), parts

        gradients, parts = jax.grad(local_loss, has_aux=True)(state.params)
        gradients, parts = lax.psum((gradients, parts), axis_name)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(*parts, gradient_norm=optax.tree.norm(gradients), parameter_norm=optax.tree.norm(params))
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step
