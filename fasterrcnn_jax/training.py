"""The training step: four losses, one update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt32

from fasterrcnn_jax.config import TrainConfig
from fasterrcnn_jax.kernels.choice import Implementation
from fasterrcnn_jax.models.detector import Detector, split, training_losses
from fasterrcnn_jax.structures import Batch, Losses

# Of the detector; a stage of alternating training moves some and leaves the others as they are.
PARTS = ("backbone", "neck", "rpn_head", "box_head")


class TrainState(NamedTuple):
    """Everything that a step changes or needs; a pytree of arrays."""

    step: Int[Array, ""]
    params: PyTree  # what the optimizer moves
    averaged: PyTree | None  # moving average of `params`; None where the run keeps none
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
    rpn_foreground: Float[Array, ""]  # anchors in the sample that are foreground
    box_foreground: Float[Array, ""]  # RoIs in the sample that are foreground


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


def learning_rates(config: TrainConfig) -> list[float]:
    """Returns the learning rate of every step, the first first."""
    steps = jnp.arange(config.steps, dtype=jnp.int32)
    return jax.jit(jax.vmap(learning_rate_schedule(config)))(steps).tolist()


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
    if config.layer_decay < 1.0:
        chain.append(optax.stateless(lambda updates, _: _slower_below(updates, config.layer_decay)))
    return optax.chain(*chain)


def _slower_below(updates: PyTree, decay: float) -> PyTree:
    """Returns the updates of the backbone times `decay` once for each stage between them and the heads."""
    stages = [path[2].key for path, _ in jax.tree_util.tree_leaves_with_path(updates) if _is_stage(path)]
    last = max(stages, default=0)

    def scaled(path, update):
        if path[0].key != "backbone":
            return update
        # The stem counts to the first stage.
        stage = path[2].key if _is_stage(path) else 0
        return update * decay ** (1 + last - stage)

    return jax.tree_util.tree_map_with_path(scaled, updates)


def _is_stage(path) -> bool:
    return path[0].key == "backbone" and path[1].key == "stages"


def _names(path) -> tuple[str, ...]:
    return tuple(str(part.key) for part in path if hasattr(part, "key"))


def _is_bias(names: tuple[str, ...]) -> bool:
    return "bias" in names


def _is_objectness(names: tuple[str, ...]) -> bool:
    return "objectness" in names


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
      averages: keep a moving average of the weights beside them.
      parts: those of the detector that are to move.
    """
    graphdef, params, frozen = split(model)
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        averaged=jax.tree.map(jnp.copy, params) if averages else None,
        frozen=frozen,
        opt_state=optimizer.init(_moved(params, parts)[0]),
        key=jax.random.key_data(jax.random.key(seed)),
    )
    return graphdef, state


def _moved(params: PyTree, parts: tuple[str, ...]) -> tuple[PyTree, PyTree]:
    """Returns (what moves, the rest); `nnx.merge_state` is the inverse."""
    return nnx.split_state(params, lambda path, _: path[0] in parts, ...)


def merge(graphdef: nnx.GraphDef, state: TrainState) -> Detector:
    """Returns the detector of a state, of averaged weights where it has them, on the first local device."""
    weights = state.params if state.averaged is None else state.averaged
    params, frozen = jax.device_put((weights, state.frozen), jax.local_devices()[0])
    return nnx.merge(graphdef, params, frozen)


def step_key(state: TrainState) -> PRNGKeyArray:
    """Returns the key of the step that follows `state`."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str,
    accumulate: int = 1,
    ema_decay: float | None = None,
    losses: Callable[..., Losses] = training_losses,
    parts: tuple[str, ...] = PARTS,
    implementation: Implementation = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the step of one device; map it over devices with the axis `axis_name`.

    Each device differentiates its local sums over the global counts and the gradients are added, which
    is the gradient of the global mean. No `psum` is differentiated: that would count it once per device.

    Args:
      accumulate: parts that a device's images are cut into, one after the other; the gradient is the mean of
        theirs. Each part divides by its own counts.
      ema_decay: of the state's averaged weights; in its first steps the average forgets faster.
      losses: what is differentiated: `training_losses`, `rpn_training_losses` or `box_training_losses`.
      parts: of the detector, those that move, as in `create_state`.
    """

    def gradients_of(state: TrainState, key: PRNGKeyArray, batch: Batch) -> tuple[PyTree, tuple[list, tuple]]:
        # RoIs per batch are shared by the parts as well.
        num_parts = lax.axis_size(axis_name) * accumulate
        moved, fixed = _moved(state.params, parts)

        def local_loss(moved):
            model = nnx.merge(graphdef, moved, fixed, state.frozen)
            found = losses(model, batch, key, num_devices=num_parts, implementation=implementation)
            counts = [jnp.maximum(lax.psum(lax.stop_gradient(mean.count), axis_name), 1.0) for mean in found.means]
            means = [mean.sum / count for mean, count in zip(found.means, counts, strict=True)]
            return sum(means), (means, found[4:])

        return jax.grad(local_loss, has_aux=True)(moved)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = step_key(state)
        if accumulate == 1:
            summed = gradients_of(state, key, batch)
        else:
            cut = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
            shapes = jax.eval_shape(gradients_of, state, key, jax.tree.map(lambda x: x[0], cut))
            summed, _ = lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, gradients_of(state, key, part)), None),
                jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
                cut,
            )
        gradients, (means, foreground) = lax.psum(summed, axis_name)
        gradients, means = jax.tree.map(lambda x: x / accumulate, (gradients, means))
        moved, fixed = _moved(state.params, parts)
        updates, opt_state = optimizer.update(gradients, state.opt_state, moved)
        moved = optax.apply_updates(moved, updates)
        params = nnx.merge_state(moved, fixed)
        averaged = state.averaged
        if averaged is not None:
            passed = state.step.astype(jnp.float32) + 1.0
            decay = jnp.minimum(ema_decay, passed / (passed + 9.0))
            # What does not move must not be rounded either.
            average, fixed = _moved(averaged, parts)
            average = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, average, moved)
            averaged = nnx.merge_state(average, fixed)
        norms = optax.tree.norm(gradients), optax.tree.norm(params)
        metrics = StepMetrics(*means, *norms, *foreground)
        state = state._replace(step=state.step + 1, params=params, averaged=averaged, opt_state=opt_state)
        return state, metrics

    return train_step
