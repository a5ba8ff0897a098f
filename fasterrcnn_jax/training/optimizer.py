"""The optimizer and its learning rates."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from fasterrcnn_jax.config import TrainConfig


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Returns a linear warm-up, whose first step already moves, followed by steps down or a cosine to zero."""
    if config.schedule == "cosine":
        first = config.learning_rate / max(config.warmup_steps, 1)
        return optax.warmup_cosine_decay_schedule(first, config.learning_rate, config.warmup_steps, config.steps, 0.0)

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
