"""Checkpoints of a run, through Orbax: written to a temporary folder and renamed, so never half there.

One checkpoint holds `model` (trained and frozen values by path), `train` (optimizer, step, key) and
`meta` (configuration with the class names, position of the data iterator).
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from fasterrcnn_jax.config import Config
from fasterrcnn_jax.config_io import first_difference, from_json, to_json
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import Detector, create, split
from fasterrcnn_jax.training import TrainState

FOLDER = "checkpoints"


def open_checkpoints(run: Path, *, keep: int) -> ocp.training.Checkpointer:
    """Returns the checkpointer of a run folder: keeps the newest `keep` and the best."""
    policies = ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        (run / FOLDER).absolute(),
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


def snapshot(state: TrainState, *, config: Config, iterator_state: dict[str, Any]) -> dict[str, Any]:
    """Returns what `save` takes, copied: the next step may overwrite the arrays of `state`.

    The value `measured` is the metric that decides which state is best; None until it is known.
    """
    copied = jax.tree.map(lambda leaf: np.array(leaf), state)
    return {"state": copied, "config": config, "iterator_state": iterator_state, "measured": None}


def save(
    checkpoints: ocp.training.Checkpointer,
    *,
    state: TrainState,
    config: Config,
    iterator_state: dict[str, Any],
    measured: float | None,
) -> None:
    """Writes the checkpoint of `state.step` and waits until it is complete."""
    checkpoints.save_checkpointables(
        int(state.step),
        {
            "model": _by_path({"params": state.params, "frozen": state.frozen}),
            "train": _by_path({"step": state.step, "key": state.key, "opt_state": state.opt_state}),
            "meta": {
                "config": to_json(config),
                "iterator": json.dumps(iterator_state),
            },
        },
        metrics=None if measured is None or math.isnan(measured) else {"best": measured},
    )


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
    step = checkpoints.latest.step
    difference = first_difference(_read_config(checkpoints, step), config)
    if difference:
        raise InputError(
            f"{_path_of(checkpoints, step)} is of a run with {difference}; "
            "continue it as it was or choose another --run"
        )
    values = {
        "model": {"params": state.params, "frozen": state.frozen},
        "train": {"step": state.step, "key": state.key, "opt_state": state.opt_state},
    }
    found = _read(
        checkpoints, step, {name: _abstract(_by_path(tree)) for name, tree in values.items()} | {"meta": None}
    )
    model, train = (_from_path(found[name], values[name]) for name in ("model", "train"))
    return TrainState(**model, **train), json.loads(found["meta"]["iterator"])


def load(path: str | Path, *, backbone: type[nnx.Module] | None = None) -> Detector:
    """Returns the detector in `path`: a run folder (its newest checkpoint) or one checkpoint folder.

    Args:
      backbone: your own, in place of the one whose import path the checkpoint holds; docs/backbone.md.
    Raises:
      InputError: no checkpoint there, or one that does not fit its own configuration.
    """
    folder, step = _locate(Path(path))
    with ocp.training.Checkpointer(folder.absolute()) as checkpoints:
        config = _read_config(checkpoints, step)
        names = config.data.class_names
        model = jax.eval_shape(lambda: create(config.model, names, seed=0, backbone=backbone))
        graphdef, params, frozen = split(model)
        shapes = {"params": params, "frozen": frozen}
        found = _read(checkpoints, step, {"model": _abstract(_by_path(shapes))})
    values = _from_path(found["model"], shapes)
    return nnx.merge(graphdef, values["params"], values["frozen"])


def load_run_config(path: str | Path) -> Config:
    """Returns the configuration stored in a checkpoint; `path` as in `load`."""
    folder, step = _locate(Path(path))
    with ocp.training.Checkpointer(folder.absolute()) as checkpoints:
        return _read_config(checkpoints, step)


def best(checkpoints: ocp.training.Checkpointer) -> tuple[int, float] | None:
    """Returns (step, metric) of the best checkpoint there is, or None where none was evaluated."""
    measured = [(found.metrics["best"], found.step) for found in checkpoints.checkpoints if found.metrics]
    return max(measured)[::-1] if measured else None


def folder_of(run: Path, step: int) -> Path:
    """Returns the folder of one checkpoint of a run."""
    return run / FOLDER / str(step)


def run_of(path: str | Path) -> Path:
    """Returns the run folder that `path` (as in `load`) belongs to."""
    folder, _ = _locate(Path(path))
    return folder.parent if folder.name == FOLDER else folder


def _read_config(checkpoints: ocp.training.Checkpointer, step: int) -> Config:
    meta = _read(checkpoints, step, {"meta": None})["meta"]
    return from_json(meta["config"], str(_path_of(checkpoints, step)))


def _read(checkpoints: ocp.training.Checkpointer, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    try:
        return checkpoints.load_checkpointables(step, abstract)
    except Exception as error:  # Orbax and its storage have no common base class for damage
        raise InputError(
            f"{_path_of(checkpoints, step)}: the checkpoint is incomplete or damaged ({type(error).__name__})"
        ) from error


def _path_of(checkpoints: ocp.training.Checkpointer, step: int) -> Path:
    return Path(checkpoints.directory) / str(step)


def _locate(path: Path) -> tuple[Path, int]:
    """Returns the folder of checkpoints and the step that `path` names."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    path = path.resolve()
    if path.name.isdigit() and _is_checkpoint(path):
        return path.parent, int(path.name)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = [int(child.name) for child in folder.iterdir() if child.name.isdigit() and _is_checkpoint(child)]
    if not steps:
        raise InputError(f"{path}: holds no checkpoint; give a run folder or one of its {FOLDER}/STEP")
    return folder, max(steps)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "meta").is_dir()


def _by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _from_path(values: dict[str, Any], like: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), [values[path] for path in _by_path(like)])


def _abstract(values: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        for path, value in values.items()
    }
