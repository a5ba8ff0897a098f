"""The state of a training, which each step changes."""

from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt32

from fasterrcnn_jax.models.detector import Detector

# Parts of the detector. A stage of alternating training trains some of them and does not change the others.
PARTS = ("backbone", "neck", "rpn_head", "box_head")


class TrainState(NamedTuple):
    """Everything that a step changes or needs; a pytree of arrays."""

    step: Int[Array, ""]
    params: PyTree  # parameters that the optimizer may change
    averaged: PyTree | None  # moving average of `params`; None: the run keeps no average
    frozen: PyTree  # constants and fixed stages of the network; saved, never changed
    running: PyTree  # running averages of batch normalisation; each step moves them, detection reads them
    opt_state: PyTree
    key: UInt32[Array, "2"]  # never changes; each step folds its number into the key


class StepMetrics(NamedTuple):
    """Scalars of one step over all devices."""

    rpn_objectness: Float[Array, ""]
    rpn_box: Float[Array, ""]
    box_class: Float[Array, ""]
    box_delta: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    # After the update, with the running averages: a state that is not finite must not be saved.
    parameter_norm: Float[Array, ""]
    rpn_foreground: Float[Array, ""]  # anchors in the sample that are foreground
    box_foreground: Float[Array, ""]  # RoIs in the sample that are foreground


def split_moved(params: PyTree, parts: tuple[str, ...]) -> tuple[PyTree, PyTree]:
    """Returns (trained parameters, other parameters); `nnx.merge_state` is the inverse."""
    moved, rest = nnx.split_state(params, lambda path, _: path[0] in parts, ...)
    return moved, rest


def merge(graphdef: nnx.GraphDef, state: TrainState) -> Detector:
    """Returns the detector of a state, on the first local device. It has the averaged weights if the state has them."""
    weights = state.params if state.averaged is None else state.averaged
    return nnx.merge(graphdef, *jax.device_put((weights, state.frozen, state.running), jax.local_devices()[0]))


def step_key(state: TrainState) -> PRNGKeyArray:
    """Returns the key of the step that follows `state`."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
