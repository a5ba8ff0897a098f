"""Makes the small pictures of a page: a part of an image around some boxes, as a data URL.

Boxes are drawn by the page over the picture, with thin lines and without words, so that a small object stays visible.
"""

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from markupsafe import escape
from PIL import Image

from fasterrcnn_jax.data.faults import THREADS
from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.records import ImageRecord
from fasterrcnn_jax.printing import printable, progress_bar

SIDE = 176  # pixels of the longer side of a picture
SMALLEST_WINDOW = 64  # pixels of the original image: a smaller part would not show where the object is
AROUND = 2.2  # side of the part, divided by the longer side of the boxes in it
# WebP: about a third smaller than JPEG at equal quality, and every browser since 2020 shows it.
FORMAT, QUALITY = "WEBP", 55

OutlineKind = Literal["truth", "found", "other"]


class Outline(NamedTuple):
    """A box to draw."""

    box: Float[np.ndarray, "4"]  # xyxy in pixels of the original image
    kind: OutlineKind  # truth: labelled; found: detected; other: labelled too, beside the point


class Wanted(NamedTuple):
    """A picture to make."""

    image: int  # position of the image in its data set
    outlines: tuple[Outline, ...]
    # The boxes that decide which part of the image is shown: None: the outlines without the other ones; (): the whole.
    around: tuple[Float[np.ndarray, "4"], ...] | None = None


class Drawn(NamedTuple):
    """A box in pixels of a picture."""

    x: float
    y: float
    width: float
    height: float
    kind: OutlineKind


class Picture(NamedTuple):
    url: str  # data URL
    width: int
    height: int
    outlines: tuple[Drawn, ...]


def make_pictures(
    wanted: Sequence[Wanted], records: Sequence[ImageRecord], *, budget: int, title: str
) -> list[Picture | None]:
    """Returns the pictures in the given order; None for those after the one that would exceed the budget.

    Every image is decoded once, whatever the number of its pictures.

    Args:
      budget: bytes that all pictures may take on the page.
      title: of the progress bar.
    Raises:
      InputError: an image cannot be decoded.
    """
    by_image = defaultdict(list)
    for number, one in enumerate(wanted):
        by_image[one.image].append(number)
    made: list[Picture | None] = [None] * len(wanted)

    def of_image(image: int) -> list[tuple[int, Picture]]:
        pixels = record_pixels(records[image])
        return [(number, picture(pixels, wanted[number])) for number in by_image[image]]

    with ThreadPoolExecutor(THREADS) as pool:
        for found in progress_bar(pool.map(of_image, by_image), title=title, total=len(by_image), unit="image"):
            for number, one in found:
                made[number] = one
    for number, one in enumerate(made):
        budget -= cost(one) if one is not None else 0
        if budget < 0:
            return made[:number] + [None] * (len(made) - number)
    return made


def cost(one: Picture) -> int:
    """Returns about how many bytes a picture takes on a page, with its caption and its boxes."""
    return len(one.url) + 900 + 190 * len(one.outlines)


def long_texts(*texts: str) -> int:
    """Returns how many bytes more than `cost` counts a picture takes if its title, words and file name are long.

    The page repeats each of them up to three times, with its escapes.
    """
    return max(0, 3 * sum(len(escape(printable(text)).encode()) for text in texts) - 500)


def picture(pixels: UInt8[np.ndarray, "h w 3"], wanted: Wanted) -> Picture:
    """Returns a picture of a decoded image."""
    height, width = pixels.shape[:2]
    around = wanted.around
    if around is None:
        around = tuple(outline.box for outline in wanted.outlines if outline.kind != "other")
    x1, y1, x2, y2 = window(around, (height, width)) if around else (0, 0, width, height)
    part = Image.fromarray(np.ascontiguousarray(pixels[y1:y2, x1:x2]))
    scale = min(1.0, SIDE / max(part.size))
    size = max(1, round(part.width * scale)), max(1, round(part.height * scale))
    encoded = io.BytesIO()
    part.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0).save(encoded, FORMAT, quality=QUALITY)
    url = f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"
    drawn = []
    for outline in wanted.outlines:
        left, top, right, bottom = ((outline.box - [x1, y1, x1, y1]) * scale).tolist()
        # Of the others, those that the picture shows a part of.
        if right > 0 and bottom > 0 and left < size[0] and top < size[1]:
            # Cut a little outside of the picture.
            left, right = max(left, -3.0), min(right, size[0] + 3.0)
            top, bottom = max(top, -3.0), min(bottom, size[1] + 3.0)
            drawn.append(Drawn(left, top, right - left, bottom - top, outline.kind))
    return Picture(url, size[0], size[1], tuple(drawn))


def window(around: Sequence[Float[np.ndarray, "4"]], image_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the part (x1, y1, x2, y2) of an image to show: a square around the boxes, cut at the border."""
    boxes = np.stack(around).astype(np.float64)
    near, far = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    half = max(float((far - near).max()) * AROUND, SMALLEST_WINDOW) / 2
    limits = np.array([image_hw[1], image_hw[0]], np.float64)
    centre = np.clip((near + far) / 2, np.minimum(half, limits / 2), np.maximum(limits - half, limits / 2))
    first = np.clip(np.floor(centre - half), 0, limits - 1).astype(int)
    last = np.clip(np.ceil(centre + half), first + 1, limits).astype(int)
    return int(first[0]), int(first[1]), int(last[0]), int(last[1])


def ranked_by_group(groups: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns the rank of each entry within its group, 0 for the first.

    Args:
      groups: [n] the group of each entry.
      order: [n] number by which the entries of a group are sorted, the smallest first; equal ones keep their order.
    """
    sequence = np.lexsort((order, groups))
    sorted_groups = groups[sequence]
    starts = np.flatnonzero(np.r_[True, sorted_groups[1:] != sorted_groups[:-1]]) if len(groups) else np.zeros(0, int)
    lengths = np.diff(np.r_[starts, len(groups)])
    ranks = np.empty(len(groups), np.int64)
    ranks[sequence] = np.arange(len(groups)) - np.repeat(starts, lengths)
    return ranks
