"""Draws boxes on images."""

import colorsys
import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.records import (
    Dataset,
    ImageDetections,
    ImageProposals,
    Prediction,
)
from fasterrcnn_jax.inference.given_images import given_image

# Limits of a comparison sheet.
SHOWN_IMAGES = 6
SHOWN_PROPOSALS = 20  # per image: the best ones
SHOWN_SIDE = 480  # pixels of the longer side; larger images are shrunk to it

Pixels = UInt8[np.ndarray, "h w 3"]


def draw(image: Any, detections: Any, *, score_threshold: float = 0.5) -> Pixels:
    """Returns a copy of `image` with a labelled box for each detection whose score is at least `score_threshold`.

    Args:
      image: one image of any kind that `predict` takes.
      detections: the `Prediction` of this image, from `predict`.
    Raises:
      InputError: a file cannot be read as an image.
      ValueError: the image is of another kind, or `detections` is not one `Prediction`.
    """
    if not isinstance(detections, Prediction):
        raise ValueError(f"detections must be one Prediction, got {type(detections).__name__}")
    pixels = given_image(image, "the image").pixels()
    shown = detections.scores >= score_threshold
    captions = [
        f"{name} {score:.2f}"
        for name, score, show in zip(detections.class_names, detections.scores, shown, strict=True)
        if show
    ]
    return draw_boxes(pixels, detections.boxes[shown], detections.labels[shown], captions)


def draw_boxes(
    image: Pixels, boxes: Float[np.ndarray, "n 4"], labels: Int[np.ndarray, "n"], captions: list[str]
) -> Pixels:
    """Returns a copy of `image` with boxes in the colours of their labels, each with its caption."""
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    unit = max(1, round(max(canvas.size) / 400))
    font = ImageFont.load_default(size=max(9, 9 * unit))
    for box, label, caption in zip(boxes, labels, captions, strict=True):
        x1, y1, x2, y2 = (float(side) for side in box)
        colour = label_colour(int(label))
        # A box covers [x1, x2): the last pixel that belongs to it is x2 - 1.
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=unit)
        if not caption:
            continue
        left, top, right, bottom = pen.textbbox((0, 0), caption, font=font)
        # Above the box where there is room, so that a small object stays visible.
        x = max(0.0, min(x1, canvas.width - (right - left) - 2 * unit))
        y = y1 - (bottom - top) - 2 * unit
        y = y if y >= 0 else y1
        pen.rectangle((x, y, x + right - left + 2 * unit, y + bottom - top + 2 * unit), fill=colour)
        pen.text((x + unit - left, y + unit - top), caption, fill="black", font=font)
    return np.array(canvas)


def save_image(path: Path, pixels: Pixels, *, quality: int = 90) -> None:
    """Writes a PNG or JPEG file, by the extension of `path`; it appears whole or not at all.

    Args:
      quality: of a JPEG file.
    Raises:
      InputError: the file cannot be written; names it.
    """
    encoded = io.BytesIO()
    if path.suffix == ".png":
        Image.fromarray(pixels).save(encoded, "PNG")
    else:
        Image.fromarray(pixels).save(encoded, "JPEG", quality=quality)
    write_atomically(path, encoded.getvalue())


def label_colour(label: int) -> tuple[int, int, int]:
    """Returns a bright colour that is far from the colours of the neighbouring labels."""
    # Steps of the golden ratio spread any number of labels evenly over the colour wheel.
    red, green, blue = colorsys.hsv_to_rgb((label * 0.618034) % 1.0, 0.65, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def side_by_side(rows: list[tuple[UInt8[np.ndarray, "_ _ 3"], ...]]) -> Pixels:
    """Returns one image that shows rows of images with white gaps. All rows have the same number of images."""
    gap = 8
    column = max(image.shape[1] for row in rows for image in row)
    heights = [max(image.shape[0] for image in row) for row in rows]
    width = len(rows[0]) * (column + gap) + gap
    sheet = np.full((sum(heights) + gap * (len(rows) + 1), width, 3), 255, np.uint8)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for number, image in enumerate(row):
            left = gap + number * (column + gap)
            sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
        top += height + gap
    return sheet


def shown_positions(dataset: Dataset) -> list[int]:
    """Returns the positions of the images to show: a few, spread evenly over the data set."""
    count = min(SHOWN_IMAGES, len(dataset.records))
    return np.linspace(0, len(dataset.records) - 1, count).astype(int).tolist()


def comparison_sheet(
    dataset: Dataset,
    chosen: list[int],
    detections: list[ImageDetections] | None,
    proposals: list[ImageProposals],
) -> Pixels:
    """Returns one image with a row for each chosen image: ground truth, best proposals, and detections if given.

    Args:
      chosen: positions of the images in the data set.
      detections: detections of every image of the data set; None: the rows have no detections.
      proposals: proposals of the chosen images.
    """
    rows = []
    for index, proposed in zip(chosen, proposals, strict=True):
        record = dataset.records[index]
        image = record_pixels(record)
        zoom = SHOWN_SIDE / max(record.image_hw)
        # Small images are enlarged, so that captions do not cover them. A whole factor keeps their pixels sharp.
        zoom = float(round(zoom)) if zoom > 1 else zoom
        height, width = (max(1, round(side * zoom)) for side in record.image_hw)
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
        truth = [dataset.class_names[label - 1] for label in record.labels]
        best = proposed.boxes[:SHOWN_PROPOSALS] * zoom
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


def batch_sheet(batch, image, class_names):
    return np.zeros((8, 8, 3), np.uint8)
