"""Writes and reads the checkpoints of a run with Orbax.

A checkpoint is written to a temporary folder and then renamed, so an incomplete one never has a checkpoint's name.
It contains `model` (trained, averaged, frozen and running values by path), `train` (optimizer, step, key), `metrics`
if it was evaluated, and `meta` (configuration with the class names, position of the data iterator, fingerprint of the
data, digests of all parts).
Everything that is read is checked against the digests, because the storage does not detect flipped bits in arrays.
"""

import contextlib
import hashlib
import json
import logging
import math
import re
import shutil
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
from fasterrcnn_jax.data.fingerprint import Fingerprint
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.models.detector import BackboneClass, Detector, empty_detector, given_backbone
from fasterrcnn_jax.processes import any_process, is_main
from fasterrcnn_jax.regular_files import check_declared, check_regular
from fasterrcnn_jax.training import preemption
from fasterrcnn_jax.training.run_folder import (
    CHECKPOINTS,
    best_folder,
    checkpoints_folder,
    run_of_checkpoints,
)
from fasterrcnn_jax.training.state import TrainState

logger = logging.getLogger(__name__)

# The end of every array's path in a model.
_VALUE = "/value"

# Format version of the checkpoints that are written. Version 1 has no entry "version" and is otherwise the same.
VERSION = 2
# Metrics lie in 0..1.
MAX_METRIC = 10.0
# Of all arrays of a part. Orbax stores each of our arrays in one chunk.
MAX_CHUNKS = 100_000


class Choice(NamedTuple):
    """How the best checkpoint is chosen."""

    metric: str  # its name, such as AP50
    split: str  # split that it is measured on


def open_checkpoints(run: Path, *, keep: int, choice: Choice | None = None) -> ocp.training.Checkpointer:
    """Returns the checkpointer of a run folder. It keeps the newest `keep` checkpoints and the best one.

    Damaged checkpoints are renamed with a warning, so that the newest remaining one is intact.

    Args:
      choice: as in `best`.
    Raises:
      InputError: there are checkpoints, but none of them is intact; or a folder's name is a number in another form
        than 500.
    """
    # Orbax needs an absolute path.
    folder = checkpoints_folder(run).absolute()
    for child in sorted(folder.iterdir()) if folder.is_dir() else ():
        # Orbax reads such names as numbers, or fails on them.
        if child.name.strip().lstrip("+-").replace("_", "").isdigit() and _step_of(child) is None and child.is_dir():
            raise InputError(
                f"{child}: the name of a checkpoint folder must be a step number such as 500, got "
                f"{quoted(child.name)}; rename the folder, or move it elsewhere"
            )
    _set_damaged_aside(folder)
    policies = ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        str(folder),
        # Orbax declares its policies for an older class of checkpoints than the one its checkpointer declares.
        preservation_policy=policies.AnyPreservationPolicy(  # pyright: ignore[reportArgumentType]
            [
                policies.LatestN(keep),
                policies.BestN(
                    n=1,
                    get_metric_fn=lambda metrics: (
                        _decisive(metrics) - (MAX_METRIC if _is_other(metrics, choice) else 0)
                    ),
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        ),
        cleanup_tmp_directories=True,
    )


class Snapshot(NamedTuple):
    """The contents of one checkpoint, copied to the host, because the next step may overwrite the device arrays."""

    state: TrainState
    config: Config
    iterator_state: dict[str, Any]
    data: str | None = None  # fingerprint of the data
    choice: Choice | None = None  # what `measured` is; None: it is not stored
    measured: float | None = None  # the metric that decides which checkpoint is best; None: not evaluated


@contextlib.contextmanager
def closing(checkpoints: ocp.training.Checkpointer) -> Iterator[None]:
    """Closes the checkpointer after the body. After an error it is left as it is: closing would wait for writes."""
    try:
        yield
    except preemption.Stopped:
        checkpoints.close()
        raise
    checkpoints.close()


def snapshot(
    state: TrainState,
    *,
    config: Config,
    iterator_state: dict[str, Any],
    data: str | None = None,
    choice: Choice | None = None,
) -> Snapshot:
    """Returns a copy of everything that a checkpoint stores."""
    return Snapshot(jax.tree.map(lambda leaf: np.array(leaf), state), config, iterator_state, data, choice)


class DeferredSave:
    """Saves a state one step late, when the next step has shown that the loss of the state is finite.

    A state whose next loss is not finite is never written, so a run can always continue from the newest checkpoint.
    """

    def __init__(self, checkpoints: ocp.training.Checkpointer):
        self._checkpoints = checkpoints
        self.pending: Snapshot | None = None

    def offer(self, snapshot: Snapshot) -> None:
        """Keeps a snapshot until `confirm` is called."""
        self.pending = snapshot

    def measured(self, value: float | None) -> None:
        """Adds the metric of an evaluation to the pending snapshot."""
        if self.pending is not None:
            self.pending = self.pending._replace(measured=value)

    def confirm(self) -> bool:
        """Writes the pending snapshot, if there is one; returns whether a snapshot with a metric was written.

        Raises:
          OSError: the checkpoint cannot be written.
        """
        if self.pending is None:
            return False
        snapshot, self.pending = self.pending, None
        save(self._checkpoints, **snapshot._asdict())
        return snapshot.measured is not None

    @contextlib.contextmanager
    def confirmed_on_error(self) -> Iterator[None]:
        """Writes the pending snapshot if the body raises: a failed evaluation must not lose the steps before it."""
        try:
            yield
        except BaseException:
            try:
                self.confirm()
            except OSError as error:
                # The error of the evaluation is the one that ends the run.
                logger.error("%s", error)
            raise


def save(
    checkpoints: ocp.training.Checkpointer,
    *,
    state: TrainState,
    config: Config,
    iterator_state: dict[str, Any],
    measured: float | None,
    data: str | None = None,
    choice: Choice | None = None,
) -> None:
    """Writes the checkpoint of `state.step` and waits until it is complete. Only then are older checkpoints deleted.

    Args:
      data: fingerprint of the data.
      choice: what `measured` is.
    Raises:
      OSError: the checkpoint cannot be written; older checkpoints are unchanged.
    """
    # NumPy arrays are restored the same on any devices.
    parts = {
        part: {path: np.asarray(leaf) for path, leaf in _by_path(tree).items()} for part, tree in _parts(state).items()
    }
    metrics: dict[str, Any] | None = None
    if measured is not None and not math.isnan(measured):
        metrics = {"best": measured} | ({} if choice is None else choice._asdict())
    texts = {
        "version": str(VERSION),
        "step": str(int(state.step)),
        "config": to_json(config),
        "iterator": json.dumps(iterator_state),
        "digests": json.dumps(
            {name: _digest(values) for name, values in parts.items()} | {"metrics": json.dumps(metrics)}
        ),
    }
    if data is not None:
        texts["data"] = data
    step = int(state.step)
    try:
        checkpoints.save_checkpointables(
            step, parts | {"meta": texts | {"digest": _digest_of_texts(texts)}}, metrics=metrics
        )
    except Exception as error:  # Orbax and its storage have no common exception class for a full disk
        raise OSError(
            f"{_path_of(checkpoints, step)} cannot be written ({_first_line(error)}); "
            "the checkpoints before it are unchanged"
        ) from error


def restore(
    checkpoints: ocp.training.Checkpointer, state: TrainState, *, config: Config, data: Fingerprint | None = None
) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns the newest checkpoint as (state, position of the data iterator), or None if there is none.

    Args:
      state: a state of the same configuration, which gives the structure and the shapes.
      config: configuration of the run that is to continue.
      data: fingerprint of the data in process 0, an empty one in other processes; None: the data is not compared.
    Raises:
      InputError: the checkpoint cannot be read, it has another configuration, or the data has changed; the message
        names the first different field, split, image or file.
    """
    if checkpoints.latest is None:
        return None
    folder = _path_of(checkpoints, checkpoints.latest.step)
    found = _read(folder, ("model", "train"))
    difference = first_difference(_config_in(found, folder), config)
    if difference:
        raise InputError(
            f"{folder} is from a run with {difference}; continue it with its own value, or start another --run from "
            f"its weights with --init {run_of_checkpoints(folder.parent)}"
        )
    if data is not None:
        _check_data(found["meta"].get("data"), data, folder, accept=config.data.accept_changed)
    model, train = (_fit(found[part], tree, folder) for part, tree in _parts(state).items())
    return TrainState(**model, **train), json.loads(found["meta"]["iterator"])


def _check_data(stored: str | None, data: Fingerprint, folder: Path, *, accept: bool) -> None:
    """Raises InputError, or warns with `accept`, where the data differs from the fingerprint in a checkpoint."""
    if stored is None:
        logger.info("%s has no fingerprint of the data, so a change of the data is not noticed", folder)
        return
    try:
        changes = data.changes(stored)
    except InputError as error:
        changes = [str(error)]
    if not bool(any_process(bool(changes))):
        return
    sentence = f"{folder}: the data has changed since this checkpoint: {'; '.join(changes) or 'process 0 says where'}"
    if not accept:
        raise InputError(f"{sentence}; restore it, choose another --run, or add --data.accept_changed")
    logger.warning("%s; the run continues, because data.accept_changed is set", sentence)


def load(path: str | Path, *, backbone: BackboneClass | None = None) -> Detector:
    """Returns the detector in `path`.

    `path` is a run folder, RUN/checkpoints, or one checkpoint: RUN/best or RUN/checkpoints/STEP. Of a run folder,
    RUN/best is used, or the newest intact checkpoint if it is missing or damaged. Of RUN/checkpoints, the newest intact
    checkpoint is used.

    Args:
      backbone: your own backbone class, for a model that was trained with it; see docs/backbone.md. A class that the
        checkpoint names is never imported.
    Raises:
      InputError: there is no checkpoint, it is damaged, it does not fit its own configuration, or it needs a backbone
        class that is not given.
    """
    folder, config, arrays = read_weights(path)
    names = config.data.class_names
    backbone = given_backbone(config.model.backbone, backbone, str(folder))
    model = empty_detector(config.model, names, backbone=backbone, where=str(folder))
    graphdef, values = nnx.split(model)
    stored = {f"{name}{_VALUE}": array for name, array in arrays.items()}
    return nnx.merge(graphdef, _fit(stored, values, folder))


class Stored(NamedTuple):
    """The weights of one checkpoint for detection."""

    folder: Path
    config: Config
    arrays: dict[str, np.ndarray]  # by names such as backbone/stem/kernel


def read_weights(path: str | Path) -> Stored:
    """Returns the weights of a checkpoint, the averaged ones if there are any. `path` is as in `load`.

    Raises:
      InputError: there is no checkpoint, or it is damaged.
    """
    folder, found = _newest_whole(Path(path), ("model",))
    arrays = {}
    # The averaged weights, if any, replace the trained weights.
    for kind in ("frozen", "running", "params", "averaged"):
        prefix = f"{kind}/"
        arrays |= {
            path.removeprefix(prefix).removesuffix(_VALUE): value
            for path, value in found["model"].items()
            if path.startswith(prefix)
        }
    return Stored(folder, _config_in(found, folder), arrays)


def load_run_config(path: str | Path) -> Config:
    """Returns the configuration stored in a checkpoint. `path` is as in `load`."""
    folder, found = _newest_whole(Path(path), ())
    return _config_in(found, folder)


def step_of(path: str | Path) -> int | None:
    """Returns the step of a checkpoint; None: an earlier release has written RUN/best. `path` is as in `load`."""
    folder, found = _newest_whole(Path(path), ())
    stored = found["meta"].get("step", "")
    return int(stored) if re.fullmatch("[0-9]{1,18}", stored) else _step_of(folder)


class Best(NamedTuple):
    step: int
    metric: float
    choice: Choice | None = None  # what `metric` is; None: an earlier release has stored it without its name


def _decisive(metrics: Any) -> float:
    """Returns the one metric that a checkpoint stores."""
    return metrics["best"]


def _choice_of(metrics: Any) -> Choice | None:
    """Returns what the metric of a checkpoint is; None if it does not say so."""
    texts = [metrics.get(name) for name in Choice._fields]
    return Choice(*texts) if all(isinstance(text, str) for text in texts) else None


def _is_other(metrics: Any, choice: Choice | None) -> bool:
    """Returns whether a checkpoint was measured by another metric, or on another split, than the choice."""
    return choice is not None and _choice_of(metrics) not in (None, choice)


def best(checkpoints: ocp.training.Checkpointer, choice: Choice | None = None) -> Best | None:
    """Returns the checkpoint with the best metric, the latest if several are equal; None if none was evaluated.

    Args:
      choice: how the best checkpoint is chosen. Values of another metric or split are not compared with those of this
        one; where there are no others, the best of those that were measured like the latest is returned.
    """
    stored = [found for found in checkpoints.checkpoints if found.metrics]
    own = [found for found in stored if not _is_other(found.metrics, choice)]
    if stored and not own:
        latest = _choice_of(max(stored, key=lambda found: found.step).metrics)
        own = [found for found in stored if _choice_of(found.metrics) == latest]
    measured = [Best(found.step, _decisive(found.metrics), _choice_of(found.metrics)) for found in own]
    return max(measured, key=lambda found: (found.metric, found.step), default=None)


def write_best(checkpoints: ocp.training.Checkpointer, run: Path, *, choice: Choice) -> str | None:
    """Makes RUN/best a copy of the best checkpoint, or of the newest one if none was evaluated.

    The copy holds `model` and `meta`, which detection needs, and no state of the optimizer. A process that is killed
    leaves the old copy or the new one. Several processes may call this; the first one writes.

    Args:
      choice: as in `best`.
    Returns:
      Which checkpoint it is, for a message, such as "step 40, AP50 0.812 on val"; None if there is no checkpoint.
    Raises:
      OSError: the copy cannot be written.
    """
    found, newest = best(checkpoints, choice), checkpoints.latest
    if newest is None:
        return None
    step = newest.step if found is None else found.step
    if is_main():
        _replace_best(_path_of(checkpoints, step), run)
    if found is None:
        return f"step {step}, the newest, because no checkpoint was evaluated"
    metric, split = found.choice or choice
    return f"step {step}, {metric} {found.metric:.3f} on {split}"


def _replace_best(checkpoint: Path, run: Path) -> None:
    target = best_folder(run)
    new = target.with_name(f".{target.name}.new")
    old = _replaced(target)
    try:
        if old.exists() and not target.exists():  # a process was killed between the two renamings
            old.rename(target)
        for left in (new, old):
            if left.exists():
                shutil.rmtree(left)
        shutil.copytree(checkpoint, new, ignore=shutil.ignore_patterns("train", "metrics"))
        # A folder that is not empty cannot be replaced by one renaming.
        if target.exists():
            target.rename(old)
        new.rename(target)
        if old.exists():
            shutil.rmtree(old)
    except OSError as error:
        raise OSError(f"{target} cannot be written ({_first_line(error)}); the checkpoints are unchanged") from error


def _replaced(best: Path) -> Path:
    """Returns the folder of the old copy while the new one takes its place."""
    return best.with_name(f".{best.name}.old")


def run_of(path: str | Path) -> Path:
    """Returns the run folder that `path` (as in `load`) belongs to."""
    return run_of_checkpoints(_checkpoints_in(Path(path))[0].parent)


def _set_damaged_aside(folder: Path) -> None:
    """Renames damaged checkpoints to STEP.damaged.

    Reads the arrays of each checkpoint from the newest back to the first intact one, and only `meta` and the metrics
    of the older ones. Renames nothing if no checkpoint is intact: the fault may lie in something that they share. All
    processes read, because Orbax makes each process wait for the others; only the first process renames.
    """
    whole, faults = None, {}
    for checkpoint in _numbered(folder):
        try:
            _read(checkpoint, ("model", "train", "metrics") if whole is None else ("metrics",))
            whole = whole or checkpoint
        except InputError as error:
            faults[checkpoint] = error
    if faults and whole is None:
        raise InputError(f"no checkpoint is intact; choose another --run: {'; '.join(map(str, faults.values()))}")
    multihost_utils.sync_global_devices("all checkpoints are read")
    for checkpoint, fault in faults.items() if jax.process_index() == 0 else ():
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}.damaged")
        checkpoint.rename(aside)
        logger.warning("%s; it is renamed to %s, and the run continues from %s", fault, aside.name, whole)
    multihost_utils.sync_global_devices("damaged checkpoints are aside")


def _newest_whole(path: Path, parts: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """Returns the first intact checkpoint of `_checkpoints_in`, together with its contents."""
    candidates = _checkpoints_in(path)
    for checkpoint in candidates[:-1]:
        try:
            return checkpoint, _read(checkpoint, parts)
        except InputError as error:
            other = "checkpoint before it" if checkpoint.name.isdigit() else "newest intact checkpoint"
            logger.warning("%s; the %s is used", error, other)
    return candidates[-1], _read(candidates[-1], parts)


def _read(folder: Path, parts: tuple[str, ...]) -> dict[str, Any]:
    """Returns `meta` and the named parts of a checkpoint; `metrics` only if it was evaluated.

    Raises:
      InputError: a part cannot be read, or it differs from what was saved.
    """
    for path in folder.rglob("*"):
        check_regular(path)
    arrays = tuple(name for name in parts if name != "metrics")
    try:
        _check_texts(folder)
        meta = ocp.load_checkpointables(str(folder), {"meta": None})["meta"]
        texts = {name: text for name, text in meta.items() if name != "digest"}
        if meta["digest"] != _digest_of_texts(texts):
            raise InputError(f"{folder}: the checkpoint is damaged: meta differs from what was saved")
        version = meta.get("version", "1")
        if re.fullmatch("[1-9][0-9]{0,8}", version) is None:
            raise InputError(f"{folder}: the checkpoint is damaged: version must be a number, got {quoted(version)}")
        if int(version) > VERSION:
            raise InputError(
                f"{folder}: the checkpoint has format version {version}; this release reads versions up to {VERSION}; "
                "install a newer release"
            )
        json.loads(meta["iterator"])  # which `restore` reads
        digests, found = json.loads(meta["digests"]), {}
        metrics = folder / "metrics" / "metrics"
        if "metrics" in parts and (metrics.exists() or digests["metrics"] != "null"):
            # Orbax returns the metrics of all checkpoints together, and fails if those of one are damaged.
            found["metrics"] = json.loads(metrics.read_text())
        if arrays:
            _check_sizes(folder, arrays)
            found |= ocp.load_checkpointables(str(folder), dict.fromkeys(arrays))
        for name, values in found.items():
            if digests[name] != (json.dumps(values) if name == "metrics" else _digest(values)):
                raise InputError(f"{folder}: the checkpoint is damaged: {name} differs from what was saved")
        if "metrics" in found and not math.isfinite(_decisive(found["metrics"])):
            raise InputError(f"{folder}: the checkpoint is damaged: the metric must be finite")
        if "train" in found and found["train"]["step"] != _step_of(folder):
            step = int(found["train"]["step"])
            raise InputError(f"{folder}: the checkpoint is of step {step}; rename the folder to {step}")
    except InputError:
        raise
    except Exception as error:  # Orbax and its storage have no common exception class for damaged files
        raise InputError(f"{folder}: the checkpoint is incomplete or damaged ({type(error).__name__})") from error
    return found | {"meta": meta}


def _check_texts(folder: Path) -> None:
    """Raises InputError if `meta` declares anything but texts: an array may have any size."""
    # `ocp.metadata` of the one part would warn that a part without arrays may be damaged.
    for name, entry in ocp.checkpointables_metadata(str(folder)).metadata["meta"].items():
        if entry != "string":
            raise InputError(f"{folder}: the checkpoint is damaged: meta.{name} must be a text")


def _check_sizes(folder: Path, parts: tuple[str, ...]) -> None:
    """Raises InputError unless the declared sizes of all arrays are plausible for the size of the files.

    The storage believes the declared sizes: it reserves the memory of each array, and of each chunk, before it reads.
    """
    for part in parts:
        declared, chunks = 0, 0
        for name, entry in ocp.metadata(str(folder), part).metadata.items():
            shape, chunk = entry.shape, entry.storage_metadata.chunk_shape
            declared += max(math.prod(shape), math.prod(chunk)) * np.dtype(entry.dtype).itemsize
            chunks += math.prod(-(-side // step) for side, step in zip(shape, chunk, strict=True))
            if chunks > MAX_CHUNKS:
                raise InputError(f"{folder}: the checkpoint is damaged: {part}/{name} must not have {chunks} chunks")
        stored = sum(path.stat().st_size for path in (folder / part).rglob("*") if path.is_file())
        check_declared(folder / part, declared, stored=stored)


def _parts(state: TrainState) -> dict[str, dict[str, Any]]:
    """Returns the parts of a state as a checkpoint stores them."""
    model = {"params": state.params, "averaged": state.averaged, "frozen": state.frozen, "running": state.running}
    return {"model": model, "train": {"step": state.step, "key": state.key, "opt_state": state.opt_state}}


def _config_in(found: dict[str, Any], folder: Path) -> Config:
    return from_json(found["meta"].get("config", ""), str(folder))


def _path_of(checkpoints: ocp.training.Checkpointer, step: int) -> Path:
    return Path(checkpoints.directory) / str(step)


def _checkpoints_in(path: Path) -> list[Path]:
    """Returns one checkpoint, or all checkpoints of a run: RUN/best if `path` is the run folder, then newest first."""
    if not path.is_dir():
        what = "is a file, not a run folder" if path.exists() else "no such folder"
        raise InputError(f"{path}: {what}")
    resolved = path.resolve()
    inside = checkpoints_folder(resolved)
    folder = inside if inside.is_dir() else resolved
    # The second is there only while a process replaces the first.
    best = [copy for copy in (best_folder(resolved), _replaced(best_folder(resolved))) if copy.is_dir()][:1]
    # A copy of RUN/best may have any name.
    if not best and (_step_of(folder) is not None or (folder / "meta").is_dir()):
        return [folder]
    found = best + _numbered(folder)
    if not found:
        raise InputError(f"{path}: contains no checkpoint; give a run folder or one of its {CHECKPOINTS}/STEP")
    return found


def _numbered(folder: Path) -> list[Path]:
    """Returns the checkpoints in `folder`, newest first."""
    children = folder.iterdir() if folder.is_dir() else ()
    found = [child for child in children if _step_of(child) is not None and child.is_dir()]
    return sorted(found, key=lambda child: int(child.name), reverse=True)


def _step_of(folder: Path) -> int | None:
    """Returns the step in the name of a checkpoint folder; None if the name is no step."""
    # Not str.isdigit, which is true for "²" and for digits of other scripts.
    return int(folder.name) if re.fullmatch("0|[1-9][0-9]{0,9}", folder.name) else None


def _digest(values: dict[str, Any]) -> str:
    """Returns the SHA-256 of the arrays, with their names, types and shapes."""
    digest = hashlib.sha256()
    for path, value in sorted(values.items()):
        array = np.asarray(value, order="C")
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _digest_of_texts(texts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    # The storage names the file several times over.
    return line if len(line) <= 200 else f"{line[:200]} ..."


def _by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _fit(values: dict[str, Any], like: Any, folder: Path) -> Any:
    """Returns a tree with the structure of `like` and the given values by path, on the first local device."""
    wanted = _by_path(like)
    for path in sorted(wanted | values):
        found, expected = (
            f"{tree[path].dtype}{list(tree[path].shape)}" if path in tree else "nothing" for tree in (values, wanted)
        )
        if found != expected:
            raise InputError(f"{folder} does not fit its model: {path} is {found}, expected {expected}")
    leaves = [values[path] for path in wanted]
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(like), leaves), jax.local_devices()[0])
