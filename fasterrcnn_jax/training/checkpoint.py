"""Checkpoints of a run, through Orbax: written to a temporary folder and renamed, so never half there.

One checkpoint holds `model` (trained, averaged and frozen values by path), `train` (optimizer, step, key),
`metrics` where it was evaluated, and `meta` (configuration with the class names, position of the data
iterator, a digest of everything). What is read is held against the digests: of bits that flip in the
arrays, the storage notices nothing.
"""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from fasterrcnn_jax.config import Config
from fasterrcnn_jax.config.rules import first_difference
from fasterrcnn_jax.config.text import from_json, to_json
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import Detector, create_detector
from fasterrcnn_jax.training.run_folder import (
    CHECKPOINTS,
    checkpoints_folder,
    run_of_checkpoints,
)
from fasterrcnn_jax.training.state import TrainState

logger = logging.getLogger(__name__)

# Of what is written. Version 1 has no entry "version" and is otherwise the same.
VERSION = 2


def open_checkpoints(run: Path, *, keep: int) -> ocp.training.Checkpointer:
    """Returns the checkpointer of a run folder: keeps the newest `keep` and the best.

    Damaged checkpoints are set aside with a warning, so that the newest one is whole.

    Raises:
      InputError: there are checkpoints and none of them is whole.
    """
    # Orbax reads absolute paths alone.
    folder = checkpoints_folder(run).absolute()
    _set_damaged_aside(folder)
    policies = ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        folder,
        preservation_policy=policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    n=1,
                    get_metric_fn=lambda metrics: metrics["best"],
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        ),
        cleanup_tmp_directories=True,
    )


class Snapshot(NamedTuple):
    """What one checkpoint holds, copied to the host: the next step may overwrite the arrays on the device."""

    state: TrainState
    config: Config
    iterator_state: dict[str, Any]
    measured: float | None = None  # the metric that decides which checkpoint is best; None: not evaluated


def snapshot(state: TrainState, *, config: Config, iterator_state: dict[str, Any]) -> Snapshot:
    """Returns a copy of everything that a checkpoint holds."""
    return Snapshot(jax.tree.map(lambda leaf: np.array(leaf), state), config, iterator_state)


class DeferredSave:
    """Saves a state one step late: once the next step has shown that its loss is finite.

    A state whose next loss is not finite is never written, so the newest checkpoint can always be continued.
    """

    def __init__(self, checkpoints: ocp.training.Checkpointer):
        self._checkpoints = checkpoints
        self.pending: Snapshot | None = None

    def offer(self, snapshot: Snapshot) -> None:
        """Keeps a snapshot until `confirm`."""
        self.pending = snapshot

    def measured(self, value: float | None) -> None:
        """Adds the metric of an evaluation to the pending snapshot."""
        if self.pending is not None:
            self.pending = self.pending._replace(measured=value)

    def confirm(self) -> None:
        """Writes the pending snapshot, if there is one.

        Raises:
          OSError: it cannot be written.
        """
        if self.pending is not None:
            snapshot, self.pending = self.pending, None
            save(self._checkpoints, **snapshot._asdict())

    @contextlib.contextmanager
    def confirmed_on_error(self) -> Iterator[None]:
        """Writes the pending snapshot when the body raises: a failed evaluation must not cost the steps before it."""
        try:
            yield
        except BaseException:
            self.confirm()
            raise


def save(
    checkpoints: ocp.training.Checkpointer,
    *,
    state: TrainState,
    config: Config,
    iterator_state: dict[str, Any],
    measured: float | None,
) -> None:
    """Writes the checkpoint of `state.step` and waits until it is complete; only then older ones go.

    Raises:
      OSError: it cannot be written; those before it are untouched.
    """
    # NumPy, which the storage gives back as it was whatever devices are there.
    parts = {
        part: {path: np.asarray(leaf) for path, leaf in _by_path(tree).items()} for part, tree in _parts(state).items()
    }
    metrics = None if measured is None or math.isnan(measured) else {"best": measured}
    texts = {
        "version": str(VERSION),
        "config": to_json(config),
        "iterator": json.dumps(iterator_state),
        "digests": json.dumps(
            {name: _digest(values) for name, values in parts.items()} | {"metrics": json.dumps(metrics)}
        ),
    }
    step = int(state.step)
    try:
        checkpoints.save_checkpointables(
            step, parts | {"meta": texts | {"digest": _digest_of_texts(texts)}}, metrics=metrics
        )
    except Exception as error:  # Orbax and its storage have no common base class for a disk that is full
        with contextlib.suppress(Exception):  # it would raise the same again when it is closed for good
            checkpoints.close()
        raise OSError(
            f"{_path_of(checkpoints, step)} cannot be written ({_first_line(error)}); "
            "the checkpoints before it are untouched"
        ) from error


def restore(
    checkpoints: ocp.training.Checkpointer, state: TrainState, *, config: Config
) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns the newest checkpoint as (state, position of the iterator), or None where there is none.

    Args:
      state: of the same configuration; gives structure and shapes.
      config: of the run that is to continue.
    Raises:
      InputError: the checkpoint cannot be read or is of another configuration; names the first field.
    """
    if checkpoints.latest is None:
        return None
    folder = _path_of(checkpoints, checkpoints.latest.step)
    found = _read(folder, ("model", "train"))
    difference = first_difference(_config_in(found, folder), config)
    if difference:
        raise InputError(f"{folder} is of a run with {difference}; continue it as it was or choose another --run")
    model, train = (_fit(found[part], tree, folder) for part, tree in _parts(state).items())
    return TrainState(**model, **train), json.loads(found["meta"]["iterator"])


def load(path: str | Path, *, backbone: type[nnx.Module] | None = None) -> Detector:
    """Returns the detector in `path`: a run folder (its newest whole checkpoint) or one checkpoint folder.

    Args:
      backbone: your own, in place of the one whose import path the checkpoint holds; docs/backbone.md.
    Raises:
      InputError: no checkpoint there, or one that is damaged or does not fit its own configuration.
    """
    folder, found = _newest_whole(Path(path), ("model",))
    config = _config_in(found, folder)
    names = config.data.class_names
    model = jax.eval_shape(lambda: create_detector(config.model, names, seed=0, backbone=backbone))
    graphdef, values = nnx.split(model)
    stored = {}
    for kind in ("frozen", "params", "averaged"):  # the average, where there is one, in place of the weights
        prefix = f"{kind}/"
        stored |= {
            path.removeprefix(prefix): value for path, value in found["model"].items() if path.startswith(prefix)
        }
    return nnx.merge(graphdef, _fit(stored, values, folder))


def load_run_config(path: str | Path) -> Config:
    """Returns the configuration stored in a checkpoint; `path` as in `load`."""
    folder, found = _newest_whole(Path(path), ())
    return _config_in(found, folder)


class Best(NamedTuple):
    step: int
    metric: float


def best(checkpoints: ocp.training.Checkpointer) -> Best | None:
    """Returns the checkpoint with the best metric, the later of two; None where none was evaluated."""
    measured = [Best(found.step, found.metrics["best"]) for found in checkpoints.checkpoints if found.metrics]
    return max(measured, key=lambda found: (found.metric, found.step), default=None)


def run_of(path: str | Path) -> Path:
    """Returns the run folder that `path` (as in `load`) belongs to."""
    return run_of_checkpoints(_checkpoints_in(Path(path))[0].parent)


def _set_damaged_aside(folder: Path) -> None:
    """Renames damaged checkpoints to STEP.damaged; the arrays of the newest whole one and after are read.

    Nothing is renamed where none is whole: the fault may lie in what they all have in common. All processes read,
    because Orbax lets one wait for the others; the first one renames.
    """
    whole, faults = None, {}
    for checkpoint in _numbered(folder):
        try:
            _read(checkpoint, ("model", "train", "metrics") if whole is None else ("metrics",))
            whole = whole or checkpoint
        except InputError as error:
            faults[checkpoint] = error
    if faults and whole is None:
        raise InputError(f"no checkpoint is whole, choose another --run: {'; '.join(map(str, faults.values()))}")
    multihost_utils.sync_global_devices("all checkpoints are read")
    for checkpoint, fault in faults.items() if jax.process_index() == 0 else ():
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}.damaged")
        checkpoint.rename(aside)
        logger.warning("%s; it is now %s, the run goes on from %s", fault, aside.name, whole)
    multihost_utils.sync_global_devices("damaged checkpoints are aside")


def _newest_whole(path: Path, parts: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """Returns the checkpoint that `path` names, or the newest whole one of a run, with what is in it."""
    candidates = _checkpoints_in(path)
    for checkpoint in candidates[:-1]:
        try:
            return checkpoint, _read(checkpoint, parts)
        except InputError as error:
            logger.warning("%s; the one before it is used", error)
    return candidates[-1], _read(candidates[-1], parts)


def _read(folder: Path, parts: tuple[str, ...]) -> dict[str, Any]:
    """Returns `meta` and the named parts of a checkpoint, `metrics` only where it was evaluated.

    Raises:
      InputError: something cannot be read or is not what was saved.
    """
    try:
        meta = ocp.load_checkpointables(folder, {"meta": None})["meta"]
        texts = {name: text for name, text in meta.items() if name != "digest"}
        if meta["digest"] != _digest_of_texts(texts):
            raise InputError(f"{folder}: the checkpoint is damaged: meta is not what was saved")
        version = int(meta.get("version", "1"))
        if version > VERSION:
            raise InputError(
                f"{folder}: the checkpoint has format version {version}; this release reads versions up to {VERSION}, "
                "install a newer one"
            )
        digests = json.loads(meta["digests"])
        found = {}
        if "metrics" in parts and digests["metrics"] != "null":
            # Orbax hands them out as a whole list only, and fails on one that is damaged.
            found["metrics"] = json.loads((folder / "metrics" / "metrics").read_text())
        arrays = dict.fromkeys(name for name in parts if name != "metrics")
        found |= ocp.load_checkpointables(folder, arrays) if arrays else {}
    except InputError:
        raise
    except Exception as error:  # Orbax and its storage have no common base class for damage
        raise InputError(f"{folder}: the checkpoint is incomplete or damaged ({type(error).__name__})") from error
    for name, values in found.items():
        if digests[name] != (json.dumps(values) if name == "metrics" else _digest(values)):
            raise InputError(f"{folder}: the checkpoint is damaged: {name} is not what was saved")
    return found | {"meta": meta}


def _parts(state: TrainState) -> dict[str, dict[str, Any]]:
    """Returns the trees of a state as a checkpoint holds them."""
    model = {"params": state.params, "averaged": state.averaged, "frozen": state.frozen}
    return {"model": model, "train": {"step": state.step, "key": state.key, "opt_state": state.opt_state}}


def _config_in(found: dict[str, Any], folder: Path) -> Config:
    return from_json(found["meta"]["config"], str(folder))


def _path_of(checkpoints: ocp.training.Checkpointer, step: int) -> Path:
    return Path(checkpoints.directory) / str(step)


def _checkpoints_in(path: Path) -> list[Path]:
    """Returns the checkpoints that `path` names, newest first: one, or all of a run."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    resolved = path.resolve()
    inside = checkpoints_folder(resolved)
    folder = inside if inside.is_dir() else resolved
    if folder.name.isdigit():
        return [folder]
    found = _numbered(folder)
    if not found:
        raise InputError(f"{path}: holds no checkpoint; give a run folder or one of its {CHECKPOINTS}/STEP")
    return found


def _numbered(folder: Path) -> list[Path]:
    """Returns the checkpoints in `folder`, newest first."""
    children = folder.iterdir() if folder.is_dir() else ()
    found = [child for child in children if child.name.isdigit() and child.is_dir()]
    return sorted(found, key=lambda child: int(child.name), reverse=True)


def _digest(values: dict[str, Any]) -> str:
    """Returns the SHA-256 of arrays with their names, types and shapes."""
    digest = hashlib.sha256()
    for path, value in sorted(values.items()):
        array = np.asarray(value, order="C")
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _digest_of_texts(texts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _fit(values: dict[str, Any], like: Any, folder: Path) -> Any:
    """Returns the tree `like` with the values by path, on the first local device."""
    wanted = _by_path(like)
    for path in sorted(wanted | values):
        found, expected = (
            f"{tree[path].dtype}{list(tree[path].shape)}" if path in tree else "nothing" for tree in (values, wanted)
        )
        if found != expected:
            raise InputError(f"{folder} does not fit its model: {path} is {found}, expected {expected}")
    leaves = [values[path] for path in wanted]
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(like), leaves), jax.local_devices()[0])
