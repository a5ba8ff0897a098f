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
from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.records import Dataset, ImageProposals
from fasterrcnn_jax.drawing import Picture, draw, draw_boxes, side_by_side
from fasterrcnn_jax.errors import NonFiniteLossError
from fasterrcnn_jax.evaluation.results import ImageDetections
from fasterrcnn_jax.inference import Prediction
from fasterrcnn_jax.training import StepMetrics

PICTURED_IMAGES = 6
PICTURED_PROPOSALS = 20  # of an image, the best
PICTURED_SIDE = 480  # pixels; larger pictures shrink to it


def write_config(config: Config, run: Path) -> None:
    """Writes config.json into a run folder; what a checkpoint continues with is its own copy."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(to_json(config))


class MetricsWriter:
    """Appends numbers to metrics.jsonl and TensorBoard events, both named by step; `silent` writes nothing.

    What an interrupted run wrote after its newest checkpoint, at step `after`, is cut off: those steps are
    made again.
    """

    def __init__(self, run: Path, *, after: int, silent: bool = False):
        self._run, self._lines, self._board = run, None, None
        if silent:
            return
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A kill may have torn the last line.
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= after]
        if kept != lines:
            # Another kill must not find half of it.
            shorter = path.with_suffix(".tmp")
            shorter.write_text("".join(kept))
            shorter.replace(path)
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(run), flush_secs=10, purge_step=after + 1)

    def write(self, step: int, values: dict[str, float | None]) -> None:
        if self._lines is None:
            return
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def write_picture(self, step: int, picture: Picture, *, of: str = "") -> Path:
        """Writes pictures/STEP.png, or STEP_OF.png, and TensorBoard's copy of it; returns its path."""
        path = self._run / "pictures" / f"{step:06d}{of and '_'}{of}.png"
        if self._lines is not None:
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(path)
            self._board.add_image(f"pictures{of and '/'}{of}", picture, step, dataformats="HWC")
        return path

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._lines is not None:
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


def pictured(dataset: Dataset) -> list[int]:
    """Returns the positions of the images that pictures show: a few, spread over the data set."""
    count = min(PICTURED_IMAGES, len(dataset.records))
    return np.linspace(0, len(dataset.records) - 1, count).astype(int).tolist()


def sheet(
    dataset: Dataset,
    chosen: list[int],
    detections: list[ImageDetections] | None,
    proposals: list[ImageProposals],
) -> Picture:
    """Returns a row for each chosen image: ground truth, its best proposals, and detections where there are some.

    Args:
      detections: of every image of the data set.
      proposals: of the chosen ones.
    """
    rows = []
    for index, proposed in zip(chosen, proposals, strict=True):
        record = dataset.records[index]
        image = record_pixels(record)
        zoom = PICTURED_SIDE / max(record.image_hw)
        # Captions would cover a small picture; whole factors keep its pixels.
        zoom = float(round(zoom)) if zoom > 1 else zoom
        size = tuple(max(1, round(side * zoom)) for side in record.image_hw[::-1])
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
        truth = [dataset.class_names[label - 1] for label in record.labels]
        best = proposed.boxes[:PICTURED_PROPOSALS] * zoom
        row = [
            draw_boxes(image, record.boxes * zoom, record.labels, truth),
            draw_boxes(image, best, np.arange(len(best)), [""] * len(best)),
        ]
        if detections is not None:
            found = detections[index]
            names = tuple(dataset.class_names[label - 1] for label in found.labels)
            row.append(draw(image, Prediction(found.boxes * zoom, found.scores, found.labels, names)))
        rows.append(tuple(row))
    return side_by_side(rows)
