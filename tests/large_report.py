"""Measures the report of many made-up images: python tests/large_report.py FOLDER IMAGES CLASSES DETECTIONS

Prints one JSON object: seconds of the wall clock and of the processor for the metrics, the analysis, the report and the
decoding of a tenth of the images, each with the peak memory of the process so far, in megabytes.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.records import Dataset, ImageDetections, ImageRecord, box_areas
from fasterrcnn_jax.evaluation.analysis import analyse
from fasterrcnn_jax.evaluation.report import evaluate_detections
from fasterrcnn_jax.report.evaluation_page import Evaluation, write_report

OBJECTS = 7  # per image, as in COCO
HEIGHT, WIDTH = 480, 640


def boxes_of(generator, count):
    side = generator.uniform(10, 200, (count, 2))
    corner = generator.uniform(0, 1, (count, 2)) * ([WIDTH, HEIGHT] - side)
    return np.concatenate([corner, corner + side], axis=1).astype(np.float32)


def made_up(folder, images, classes, detections):
    """Returns a data set with image files, and the detections: one near each object, and the rest anywhere."""
    generator = np.random.default_rng(0)
    records, found = [], []
    for number in range(images):
        path = folder / f"{number:06d}.jpg"
        coarse = generator.integers(0, 255, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((WIDTH, HEIGHT)).save(path, quality=80)
        boxes, labels = boxes_of(generator, OBJECTS), generator.integers(1, classes + 1, OBJECTS).astype(np.int32)
        flags = np.zeros(OBJECTS, bool)
        records.append(ImageRecord(path.stem, path, (HEIGHT, WIDTH), boxes, labels, flags, flags, box_areas(boxes)))
        near = boxes + generator.normal(0, 4, boxes.shape).astype(np.float32)
        rest = detections - OBJECTS
        scores = np.concatenate([generator.beta(5, 2, OBJECTS), generator.beta(1, 6, rest)]).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        every = np.concatenate([near, boxes_of(generator, rest)])[order]
        classified = np.concatenate([labels, generator.integers(1, classes + 1, rest).astype(np.int32)])[order]
        found.append(ImageDetections(every, scores[order], classified))
    names = tuple(f"class {label}" for label in range(1, classes + 1))
    return Dataset("made up", names, tuple(records), (), tuple(range(1, classes + 1))), found


def main():
    folder, *numbers = sys.argv[1:]
    dataset, found = made_up(Path(folder), *map(int, numbers))
    measured = {}

    def timed(name, function):
        wall, processor = time.perf_counter(), time.process_time()
        result = function()
        seconds = time.perf_counter() - wall, time.process_time() - processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        measured[name] = {"wall": seconds[0], "processor": seconds[1], "peak_mb": peak}
        return result

    analysis = timed("analysis", lambda: analyse(found, dataset))
    metrics = timed("metrics", lambda: evaluate_detections(found, dataset))
    path = Path(folder) / "report.html"
    timed("report", lambda: write_report(path, Evaluation("runs/large", "val", "", dataset, analysis, metrics)))
    timed("decoding", lambda: [record_pixels(record) for record in dataset.records[::10]])
    print(json.dumps(measured | {"bytes": path.stat().st_size}))


if __name__ == "__main__":
    main()
