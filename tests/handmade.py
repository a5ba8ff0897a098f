"""Makes records and detections by hand, for the tests of the metrics."""

from pathlib import Path

import numpy as np

from fasterrcnn_jax.data.records import Dataset, ImageDetections, ImageRecord, box_areas


def record(*objects, image_id="0", crowd=None, area=None):
    """Returns an image with objects (box, label, difficult); by default without crowds and with the box areas."""
    boxes = np.array([o[0] for o in objects], np.float32).reshape(-1, 4)
    return ImageRecord(
        id=image_id,
        path=Path(f"{image_id}.jpg"),
        image_hw=(300, 400),
        boxes=boxes,
        labels=np.array([o[1] for o in objects], np.int32),
        difficult=np.array([o[2] for o in objects], bool),
        crowd=np.zeros(len(objects), bool) if crowd is None else np.array(crowd, bool),
        area=box_areas(boxes) if area is None else np.array(area, np.float64),
    )


def found(*rows):
    """Returns the detections (box, score, label) of one image."""
    return ImageDetections(
        np.array([r[0] for r in rows], np.float32).reshape(-1, 4),
        np.array([r[1] for r in rows], np.float32),
        np.array([r[2] for r in rows], np.int32),
    )


def dataset(*records, classes=1):
    names = tuple(f"class{k + 1}" for k in range(classes))
    return Dataset("hand made", names, records, (), tuple(range(1, classes + 1)))


def random_case(seed, images=25, classes=3, most=30):
    """Crowded images on a grid of whole pixels, with equal scores, difficult objects and crowds."""
    rng = np.random.default_rng(seed)
    records, given = [], []
    for image in range(images):
        size = rng.choice([1, 6, 20])  # small, medium and large objects

        def boxes(count, size=size):
            corner = rng.integers(0, 12, (count, 2))
            return size * np.concatenate([corner, corner + rng.integers(2, 9, (count, 2))], axis=1)

        count = int(rng.integers(0, 9))
        places, labels = boxes(count), rng.integers(1, classes + 1, count)
        objects = zip(places, labels, rng.random(count) < 0.15)
        records.append(record(*objects, image_id=str(image), crowd=rng.random(count) < 0.1))
        given_boxes, given_labels = boxes(most), rng.integers(1, classes + 1, most)
        given_boxes[:count], given_labels[:count] = places, labels
        order = rng.permutation(most)
        rows = zip(given_boxes[order], rng.integers(0, 9, most) / 8, given_labels[order])
        given.append(found(*list(rows)[: int(rng.integers(0, most))]))
    return given, dataset(*records, classes=classes)
