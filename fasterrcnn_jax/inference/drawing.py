"""Draws boxes on images."""

import colorsys
import functools
import io
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.config import ImageConfig
from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.records import (
    Dataset,
    ImageDetections,
    ImageProposals,
    Prediction,
)
from fasterrcnn_jax.inference.given_images import given_image
from fasterrcnn_jax.structures import Batch

# Limits of a sheet.
SHOWN_IMAGES = 6
SHOWN_IN_BATCH = 12
SHOWN_PROPOSALS = 20  # per image: the best ones
SHOWN_SCORE = 0.5  # of a detection: the lowest
SHOWN_SIDE = 480  # pixels of the longer side; larger images are shrunk to it

TEXT_SIZE = 18  # pixels of the letters on a sheet
# Fonts with more letters than Pillow's own, which has those of English alone: of Linux, Windows and macOS.
FONTS = ("DejaVuSans.ttf", "arial.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc", "Arial Unicode.ttf")

Pixels = UInt8[np.ndarray, "h w 3"]


def draw(image: Any, detections: Any, *, score_threshold: float = SHOWN_SCORE) -> Pixels:
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
    size = max(9, round(max(canvas.size) / 40))
    for box, label, caption in zip(boxes, labels, captions, strict=True):
        x1, y1, x2, y2 = (float(side) for side in box)
        colour = label_colour(int(label))
        # A box covers [x1, x2): the last pixel that belongs to it is x2 - 1.
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=unit)
        if not caption:
            continue
        caption, font = readable(caption, size)
        left, top, right, bottom = pen.textbbox((0, 0), caption, font=font)
        # Above the box where there is room, so that a small object stays visible.
        x = max(0.0, min(x1, canvas.width - (right - left) - 2 * unit))
        y = y1 - (bottom - top) - 2 * unit
        y = y if y >= 0 else y1
        pen.rectangle((x, y, x + right - left + 2 * unit, y + bottom - top + 2 * unit), fill=colour)
        pen.text((x + unit - left, y + unit - top), caption, fill="black", font=font)
    return np.array(canvas)


def readable(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Returns a text and a font that has all its letters.

    The font is the first of Pillow's own and of the installed `FONTS` that has the most letters of the text. Of letters
    that it lacks, accents are left out, or they become their code, such as \\u732b.
    """
    text = "".join(" " if letter.isspace() or unicodedata.category(letter) == "Cc" else letter for letter in text)
    fonts = [font for name in (None, *FONTS) if (font := _font(name, size)) is not None]
    font = max(fonts, key=lambda font: sum(_has(font, letter) for letter in text))
    return "".join(_replaced(letter, font) for letter in text), font


@functools.cache
def _font(name: str | None, size: int) -> ImageFont.FreeTypeFont | None:
    if name is None:
        font = ImageFont.load_default(size=size)
        assert isinstance(font, ImageFont.FreeTypeFont), "Pillow's wheels have FreeType"
        return font
    try:
        return ImageFont.truetype(name, size)
    except OSError:  # it is not installed
        return None


@functools.cache
def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Returns whether the font has a letter: a missing one looks like U+FFFF, which is never a letter."""
    if unicodedata.category(letter) == "Cs":  # a byte of a file name that is no text; FreeType gets U+FFFD for it
        return False
    shapes = [font.getmask(text) for text in (letter, "\uffff")]
    # Pillow's masks are sequences of bytes, which it does not declare.
    return shapes[0].size != shapes[1].size or bytes(shapes[0]) != bytes(shapes[1])  # pyright: ignore[reportArgumentType]


def _replaced(letter: str, font: ImageFont.FreeTypeFont) -> str:
    """Returns the letter, the letter without its accents, or its code."""
    if _has(font, letter):
        return letter
    plain = "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
    if plain and all(_has(font, part) for part in plain):
        return plain
    return letter.encode("ascii", "backslashreplace").decode()


def text_line(text: str, width: int) -> Pixels:
    """Returns an image of one line of text, cut to `width` pixels."""
    text, font = readable(text, TEXT_SIZE)
    shown = text
    while shown and font.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text}..." if text else ""
    line = Image.new("RGB", (width, TEXT_SIZE * 4 // 3), "white")
    # On the baseline, so that lines beside each other are level.
    ImageDraw.Draw(line).text((0, TEXT_SIZE), shown, fill="black", font=font, anchor="ls")
    return np.array(line)


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

    The columns have titles, and each row has the name of its image.

    Args:
      chosen: positions of the images in the data set.
      detections: detections of every image of the data set; None: the rows have no detections.
      proposals: proposals of the chosen images.
    """
    rows = []
    for index, proposed in zip(chosen, proposals, strict=True):
        record = dataset.records[index]
        image = record_pixels(record)
        image, zoom = _zoomed(image)
        truth = [dataset.class_names[label - 1] for label in record.labels]
        best = proposed.boxes[:SHOWN_PROPOSALS] * zoom
        row = [
            draw_boxes(image, record.boxes * zoom, record.labels, truth),
            draw_boxes(image, best, np.arange(len(best)), [""] * len(best)),
        ]
        if detections is not None:
            found = detections[index]
            names = tuple(dataset.class_names[label - 1] for label in found.labels)
            prediction = Prediction(found.boxes * zoom, found.scores, found.labels, names)
            row.append(draw(image, prediction, score_threshold=SHOWN_SCORE))
        rows.append((record.id, tuple(row)))
    titles = ("ground truth", f"best {SHOWN_PROPOSALS} proposals", f"detections, score at least {SHOWN_SCORE}")
    columns = len(rows[0][1])
    width = max(image.shape[1] for _, row in rows for image in row)
    lines = [tuple(text_line(title, width) for title in titles[:columns])]
    for name, row in rows:
        lines += [(text_line(name, width), *[text_line("", width)] * (columns - 1)), row]
    return side_by_side(lines)


def batch_sheet(
    batch: Batch, config: ImageConfig, class_names: tuple[str, ...], *, names: list[str] | None = None
) -> Pixels:
    """Returns one image of a training batch as the network sees it, with the boxes and classes that it is trained on.

    The images are resized, mirrored and cropped as in the batch. Above each are its name, and its size and that of its
    canvas as width x height. Grey squares are the padding of the canvas.

    Args:
      config: the model's `model.config.image`.
      names: name of each image of the batch; None: its position in the data set.
    """
    cells = []
    truth = batch.ground_truth
    for row in np.flatnonzero(batch.image_valid)[:SHOWN_IN_BATCH]:
        image, zoom = _zoomed(_rgb_of_canvas(np.asarray(batch.images[row]), config))
        (height, width), canvas = (int(side) for side in batch.image_hw[row]), batch.images.shape[1:3]
        image = _with_padding(image, round(height * zoom), round(width * zoom))
        valid = np.asarray(truth.valid[row])
        boxes, labels = np.asarray(truth.boxes[row])[valid] * np.float32(zoom), np.asarray(truth.labels[row])[valid]
        image = draw_boxes(image, boxes, labels, [class_names[label - 1] for label in labels])
        name = f"image {batch.image_index[row]}" if names is None else names[row]
        size = f"{width} x {height} on {canvas[1]} x {canvas[0]}"
        cells.append((text_line(name, image.shape[1]), text_line(size, image.shape[1]), image))
    columns = min(4, len(cells))
    empty = np.full((1, 1, 3), 255, np.uint8)
    cells += [(empty,) * 3] * (-len(cells) % columns)
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    return side_by_side([line for row in rows for line in zip(*row, strict=True)])


def _zoomed(image: Pixels) -> tuple[UInt8[np.ndarray, "_ _ 3"], float]:
    """Returns the image at the size of a sheet, and the factor of its size."""
    zoom = SHOWN_SIDE / max(image.shape[:2])
    # Small images are enlarged, so that captions do not cover them. A whole factor keeps their pixels sharp.
    zoom = float(round(zoom)) if zoom > 1 else zoom
    height, width = (max(1, round(side * zoom)) for side in image.shape[:2])
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BOX)), zoom


def _rgb_of_canvas(pixels: Float[np.ndarray, "h w 3"] | UInt8[np.ndarray, "h w 3"], config: ImageConfig) -> Pixels:
    """Returns a canvas of the network as RGB; takes back what `data.transforms.draw` does."""
    if pixels.dtype != np.uint8:
        values = pixels * np.asarray(config.std, np.float32) + np.asarray(config.mean, np.float32)
        pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels[..., ::-1]) if config.channel_order == "bgr" else pixels


def _with_padding(image: Pixels, height: int, width: int) -> Pixels:
    """Returns the image with a chequered pattern outside of its first `height` rows and `width` columns."""
    y, x = np.indices(image.shape[:2])
    pattern = np.where((y // 8 + x // 8) % 2 == 0, 205, 235).astype(np.uint8)
    outside = np.logical_or(y >= height, x >= width)
    return np.where(outside[..., None], pattern[..., None], image)
