"""The folder of one run: its configuration, its numbers, its pictures."""

import json
import math
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from fasterrcnn_jax.config import Config
from fasterrcnn_jax.config_io import to_json
from fasterrcnn_jax.data.images import read_image
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.drawing import draw, draw_boxes, side_by_side
from fasterrcnn_jax.errors import NonFiniteLossError
from fasterrcnn_jax.evaluation.results import ImageDetections, Metrics
from fasterrcnn_jax.inference import Prediction
from fasterrcnn_jax.training import StepMetrics

PICTURED_IMAGES = 6
PICTURED_SIDE = 480  # pixels; larger pictures shrink to it


def write_config(config: Config) -> None:
    """Writes config.json into the run folder; what a checkpoint continues with is its own copy."""
    config.run.mkdir(parents=True, exist_ok=True)
    (config.run / "config.json").write_text(to_json(config))


class MetricsWriter:
    """Appends numbers to metrics.jsonl and TensorBoard events, both named by step.

    What an interrupted run wrote after its newest checkpoint, at step `after`, is cut off: those steps are
    made again.
    """

    def __init__(self, run: Path, *, after: int):
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A kill may have torn the last line.
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= after]
        if kept != lines:
            path.write_text("".join(kept))
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(run), flush_secs=10, purge_step=after + 1)

    def write(self, step: int, values: dict[str, float | None]) -> None:
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self._lines.close()
        self._board.close()


def finite_metrics(step: int, metrics: StepMetrics, image_ids: list[str]) -> dict[str, float]:
    """Returns the numbers of a step as plain floats.

    Raises:
      NonFiniteLossError: one of them is infinite or not a number; names step, number and images.
    """
    values = {name: float(value) for name, value in metrics._asdict().items()}
    wrong = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise NonFiniteLossError(
            f"step {step}: {', '.join(wrong)} on images {', '.join(image_ids)}; "
            "the last checkpoint is untouched; a lower train.learning_rate (in another --run) often helps"
        )
    return values


def metric(result: Metrics, name: str) -> float:
    """Returns the COCO metric called AP50 or AP."""
    return {"AP50": result.coco.ap50, "AP": result.coco.ap}[name]


def write_picture(run: Path, step: int, detections: list[ImageDetections], dataset: Dataset) -> Path:
    """Writes pictures/STEP.png: ground truth on the left, detections on the right; returns its path."""
    pairs = []
    spread = np.linspace(0, len(dataset.records) - 1, min(PICTURED_IMAGES, len(dataset.records)))
    for index in spread.astype(int):
        record, found = dataset.records[index], detections[index]
        image = read_image(record.path)
        zoom = PICTURED_SIDE / max(record.image_hw)
        # Captions would cover a small picture; whole factors keep its pixels.
        zoom = float(round(zoom)) if zoom > 1 else zoom
        size = tuple(max(1, round(side * zoom)) for side in record.image_hw[::-1])
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
        truth = [dataset.class_names[label - 1] for label in record.labels]
        names = tuple(dataset.class_names[label - 1] for label in found.labels)
        shown = Prediction(found.boxes * zoom, found.scores, found.labels, names)
        pairs.append(
            (draw_boxes(image, record.boxes * zoom, record.labels, truth), draw(image, shown))
        )
    path = run / "pictures" / f"{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(side_by_side(pairs)).save(path)
    return path
