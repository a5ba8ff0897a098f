"""Writes the same images and boxes as labelling programs export them, for the tests of the readers."""

import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image

CLASSES = ("square", "disc")


class Labelled(NamedTuple):
    """One image; boxes are xyxy in continuous pixels."""

    name: str  # without extension
    size: tuple[int, int]  # width, height
    objects: tuple[tuple[str, tuple[float, float, float, float]], ...]


# Corners at pixels and between them, at the border, and an image without objects.
RECORDS = (
    Labelled("a", (96, 64), (("square", (10, 12, 40, 44)), ("disc", (52, 8, 88, 40)))),
    Labelled("b", (61, 83), (("disc", (0, 0, 61, 83)), ("disc", (3.5, 7.25, 20.75, 30.5)))),
    Labelled("c", (50, 50), ()),
)


def write_images(folder: Path, records=RECORDS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        Image.new("RGB", record.size, (90, 120, 60)).save(folder / f"{record.name}.png")


def yolo_line(number: int, box, size, digits=17) -> str:
    (x1, y1, x2, y2), (width, height) = box, size
    values = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
    return " ".join((str(number), *(f"{value:.{digits}f}" for value in values)))


def write_yolo_labels(folder: Path, records=RECORDS, classes=CLASSES, digits=17) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        lines = (yolo_line(classes.index(name), box, record.size, digits) for name, box in record.objects)
        (folder / f"{record.name}.txt").write_text("".join(f"{line}\n" for line in lines))


def write_yolo(folder: Path, splits=("train", "val"), records=RECORDS, classes=CLASSES) -> None:
    """Writes the layout of Ultralytics: images/SPLIT, labels/SPLIT and data.yaml."""
    for split in splits:
        write_images(folder / "images" / split, records)
        write_yolo_labels(folder / "labels" / split, records, classes)
    lines = ["path: .", *(f"{split}: images/{split}" for split in splits), "names:"]
    lines += [f"  {number}: {name}" for number, name in enumerate(classes)]
    (folder / "data.yaml").write_text("\n".join(lines) + "\n")


def shape(label, points, kind="rectangle", **fields):
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **fields}


def labelme_json(record: Labelled):
    shapes = [shape(name, [list(box[:2]), list(box[2:])]) for name, box in record.objects]
    return {
        "version": "5.2.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"{record.name}.png",
        "imageData": None,
        "imageHeight": record.size[1],
        "imageWidth": record.size[0],
    }


def write_labelme(folder: Path, records=RECORDS) -> None:
    """Writes NAME.json beside each image."""
    write_images(folder, records)
    for record in records:
        (folder / f"{record.name}.json").write_text(json.dumps(labelme_json(record), indent=1))


def csv_lines(records=RECORDS) -> list[str]:
    """Returns the lines of a table with a header; a line with empty corners for an image without objects."""
    lines = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
    for record in records:
        start = f"{record.name}.png,{record.size[0]},{record.size[1]}"
        lines += [f"{start},{name},{','.join(map(str, box))}" for name, box in record.objects]
        lines += [] if record.objects else [f"{start},,,,,"]
    return lines


def write_csv(folder: Path, splits=("train", "test"), records=RECORDS) -> None:
    """Writes the layout of TensorFlow's tutorials: images/SPLIT and SPLIT_labels.csv."""
    for split in splits:
        write_images(folder / "images" / split, records)
        (folder / f"{split}_labels.csv").write_text("\n".join(csv_lines(records)) + "\n")
