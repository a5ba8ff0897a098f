"""Checkpoints of a run, through Orbax: written to a temporary folder and renamed, so never half there.

One checkpoint holds `model` (trained and frozen values by path), `train` (optimizer, step, key) and
`meta` (configuration, class names, position of the data iterator, versions).
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from fasterrcnn_jax.config import Config, from_json, to_json
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.training import TrainState

FOLDER = "checkpoints"


def open_checkpoints(run: Path, *, keep: int) -> ocp.training.Checkpointer:
    """Returns the checkpointer of a run folder: keeps the newest `keep` and the best by AP50."""
    policies = ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        (run / FOLDER).absolute(),
        preservation_policy=policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    n=1,
                    get_metric_fn=lambda metrics: metrics["AP50"],
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        ),
        cleanup_tmp_directories=True,
    )


def save(
    checkpoints: ocp.training.Checkpointer,
    state: TrainState,
    *,
    config: Config,
    iterator_state: dict[str, Any],
    ap50: float | None,
) -> None:
    """Writes the checkpoint of `state.step` and waits until it is complete.

    Args:
      ap50: of this very state on the test split, or None where it was not evaluated.
    """
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
        metrics=None if ap50 is None or math.isnan(ap50) else {"AP50": ap50},
    )


def restore(
    checkpoints: ocp.training.Checkpointer, state: TrainState
) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns the newest checkpoint as (state, position of the iterator), or None where there is none.

    Args:
      state: of the same configuration; gives structure and shapes.
    """
    if checkpoints.latest is None:
        return None
    step = checkpoints.latest.step
    values = {
        "model": {"params": state.params, "frozen": state.frozen},
        "train": {"step": state.step, "key": state.key, "opt_state": state.opt_state},
    }
    found = checkpoints.load_checkpointables(
        step, {name: _abstract(_by_path(tree)) for name, tree in values.items()} | {"meta": None}
    )
    model, train = (_from_path(found[name], values[name]) for name in ("model", "train"))
    return TrainState(**model, **train), json.loads(found["meta"]["iterator"])


def load(path: str | Path) -> Detector:
    """Returns the detector in `path`: a run folder (its newest checkpoint) or one checkpoint folder.

    Raises:
      InputError: no checkpoint there, or one that does not fit its own configuration.
    """
    folder, step = _locate(Path(path))
    with ocp.training.Checkpointer(folder.absolute()) as checkpoints:
        config = _read_config(checkpoints, step)
        model = nnx.eval_shape(
            lambda: Detector(config.model, config.data.class_names, rngs=nnx.Rngs(params=0))
        )
        graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
        shapes = {"params": params, "frozen": frozen}
        found = checkpoints.load_checkpointables(step, {"model": _abstract(_by_path(shapes))})
    values = _from_path(found["model"], shapes)
    return nnx.merge(graphdef, values["params"], values["frozen"])


def load_run_config(path: str | Path) -> Config:
    """Returns the configuration stored in a checkpoint; `path` as in `load`."""
    folder, step = _locate(Path(path))
    with ocp.training.Checkpointer(folder.absolute()) as checkpoints:
        return _read_config(checkpoints, step)


def run_of(path: str | Path) -> Path:
    """Returns the run folder that `path` (as in `load`) belongs to."""
    folder, _ = _locate(Path(path))
    return folder.parent if folder.name == FOLDER else folder


def _read_config(checkpoints: ocp.training.Checkpointer, step: int) -> Config:
    return from_json(checkpoints.load_checkpointables(step, {"meta": None})["meta"]["config"])


def _locate(path: Path) -> tuple[Path, int]:
    """Returns the folder of checkpoints and the step that `path` names."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    if path.name.isdigit() and (path / "meta").is_dir():
        return path.parent, int(path.name)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = [int(child.name) for child in folder.iterdir() if child.name.isdigit()]
    if not steps:
        raise InputError(f"{path}: holds no checkpoint; give a run folder or one of its {FOLDER}/STEP")
    return folder, max(steps)


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
