"""Data sets of one small file that once took time or memory with the square of its size; for `budget.check`."""

import contextlib
import json
import re
import tempfile
from pathlib import Path

import bad_cases
import exports
import numpy as np

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import sources
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.scripts import check


def read(case: tuple[str, int]) -> None:
    """Builds the set that is named, in a size, and reads it as `train` or `check` does."""
    name, size = case
    with tempfile.TemporaryDirectory() as folder:
        SETS[name](Path(folder) / "set", size)


def voc(root: Path, *, listing: bytes = b"ok\nodd\n", class_names: tuple[str, ...] = bad_cases.CLASSES) -> None:
    bad_cases.write_voc(root)
    bad_cases.listing(listing)(root)
    sources.read(DataConfig(root=root, class_names=class_names), "train")


def coco(root: Path, content: dict, class_names: tuple[str, ...] = bad_cases.CLASSES) -> None:
    bad_cases.write_coco(root)
    bad_cases.holding(content)(root)
    data = DataConfig(
        root=root, layout="coco", coco_annotations="instances.json", coco_images="images", class_names=class_names,
        faults="skip",
    )  # fmt: skip
    sources.read(data, "train")


def checked(root: Path, content: dict) -> None:
    bad_cases.write_coco(root)
    bad_cases.holding(content)(root)
    with contextlib.suppress(SystemExit):
        check.main([str(root)])


def annotations(boxes: np.ndarray, category_ids: list[int], **more) -> dict:
    """Returns a COCO file whose first image has these (x, y, width, height)."""
    items = [
        {"id": n, "image_id": 10, "category_id": category, "bbox": np.round(box, 2).tolist()}
        for n, (box, category) in enumerate(zip(boxes, category_ids, strict=True))
    ]
    return bad_cases.instances() | {"annotations": items} | more


def classes(count: int) -> list[dict]:
    return [{"id": n, "name": f"class {n}"} for n in range(count)]


def scattered(count: int) -> np.ndarray:
    drawn = np.random.default_rng(0).uniform(0.0, 1.0, (count, 4))
    return drawn * [60, 40, 24, 20] + [0, 0, 4, 4]


def named(count: int) -> tuple[str, ...]:
    return tuple(item["name"] for item in classes(count))


def unlisted_class(root: Path, size: int) -> None:
    """Every annotation has a class that is not trained on, so that each gives a sentence with the class names."""
    items = [*classes(size), {"id": size, "name": "other"}]
    with contextlib.suppress(InputError):
        coco(root, annotations(scattered(size), [size] * size, categories=items), named(size))


def yolo(root: Path, size: int) -> None:
    """One file of labels with as many boxes, one of them of a class that has no name."""
    exports.write_yolo(root)
    lines = [f"{n % 2} {x / 100:.4f} {y / 100:.4f} 0.05 0.05" for n, (x, y, _, _) in enumerate(scattered(size))]
    (root / "labels/train/a.txt").write_text("\n".join([*lines, "7 0.5 0.5 0.1 0.1"]))
    layout(root, "yolo")


def labelme(root: Path, size: int) -> None:
    """One file with as many shapes, each of a class of its own."""
    exports.write_labelme(root)
    content = json.loads((root / "a.json").read_text())
    shapes = [{"label": f"class {n}", "points": [[1, 1], [9, 9]], "shape_type": "rectangle"} for n in range(size)]
    (root / "a.json").write_text(json.dumps(content | {"shapes": shapes}))
    layout(root, "labelme")


def csv(root: Path, size: int) -> None:
    """One table with as many lines about images that do not exist."""
    exports.write_csv(root)
    path = root / "train_labels.csv"
    lines = [re.sub(r"[^,]*\.png", f"{n}.png", path.read_text().splitlines()[1]) for n in range(size)]
    path.write_text("\n".join([path.read_text(), *lines]))
    layout(root, "csv")


def layout(root: Path, name: str) -> None:
    split = "all" if name == "labelme" else "train"
    data = sources.with_class_names(DataConfig(root=root, layout=name, train_split=split, faults="skip"))
    sources.read(data, split)


SETS = {
    "blanks in a VOC list": lambda root, n: voc(root, listing=b"ok\nodd" + b" " * n + b"x\nodd\n"),
    "COCO categories": lambda root, n: coco(root, bad_cases.instances() | {"categories": classes(n)}, named(2)),
    "ids of one hash value": lambda root, n: coco(
        root, annotations(scattered(n), [3] * n) | {"images": [{"id": k * (2**61 - 1)} for k in range(n)]}
    ),
    "classes and faults": unlisted_class,
    "class names": lambda root, n: voc(root, class_names=(*bad_cases.CLASSES, *named(n))),
    "YOLO labels": yolo,
    "LabelMe shapes": labelme,
    "lines of csv": csv,
    "check: scattered boxes": lambda root, n: checked(root, annotations(scattered(n), [3, 7] * (n // 2))),
    "check: equal boxes": lambda root, n: checked(root, annotations(scattered(1).repeat(n, 0), [3, 7] * (n // 2))),
    "check: classes": lambda root, n: checked(root, annotations(scattered(n), [*range(n)], categories=classes(n))),
}
