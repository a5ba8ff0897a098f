"""The folder of one run: where each of its files lies."""

from pathlib import Path

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.config import Config
from fasterrcnn_jax.config.text import to_json

CHECKPOINTS = "checkpoints"


def write_config(config: Config, run: Path) -> None:
    """Writes config.json. A run continues with the copy in its checkpoint, not with this file."""
    write_atomically(run / "config.json", to_json(config))


def metrics_path(run: Path) -> Path:
    """Returns the file of the numbers, one JSON object per line."""
    return run / "metrics.jsonl"


def image_path(run: Path, step: int, split: str = "") -> Path:
    """Returns the image of detections beside ground truth after `step`."""
    return run / "images" / f"{step:06d}{split and '_'}{split}.png"


def checkpoints_folder(run: Path) -> Path:
    """Returns the folder of all checkpoints."""
    return run / CHECKPOINTS


def checkpoint_folder(run: Path, step: int) -> Path:
    """Returns the folder of the checkpoint of `step`."""
    return checkpoints_folder(run) / str(step)


def run_of_checkpoints(folder: Path) -> Path:
    """Returns the run folder that a folder of checkpoints belongs to; `folder` itself where it has another name."""
    return folder.parent if folder.name == CHECKPOINTS else folder


def failed_batch_path(run: Path, step: int, process: int = 0) -> Path:
    """Returns the file of the batch whose step was not finite; processes after the first add their number."""
    suffix = f"_process_{process}" if process else ""
    return run / "failed" / f"step_{step:08d}{suffix}.npz"


def run_of_failed_batch(path: Path) -> Path:
    """Returns the run folder of a file that `failed_batch_path` named."""
    return path.resolve().parent.parent


def proposals_path(run: Path, split: str) -> Path:
    """Returns the file of the run's proposals for one split."""
    return run / "proposals" / f"{split}.safetensors"


def stage_folder(run: Path, name: str) -> Path:
    """Returns the run folder of one stage of alternating training."""
    return run / "stages" / name


def evaluation_folder(run: Path, split: str) -> Path:
    """Returns the folder of the result files of an evaluation."""
    return run / "evaluation" / split
