"""Stores the batch of a step whose numbers were not finite, and repeats that step image by image.

A step depends only on the seed, the step number and the images. A run that continues from its newest checkpoint
therefore reaches the failed step with the same weights again. Then each image of the batch is examined by itself.
"""

import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PyTree

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.models.detector import Detector, shared_features, use_batch_statistics
from fasterrcnn_jax.models.rpn import rpn_output
from fasterrcnn_jax.printing import printable
from fasterrcnn_jax.regular_files import check_declared, check_regular
from fasterrcnn_jax.structures import Batch, GroundTruth, Losses, LossTerms, Proposals
from fasterrcnn_jax.training.run_folder import failed_batch_path
from fasterrcnn_jax.training.state import PARTS, TrainState, step_key


class Examined(NamedTuple):
    """The results of one image of the step, as a batch of its own."""

    id: str
    losses: LossTerms
    gradient_norm: Float[Array, ""]
    first_not_finite: str | None  # first quantity from pixels to gradient that is not finite; None: all are finite


def write_batch(run: Path, number: int, batch: Batch, ids: list[str], *, process: int = 0) -> Path:
    """Writes RUN/failed/step_NUMBER.npz and returns its path. Processes after the first add their number to it."""
    path = failed_batch_path(run, number, process)
    arrays = {"step": np.int64(number), "ids": np.array(ids, str), **_flat(batch)}
    content = io.BytesIO()
    # No field of a batch has the name of an option.
    np.savez_compressed(content, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomically(path, content.getvalue())
    return path


def read_batch(path: Path) -> tuple[int, list[str], Batch]:
    """Returns (step number, ids of the valid images, batch) from a file.

    Raises:
      InputError: the file is missing or was not written by `write_batch`.
    """
    check_regular(path)
    try:
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as arrays:
            values = {name: arrays[name] for name in arrays.files}
        number, ids = int(values.pop("step")), values.pop("ids").tolist()
        truth = GroundTruth(*(values.pop(f"ground_truth.{name}") for name in GroundTruth._fields))
        given = [values.pop(f"proposals.{name}", None) for name in Proposals._fields]
        proposals = None if given[0] is None else Proposals(*given)
        batch = Batch(ground_truth=truth, proposals=proposals, **values)
        _check_batch(batch, ids)
        return number, ids, batch
    except FileNotFoundError:
        raise InputError(f"--replay {path}: no such file") from None
    except Exception as error:  # NumPy and zipfile have no common exception class for damaged files
        raise InputError(
            f"--replay {path}: this file is not the batch of a failed step ({type(error).__name__}: {error})"
        ) from None


def _check_sizes(path: Path) -> None:
    """Raises InputError or ValueError unless each array has the size that its entry in the archive has."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        check_declared(path, sum(entry.file_size for entry in entries), stored=path.stat().st_size)
        for entry in entries:
            with archive.open(entry) as file:
                read = np.lib.format.read_magic(file)
                header = np.lib.format.read_array_header_1_0 if read == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = header(file)
                if math.prod(shape) * dtype.itemsize > entry.file_size:
                    raise ValueError(f"{entry.filename} declares {dtype}{list(shape)} in {entry.file_size} bytes")


def _check_batch(batch: Batch, ids: list[str]) -> None:
    """Raises ValueError unless the arrays have the types and shapes that `write_batch` writes."""
    size, (height, width, _) = len(batch.images), batch.images.shape[1:]
    slots = batch.ground_truth.labels.shape[1]
    declared = {
        "images": (batch.images, ("float32", "uint8"), (size, height, width, 3)),
        "image_hw": (batch.image_hw, ("float32",), (size, 2)),
        "scale": (batch.scale, ("float32",), (size, 2)),
        "image_index": (batch.image_index, ("int32", "int64"), (size,)),
        "image_valid": (batch.image_valid, ("bool",), (size,)),
        "ground_truth.boxes": (batch.ground_truth.boxes, ("float32",), (size, slots, 4)),
        "ground_truth.labels": (batch.ground_truth.labels, ("int32",), (size, slots)),
        "ground_truth.valid": (batch.ground_truth.valid, ("bool",), (size, slots)),
    }
    if batch.proposals is not None:
        given = batch.proposals.scores.shape[1]
        declared |= {
            "proposals.boxes": (batch.proposals.boxes, ("float32",), (size, given, 4)),
            "proposals.scores": (batch.proposals.scores, ("float32",), (size, given)),
            "proposals.valid": (batch.proposals.valid, ("bool",), (size, given)),
        }
    for name, (array, types, shape) in declared.items():
        if str(array.dtype) not in types or array.shape != shape:
            raise ValueError(f"{name} must be {' or '.join(types)}{list(shape)}, got {array.dtype}{list(array.shape)}")
    if not all(isinstance(name, str) for name in ids) or len(ids) != batch.image_valid.sum():
        raise ValueError(f"ids must name the {batch.image_valid.sum()} valid images, got {quoted(ids)}")


def examine(
    graphdef: nnx.GraphDef,
    state: TrainState,
    batch: Batch,
    ids: list[str],
    losses_of: Callable[..., Losses],
    *,
    parts: tuple[str, ...] = PARTS,
) -> list[Examined]:
    """Returns the losses and gradient norm of the step `state.step + 1` for every valid image of `batch` by itself.

    Batch normalisation uses the statistics of the image alone.

    Args:
      state: state before the step.
      ids: ids of the valid images.
      losses_of: losses of the training, for example `training_losses`.
      parts: the parts of the detector that are trained.
    """

    def in_training(params: PyTree, state: TrainState) -> Detector:
        model = nnx.merge(graphdef, params, state.frozen, state.running, copy=True)
        use_batch_statistics(model, parts=parts)
        return model

    @jax.jit
    def one(state: TrainState, image: Batch) -> tuple[LossTerms, Array, dict[str, Array]]:
        params = state.params

        def total(params: PyTree) -> tuple[Array, LossTerms]:
            terms = losses_of(in_training(params, state), image, step_key(state)).terms()
            return terms.total, terms

        model = in_training(params, state)
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
        # A jitted function returns its dictionary in sorted order, so _WAY gives the order.
        first = next((stage for stage in _WAY if not finite[stage]), None)
        examined.append(Examined(name, terms, norm, first))
    return examined


_WAY = ("pixels", "boxes", "features", "objectness", "deltas of the RPN", "losses", "gradient")


def format_examined(number: int, examined: list[Examined]) -> str:
    """Returns the text that `train.py --replay` prints: a table, and a sentence if every number is finite."""
    ids = [printable(row.id) for row in examined]
    width = max(len("image"), *map(len, ids))
    columns = ("objectness", "rpn box", "class", "box", "gradient")
    lines = [
        f"step {number}, each image alone",
        f"{'image':<{width}}" + "".join(f"{c:>12}" for c in columns),
    ]
    for name, row in zip(ids, examined, strict=True):
        numbers = "".join(f"{float(value):>12.4g}" for value in (*row.losses, row.gradient_norm))
        found = "" if row.first_not_finite is None else f"  first not finite: {row.first_not_finite}"
        lines.append(f"{name:<{width}}{numbers}{found}")
    if all(row.first_not_finite is None for row in examined):
        lines.append(
            "Every number of each image is finite. The sum over the images or devices, or the update, was not finite."
        )
    return "\n".join(lines)


def _finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _flat(batch: Batch) -> dict[str, np.ndarray]:
    flat = {}
    for name, value in batch._asdict().items():
        if isinstance(value, (GroundTruth, Proposals)):
            flat |= {f"{name}.{field}": np.asarray(part) for field, part in value._asdict().items()}
        elif value is not None:
            flat[name] = np.asarray(value)
    return flat
