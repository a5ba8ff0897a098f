"""Draws a data set that needs no download: labelled shapes on a textured background, in VOC layout.

Image i of a split is drawn from its own random stream, so it does not depend on the number of images.
Boxes here are integers (x1, y1, x2, y2) covering [x1, x2) x [y1, y2). A box is the extent of the pixels
that the object colours inside the image, including pixels that are covered by other objects later.
"""

import json
import math
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fasterrcnn_jax.data.records import box_iou
from fasterrcnn_jax.errors import InputError

CLASS_NAMES = ("disc", "rectangle", "triangle", "cross")

# Increased whenever the images change, so that a folder made by an older version is not used.
VERSION = 1

IMAGE_HW = ((144, 192), (144, 240), (160, 160), (160, 208), (176, 224), (192, 192), (192, 240))
IMAGE_HW += tuple((w, h) for h, w in IMAGE_HW if h != w)
MIN_SIDE, MAX_SIDE = 12, 96  # pixels, of an object that is completely inside
MAX_IOU = 0.5
MIN_SHOWN = 0.5  # visible share of an object's pixels inside the image, after all others are drawn
MIN_INSIDE, MIN_INSIDE_SIDE = 0.4, 8  # of an object cut by the image border: share of pixels, sides in pixels
SPLITS = ("train", "test")


class DrawnObject(NamedTuple):
    """One object of an image."""

    label: int  # 1..4, in the order of CLASS_NAMES
    box: tuple[int, int, int, int]
    truncated: bool  # the image border cuts it
    difficult: bool  # drawn with little contrast


# What `_place` returns.
_Placed = tuple[np.ndarray, tuple[int, int, int, int], bool]


def make_shapes(root: Path | str, *, seed: int, num_train: int, num_test: int) -> None:
    """Writes the data set to `root` as a VOC folder with splits train and test; does nothing if it is there already.

    The same arguments, machine type and library versions give the same bytes. The folder is written
    completely or not at all: an interrupted call leaves no folder `root`.

    Raises:
      InputError: an argument is out of range, or `root` contains anything except this data set.
    """
    for name, value, least in (("seed", seed, 0), ("num_train", num_train, 1), ("num_test", num_test, 1)):
        if type(value) is not int or value < least:  # isinstance would accept True
            raise InputError(f"data.shapes.{name} must be an integer of at least {least}, got {value!r}")
    root = Path(root).absolute()
    arguments = {"version": VERSION, "seed": seed, "num_train": num_train, "num_test": num_test}
    if _holds(root, arguments):
        return
    unfinished = root.with_name(f".{root.name}.unfinished-{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        _write(unfinished, arguments)
        unfinished.replace(root)  # fails unless `root` is absent or empty
    except OSError as error:
        # If another process wrote the same data set in the meantime, its folder is used.
        if not _holds(root, arguments):
            raise InputError(f"{root}: the shapes data set cannot be written: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def draw_image(seed: int, split: str, index: int) -> tuple[np.ndarray, tuple[DrawnObject, ...], np.ndarray]:
    """Returns (pixels uint8 [H, W, 3], objects, top int32 [H, W]).

    `top` is the topmost object of each pixel: 0 is the background, k is objects[k - 1].
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, SPLITS.index(split), index])))
    height, width = IMAGE_HW[rng.integers(len(IMAGE_HW))]
    canvas = _background(rng, height, width)
    for _ in range(rng.integers(0, 7)):
        _draw_clutter(rng, canvas)
    top = np.zeros((height, width), np.int32)
    objects, areas = [], []
    for _ in range(0 if rng.random() < 0.04 else rng.integers(1, 9)):
        # A full image can have no room left; then it has fewer objects.
        for _ in range(12):
            label = int(rng.integers(1, len(CLASS_NAMES) + 1))
            coverage = _coverage(rng, CLASS_NAMES[label - 1])
            placed = _place(rng, coverage, height, width)
            if placed is not None and _fits(placed, objects, areas, top):
                coverage, box, truncated = placed
                x1, y1, x2, y2 = box
                difficult = bool(rng.random() < 0.03)
                _paint(rng, canvas[y1:y2, x1:x2], coverage, difficult=difficult)
                objects.append(DrawnObject(label, box, truncated, difficult))
                areas.append(np.count_nonzero(coverage))
                top[y1:y2, x1:x2][coverage > 0] = len(objects)
                break
    # Camera noise, the same on objects and background.
    canvas += np.float32(rng.uniform(1.0, 5.0)) * rng.standard_normal(canvas.shape, np.float32)
    np.clip(np.rint(canvas, out=canvas), 0, 255, out=canvas)
    return canvas.astype(np.uint8), tuple(objects), top


def _coverage(rng: np.random.Generator, name: str) -> np.ndarray:
    """Returns float32 [h, w], the share of each pixel that a random shape covers: 0 or 0.5..1.

    No border row or column is empty, so the box of the shape is the extent of the array.
    """
    while True:
        width = _log_uniform(rng, MIN_SIDE, MAX_SIDE)
        height = _log_uniform(rng, max(MIN_SIDE, width / 2), min(MAX_SIDE, width * 2))
        if rng.random() < 0.5:
            width, height = height, width
        width, height = round(width), round(height)
        # 2 x 2 sample points in each pixel.
        x = (np.arange(2 * width, dtype=np.float32) / 2 + 0.25)[None, :]
        y = (np.arange(2 * height, dtype=np.float32) / 2 + 0.25)[:, None]
        turn = 0.0 if rng.random() < 0.4 else math.radians(rng.uniform(-12.0, 12.0))
        if name == "disc":
            u, v, slant = 2 * x / width - 1, 2 * y / height - 1, math.sin(turn)
            inside = u * u + v * v - 2 * slant * u * v <= 1 - slant * slant
        else:
            inside = np.zeros((2 * height, 2 * width), bool)
            for polygon in _fit(_convex_parts(rng, name, width, height), turn, width, height):
                inside |= _inside_convex(polygon, x, y)
        share = inside.reshape(height, 2, width, 2).mean((1, 3), dtype=np.float32)
        share[share < 0.5] = 0.0
        x1, y1, x2, y2 = _extent(share)
        if min(x2 - x1, y2 - y1) >= MIN_SIDE:
            return share[y1:y2, x1:x2]


def _convex_parts(rng: np.random.Generator, name: str, width: int, height: int) -> list[np.ndarray]:
    """Returns the unrotated shape as convex polygons [V, 2] of (x, y), clockwise on the screen."""
    whole = _rectangle(0, 0, width, height)
    if name == "rectangle":
        return [whole]
    if name == "triangle":
        apex = rng.uniform(0.35, 0.65) * width
        return [np.array([[apex, 0], [width, height], [0, height]])]
    arm_x, arm_y = rng.uniform(0.28, 0.38, 2) * (width, height)
    upright = _rectangle((width - arm_x) / 2, 0, (width + arm_x) / 2, height)
    return [upright, _rectangle(0, (height - arm_y) / 2, width, (height + arm_y) / 2)]


def _rectangle(x1: float, y1: float, x2: float, y2: float) -> np.ndarray:
    return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float64)


def _fit(polygons: list[np.ndarray], turn: float, width: int, height: int) -> list[np.ndarray]:
    """Returns the polygons rotated together by `turn` radians and stretched to the box [0, width] x [0, height]."""
    cos, sin = math.cos(turn), math.sin(turn)
    turned = [np.stack([p[:, 0] * cos - p[:, 1] * sin, p[:, 0] * sin + p[:, 1] * cos], axis=1) for p in polygons]
    points = np.concatenate(turned)
    low, high = points.min(0), points.max(0)
    return [(p - low) / (high - low) * (width, height) for p in turned]


def _inside_convex(polygon: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    inside = np.ones((y.shape[0], x.shape[1]), bool)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        inside &= (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) >= 0
    return inside


def _place(rng: np.random.Generator, coverage: np.ndarray, height: int, width: int) -> _Placed | None:
    """Returns (coverage inside the image, its box, truncated) at a random place; None: too little is inside."""
    h, w = coverage.shape
    if rng.random() < 0.2:
        x = int(rng.integers(-w * 6 // 10, width - w * 4 // 10 + 1))
        y = int(rng.integers(-h * 6 // 10, height - h * 4 // 10 + 1))
    elif h <= height and w <= width:
        x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    else:
        return None
    inside = coverage[max(0, -y) : height - y, max(0, -x) : width - x]
    if np.count_nonzero(inside) < MIN_INSIDE * np.count_nonzero(coverage):
        return None
    x1, y1, x2, y2 = _extent(inside)
    if min(x2 - x1, y2 - y1) < MIN_INSIDE_SIDE:
        return None
    left, upper = max(0, x), max(0, y)
    return (
        inside[y1:y2, x1:x2],
        (left + x1, upper + y1, left + x2, upper + y2),
        inside.shape != coverage.shape,
    )


def _fits(placed: _Placed, objects: list[DrawnObject], areas: Sequence[int | np.integer], top: np.ndarray) -> bool:
    """Returns whether the object overlaps or hides no other object too much."""
    coverage, box, _ = placed
    x1, y1, x2, y2 = box
    hidden = np.bincount(top[y1:y2, x1:x2][coverage > 0], minlength=len(objects) + 1)
    for number, (other, area) in enumerate(zip(objects, areas, strict=True), start=1):
        if box_iou(np.array([box], float), np.array([other.box], float))[0, 0] > MAX_IOU:
            return False
        if hidden[number] and np.count_nonzero(top == number) - hidden[number] <= MIN_SHOWN * area:
            return False
    return True


def _paint(rng: np.random.Generator, crop: np.ndarray, coverage: np.ndarray, *, difficult: bool) -> None:
    """Colours only the covered pixels of `crop`, float32 [h, w, 3], in place."""
    covered = coverage > 0
    ground = crop[covered].mean(0)
    if difficult:
        direction = rng.normal(size=3)
        # Away from the nearer end of the range 0..255, so that clipping does not remove the low contrast.
        colour = ground + np.copysign(direction, 127.5 - ground) / np.linalg.norm(direction) * rng.uniform(35, 50)
    else:
        candidates = rng.uniform(10, 245, (16, 3))
        distance = np.linalg.norm(candidates - ground, axis=1)
        colour = candidates[np.argmax(distance > 110)] if distance.max() > 110 else candidates[distance.argmax()]
    fill = np.broadcast_to(colour, crop.shape).astype(np.float32)
    strength = 8.0 if difficult else 22.0
    kind = rng.random()
    if kind < 0.2:
        fill += strength * _stripes(rng, *coverage.shape)[..., None]
    elif kind < 0.4:
        fill += strength * _ramp(rng, *coverage.shape)[..., None]
    elif kind < 0.5:
        fill += rng.normal(0, strength / 2, coverage.shape).astype(np.float32)[..., None]
    if not difficult and rng.random() < 0.25:
        fill[covered & ~_eroded(covered)] *= rng.uniform(0.35, 0.6)
    crop += (fill - crop) * coverage[..., None]


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns float32 [H, W, 3]: a colour with a ramp, smooth noise at two scales and sometimes stripes."""
    canvas = np.broadcast_to(rng.uniform(40, 215, 3), (height, width, 3)).astype(np.float32)
    canvas += _ramp(rng, height, width)[..., None] * rng.uniform(-30, 30, 3).astype(np.float32)
    for cells, strength in ((5, rng.uniform(0, 28)), (24, rng.uniform(0, 14))):
        canvas += np.float32(strength) * _smooth_noise(rng, height, width, cells)
    if rng.random() < 0.35:
        canvas += _stripes(rng, height, width)[..., None] * rng.uniform(3, 15, 3).astype(np.float32)
    return canvas


def _draw_clutter(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Draws a thin line or a small blob that is too thin or too small to be an object."""
    height, width = canvas.shape[:2]
    line = rng.random() < 0.6
    half = rng.uniform(3, 12) if line else 0.0
    thick = rng.uniform(0.6, 1.1) if line else rng.uniform(1.5, 3.5)
    x, y, turn = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, math.pi)
    reach = half + thick + 1
    x1, y1, x2, y2 = max(0, int(x - reach)), max(0, int(y - reach)), int(x + reach) + 1, int(y + reach) + 1
    crop = canvas[y1:y2, x1:x2]
    dx = np.arange(x1, x1 + crop.shape[1]) + 0.5 - x
    dy = (np.arange(y1, y1 + crop.shape[0]) + 0.5 - y)[:, None]
    along = np.clip(dx * math.cos(turn) + dy * math.sin(turn), -half, half)
    distance = np.hypot(dx - along * math.cos(turn), dy - along * math.sin(turn))
    share = np.clip(thick + 0.5 - distance, 0, 1)[..., None].astype(np.float32)
    crop += (rng.uniform(0, 255, 3).astype(np.float32) - crop) * share


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Returns float32 [H, W, 3]: normal values on a square grid, bilinear between them."""
    grid = rng.standard_normal((cells + 1, cells + 1, 3), np.float32)
    for axis, side in ((0, height), (1, width)):
        at = (np.arange(side, dtype=np.float32) + 0.5) * (cells / side)
        cell = at.astype(np.int64)
        share = (at - cell).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        grid = grid.take(cell, axis) + np.diff(grid, axis=axis).take(cell, axis) * share
    return grid


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns float32 [H, W] running from -1 to 1 in a random direction."""
    turn = rng.uniform(0, 2 * math.pi)
    ramp = math.cos(turn) * np.linspace(-1, 1, width) + math.sin(turn) * np.linspace(-1, 1, height)[:, None]
    return (ramp / (abs(math.cos(turn)) + abs(math.sin(turn)))).astype(np.float32)


def _stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns float32 [H, W], a plane wave between -1 and 1."""
    turn, period, phase = rng.uniform(0, math.pi), rng.uniform(4, 18), rng.uniform(0, 2 * math.pi)
    along = math.cos(turn) * np.arange(width) + math.sin(turn) * np.arange(height)[:, None]
    return np.sin(along * (2 * math.pi / period) + phase).astype(np.float32)


def _eroded(covered: np.ndarray) -> np.ndarray:
    padded = np.pad(covered, 1)
    return covered & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _extent(coverage: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(coverage.any(1)), np.flatnonzero(coverage.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _holds(root: Path, arguments: dict) -> bool:
    """Returns whether `root` contains the data set already; False for a missing or empty folder."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    record = root / "shapes.json"
    if not record.is_file():
        raise InputError(f"{root}: not a shapes data set ({record.name} is missing); give another folder")
    try:
        made_with = json.loads(record.read_bytes())
    except ValueError as error:
        raise InputError(f"{record}: the file cannot be read: {error}") from None
    if made_with != arguments:
        raise InputError(f"{root}: contains shapes made with {made_with}, not with {arguments}; give another folder")
    return True


def _write(root: Path, arguments: dict) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split in SPLITS:
        ids = [f"{split}_{index:05d}" for index in range(arguments[f"num_{split}"])]
        for index, image_id in enumerate(ids):
            pixels, objects, _ = draw_image(arguments["seed"], split, index)
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{image_id}.jpg", quality=92)
            (root / "Annotations" / f"{image_id}.xml").write_bytes(_annotation(image_id, pixels, objects))
        (root / "ImageSets" / "Main" / f"{split}.txt").write_bytes("".join(f"{i}\n" for i in ids).encode())
    (root / "shapes.json").write_bytes(json.dumps(arguments).encode() + b"\n")


def _annotation(image_id: str, pixels: np.ndarray, objects: tuple[DrawnObject, ...]) -> bytes:
    height, width = pixels.shape[:2]
    lines = [
        "<annotation>",
        f"  <filename>{image_id}.jpg</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    for item in objects:
        x1, y1, x2, y2 = item.box
        lines += [
            "  <object>",
            f"    <name>{CLASS_NAMES[item.label - 1]}</name>",
            f"    <truncated>{item.truncated:d}</truncated>",
            f"    <difficult>{item.difficult:d}</difficult>",
            # VOC counts pixels from 1 and includes the last pixel.
            f"    <bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>",
            "  </object>",
        ]
    return ("\n".join([*lines, "</annotation>"]) + "\n").encode()
