"""Makes a data set with image files, and detections with every kind of error, for the tests of the report."""

from pathlib import Path

import numpy as np
from PIL import Image

from fasterrcnn_jax.data.records import Dataset, ImageDetections, ImageRecord, box_areas


def made_up(
    folder: Path, *, images: int, class_names: tuple[str, ...], objects: int = 4, extra: int = 3, seed=0, names=None
) -> tuple[Dataset, list[ImageDetections]]:
    """Returns a data set whose image files lie in `folder`, and detections: right ones, and errors of every kind.

    Args:
      objects: objects per image.
      extra: detections on nothing per image.
      names: file names of the first images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    records, detections, classes = [], [], len(class_names)
    for number in range(images):
        height, width = (240, 320) if number % 3 else (320, 240)
        pixels = generator.integers(40, 110, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        sides = np.exp(generator.uniform(np.log(8), np.log(90), (objects, 2)))
        corners = generator.uniform(0, 1, (objects, 2)) * ([width, height] - sides)
        boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
        labels = generator.integers(1, classes + 1, objects).astype(np.int32)
        for box, label in zip(boxes.astype(int), labels):
            pixels[box[1] : box[3], box[0] : box[2]] = generator.integers(0, 255, 3) // 2 + 80
            del label
        name = names[number] if names and number < len(names) else f"image{number:05d}.jpg"
        path = folder / name
        Image.fromarray(pixels).save(path, "JPEG", quality=70)
        flags = np.zeros(objects, bool), np.zeros(objects, bool)
        records.append(ImageRecord(path.stem, path, (height, width), boxes, labels, *flags, box_areas(boxes)))
        kinds = generator.choice(6, objects, p=[0.6, 0.1, 0.1, 0.05, 0.05, 0.1])
        found, scores, classified = [], [], []
        for box, label, kind in zip(boxes, labels, kinds):
            size = np.tile(box[2:] - box[:2], 2)
            near = box + generator.normal(0, 0.03, 4) * size
            far = box + np.array([0.45, 0.1, 0.45, 0.1]) * size
            other = int(label) % classes + 1
            rows = {
                0: [(near, label)],
                1: [(near, other)],
                2: [(far, label)],
                3: [(far, other)],
                4: [(near, label), (near + 1, label)],
                5: [],
            }[int(kind)]
            for place, of in rows:
                found.append(place)
                classified.append(of)
                scores.append(generator.beta(5, 2))
        for _ in range(extra):
            side = generator.uniform(10, 60, 2)
            corner = generator.uniform(0, 1, 2) * ([width, height] - side)
            found.append(np.concatenate([corner, corner + side]))
            classified.append(generator.integers(1, classes + 1))
            scores.append(generator.beta(2, 5))
        limits = np.array([width, height, width, height])
        arrays = np.clip(np.array(found).reshape(-1, 4), 0, limits).astype(np.float32)
        order = np.argsort(-np.array(scores), kind="stable")
        detections.append(
            ImageDetections(arrays[order], np.array(scores, np.float32)[order], np.array(classified, np.int32)[order])
        )
    ids = tuple(range(1, classes + 1))
    return Dataset("made up", class_names, tuple(records), (), ids), detections
