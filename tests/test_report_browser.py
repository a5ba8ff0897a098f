"""The pages in a real browser: Chromium without a window, driven by Playwright, and checked with axe-core.

They skip where Playwright or Chromium is not installed: `apt-get install chromium` and `pip install -e '.[browser]'`.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import report_data
import tiny
from test_report import HOSTILE, evaluated

from fasterrcnn_jax.data import check
from fasterrcnn_jax.report import data_page, evaluation_page
from fasterrcnn_jax.report.history import History

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install '.[browser]'")
axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed: pip install '.[browser]'")


def starts(program):
    """Returns whether a program is a browser: Ubuntu's chromium-browser may be a script that asks for a snap."""
    try:
        return subprocess.run([program, "--version"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


CHROMIUM = next(
    filter(starts, filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))), None
)
if CHROMIUM is None:
    pytest.skip("No Chromium that starts is installed: apt-get install chromium", allow_module_level=True)

SIZES = {"wide": (1280, 900), "phone": (360, 740)}
# Each size and each scheme once; the other two pairs take as long and are checked with the slow tests.
VIEWS = [
    ("wide", "light"),
    ("phone", "dark"),
    pytest.param("wide", "dark", marks=pytest.mark.slow),
    pytest.param("phone", "light", marks=pytest.mark.slow),
]
AXE = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    # Chromium's own sandbox needs rights that root in a container does not have.
    as_root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=as_root)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def history():
    history = History()
    for step in range(1, 101):
        history.add(step, {"rpn_box": 1 / step, "box_class": 2 / step, "learning_rate": 1e-4, "images_per_second": 9.0})
        if step % 20 == 0:
            history.add(step, {"val/AP": step / 200, "val/AP50": step / 150})
    return history


@pytest.fixture(scope="module")
def report(tmp_path_factory, history):
    folder = tmp_path_factory.mktemp("browser")
    names = ("ring", "disc", "square", "triangle", "star", "heart", "a class with a rather long name")
    dataset, detections = report_data.made_up(folder / "set", images=40, class_names=names)
    shown = evaluated(dataset, detections, config=tiny.config(folder), step=100, history=history)
    with pytest.MonkeyPatch.context() as patch:
        # axe-core looks at each picture.
        patch.setattr(evaluation_page, "MOST_PICTURES", 4)
        evaluation_page.write_report(folder / "report.html", shown)
        yield folder / "report.html", shown


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    files = [f"{name}.jpg" for name in HOSTILE if "/" not in name and "\x00" not in name]
    dataset, detections = report_data.made_up(folder / "set", images=6, class_names=HOSTILE, names=files)
    shown = evaluated(dataset._replace(name=HOSTILE[0]), detections)._replace(name=HOSTILE[0], split=HOSTILE[2])
    evaluation_page.write_report(folder / "report.html", shown)
    return folder / "report.html"


@pytest.fixture(scope="module")
def data_report(tmp_path_factory):
    """A page about a data set with an image twice, a leak, and a box twice."""
    folder = tmp_path_factory.mktemp("data")
    dataset, _ = report_data.made_up(folder / "set", images=12, class_names=("ring", "disc"))
    first, second, third, *_ = dataset.records
    shutil.copy(first.path, second.path)
    twice = third._replace(
        **{name: np.concatenate([getattr(third, name), getattr(third, name)[:1]]) for name in third._fields[3:8]}
    )
    train = check.check_split(
        dataset._replace(name="train", records=(first, second._replace(image_hw=first.image_hw), twice))
    )
    shutil.copy(first.path, dataset.records[5].path)
    leaked = dataset.records[5]._replace(image_hw=first.image_hw)
    test = check.check_split(dataset._replace(name="test", records=(*dataset.records[3:5], leaked)))
    leaks, _ = check.shared_images(train, test)
    findings = (*train.dataset.findings, *test.dataset.findings, *leaks)
    shown = data_page.DataSet("set", {"train": train.dataset, "test": test.dataset}, (), findings)
    data_page.write_data_report(folder / "data.html", shown)
    return folder / "data.html", shown


class Opened:
    """A page with what it said and asked for."""

    def __init__(self, browser, path, *, size="wide", scheme="light", **options):
        width, height = SIZES[size]
        options = dict(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True) | options
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def violations(self):
        self.page.evaluate(f"() => {{ {AXE} }}")
        found = self.page.evaluate("() => axe.run()")["violations"]
        return [(one["id"], node["html"][:160], node.get("failureSummary")) for one in found for node in one["nodes"]]


@pytest.mark.parametrize("size, scheme", VIEWS)
@pytest.mark.parametrize("which", ["report", "data_report"])
def test_a_page_is_accessible_and_silent_and_asks_for_nothing(browser, request, which, size, scheme):
    path, _ = request.getfixturevalue(which)
    with Opened(browser, path, size=size, scheme=scheme) as opened:
        page = opened.page
        for closed in page.locator("details").all():
            closed.evaluate("element => element.open = true")
        assert opened.violations() == []
        page.locator("button.count").first.click()
        page.locator("#list tbody tr").first.wait_for()
        assert opened.violations() == []
        page.keyboard.press("Escape")
        page.locator("button.enlarge").first.click()
        assert page.locator("#large svg image").is_visible() and opened.violations() == []
        assert opened.said == []
        assert {url.split(":")[0] for url in opened.asked} <= {"file", "data", "blob"}
        assert [url for url in opened.asked if url.startswith("file")] == [path.as_uri()]


@pytest.mark.parametrize("size", SIZES)
def test_nothing_sticks_out_of_a_narrow_or_wide_window(browser, report, data_report, size):
    for path, _ in (report, data_report):
        with Opened(browser, path, size=size) as opened:
            inside = "() => document.documentElement.scrollWidth <= innerWidth"
            assert opened.page.evaluate(inside)
            # Words in charts are not smaller than 11 pixels, on a phone either.
            heights = opened.page.evaluate(
                "() => [...document.querySelectorAll('svg.chart')].filter(s => s.clientWidth)"
                ".map(s => 12 * s.clientWidth / s.viewBox.baseVal.width)"
            )
            assert heights and min(heights) > 10.5


def test_a_dark_window_has_a_dark_page(browser, report):
    shades = {}
    for scheme in ("light", "dark"):
        with Opened(browser, report[0], scheme=scheme) as opened:
            colour = opened.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
            shades[scheme] = sum(int(part) for part in colour.strip("rgb()").split(","))
    assert shades["dark"] < 150 < 600 < shades["light"]


def column(page, number):
    return page.evaluate(
        "n => [...document.querySelectorAll('#class-table tbody tr')].map(row => row.children[n].textContent.trim())",
        number,
    )


def test_the_table_per_class_sorts_in_both_directions_with_the_keyboard(browser, report):
    with Opened(browser, report[0]) as opened:
        page = opened.page
        names, ap = column(page, 0), column(page, 2)
        head = page.locator("#class-table thead th").nth(2)
        head.locator("button").focus()
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == "descending"
        assert column(page, 2) == sorted(ap, key=float, reverse=True) != ap
        page.keyboard.press("Space")
        assert head.get_attribute("aria-sort") == "ascending"
        assert column(page, 2) == sorted(ap, key=float)
        page.locator("#class-table thead th button").first.click()
        assert column(page, 0) == sorted(names) and head.get_attribute("aria-sort") is None


def test_undefined_numbers_come_last(browser, tmp_path):
    names = ("absent", "ring", "disc", "square")
    dataset, detections = report_data.made_up(tmp_path / "set", images=6, class_names=names)
    # The first class has no object.
    records = [r._replace(labels=np.maximum(r.labels, 2)) for r in dataset.records]
    dataset = dataset._replace(records=tuple(records))
    evaluation_page.write_report(tmp_path / "report.html", evaluated(dataset, detections))
    with Opened(browser, tmp_path / "report.html") as opened:
        for _ in range(2):
            opened.page.locator("#class-table thead th button").nth(2).click()
            ap = column(opened.page, 2)
            assert column(opened.page, 0)[-1] == "absent" and ap[-1] == "\N{EN DASH}"
            assert len(ap) == 4 and (ap[:3] == sorted(ap[:3]) or ap[:3] == sorted(ap[:3], reverse=True))


def visible(page):
    return page.evaluate(
        "() => [...document.querySelectorAll('#gallery figure')].filter(figure => !figure.hidden)"
        ".map(figure => [figure.dataset.kind, figure.dataset.class, Number(figure.dataset.score)])"
    )


def test_the_pictures_are_filtered_by_kind_class_and_score(browser, report):
    path, shown = report
    entries = evaluation_page.page_values(shown)["pictures"]
    with Opened(browser, path) as opened:
        page, filters = opened.page, opened.page.locator("form[data-gallery]")
        assert len(visible(page)) == 48 < len(entries)
        kind = evaluation_page.KINDS.index("background")
        filters.locator("[name=kind]").select_option(str(kind))
        filters.locator("[name=class]").select_option("2")
        wanted = [e for e in entries if (e["kind"], e["label"]) == (kind, 2)]
        assert [score for *_, score in visible(page)] == pytest.approx([e["score"] for e in wanted], abs=1e-4)
        filters.locator("[name=score]").fill("0.5")
        kept = [e["score"] for e in wanted if e["score"] >= 0.5]
        assert [score for *_, score in visible(page)] == pytest.approx(kept, abs=1e-4) and 0 < len(kept) < len(wanted)
        table = shown.analysis.detections
        # Those that are probable label errors count as these.
        of_kind = (table.kind == kind) & (table.label == 2) & (table.score >= 0.5)
        sure = of_kind & (table.true_label == 0) & (table.score >= evaluation_page.SURE)
        said = page.locator("[data-of=gallery]").text_content()
        assert said.startswith(f"{len(kept)} of {of_kind.sum() - sure.sum()} are here as pictures")
        filters.locator("[name=score]").fill("1")
        assert visible(page) == [] and page.locator("[data-of=gallery]").text_content() == "Nothing of this kind."
        filters.locator("[name=score]").fill("0")
        filters.locator("[name=kind]").select_option("")
        filters.locator("[name=class]").select_option("")
        page.locator("[data-more=gallery]").click()
        assert len(visible(page)) == min(96, len(entries))


def test_a_count_opens_its_list_and_the_keyboard_returns_to_it(browser, report):
    path, shown = report
    table = shown.analysis.detections
    with Opened(browser, path) as opened:
        page = opened.page
        button = page.locator("#errors button.count").first
        button.focus()
        page.keyboard.press("Enter")
        rows = page.locator("#list tbody tr")
        rows.first.wait_for()
        kind = evaluation_page.KINDS.index("class")
        of_kind = np.flatnonzero(table.kind == kind)
        assert rows.count() == min(200, len(of_kind)) and button.text_content() == f"{len(of_kind):,}"
        assert page.locator("#list-note").text_content() == f"{len(of_kind):,} in all."
        best = of_kind[np.argmax(table.score[of_kind])]
        words = rows.first.locator("td").all_text_contents()
        record = shown.dataset.records[int(table.image[best])]
        box = ", ".join(f"{side:.1f}" for side in np.round(table.box[best].astype(float), 1))
        labelled = shown.dataset.class_names[int(shown.analysis.objects.label[table.object[best]]) - 1]
        name = shown.dataset.class_names[int(table.label[best]) - 1]
        score, iou = f"{table.score[best]:.3f}", f"{table.iou[best]:.2f}"
        assert words == [record.path.name, name, score, box, "class", labelled, iou]
        page.keyboard.press("Escape")
        assert not page.locator("#list").is_visible()
        assert button.evaluate("element => element === document.activeElement")


def test_a_stub_that_does_not_start_is_no_browser(tmp_path):
    stub = tmp_path / "chromium-browser"
    stub.write_text("#!/bin/sh\necho 'requires the chromium snap to be installed' >&2\nexit 1\n")
    stub.chmod(0o755)
    assert starts(CHROMIUM) and not starts(str(stub)) and not starts(str(tmp_path / "absent"))


def test_a_list_without_room_for_all_rows_says_how_many_are_listed(browser, report, tmp_path, monkeypatch):
    _, shown = report
    monkeypatch.setattr(evaluation_page, "MOST_ROWS", 50)
    evaluation_page.write_report(tmp_path / "report.html", shown)
    with Opened(browser, tmp_path / "report.html") as opened:
        count = f"{len(shown.analysis.detections.score):,}"
        opened.page.locator("#summary button.count", has_text=count).click()
        opened.page.locator("#list tbody tr").first.wait_for()
        said = opened.page.locator("#list-note").text_content()
        assert said == f"50 of {count} are listed; this page has no room for the others."


def test_a_long_list_opens_in_parts(browser, report):
    path, shown = report
    with Opened(browser, path) as opened:
        page = opened.page
        page.locator("#summary button.count", has_text=f"{len(shown.analysis.detections.score):,}").click()
        rows = page.locator("#list tbody tr")
        rows.first.wait_for()
        assert rows.count() == 200
        page.locator("#list-more").click()
        assert rows.count() == min(400, len(shown.analysis.detections.score))


def test_a_chosen_class_gets_its_curves(browser, report):
    path, shown = report
    with Opened(browser, path) as opened:
        page = opened.page
        line = page.locator("polyline[data-line=precision]")
        assert line.get_attribute("points") == ""
        page.locator("select[data-curves]").select_option("3")
        page.wait_for_function("() => document.querySelector('[data-line=precision]').getAttribute('points') !== ''")
        points = np.array([p.split(",") for p in line.get_attribute("points").split()], float)
        left, right, top, bottom = json.loads(page.locator("#meta").text_content())["plot"]
        precision = (bottom - points[:, 1]) / (bottom - top)
        wanted = evaluation_page.interpolated_precision(shown.analysis.curves[2])
        np.testing.assert_allclose(precision, wanted, atol=2e-3)
        np.testing.assert_allclose((points[:, 0] - left) / (right - left), np.linspace(0, 1, 101), atol=2e-3)


def test_names_of_strangers_run_nothing_and_the_policy_stops_what_gets_in(browser, hostile_report):
    with Opened(browser, hostile_report) as opened:
        page = opened.page
        for button in page.locator("button.count").all()[:12]:
            button.click()
            page.locator("#list tbody tr").first.wait_for()
            page.keyboard.press("Escape")
        page.locator("button.enlarge").first.click()
        page.keyboard.press("Escape")
        assert HOSTILE[0] in page.locator("#class-table tbody th").first.text_content()
        assert opened.said == [] and page.locator("img").count() == 0
        # Were there a hole, the policy would close it.
        page.evaluate(
            "() => { document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit = 1\">');"
            "const s = document.createElement('script'); s.textContent = 'window.hit = 2'; document.body.append(s); }"
        )
        page.wait_for_timeout(200)
        assert page.evaluate("() => window.hit === undefined")
        assert any("Content Security Policy" in line for line in opened.said)


def test_without_javascript_the_page_shows_its_tables_charts_and_pictures(browser, report):
    with Opened(browser, report[0], java_script_enabled=False) as opened:
        page = opened.page
        assert page.locator("noscript p").is_visible()
        assert page.locator("#class-table tbody tr").count() == 7
        assert page.locator("#gallery figure svg image").last.is_visible()


def test_doubles_and_leaks_lie_side_by_side_on_the_page_of_a_data_set(browser, data_report):
    path, shown = data_report
    with Opened(browser, path) as opened:
        page = opened.page
        titles = page.locator("#pairs h3").all_text_contents()
        assert sorted(title.split(":")[0] for title in titles) == sorted(
            [check.SAME_PIXELS, check.SAME_PIXELS_WITHIN, check.SAME_BOX]
        )
        for pair in page.locator(".pair").all():
            boxes = [figure.bounding_box() for figure in pair.locator("figure").all()]
            assert len(boxes) == 2 and boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
        # Findings and classes open their lists.
        page.locator("#findings button.count").first.click()
        page.locator("#list tbody tr").first.wait_for()
        assert page.locator("#list tbody tr").count() >= 1
        page.keyboard.press("Escape")
        page.locator("select[data-for]").select_option("1")
        assert page.locator("[data-places] > [data-class='1']").is_visible()
        assert not page.locator("[data-places] > [data-class='']").is_visible()
