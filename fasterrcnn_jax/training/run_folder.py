"""The paths of all files in a run folder."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fasterrcnn_jax.atomic_write import is_temporary, write_atomically
from fasterrcnn_jax.config import Config
from fasterrcnn_jax.config.text import to_json
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.processes import any_process, is_main

if TYPE_CHECKING:
    import filelock

logger = logging.getLogger(__name__)

CHECKPOINTS, STAGES = "checkpoints", "stages"


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keeps other trainings out of a run folder while the body runs.

    Process 0 takes the lock for all processes of the run; all must call this, and all are refused together. The
    operating system frees the lock when the process ends, however it ends.

    Raises:
      InputError: another process trains in this folder, or nothing can be written there.
    """
    from filelock import FileLock

    lock = FileLock(_owner(run) / ".lock")
    refusal = _taken(lock, run) if is_main() else None
    if bool(any_process(refusal is not None)):
        raise InputError(refusal or f"--run {run}: process 0 cannot train in this run folder")
    try:
        yield
    finally:
        if is_main():
            lock.release()


def _owner(run: Path) -> Path:
    """Returns the run folder whose lock protects `run`: for a stage of alternating training, the folder around it."""
    resolved = run.resolve()
    return resolved.parent.parent if resolved.parent.name == STAGES else run


def _taken(lock: "filelock.BaseFileLock", run: Path) -> str | None:
    """Makes the folder and takes its lock; returns why that is not possible, or None."""
    from filelock import Timeout

    try:
        # The folder of the checkpoints too: that it cannot be made must not show at the first checkpoint.
        checkpoints_folder(run).mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        _remove_leftovers(run)
    except Timeout:
        return f"--run {run}: another process is training in this run folder; wait for it, or choose another --run"
    except NotImplementedError:
        logger.warning("%s: this file system has no locks; make sure that no other process trains here", run)
    except OSError as error:
        return f"--run {run}: {error.filename or run} cannot be written: {error.strerror or error}"
    return None


def _remove_leftovers(run: Path) -> None:
    """Removes what killed trainings of this folder were writing, and logs one line. Call it under the lock."""
    stages = (run / STAGES).iterdir() if (run / STAGES).is_dir() else ()
    # Not in the folder of the evaluations, which other processes write without the lock.
    inside = ("", "images", "failed", "proposals", CHECKPOINTS)
    folders = [folder / name for folder in (run, *stages) for name in inside]
    left = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if _is_leftover(path)]
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if left:
        logger.info("%s: removed what a killed run left: %s", run, ", ".join(sorted(path.name for path in left)))


def _is_leftover(path: Path) -> bool:
    # Orbax's name for a checkpoint that is not complete.
    return is_temporary(path) or ".orbax-checkpoint-tmp" in path.name


def config_path(run: Path) -> Path:
    """Returns the file of the configuration."""
    return run / "config.json"


def write_config(config: Config, run: Path) -> None:
    """Writes config.json. A run continues with the copy in its checkpoint, not with this file."""
    write_atomically(config_path(run), to_json(config))


def division_path(run: Path) -> Path:
    """Returns the file that says which image is in which part of a divided split."""
    return run / "splits.json"


def is_unused(run: Path) -> bool:
    """Returns whether a folder is missing, or holds only what a run writes before its first step."""
    before = {".lock", division_path(run).name, CHECKPOINTS}
    return not run.exists() or (
        run.is_dir()
        and all(path.name in before for path in run.iterdir())
        and not any(checkpoints_folder(run).glob("*"))
    )


def metrics_path(run: Path) -> Path:
    """Returns the file of the metrics, one JSON object per line."""
    return run / "metrics.jsonl"


def results_path(run: Path) -> Path:
    """Returns the table of losses and metrics, one line per checkpoint and evaluation."""
    return run / "results.csv"


def curves_path(run: Path) -> Path:
    """Returns the image of the learning curves."""
    return run / "curves.png"


def report_path(run: Path) -> Path:
    """Returns the page about the detections of the best checkpoint."""
    return run / "report.html"


def image_path(run: Path, step: int, split: str = "") -> Path:
    """Returns the file of the image that shows ground truth and detections after `step`."""
    return run / "images" / f"{step:06d}{split and '_'}{split}.png"


def first_batch_path(run: Path) -> Path:
    """Returns the file of the image that shows the first training batch."""
    return run / "images" / "first_batch.png"


def checkpoints_folder(run: Path) -> Path:
    """Returns the folder of all checkpoints."""
    return run / CHECKPOINTS


def has_checkpoints(run: Path) -> bool:
    """Returns whether the run folder has a complete checkpoint."""
    return any(path.name.isdecimal() for path in checkpoints_folder(run).glob("*"))


def checkpoint_folder(run: Path, step: int) -> Path:
    """Returns the folder of the checkpoint of `step`."""
    return checkpoints_folder(run) / str(step)


def run_of_checkpoints(folder: Path) -> Path:
    """Returns the run folder of a checkpoints folder; `folder` itself if it has another name."""
    return folder.parent if folder.name == CHECKPOINTS else folder


def best_folder(run: Path) -> Path:
    """Returns the folder of the copy of the best checkpoint."""
    return run / "best"


def failed_batch_path(run: Path, step: int, process: int = 0) -> Path:
    """Returns the file of the batch whose step was not finite; processes after the first add their number."""
    suffix = f"_process_{process}" if process else ""
    return run / "failed" / f"step_{step:08d}{suffix}.npz"


def run_of_failed_batch(path: Path) -> Path:
    """Returns the run folder of a file whose path came from `failed_batch_path`."""
    return path.resolve().parent.parent


def proposals_path(run: Path, split: str) -> Path:
    """Returns the file of the run's proposals for one split."""
    return run / "proposals" / f"{split}.safetensors"


def stage_folder(run: Path, name: str) -> Path:
    """Returns the run folder of one stage of alternating training."""
    return run / STAGES / name


def evaluation_folder(run: Path, split: str) -> Path:
    """Returns the folder of the result files of an evaluation."""
    return run / "evaluation" / split
