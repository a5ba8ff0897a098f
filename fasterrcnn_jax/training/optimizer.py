"""The optimizer and its learning rates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from fasterrcnn_jax.config import TrainConfig
from fasterrcnn_jax.config.checks import fitted

# Of a leaf, as JAX gives it: keys and indices from the root on.
KeyPath = tuple[Any, ...]


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Returns the learning-rate schedule: linear warm-up from above zero, then steps down or a cosine to zero."""
    warmup_steps, steps = fitted(config.warmup_steps, "train.warmup_steps"), fitted(config.steps, "train.steps")
    if config.schedule == "cosine":
        first = config.learning_rate / max(warmup_steps, 1)
        return optax.warmup_cosine_decay_schedule(first, config.learning_rate, warmup_steps, steps, 0.0)

    def schedule(step: ArrayLike) -> Array:
        passed = jnp.asarray(step, jnp.float32)
        first = 1.0 / max(warmup_steps, 1)
        warmup = jnp.minimum(first + (1.0 - first) * passed / max(warmup_steps, 1), 1.0)
        falls = (passed >= jnp.asarray(config.decay_steps, jnp.float32)).sum()
        return config.learning_rate * warmup * config.decay_factor ** falls.astype(jnp.float32)

    return schedule


def learning_rates(config: TrainConfig) -> list[float]:
    """Returns the learning rate of every step, in order."""
    steps = jnp.arange(fitted(config.steps, "train.steps"), dtype=jnp.int32)
    return jax.jit(jax.vmap(learning_rate_schedule(config)))(steps).tolist()


def create_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Returns the optimizer: clipping by global norm, weight decay, SGD or Adam(W), learning rates per kind of weight.

    Kernels are the weights of convolutions and matrix products. Biases are the weights named "bias". The scales of
    normalisation layers are neither, so they do not decay.
    """

    def masked(
        transformation: optax.GradientTransformation, choose: Callable[[tuple[str, ...], Any], bool]
    ) -> optax.GradientTransformation:
        def mask(params: PyTree) -> PyTree:
            return jax.tree_util.tree_map_with_path(lambda path, leaf: choose(_names(path), leaf), params)

        return optax.masked(transformation, mask)

    def decay(weight: float) -> optax.GradientTransformation:
        """Adds `weight` times the value to the gradient, as the reference's frameworks do."""

        def kernels(*, of_objectness: bool) -> Callable[[tuple[str, ...], Any], bool]:
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
    """Returns the updates, with each backbone stage scaled by `decay` once per stage from it to the heads."""
    stages = [path[2].key for path, _ in jax.tree_util.tree_leaves_with_path(updates) if _is_stage(path)]
    last = max(stages, default=0)

    def scaled(path: KeyPath, update: Array) -> Array:
        if path[0].key != "backbone":
            return update
        # The stem belongs to the first stage.
        stage = path[2].key if _is_stage(path) else 0
        return update * decay ** (1 + last - stage)

    return jax.tree_util.tree_map_with_path(scaled, updates)


def _is_stage(path: KeyPath) -> bool:
    return path[0].key == "backbone" and path[1].key == "stages"


def _names(path: KeyPath) -> tuple[str, ...]:
    return tuple(str(part.key) for part in path if hasattr(part, "key"))


def _is_bias(names: tuple[str, ...]) -> bool:
    return "bias" in names


def _is_objectness(names: tuple[str, ...]) -> bool:
    return "objectness" in names
