"""Changes data sets at random and reads them: python tests/fuzz_readers.py --minutes 10

A healthy VOC annotation, its list, or a COCO file gets one to six changes of the tree (an element or item is removed,
duplicated, moved, or gets another value) and of the bytes. In every case the strict and the lenient reader must, within
seconds, return records that training can use, or raise InputError with one sentence that names the folder.

An image of each format gets changes of its first bytes, or of all bytes; it gives pixels or InputError within the time
and memory of `budget`. The two JSON files of a TFDS folder are changed like a COCO file, if TFDS is installed.
"""

import argparse
import copy
import dataclasses
import functools
import json
import random
import re
import resource
import shutil
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import bad_cases
import budget
import exports
import hostile_images
import numpy as np
import test_tfds
from PIL import Image

from fasterrcnn_jax.data import csv_table, labelme, sources, yolo
from fasterrcnn_jax.data.coco import read_coco
from fasterrcnn_jax.data.images import read_image
from fasterrcnn_jax.data.tfds import read_tfds
from fasterrcnn_jax.data.voc import class_names_in, read_voc
from fasterrcnn_jax.errors import InputError

TEXTS = [
    "", " ", "0", "1", "-1", "+7", "10.6", "1e3", "1e300", "-0", "nan", "inf", "-Infinity", "ten", "65535", "0x10",
    "1_0", "٣", "9" * 400, "\u2003 12", "square", "disc", "Disc", "../../outside", "/etc/passwd", "C:\\x", "odd",
    "ok.jpg", "odd.png", "\ufeff", "é", "a" * 5000,
]  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10, 11, 1.5, -0.0, 2**31, 2**63, 10**400, 1e308, float("nan"),
    float("inf"), "", "10", "square", [], {}, [[]], [1, 2, 3, 4], {"id": 10}, "../x.png", "10.png\0", "a" * 5000,
    [9, 9, 30, 30], [9, 9, 1e-30, 30], [1e12, 0, 1, 1], [95.99999, 0, 1e11, 5], "\ud800",
]  # fmt: skip
BYTES = [
    b"<", b">", b"&", b"&#0;", b"&lol;", b"\0", b"\xff", b"\xfe\xff", b"]]>", b"<!--", b"<!DOCTYPE a>", b"<![CDATA[",
    b"{", b"[", b'"', b"\\u", b"NaN", b",", b"-", b"\r", b"\n", b"/", b"..", b" 1", b"\xef\xbb\xbf", b"[" * 3000,
]  # fmt: skip
MAX_SECONDS = 5.0


def spoil_bytes(rng: random.Random, content: bytes) -> bytes:
    place = rng.randrange(len(content) + 1)
    end = min(len(content), place + rng.choice((0, 1, 2, 8, 64)))
    kind = rng.randrange(5)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + content[end:]
    if kind == 2:
        return content[:end] + content[place:end] * rng.randrange(1, 4) + content[end:]
    if kind == 3:
        return content[:place] + bytes([rng.randrange(256)]) + content[end:]
    return content[:place] + rng.choice(BYTES) + content[end:]


def spoil_tree(rng: random.Random, root: ElementTree.Element) -> None:
    parent = rng.choice(list(root.iter()))
    kind, children = rng.randrange(7), list(parent)
    if kind == 0 and children:
        parent.remove(rng.choice(children))
    elif kind == 1 and children:
        parent.append(copy.deepcopy(rng.choice(children)))
    elif kind == 2:
        parent.append(copy.deepcopy(rng.choice([e for e in root.iter() if not len(e)])))
    elif kind == 3 and children:
        rng.shuffle(children)
        parent[:] = children
    elif kind == 4:
        parent.tag = rng.choice([e.tag for e in root.iter()])
    elif kind == 5:
        parent.set("xmin", rng.choice(TEXTS))
    else:
        parent.text = rng.choice(TEXTS)


def spoil_json(rng: random.Random, content):
    """Returns the content with one random item removed, duplicated or replaced by another value."""
    places, stack = [], [content]
    while stack:
        item = stack.pop()
        keys = item.keys() if isinstance(item, dict) else range(len(item))
        for key in keys:
            places.append((item, key))
            if isinstance(item[key], dict | list):
                stack.append(item[key])
    if not places:
        return rng.choice(VALUES)
    item, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0:
        del item[key]
    elif kind == 1 and isinstance(item, list):
        item.append(copy.deepcopy(item[key]))
    elif kind == 2 and isinstance(item, dict):
        other = rng.choice(list(item))
        item[key], item[other] = item[other], item[key]
    else:
        item[key] = copy.deepcopy(rng.choice(VALUES))
    return content


def spoiled_xml(rng: random.Random) -> bytes:
    root = ElementTree.fromstring(bad_cases.annotation("odd.png"))
    for _ in range(rng.randrange(4)):
        spoil_tree(rng, root)
    encoding = rng.choice(("utf-8", "utf-8", "utf-16", "latin-1"))
    content = ElementTree.tostring(root, encoding) if encoding != "latin-1" else ElementTree.tostring(root)
    for _ in range(rng.choice((0, 0, 1, 2))):
        content = spoil_bytes(rng, content)
    return content


def spoiled_json(rng: random.Random) -> bytes:
    content = bad_cases.instances()
    for _ in range(rng.randrange(1, 5)):
        if isinstance(content, dict | list):
            content = spoil_json(rng, content)
    content = json.dumps(content).encode("utf-8", "surrogatepass")
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        content = spoil_bytes(rng, content)
    return content


def check(read, folder: Path) -> bool:
    """Returns whether `read` returned records; AssertionError: it gave neither valid records nor a valid error."""
    started = time.process_time()
    try:
        dataset = read()
    except InputError as error:
        message = str(error)
        assert str(folder) in message and "\n" not in message and len(message) < 1500, message
        dataset = None
    assert time.process_time() - started < MAX_SECONDS
    for record in () if dataset is None else dataset.records:
        height, width = record.image_hw
        boxes, count = record.boxes, len(record.boxes)
        assert np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all() and np.isfinite(record.area).all() and (record.area >= 0).all()
        assert ((1 <= record.labels) & (record.labels <= 2)).all()
        assert len(record.labels) == len(record.difficult) == len(record.crowd) == len(record.area) == count
        if isinstance(record.path, Path):
            assert record.path.resolve().is_relative_to(folder.resolve())
    return dataset is not None


def attempt(folder: Path, seed: int) -> bool:
    """Changes a set at random by `seed`, reads it strict and lenient; returns whether lenient reading succeeded."""
    rng = random.Random(seed)
    kind = rng.randrange(5)
    if kind < 2:
        root = folder / "voc"
        (root / "Annotations/odd.xml").write_bytes(spoiled_xml(rng))
        (root / "ImageSets/Main/train.txt").write_bytes(b"ok\nodd\n")
    elif kind == 2:
        root, listing = folder / "voc", b"ok\nodd\n"
        for _ in range(rng.randrange(1, 4)):
            listing = spoil_bytes(rng, listing)
        (root / "Annotations/odd.xml").write_text(bad_cases.annotation("odd.png"))
        (root / "ImageSets/Main/train.txt").write_bytes(listing)
    if kind < 3:
        check(lambda: (class_names_in(root, "train"), None)[1], root)
        reads = [lambda f=f: read_voc(root, "train", bad_cases.CLASSES, faults=f) for f in ("error", "skip")]
    else:
        root = folder / "coco"
        (root / "instances.json").write_bytes(spoiled_json(rng))
        reads = [
            lambda f=f: read_coco(root / "instances.json", root / "images", bad_cases.CLASSES, faults=f)
            for f in ("error", "skip")
        ]
    strict, lenient = (check(read, root) for read in reads)
    assert lenient or not strict
    return lenient


def spoil_words(rng: random.Random, content: bytes) -> bytes:
    """Returns the content with some of its numbers, words and separators replaced."""
    words = re.split(rb"(\w+|\s)", content)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(words))
        words[place] = rng.choice(
            (rng.choice(TEXTS).encode(), rng.choice(words), rng.choice(BYTES), b"", b"-1", b"1.05")
        )
    return b"".join(words)


def spoiled_text(rng: random.Random, content: bytes) -> bytes:
    for _ in range(rng.randrange(1, 4)):
        content = rng.choice((spoil_words, spoil_words, spoil_bytes))(rng, content)
    return content


def spoiled_labelme(rng: random.Random) -> bytes:
    content = exports.labelme_json(exports.RECORDS[0])
    for kind in ("polygon", "circle", "mask"):
        content["shapes"].append(
            exports.shape("disc", [[9, 9], [30, 12], [20, 40]][: rng.choice((2, 3))], kind, group_id=1)
        )
    for _ in range(rng.randrange(1, 5)):
        if isinstance(content, dict | list):
            content = spoil_json(rng, content)
    content = json.dumps(content).encode("utf-8", "surrogatepass")
    return spoil_bytes(rng, content) if rng.random() < 0.3 else content


# Layout -> its module and its reader.
EXPORTS = {
    "yolo": (yolo, yolo.read_yolo),
    "labelme": (labelme, labelme.read_labelme),
    "csv": (csv_table, csv_table.read_csv),
}


def prepare_exports(folder: Path) -> None:
    exports.write_yolo(folder / "yolo")
    (folder / "yolo/train.txt").write_text("".join(f"images/train/{r.name}.png\n" for r in exports.RECORDS))
    (folder / "yolo/data.yaml").write_text(
        "path: .\ntrain: train.txt\nval: [images/val, images/train]\nnc: 2\nnames:\n  0: square\n  1: disc\n"
    )
    exports.write_labelme(folder / "labelme")
    exports.write_csv(folder / "csv")


def attempt_export(folder: Path, seed: int, layout: str) -> bool:
    """Changes one file of a folder in `layout` at random by `seed`; returns whether lenient reading succeeded."""
    rng, root = random.Random(seed), folder / layout
    module, read = EXPORTS[layout]
    names = {"yolo": ("labels/train/a.txt", "labels/train/a.txt", "data.yaml", "train.txt"), "labelme": ("a.json",)}
    path = root / rng.choice(names.get(layout, ("train_labels.csv",)))
    healthy = path.read_bytes()
    try:
        path.write_bytes(spoiled_labelme(rng) if layout == "labelme" else spoiled_text(rng, healthy))
        split = "all" if layout == "labelme" else "train"
        for look in (module.recognise, module.splits, lambda root: module.class_names_in(root, split)):
            check(lambda look=look: (look(root), None)[1], root)
        strict, lenient = (
            check(lambda f=f: read(root, split, exports.CLASSES, faults=f), root) for f in ("error", "skip")
        )
    finally:
        path.write_bytes(healthy)
    assert lenient or not strict
    return lenient


def healthy_images() -> list[bytes]:
    """Returns small images of every format and of the kinds that their decoders treat in different ways."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    kinds = [
        ("JPEG", image, {"exif": exif}), ("JPEG", image, {"progressive": True}), ("JPEG", image.convert("CMYK"), {}),
        ("PNG", image, {"exif": exif}), ("PNG", image.convert("P"), {"transparency": 1}),
        ("PNG", image.convert("1"), {}),
        ("PNG", Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {}),
        ("BMP", image, {}), ("GIF", image, {"save_all": True, "append_images": [image.rotate(90)]}),
        ("TIFF", image, {}), ("TIFF", image, {"compression": "tiff_lzw"}), ("TIFF", image, {"compression": "jpeg"}),
        ("TIFF", image.convert("F"), {}), ("TIFF", image, {"big_tiff": True}),
        ("WEBP", image, {}), ("WEBP", image, {"lossless": True, "exif": exif}),
        ("WEBP", image, {"save_all": True, "append_images": [image.rotate(90)]}),
        ("PPM", image, {}), ("PPM", image.convert("1"), {}),
    ]  # fmt: skip
    files = [hostile_images.encoded(image, name, **options) for name, image, options in kinds]
    return [*files, hostile_images.bmp_rle(30, 20, b"\x1e\1\0\0" * 20), b"P3 2 2 255\n" + b"7 " * 12]


HEALTHY_IMAGES = healthy_images()
# Numbers as headers hold them, in both byte orders.
NUMBERS = [
    number.to_bytes(size, order)
    for number in (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 10_000, 16_383, 2**31 - 1, 2**32 - 1)
    for size in (1, 2, 4)
    for order in ("little", "big")
    if number < 256**size
]


def spoiled_image(rng: random.Random) -> bytes:
    content = rng.choice(HEALTHY_IMAGES)
    for _ in range(rng.randrange(1, 5)):
        if rng.randrange(3):
            # Most numbers that declare something are near the beginning, or near the end of a TIFF.
            near = min(64, len(content)) if rng.randrange(4) else len(content)
            place = rng.randrange(near) if rng.randrange(4) else len(content) - rng.randrange(1, near + 1)
            number = rng.choice(NUMBERS)
            content = content[:place] + number + content[place + len(number) :]
        else:
            content = spoil_bytes(rng, content) or b"\0"
    return content


def attempt_image(folder: Path, seed: int) -> bool:
    """Changes an image at random by `seed` and decodes it; returns whether that succeeded."""
    path = folder / "image"
    path.write_bytes(spoiled_image(random.Random(seed)))
    started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        pixels = read_image(path, upright=bool(seed % 2))
    except InputError as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and len(message) < 1500, message
        pixels = None
    assert time.process_time() - started < budget.MAX_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1e3 < budget.MAX_MEGABYTES
    assert pixels is None or (pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.size > 0)
    return pixels is not None


def attempt_tfds(folder: Path, seed: int) -> bool:
    """Changes the descriptions of a TFDS folder at random by `seed` and reads it; returns whether that succeeded."""
    rng, root = random.Random(seed), folder / "tfds"
    for name in ("features.json", "dataset_info.json"):
        path, original = root / "mine/1.0.0" / name, folder / name
        content = json.loads(original.read_text())
        for _ in range(rng.randrange(3)):
            if isinstance(content, dict | list):
                content = spoil_json(rng, content)
        content = json.dumps(content).encode("utf-8", "surrogatepass")
        for _ in range(rng.choice((0, 0, 0, 1))):
            content = spoil_bytes(rng, content)
        path.write_bytes(content)
    return check(lambda: read_tfds(root, "mine", "train", ("disc", "ring")), root)


def prepare(folder: Path) -> None:
    bad_cases.write_voc(folder / "voc")
    bad_cases.write_coco(folder / "coco")
    prepare_exports(folder)


def prepare_tfds(folder: Path) -> None:
    """Stores a healthy TFDS folder, and its descriptions beside it."""
    stored = test_tfds.store(folder / "tfds", [test_tfds.example(*test_tfds.OBJECTS)] * 3)
    for name in ("features.json", "dataset_info.json"):
        shutil.copy(stored / name, folder / name)


def prepare_layouts(folder: Path) -> None:
    for name, write in exports.WRITERS.items():
        write(folder / name)


def attempt_layout(folder: Path, seed: int) -> bool:
    """Changes, removes or renames a file of a folder at random by `seed`, recognises the folder and reads its splits.

    Returns whether it was recognised.
    """
    rng = random.Random(seed)
    root = folder / rng.choice(list(exports.WRITERS))
    path = rng.choice(sorted(path for path in root.rglob("*") if path.is_file()))
    healthy, renamed = path.read_bytes(), path
    try:
        kind = rng.randrange(8)
        if kind == 0:
            path.unlink()
        elif kind == 1:
            renamed = path.rename(
                path.with_name(rng.choice(("a b.png", "x.JSON", "train.xml", "é.txt", "A.PNG", ".a")))
            )
        elif path.suffix == ".json":
            content = json.loads(healthy)
            for _ in range(rng.randrange(1, 4)):
                if isinstance(content, dict | list):
                    content = spoil_json(rng, content)
            path.write_bytes(json.dumps(content).encode("utf-8", "surrogatepass"))
        else:
            path.write_bytes(spoiled_text(rng, healthy) if kind < 5 else spoil_bytes(rng, healthy))
        return check_layout(root)
    finally:
        if renamed != path:
            renamed.unlink()
        path.write_bytes(healthy)


def check_layout(root: Path) -> bool:
    """Recognises a folder and reads its splits with its classes; returns whether it was recognised."""
    recognised = []
    check(lambda: recognised.append(sources.recognise(root)), root)
    for layout in recognised:
        assert layout.splits and layout.data.root.is_relative_to(root)
        assert all("\n" not in note for note in (layout.name, layout.why, *layout.notes))
        data = dataclasses.replace(layout.data, class_names=exports.CLASSES)
        for split in layout.splits:
            strict, lenient = (
                check(lambda d=dataclasses.replace(data, faults=f), s=split: sources.read(d, s), root)
                for f in ("error", "skip")
            )
            assert lenient or not strict
    return bool(recognised)


# What --of names -> one execution, and what prepares its folder.
PREPARED = {"tfds": prepare_tfds, "layouts": prepare_layouts}
ATTEMPTS = {
    "sets": attempt,
    "images": attempt_image,
    "tfds": attempt_tfds,
    "layouts": attempt_layout,
    **{name: functools.partial(attempt_export, layout=name) for name in EXPORTS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--of", choices=ATTEMPTS, default="sets", help="what is changed")
    arguments = parser.parse_args()
    end, seed, read, failed = time.monotonic() + 60 * arguments.minutes, arguments.seed, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        PREPARED.get(arguments.of, prepare)(Path(folder))
        while time.monotonic() < end:
            try:
                read += ATTEMPTS[arguments.of](Path(folder), seed)
            except Exception as error:
                failed += 1
                print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            seed += 1
    count = seed - arguments.seed
    print(f"{count} executions, {read} of them read, {failed} failures")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
