"""Writes a page about a data set: classes, sizes, places of the objects, doubles and leaks, faults."""

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fasterrcnn_jax
from fasterrcnn_jax.data import check
from fasterrcnn_jax.data.fingerprint import short_digest
from fasterrcnn_jax.data.records import Dataset, Finding, ImageRecord
from fasterrcnn_jax.printing import printable
from fasterrcnn_jax.report import pages
from fasterrcnn_jax.report.binning import ASPECTS, SIDES, bin_names, bin_of
from fasterrcnn_jax.report.charts import axis, bar_chart, heat_map
from fasterrcnn_jax.report.file_names import distinct_names
from fasterrcnn_jax.report.pictures import Outline, Picture, Wanted, cost, long_texts, make_pictures
from fasterrcnn_jax.report.tables import packed

# Limits of a page. Bytes of pictures and rows fall where the page would exceed `pages.MOST_BYTES`.
MOST_PICTURES = 50  # of each kind of finding
PICTURE_BYTES = 2_400_000
MOST_ROWS = 60_000  # of the table behind the lists of objects
MOST_PLACES = 20_000  # texts behind the lists of findings
CELLS = 16  # of a heat map, along each side
MAPS = 30  # heat maps of single classes
OUTLINES = 40  # boxes drawn on a picture of a whole image

TEMPLATE = "dataset.html"
LEAKS = (check.SAME_PIXELS, check.SAME_FIELD)
DOUBLES = (check.SAME_PIXELS_WITHIN, check.SAME_BOX, check.NEARLY_SAME_BOX, check.TWO_CLASSES)


class DataSet(NamedTuple):
    """All that the page shows."""

    name: str
    splits: Mapping[str, Dataset]  # without those that are the union of others
    unions: tuple[str, ...]  # names of the splits that are left out
    findings: tuple[Finding, ...]


class _Objects(NamedTuple):
    """One row per object of all splits."""

    split: np.ndarray
    image: np.ndarray  # position among the images of all splits
    label: np.ndarray
    box: np.ndarray
    side: np.ndarray  # square root of the width times the height, in pixels
    aspect: np.ndarray  # height / width
    centre: np.ndarray  # [G, 2] x and y, as fractions of the image's sides
    difficult: np.ndarray
    crowd: np.ndarray


def write_data_report(path: Path, shown: DataSet) -> str:
    """Writes the page, whole or not at all; returns a sentence about it.

    Raises:
      InputError: the file cannot be written.
    """
    values = page_values(shown)
    size = pages.write_page(path, TEMPLATE, **values)
    return f"{path}: {size / 1e6:.1f} MB"


def page_values(shown: DataSet) -> dict[str, Any]:
    """Returns the values of the template `dataset.html`.

    The pictures get the bytes that the rest of the page leaves. Where it leaves none, the lists get shorter.
    """
    datasets = list(shown.splits.values())
    records = [record for dataset in datasets for record in dataset.records]
    of_split = np.repeat(np.arange(len(datasets)), [len(dataset.records) for dataset in datasets])
    class_names = datasets[0].class_names if datasets else ()
    names = [printable(name) for name in class_names]
    objects = _objects(records, of_split)
    sizes = np.array([record.image_hw for record in records], np.int64).reshape(-1, 2)
    per_image = np.bincount(objects.image, minlength=len(records))
    # An image may be in several splits.
    findings = list({(finding.sentence, finding.where): finding for finding in shown.findings}.values())
    kinds = _kinds(findings)
    files = distinct_names([record.path for record in records])
    columns = {
        "split": objects.split,
        "image": objects.image,
        "label": objects.label,
        "side": objects.side,
        "aspect": objects.aspect,
        "difficult": objects.difficult,
        "crowd": objects.crowd,
        "side_bin": bin_of(objects.side, SIDES),
        "aspect_bin": bin_of(objects.aspect, ASPECTS),
        **{side: objects.box[:, number] for number, side in enumerate(("x1", "y1", "x2", "y2"))},
    }
    kept = {
        "images": {
            "split": of_split,
            "image": np.arange(len(records)),
            "width": sizes[:, 1],
            "height": sizes[:, 0],
            "objects": per_image,
        },
    }
    texts = {
        "classes": ["", *names],
        "images": list(map(printable, files)),
        "splits": list(map(printable, shown.splits)),
    }
    counted = Counter(finding.sentence for finding in findings)
    faults = sum(finding.is_fault for finding in findings)
    now = datetime.datetime.now().astimezone()
    values = {
        "title": f"Data set {shown.name}",
        "subtitle": f"{len(records):,} images, {len(objects.label):,} objects, {len(names)} classes, in "
        f"{', '.join(shown.splits) or 'no split that can be read'}. Written {now:%Y-%m-%d %H:%M:%S %z} by "
        f"fasterrcnn_jax {fasterrcnn_jax.__version__}.",
        "sections": [
            ("summary", "Summary"),
            ("findings", "Findings"),
            ("classes", "Classes"),
            ("sizes", "Sizes"),
            ("places", "Places"),
            ("pairs", "Doubles and leaks"),
        ],
        "headline": [
            ("images", len(records), "images", []),
            ("objects", len(objects.label), "objects", []),
            ("classes", len(names), None, []),
            ("images without an object", int((per_image == 0).sum()), "images", [["objects", 0, 0]]),
        ],
        "faults": faults,
        "notes": len(findings) - faults,
        "splits": [
            {
                "name": name,
                "images": len(dataset.records),
                "objects": int((objects.split == number).sum()),
                "empty": int((per_image[of_split == number] == 0).sum()),
                "median": float(np.median(per_image[of_split == number])) if (of_split == number).any() else 0.0,
                "most": int(per_image[of_split == number].max(initial=0)),
                "where": [["split", number, number]],
                "fingerprint": short_digest(dataset),
            }
            for number, (name, dataset) in enumerate(shown.splits.items())
        ],
        "kinds": [
            {
                "sentence": sentence,
                "is_fault": is_fault,
                "count": counted[sentence],
                "where": [["finding", number, number]],
            }
            for sentence, (number, is_fault) in kinds.items()
        ],
        "pairs": [],
        "unseen": 0,
        "classes": _class_rows(objects, names, list(shown.splits)),
        "unions": list(shown.unions),
        "split_names": list(shown.splits),
        "size_charts": _size_charts(objects, per_image),
        "size_tables": _size_tables(objects),
        "image_sizes": _image_sizes(sizes),
        "maps": _maps(objects, names, sizes),
        "meta": {
            "kinds": [],
            "groups": [],
            "most": MOST_PICTURES,
            "lists": {
                "objects": ["file", "split", "label", "box", "side", "aspect"],
                "images": ["file", "split", "width", "height", "objects"],
                "findings": ["where"],
            },
        },
    }
    room = 0
    for divisor in pages.SHORTENED:
        step = max(1, -(-len(objects.label) // (MOST_ROWS // divisor)))
        texts["places"], of_kind = _places(findings, kinds, MOST_PLACES // divisor)
        kept["objects"] = {name: column[::step] for name, column in columns.items()}
        kept["findings"] = {"finding": of_kind, "place": np.arange(len(of_kind))}
        values["packed"] = packed(kept, texts)
        room = pages.room(TEMPLATE, **values)
        if room >= 0:
            break
    names_of = dict(zip((record.path for record in records), files, strict=True))
    pairs, unseen = _pairs(findings, names_of, min(PICTURE_BYTES, max(0, room)))
    return values | {"pairs": pairs, "unseen": unseen}


def _objects(records: Sequence[ImageRecord], of_split: np.ndarray) -> _Objects:
    counts = [len(record.boxes) for record in records]
    image = np.repeat(np.arange(len(records)), counts)

    def joined(name: str, dtype: type, *shape: int) -> np.ndarray:
        return np.concatenate([np.zeros((0, *shape), dtype), *(getattr(record, name) for record in records)])

    box = joined("boxes", np.float64, 4)
    width, height = (box[:, 2:] - box[:, :2]).T
    limits = np.array([record.image_hw[::-1] for record in records], np.float64).reshape(-1, 2)[image]
    return _Objects(
        split=of_split[image],
        image=image,
        label=joined("labels", np.int64),
        box=box,
        side=np.sqrt(np.maximum(width * height, 0.0)),
        aspect=height / np.maximum(width, 1e-6),
        centre=(box[:, :2] + box[:, 2:]) / 2 / limits,
        difficult=joined("difficult", bool),
        crowd=joined("crowd", bool),
    )


def _kinds(findings: Iterable[Finding]) -> dict[str, tuple[int, bool]]:
    """Returns (number, whether it is a fault) of each kind of finding by its sentence, the faults first."""
    told = dict.fromkeys((finding.sentence, finding.is_fault) for finding in findings)
    ordered = sorted(told, key=lambda kind: not kind[1])
    return {sentence: (number, is_fault) for number, (sentence, is_fault) in enumerate(ordered)}


def _places(
    findings: Iterable[Finding], kinds: Mapping[str, tuple[int, bool]], most: int
) -> tuple[list[str], np.ndarray]:
    """Returns the places of the findings and their kinds; of each kind the first ones, if there are very many."""
    room = Counter({sentence: max(1, most // max(1, len(kinds))) for sentence in kinds})
    places, of_kind = [], []
    for finding in findings:
        if room[finding.sentence] > 0:
            room[finding.sentence] -= 1
            places.append(printable(finding.where))
            of_kind.append(kinds[finding.sentence][0])
    return places, np.array(of_kind, np.int64)


def _pairs(findings: Iterable[Finding], names_of: Mapping[Any, str], budget: int) -> tuple[list[dict[str, Any]], int]:
    """Returns the doubles and leaks with their pictures, and how many have no picture.

    Args:
      names_of: name to show by the path of an image.
      budget: bytes for the pictures.
    """
    shown, seen, unseen = [], Counter(), 0
    for finding in findings:
        if finding.sentence in (*LEAKS, *DOUBLES) and finding.records:
            seen[finding.sentence] += 1
            if seen[finding.sentence] <= MOST_PICTURES:
                shown.append(finding)
            else:
                unseen += 1
    shown.sort(key=lambda finding: (*LEAKS, *DOUBLES).index(finding.sentence))
    records, wanted = [], []
    for finding in shown:
        for record, part in _sides(finding, len(records)):
            records.append(record)
            wanted.append(part)
    pictures = make_pictures(wanted, records, budget=budget, title="pictures of the report")
    made = iter(zip(records, pictures, strict=True))
    pairs = []
    for finding in shown:
        sides = [next(made) for _ in range(2)]
        if any(picture is None for _, picture in sides):
            unseen += 1
            continue
        entries = [
            _entry(record, picture, names_of.get(record.path, record.path.name))
            for record, picture in sides
            if picture is not None
        ]
        texts = (text for entry in entries for text in (entry["title"], entry["described"], entry["file"]))
        budget -= sum(cost(entry["picture"]) for entry in entries) + long_texts(*texts) + 3 * len(finding.where)
        if budget < 0:
            unseen += 1
            continue
        pairs.append({"kind": finding.sentence, "where": finding.where, "pictures": entries})
    return pairs, unseen


def _sides(finding: Finding, number: int) -> list[tuple[ImageRecord, Wanted]]:
    """Returns the two pictures of a double: two images, or the same part of an image with one box and the other."""
    if finding.objects:
        (record,) = finding.records
        around = tuple(record.boxes[one] for one in finding.objects)
        parts = [(Outline(box, "found"),) for box in around]
        return [(record, Wanted(number + side, part, around)) for side, part in enumerate(parts)]
    return [
        (record, Wanted(number + side, tuple(Outline(box, "truth") for box in record.boxes[:OUTLINES]), ()))
        for side, record in enumerate(finding.records)
    ]


def _entry(record: ImageRecord, picture: Picture, name: str) -> dict[str, Any]:
    count = len(record.boxes)
    return {
        "kind": 0,
        "label": 0,
        "score": 0.0,
        "title": name,
        "detail": f"{count} object{'' if count == 1 else 's'}, {record.image_hw[1]} x {record.image_hw[0]} pixels",
        "described": f"{name}, {count} objects",
        "file": str(record.path.parent.name) if isinstance(record.path, Path) else "",
        "picture": picture,
    }


def _class_rows(objects: _Objects, names: Sequence[str], splits: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    order = np.argsort(objects.label, kind="stable")
    members = np.split(order, np.searchsorted(objects.label[order], np.arange(2, len(names) + 1))) if names else []
    for label, (name, here) in enumerate(zip(names, members, strict=True), start=1):
        by_split = np.bincount(objects.split[here], minlength=len(splits))
        quantiles = np.quantile(objects.side[here], (0.05, 0.5, 0.95)) if len(here) else np.full(3, np.nan)
        rows.append(
            {
                "name": name,
                "label": label,
                "objects": len(here),
                "images": len(np.unique(objects.image[here])),
                "splits": [(int(count), number) for number, count in enumerate(by_split)],
                "difficult": int(objects.difficult[here].sum()),
                "crowd": int(objects.crowd[here].sum()),
                "sides": quantiles.tolist(),
                "aspect": float(np.median(objects.aspect[here])) if len(here) else float("nan"),
            }
        )
    return rows


def _size_charts(objects: _Objects, per_image: np.ndarray) -> list[Any]:
    charts = []
    for values, limits, title, x_name in (
        (objects.side, SIDES, "Size of the objects", "square root of the area, pixels"),
        (objects.aspect, ASPECTS, "Shape of the objects", "height / width"),
    ):
        names = bin_names(limits)
        counts = np.bincount(bin_of(values, limits), minlength=len(names))
        y = axis("objects", 0.0, float(max(1, counts.max())))
        charts.append(bar_chart(title, names, [("objects", counts)], x_name, y))
    limits = (0, 1, 2, 3, 5, 9, 17, 33, 65, np.inf)
    names = ["0", "1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65+"]
    counts = np.bincount(bin_of(per_image, limits), minlength=len(names))
    y = axis("images", 0.0, float(max(1, counts.max())))
    charts.append(bar_chart("Objects per image", names, [("images", counts)], "objects", y))
    return charts


def _size_tables(objects: _Objects) -> list[dict[str, Any]]:
    tables = []
    for name, column, values, limits in (
        ("side, pixels", "side_bin", objects.side, SIDES),
        ("height / width", "aspect_bin", objects.aspect, ASPECTS),
    ):
        counts = np.bincount(bin_of(values, limits), minlength=len(limits) - 1)
        rows = [
            (words, int(counts[number]), [[column, number, number]]) for number, words in enumerate(bin_names(limits))
        ]
        tables.append({"name": name, "rows": rows})
    return tables


def _image_sizes(sizes: np.ndarray) -> list[tuple[str, int, list]]:
    counted = Counter(map(tuple, sizes.tolist())).most_common(20)
    return [
        (f"{width} x {height}", count, [["width", width, width], ["height", height, height]])
        for (height, width), count in counted
    ]


def _maps(objects: _Objects, names: Sequence[str], sizes: np.ndarray) -> list[tuple[str, str, Any]]:
    """Returns (number of the class or nothing, name, map) of all classes and of those with the most objects."""
    aspect = float(np.clip(np.median(sizes[:, 0] / sizes[:, 1]), 0.4, 1.6)) if len(sizes) else 1.0
    counts = np.bincount(objects.label, minlength=len(names) + 1)[1:]
    chosen = np.sort(np.argsort(-counts, kind="stable")[:MAPS])
    maps = []
    for label, name in [(0, "all classes"), *((int(one) + 1, names[int(one)]) for one in chosen if counts[one])]:
        here = objects.centre if label == 0 else objects.centre[objects.label == label]
        cells = np.clip((here * CELLS).astype(np.int64), 0, CELLS - 1)
        grid = np.bincount(cells[:, 1] * CELLS + cells[:, 0], minlength=CELLS * CELLS).reshape(CELLS, CELLS)
        title = f"Centres of the objects: {name}"
        maps.append((str(label) if label else "", name, heat_map(title, grid.astype(np.float64), aspect=aspect)))
    return maps
