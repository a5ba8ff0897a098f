"""The folder of one run: its configuration, its numbers, its pictures."""

import json
import math
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from fasterrcnn_jax.config import Config, first_difference, from_json, to_json
from fasterrcnn_jax.data.images import read_image
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.drawing import draw, draw_boxes, side_by_side
from fasterrcnn_jax.errors import InputError, NonFiniteLossError
from fasterrcnn_jax.evaluation.results import ImageDetections
from fasterrcnn_jax.inference import Prediction
from fasterrcnn_jax.training import StepMetrics

PICTURED_IMAGES = 6
PICTURED_SIDE = 480  # pixels; smaller pictures are enlarged by a whole factor


def open_run(config: Config) -> None:
    """Makes the run folder and writes config.json, or checks that the one there is the same.

    Raises:
      InputError: the folder holds a run with another configuration; names the first field.
    """
    stored = config.run / "config.json"
    if stored.exists():
        difference = first_difference(from_json(stored.read_text(), str(stored)), config)
        if difference:
            raise InputError(
                f"{config.run} holds a run with {difference}; continue it as it was or choose another --run"
            )
        return
    try:
        config.run.mkdir(parents=True, exist_ok=True)
        stored.write_text(to_json(config))
    except OSError as error:
        raise InputError(f"run folder {config.run}: {error.strerror}") from error


class MetricsWriter:
    """Appends numbers to metrics.jsonl and TensorBoard events, both named by step."""

    def __init__(self, run: Path):
        self._lines = (run / "metrics.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(run), flush_secs=10)

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
            "the last checkpoint is untouched; a lower train.learning_rate often helps"
        )
    return values


def write_picture(run: Path, step: int, detections: list[ImageDetections], dataset: Dataset) -> Path:
    """Writes pictures/STEP.png: ground truth on the left, detections on the right; returns its path."""
    pairs = []
    spread = np.linspace(0, len(dataset.records) - 1, min(PICTURED_IMAGES, len(dataset.records)))
    for index in spread.astype(int):
        record, found = dataset.records[index], detections[index]
        image = read_image(record.path)
        # Captions would cover a small picture.
        zoom = max(1, round(PICTURED_SIDE / max(record.image_hw)))
        image = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
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
