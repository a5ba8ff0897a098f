"""The batch of a step whose numbers were not finite, written out, and that step made again image by image.

Steps follow from seed, step number and images alone, so a run that goes on from its newest checkpoint meets the
same weights in the same step again. Then each image is looked at by itself.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import shared_features
from fasterrcnn_jax.models.rpn import rpn_output
from fasterrcnn_jax.structures import Batch, GroundTruth, Losses, LossTerms, Proposals
from fasterrcnn_jax.training.run_folder import failed_batch_path
from fasterrcnn_jax.training.state import TrainState, step_key


class Examined(NamedTuple):
    """One image of the step, as its own batch."""

    id: str
    losses: LossTerms
    gradient_norm: Float[Array, ""]
    first_not_finite: str | None  # the first thing on the way from pixels to gradient


def write_batch(run: Path, number: int, batch: Batch, ids: list[str], *, process: int = 0) -> Path:
    """Writes RUN/failed/step_NUMBER.npz (of further processes with their number) and returns its path."""
    path = failed_batch_path(run, number, process)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, step=np.int64(number), ids=np.array(ids, str), **_flat(batch))
    return path


def read_batch(path: Path) -> tuple[int, list[str], Batch]:
    """Returns (number of the step, ids of its valid images, batch).

    Raises:
      InputError: the file is absent or none of `write_batch`.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            values = {name: arrays[name] for name in arrays.files}
        number, ids = int(values.pop("step")), values.pop("ids").tolist()
        truth = GroundTruth(*(values.pop(f"ground_truth.{name}") for name in GroundTruth._fields))
        given = [values.pop(f"proposals.{name}", None) for name in Proposals._fields]
        proposals = None if given[0] is None else Proposals(*given)
        return number, ids, Batch(ground_truth=truth, proposals=proposals, **values)
    except FileNotFoundError:
        raise InputError(f"--replay {path}: no such file") from None
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise InputError(f"--replay {path}: not the batch of a failed step ({type(error).__name__}: {error})") from None


def examine(
    graphdef: nnx.GraphDef, state: TrainState, batch: Batch, ids: list[str], losses_of: Callable[..., Losses]
) -> list[Examined]:
    """Returns what the step `state.step + 1` is of every valid image of `batch` by itself.

    Args:
      state: before the step.
      losses_of: what is trained, as `training_losses`.
    """

    @jax.jit
    def one(state: TrainState, image: Batch):
        params = state.params

        def total(params):
            model = nnx.merge(graphdef, params, state.frozen)
            terms = losses_of(model, image, step_key(state)).terms()
            return terms.total, terms

        model = nnx.merge(graphdef, params, state.frozen)
        levels = shared_features(model, image.images, image.image_hw)
        rpn = rpn_output(model, levels, image.image_hw)
        gradient, terms = jax.grad(total, has_aux=True)(params)
        way = {
            "pixels": image.images,
            "boxes": image.ground_truth.boxes,
            "features": levels,
            "objectness": rpn.objectness,
            "deltas of the RPN": rpn.deltas,
            "losses": terms,
            "gradient": gradient,
        }
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)))
        return terms, norm, {name: _finite(value) for name, value in way.items()}

    examined = []
    rows = np.flatnonzero(batch.image_valid)
    images = [jax.tree.map(lambda x, row=row: x[row : row + 1], batch) for row in rows]
    for image, name in zip(images, ids, strict=True):
        terms, norm, finite = jax.device_get(one(state, image))
        # A jitted function returns its dictionary sorted.
        first = next((stage for stage in _WAY if not finite[stage]), None)
        examined.append(Examined(name, terms, norm, first))
    return examined


_WAY = ("pixels", "boxes", "features", "objectness", "deltas of the RPN", "losses", "gradient")


def format_examined(number: int, examined: list[Examined]) -> str:
    """Returns the table that `train.py --replay` prints, and a sentence."""
    width = max(len("image"), *(len(row.id) for row in examined))
    columns = ("objectness", "rpn box", "class", "box", "gradient")
    lines = [
        f"step {number}, each image by itself",
        f"{'image':<{width}}" + "".join(f"{c:>12}" for c in columns),
    ]
    for row in examined:
        numbers = "".join(f"{float(value):>12.4g}" for value in (*row.losses, row.gradient_norm))
        found = "" if row.first_not_finite is None else f"  not finite first in: {row.first_not_finite}"
        lines.append(f"{row.id:<{width}}{numbers}{found}")
    if all(row.first_not_finite is None for row in examined):
        lines.append("Everything is finite here: the sum over images or devices, or the update, was not.")
    return "\n".join(lines)


def _finite(tree) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _flat(batch: Batch) -> dict[str, np.ndarray]:
    flat = {}
    for name, value in batch._asdict().items():
        if isinstance(value, tuple):
            flat |= {f"{name}.{field}": np.asarray(part) for field, part in value._asdict().items()}
        elif value is not None:
            flat[name] = np.asarray(value)
    return flat
