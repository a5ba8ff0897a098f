"""The page about an evaluation, without a browser: its counts and lists, names from strangers, pictures, size."""

import base64
import datetime
import html.parser
import io
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import report_data
from PIL import Image

from fasterrcnn_jax.data.fingerprint import short_digest
from fasterrcnn_jax.data.records import ImageDetections, StoredImage
from fasterrcnn_jax.evaluation.analysis import KINDS, analyse
from fasterrcnn_jax.evaluation.comparison import compare
from fasterrcnn_jax.evaluation.report import evaluate_detections
from fasterrcnn_jax.report import charts, data_page, evaluation_page, pages, pictures
from fasterrcnn_jax.report.evaluation_page import Evaluation
from fasterrcnn_jax.report.file_names import distinct_names

# A stranger's names: markup, an attribute, a script's end, a template, and characters that turn the reading direction.
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    '" onfocus="alert(2)" x="',
    "<svg/onload=alert(3)>",
    "{{ 7 * 7 }}",
    "a\u202eb\x00c",
    "' || alert(4) || '",
    "]]><!--",
)


class Reader(html.parser.HTMLParser):
    """Collects the elements of a page, and the text of each script."""

    def __init__(self):
        super().__init__()
        self.elements, self.scripts, self.text = [], {}, []
        self._script = None

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs).get("id", "") if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text.append(data)
        else:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def of(self, tag, name=None):
        return [attrs for found, attrs in self.elements if found == tag and (name is None or name in attrs)]


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def unpacked(text):
    """Returns the tables and texts of a page, as its script reads them."""
    content = zlib.decompress(base64.b64decode(text))
    length = int.from_bytes(content[:4], "little")
    header, at = json.loads(content[4 : 4 + length]), 4 + length
    tables = {}
    for name, told in header["tables"].items():
        tables[name] = {}
        for column in told["columns"]:
            planes = np.frombuffer(content, np.uint8, 4 * told["rows"], at).reshape(4, -1)
            tables[name][column["name"]] = np.ascontiguousarray(planes.T).view("<i4")[:, 0] / column["scale"]
            at += 4 * told["rows"]
    assert at == len(content)
    return tables, header["texts"]


def rows_of(tables, button):
    """Returns the rows of the list that a button opens."""
    table = tables[button["data-table"]]
    kept = np.ones(len(next(iter(table.values()))), bool)
    for column, low, high in json.loads(button["data-where"]):
        kept &= (table[column] >= low) & (table[column] <= high)
    return np.flatnonzero(kept)


def evaluated(dataset, detections, **options):
    found = {"analysis": analyse(detections, dataset), "metrics": evaluate_detections(detections, dataset)}
    return Evaluation("runs/made_up", "test", "", dataset, **found, **options)


def rendered(shown):
    return pages.render("evaluation.html", **evaluation_page.page_values(shown))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    names = ("ring", "disc", "square", "triangle", "star", "heart", "moon")
    return report_data.made_up(tmp_path_factory.mktemp("report"), images=60, class_names=names)


@pytest.fixture(scope="module")
def shown(made):
    return evaluated(*made)


@pytest.fixture(scope="module")
def page(shown):
    return rendered(shown)


def test_every_count_of_the_page_is_the_number_of_rows_of_its_list(page):
    reader = read(page)
    tables, texts = unpacked(reader.scripts["packed"])
    buttons = reader.of("button", "data-total")
    assert len(buttons) > 100 and {button["data-table"] for button in buttons} == {"detections", "objects", "images"}
    assert [b for b in buttons if len(rows_of(tables, b)) != int(b["data-total"])] == []
    assert len(texts["images"]) == 60 and texts["classes"][:2] == ["", "ring"]


def test_the_lists_hold_the_boxes_scores_and_files_of_the_detections(made, page):
    dataset, detections = made
    tables, texts = unpacked(read(page).scripts["packed"])
    table = tables["detections"]
    told = {
        (texts["images"][int(image)], round(score, 4), *np.round(box, 1))
        for image, score, *box in zip(*(table[name] for name in ("image", "score", "x1", "y1", "x2", "y2")))
    }
    given = {
        (record.path.name, round(float(score), 4), *np.round(box.astype(np.float64), 1))
        for record, found in zip(dataset.records, detections)
        for box, score in zip(found.boxes, found.scores)
    }
    assert len(told & given) > 0.99 * len(given), "rounding may differ in a few"
    assert len(told) == len(given)


def test_tables_that_are_too_long_keep_the_rows_above_the_thresholds_and_the_best_of_each_kind(shown, monkeypatch):
    monkeypatch.setattr(evaluation_page, "MOST_ROWS", 150)
    reader = read(rendered(shown))
    tables, _ = unpacked(reader.scripts["packed"])
    above = shown.analysis.detections.true_label >= 0
    assert len(tables["detections"]["image"]) == 150 and above.sum() > 150
    assert (tables["detections"]["true"] >= 0).all()
    # The totals on the page stay what they are.
    totals = [int(b["data-total"]) for b in reader.of("button", "data-total") if b["data-title"] == "detections"]
    assert totals == [len(shown.analysis.detections.score)]


def test_no_name_becomes_markup(tmp_path):
    files = [name for name in HOSTILE if "/" not in name and "\x00" not in name]
    files = [f"{name}.jpg" for name in (*files, "b\udcffd")]  # the last one is no text in any encoding
    dataset, detections = report_data.made_up(tmp_path / "set", images=9, class_names=HOSTILE, names=files)
    dataset = dataset._replace(name=HOSTILE[0])
    named = evaluated(dataset, detections)._replace(name=HOSTILE[1], split=HOSTILE[0], also=HOSTILE[2])
    plain = read(rendered(evaluated(dataset._replace(class_names=tuple("abcdefg"), name="d"), detections)))
    page = rendered(named)
    reader = read(page)
    assert [tag for tag, _ in reader.elements if tag == "img"] == []
    assert len(reader.of("script")) == 3
    attributes = {name for _, attrs in reader.elements for name in attrs}
    assert attributes <= {name for _, attrs in plain.elements for name in attrs}
    assert not {name for name in attributes if name.startswith("on") or name == "style"}
    # They are there, as text; {{ }} is not a template and hidden characters have escapes.
    words = "".join(reader.text)
    assert all(name in words for name in (*HOSTILE[:4], *HOSTILE[5:]))
    assert r"a\u202eb\x00c" in words and "\u202e" not in page and "\x00" not in page
    assert "</script><img" not in page and "b\\udcffd.jpg" in unpacked(reader.scripts["packed"])[1]["images"]
    page.encode()


def test_the_policy_allows_the_own_script_and_style_only(page):
    reader = read(page)
    (policy,) = (meta["content"] for meta in reader.of("meta", "content") if "http-equiv" in meta)
    script = page[page.rindex("<script>") + 8 : page.rindex("</script>")]
    style = page[page.index("<style>") + 7 : page.index("</style>")]
    assert policy == pages.policy(script, style)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    # Nothing to load: no address in any attribute but inside the page, and no @import or url() in the style sheet.
    addresses = [value for _, attrs in reader.elements for name, value in attrs.items() if name in ("href", "src")]
    assert addresses and all(address.startswith(("#", "data:image/webp;base64,")) for address in addresses)
    assert not re.search(r"@import|url\(|https?:", style) and not re.search(r"fetch\(|XMLHttp|https?:|import\(", script)


def pictures_of(reader):
    return [
        (int(a["data-kind"]), int(a["data-class"]), float(a["data-score"])) for a in reader.of("figure", "data-kind")
    ]


def test_each_kind_and_class_shows_its_worst_errors(shown, monkeypatch):
    monkeypatch.setattr(evaluation_page, "MOST_PICTURES", 2)
    reader = read(rendered(shown))
    found, table = pictures_of(reader), shown.analysis.detections
    kind = KINDS.index("duplicate")
    for label in range(1, 8):
        scores = np.sort(table.score[(table.kind == kind) & (table.label == label)])[::-1][:2]
        assert sorted((s for k, c, s in found if (k, c) == (kind, label)), reverse=True) == pytest.approx(
            scores, abs=1e-4
        )
    assert {k for k, _, _ in found} == set(evaluation_page.PICTURED)
    assert max(np.unique([f"{k} {c}" for k, c, _ in found], return_counts=True)[1]) == 2
    # What is not shown is told.
    objects = shown.analysis.objects
    errors = int((~np.isin(table.kind, (0, 6))).sum() + (objects.predicted_label == 0).sum())
    assert f"{len(found):,} of {errors:,} errors are shown as pictures, {errors - len(found):,} are not." in "".join(
        reader.text
    )


def test_confident_detections_on_nothing_are_probable_label_errors(shown):
    entries = evaluation_page.page_values(shown)["pictures"]
    table = shown.analysis.detections
    sure = (table.kind == KINDS.index("background")) & (table.true_label == 0) & (table.score >= evaluation_page.SURE)
    scores = sorted(entry["score"] for entry in entries if entry["kind"] == evaluation_page.LABEL_ERROR)
    assert scores == pytest.approx(np.sort(table.score[sure]), abs=1e-6) and len(scores) > 3


@pytest.mark.slow
def test_a_page_about_a_thousand_images_stays_below_five_megabytes(tmp_path):
    """Noise compresses badly, so the budget of bytes decides, and not the number of pictures."""
    dataset, detections = report_data.made_up(tmp_path, images=8, class_names=tuple(f"class {n}" for n in range(20)))
    noise = np.random.default_rng(0)
    for record in dataset.records:
        pixels = noise.integers(0, 256, (*record.image_hw, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(record.path, "JPEG", quality=95)
    # A thousand images in eight files, with fifty detections each, most of them wrong.
    many = []
    for number in range(1000):
        width, height = dataset.records[number % 8].image_hw[::-1]
        corner = noise.uniform(0, 0.6, (50, 2)) * (width, height)
        box = np.concatenate([corner, corner + noise.uniform(20, 90, (50, 2))], axis=1).astype(np.float32)
        scores = np.sort(noise.uniform(0, 1, 50))[::-1].astype(np.float32)
        many.append(ImageDetections(box, scores, noise.integers(1, 21, 50).astype(np.int32)))
    records = tuple(dataset.records[number % 8]._replace(id=str(number)) for number in range(1000))
    shown = evaluated(dataset._replace(records=records), many)
    path = tmp_path / "report.html"
    said = evaluation_page.write_report(path, shown)
    assert 2_000_000 < path.stat().st_size < pages.MOST_BYTES
    reader = read(path.read_text())
    count = len(pictures_of(reader))
    assert said == f"{path}: {path.stat().st_size / 1e6:.1f} MB, {count} pictures"
    assert 100 < count < evaluation_page.CANDIDATES
    # Every class and kind with an error has a picture before another one has two.
    of_group = {(k, c) for k, c, _ in pictures_of(reader)}
    groups = json.loads(reader.scripts["meta"])["groups"]
    assert of_group == {(kind, label) for kind, label, _ in groups}


def test_a_page_that_is_too_large_gives_up_pictures_and_then_rows(shown, monkeypatch):
    large = pages.room("evaluation.html", **evaluation_page.page_values(shown) | {"pictures": [], "shown_words": ""})
    bare = pages.MOST_BYTES - pages.SPARE_BYTES - large
    everything = len(evaluation_page.page_values(shown)["pictures"])
    monkeypatch.setattr(pages, "MOST_BYTES", bare + pages.SPARE_BYTES + 60_000)
    page = rendered(shown)
    count = len(pictures_of(read(page)))
    assert len(page.encode()) < pages.MOST_BYTES and 3 < count < everything
    tables, _ = unpacked(read(page).scripts["packed"])
    assert len(tables["detections"]["image"]) == len(shown.analysis.detections.score)
    # No room for the lists.
    rows = len(shown.analysis.detections.score)
    monkeypatch.setattr(evaluation_page, "MOST_ROWS", rows)
    monkeypatch.setattr(pages, "MOST_BYTES", bare + pages.SPARE_BYTES - 2000)
    page = rendered(shown)
    tables, _ = unpacked(read(page).scripts["packed"])
    assert len(page.encode()) < pages.MOST_BYTES
    assert len(tables["detections"]["image"]) in [rows // divisor for divisor in pages.SHORTENED[1:]]


def test_long_names_count_towards_the_size_of_the_pictures(tmp_path, monkeypatch):
    dataset, detections = report_data.made_up(tmp_path, images=20, class_names=("<&" * 1000, "b"))
    monkeypatch.setattr(evaluation_page, "PICTURE_BYTES", 200_000)
    values = evaluation_page.page_values(evaluated(dataset, detections))
    without = pages.render("evaluation.html", **values | {"pictures": []})
    with_them = pages.render("evaluation.html", **values)
    assert len(values["pictures"]) > 1
    assert len(with_them.encode()) - len(without.encode()) <= 200_000


def test_images_with_the_same_file_name_are_shown_with_their_folders(made, tmp_path):
    def named(*files):
        return distinct_names([tmp_path / file for file in files])

    assert named("cam1/1.jpg", "cam2/1.jpg", "cam2/2.jpg") == ["cam1/1.jpg", "cam2/1.jpg", "2.jpg"]
    assert named("a/x/i/1.jpg", "b/x/i/1.jpg") == ["a/x/i/1.jpg", "b/x/i/1.jpg"]
    assert named("a/x/1.jpg", "a/y/1.jpg", "b/2.jpg") == ["x/1.jpg", "y/1.jpg", "2.jpg"]
    assert named("1.jpg", "cam/1.jpg") == ["1.jpg", "cam/1.jpg"]
    assert named("1.jpg", "1.jpg") == ["1.jpg", "1.jpg"] and named() == []
    stored = [StoredImage(f"/d/{shard}/x.tfrecord[3]", bytes) for shard in "ab"]
    assert distinct_names(stored) == ["a/x.tfrecord[3]", "b/x.tfrecord[3]"]
    dataset, detections = made
    records = list(dataset.records)
    for number in range(2):
        path = tmp_path / f"cam{number}" / "0001.jpg"
        path.parent.mkdir()
        path.write_bytes(records[number].path.read_bytes())
        records[number] = records[number]._replace(path=path)
    dataset = dataset._replace(records=tuple(records))
    page = rendered(evaluated(dataset, detections))
    shown = unpacked(read(page).scripts["packed"])[1]["images"]
    assert [name.endswith(f"cam{n}/0001.jpg") for n, name in enumerate(shown[:2])] == [True, True]
    assert '<span class="file">cam0/0001.jpg' in page
    values = data_page.page_values(data_page.DataSet("d", {"train": dataset}, (), ()))
    shown = unpacked(values["packed"])[1]["images"]
    assert shown[:3] == ["cam0/0001.jpg", "cam1/0001.jpg", records[2].path.name]


def test_the_score_of_a_picture_is_rounded_down(shown):
    values = evaluation_page.page_values(shown)
    entry = values["pictures"][0] | {"score": 0.49996}
    (picture,) = read(pages.render("evaluation.html", **values | {"pictures": [entry]})).of("figure", "data-score")
    assert picture["data-score"] == "0.4999"


def test_a_picture_shows_the_object_where_its_box_is_drawn():
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[100:160, 200:260] = (255, 0, 0)
    box = np.float32([200, 100, 260, 160])
    one = pictures.picture(pixels, pictures.Wanted(0, (pictures.Outline(box, "truth"),)))
    (drawn,) = one.outlines
    content = base64.b64decode(one.url.removeprefix("data:image/webp;base64,"))
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (one.width, one.height)
        red = np.asarray(image.convert("RGB")).astype(int)[..., 0] > 128
    rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert seen == pytest.approx([drawn.x, drawn.y, drawn.x + drawn.width, drawn.y + drawn.height], abs=1.5)
    # The part is larger than the object, and lies inside the image at a border too.
    assert drawn.width < 0.5 * one.width
    assert pictures.window((np.float32([0, 390, 10, 400]),), (400, 600)) == (0, 336, 64, 400)


def test_images_are_decoded_once_whatever_the_number_of_their_pictures(made, monkeypatch):
    dataset, _ = made
    asked = []
    decode = pictures.record_pixels
    monkeypatch.setattr(pictures, "record_pixels", lambda record: asked.append(record.id) or decode(record))
    box = pictures.Outline(np.float32([5, 5, 50, 50]), "found")
    wanted = [pictures.Wanted(image, (box,)) for image in (3, 4, 3, 3)]
    made_now = pictures.make_pictures(wanted, dataset.records, budget=10**6, title="")
    assert sorted(asked) == sorted([dataset.records[3].id, dataset.records[4].id])
    assert made_now[0] == made_now[2] and made_now[0] != made_now[1]
    # The budget ends the row; what comes after it is not made up for by a smaller one.
    costs = [pictures.cost(one) for one in made_now]
    kept = pictures.make_pictures(wanted, dataset.records, budget=sum(costs[:2]), title="")
    assert [one is not None for one in kept] == [True, True, False, False]


def test_the_curve_of_a_class_has_the_average_precision_of_coco(shown):
    precision = [evaluation_page.interpolated_precision(curve).mean() for curve in shown.analysis.curves]
    np.testing.assert_allclose(precision, shown.metrics.coco.class_ap50, atol=1e-9)


@pytest.mark.parametrize("classes", [3, 6])
def test_a_class_without_objects_and_detections_has_no_curve_and_no_part_in_the_mean(tmp_path, classes):
    names = ("ring", "disc", "unused", "square", "star", "moon")[:classes]
    dataset, detections = report_data.made_up(tmp_path, images=20, class_names=("ring", "disc"))
    used = evaluated(dataset, detections).analysis
    analysis = analyse(detections, dataset._replace(class_names=names))
    alone, *_ = evaluation_page.curve_charts(used, ("ring", "disc"))
    chart, f1, _ = evaluation_page.curve_charts(analysis, names)

    def lines(of, colour):
        return [s.points for s in of.shapes if isinstance(s, charts.Line) and s.colour == colour]

    assert len(lines(alone, "s0")) == 1
    np.testing.assert_array_equal(lines(chart, "s0")[0], lines(alone, "s0")[0])
    assert lines(chart, "s3") == lines(f1, "s3") == []
    assert set(evaluation_page.curve_columns(analysis)["label"]) == {1, 2}
    # A class with objects that nothing finds counts as 0.
    blind = [d._replace(boxes=d.boxes[k], scores=d.scores[k], labels=d.labels[k])
             for d in detections for k in [d.labels == 1]]  # fmt: skip
    columns = evaluation_page.curve_columns(analyse(blind, dataset))
    assert columns["precision"][columns["label"] == 2].tolist() == [0.0] * 101


def test_the_f1_of_the_classes_has_the_mean_of_the_analysis(shown):
    f1 = np.mean([evaluation_page.f1_at_thresholds(curve) for curve in shown.analysis.curves], axis=0)
    np.testing.assert_allclose(f1, shown.analysis.mean_f1, atol=1e-9)


def test_the_page_states_where_its_numbers_come_from(shown, page):
    words = "".join(read(page).text)
    assert short_digest(shown.dataset) in words
    assert f"{shown.metrics.coco.ap:.3f}" in words and f"{shown.metrics.coco.ap50:.3f}" in words
    assert re.search(r"fasterrcnn_jax \d+\.\d+\.\d+, Python 3\.\d+\.\d+, jax \d", words)
    assert str(datetime.date.today().year) in words


def test_the_fingerprint_changes_with_labels_and_pixels_and_not_with_the_place(tmp_path):
    digests = []
    for folder in ("a", "b"):
        dataset, _ = report_data.made_up(tmp_path / folder, images=3, class_names=("ring", "disc"))
        digests.append(short_digest(dataset))
    assert digests[0] == digests[1] and re.fullmatch("[0-9a-f]{12}", digests[0])
    first = dataset.records[0]
    moved = first._replace(boxes=first.boxes + np.float32(1))
    digests.append(short_digest(dataset._replace(records=(moved, *dataset.records[1:]))))
    digests.append(short_digest(dataset._replace(class_names=("ring", "Disc"))))
    Image.fromarray(np.zeros((*first.image_hw, 3), np.uint8)).save(first.path)
    digests.append(short_digest(dataset))
    assert len(set(digests[1:])) == 4


@pytest.mark.parametrize("what", ["no detection", "no object", "no image"])
def test_a_page_is_written_where_there_is_nothing_to_show(tmp_path, what):
    dataset, detections = report_data.made_up(tmp_path, images=2, class_names=("ring", "disc"))
    nothing = ImageDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    if what == "no detection":
        detections = [nothing] * 2
    elif what == "no object":
        empty = dict(boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int32), area=np.zeros(0))
        flags = dict(difficult=np.zeros(0, bool), crowd=np.zeros(0, bool))
        dataset = dataset._replace(records=tuple(r._replace(**empty, **flags) for r in dataset.records))
    else:
        dataset, detections = dataset._replace(records=()), []
    reader = read(rendered(evaluated(dataset, detections)))
    tables, _ = unpacked(reader.scripts["packed"])
    assert all(len(rows_of(tables, b)) == int(b["data-total"]) for b in reader.of("button", "data-total"))
    assert "nan" not in "".join(reader.text).lower()


def test_axes_end_at_round_numbers_around_the_values():
    axis = charts.axis("loss", 0.0, 1.73)
    assert (axis.low, axis.high, axis.ticks) == (0.0, 2.0, (0.0, 0.5, 1.0, 1.5, 2.0))
    assert charts.axis("x", 3.0, 3.0).low < 3.0 < charts.axis("x", 3.0, 3.0).high
    assert charts.axis("x", float("nan"), 1.0).ticks[-1] == 1.0
    shown = [charts.short_number(value) for value in (0.25, 0.00025, 12345.0, 2e6, 0.0, -3.0)]
    assert shown == ["0.25", "2.5e-4", "12.35k", "2M", "0", "-3"]


def test_a_line_breaks_where_a_value_is_missing_and_keeps_its_peaks():
    x, unit = np.arange(5.0), charts.axis("x", 0.0, 4.0)
    chart = charts.line_chart(
        "t", [charts.Series("a", x, np.array([1, 2, np.nan, 3, 4.0]))], unit, charts.axis("y", 0, 4)
    )
    lines = [shape for shape in chart.shapes if isinstance(shape, charts.Line) and shape.colour == "s0"]
    assert [len(line.points) for line in lines] == [2, 2]
    many = np.stack([np.arange(10_000.0), np.zeros(10_000)], axis=1)
    many[7777, 1] = 5.0
    thin = charts.thinned(many)
    assert len(thin) <= 402 and thin[:, 1].max() == 5.0 and (np.diff(thin[:, 0]) > 0).all()


def test_a_chart_is_the_same_as_svg_and_as_pixels():
    bars = charts.bar_chart("t", ["a", "b"], [("n", np.array([1.0, 3.0]))], "x", charts.axis("y", 0.0, 4.0))
    drawn = charts.pixels(bars, scale=2).astype(int)
    blue = (drawn[..., 2] > 120) & (drawn[..., 0] < 60)
    heights = np.diff(np.flatnonzero(np.diff(np.pad(blue.any(axis=0), 1).astype(int))))[::2]
    assert len(heights) == 2
    columns = np.flatnonzero(blue.any(axis=0))
    ratio = blue[:, columns[-5]].sum() / blue[:, columns[5]].sum()
    assert ratio == pytest.approx(3.0, rel=0.05)
    text = charts.svg(bars, 1)
    sides = [float(height) for height in re.findall(r'<rect[^>]* height="([\d.]+)"', text)]
    assert sides[1] / sides[0] == pytest.approx(3.0, rel=0.01)
    assert "<title>b: 3</title>" in text


def test_the_confusion_of_very_many_classes_shows_those_with_the_most_mistakes(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_page, "CONFUSED", 3)
    names = tuple(f"c{n}" for n in range(6))
    dataset, detections = report_data.made_up(tmp_path, images=20, class_names=names)
    analysis = analyse(detections, dataset)
    rows, columns, words = evaluation_page.confusion_rows(analysis, names)
    wrong = analysis.confusion.sum(0) + analysis.confusion.sum(1) - 2 * np.diag(analysis.confusion)
    assert set(columns) == {names[n] for n in np.argsort(-wrong[1:], kind="stable")[:3]}
    assert words == "It shows the 3 classes with the most mistakes; 3 others are left out."
    assert [row["name"] for row in rows] == [*columns, "no object"]


def test_an_unwritable_page_is_named(tmp_path, shown):
    from fasterrcnn_jax.errors import InputError

    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/report.html cannot be written"):
        evaluation_page.write_report(Path(tmp_path / "file" / "report.html"), shown)


def test_another_run_stands_beside_this_one_with_intervals_images_and_settings(made, shown):
    dataset, detections = made
    # The other run finds nothing on the first images.
    nothing = ImageDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    worse = [nothing] * 20 + detections[20:]
    result = compare(detections, worse, dataset)
    settings = (("train.steps", 100, 200), ("model.backbone.norm", "group", None))
    compared = evaluation_page.Compared("runs/<b>other", result, settings)
    same = evaluation_page.Compared("runs/same", compare(detections, detections, dataset), ())
    reader = read(rendered(shown._replace(compared=(compared, same))))
    tables, texts = unpacked(reader.scripts["packed"])
    buttons = reader.of("button", "data-total")
    assert [b for b in buttons if len(rows_of(tables, b)) != int(b["data-total"])] == []
    (lost,) = (b for b in buttons if b["data-title"] == "Images that runs/<b>other loses")
    files = {texts["images"][int(tables["compared"]["image"][row])] for row in rows_of(tables, lost)}
    assert files == {dataset.records[int(one)].path.name for one in result.lost} and len(files) > 10
    words = re.sub(r"\s+", " ", " ".join(reader.text))
    assert f"all classes loss {result.ap.first:.3f} {result.ap.second:.3f} {result.ap.difference:.3f}" in words
    assert "train.steps 100 200" in words and "2 fields differ" in words
    assert "all classes unclear" in words  # the same detections
    assert "The other run saw these images before" not in words
    used = compared._replace(uses=", also used to choose the checkpoint")
    words = "".join(read(rendered(shown._replace(compared=(used, same)))).text)
    told = "The other run saw these images before: they were also used to choose the checkpoint."
    assert words.count(told) == 1


@pytest.mark.slow
def test_the_report_of_5000_images_and_80_classes_takes_a_minute_and_two_gigabytes_at_most(tmp_path):
    """Of the report alone; the other parts are printed beside it (`pytest -m slow -s`)."""
    script = Path(__file__).parent / "large_report.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(script), str(tmp_path), "5000", "80", "100"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    measured = json.loads(ran.stdout)
    print(json.dumps(measured, indent=1))
    # Processor time, so that other work on the machine does not count.
    assert measured["report"]["processor"] <= 60.0
    assert measured["report"]["peak_mb"] <= 2000.0
    assert measured["bytes"] < pages.MOST_BYTES
