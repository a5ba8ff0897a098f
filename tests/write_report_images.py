"""Writes the images of a report for the documentation: python tests/write_report_images.py REPORT.html NAME

Writes docs/NAME_wide.png, docs/NAME_phone.png and docs/NAME_dark.png, each below 300 kB. Needs Chromium and
`pip install -e '.[browser]'`.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from fasterrcnn_jax.printing import print_lines

DOCS = Path(__file__).parents[1] / "docs"
MOST_BYTES = 300_000
# Of each image: the window, the colour scheme, and the sections beside each other, from the top of each.
VIEWS = {
    "wide": ((1180, 860), "light", ("summary", "errors")),
    "phone": ((360, 860), "light", ("summary", "curves", "confusion", "pictures")),
    "dark": ((1180, 860), "dark", ("curves", "pictures")),
}


def screens(page, sections):
    """Returns a screenshot for each section, scrolled to its beginning."""
    for section in sections:
        top = "0" if section == "summary" else f"document.getElementById('{section}').offsetTop - 60"
        page.evaluate(f"() => scrollTo({{top: {top}, behavior: 'instant'}})")
        page.wait_for_timeout(200)
        with Image.open(io.BytesIO(page.screenshot())) as image:
            yield image.convert("RGB")


def joined(images, scale):
    """Returns images beside each other with a gap, made smaller by `scale`."""
    gap = 14
    sheet = Image.new("RGB", (sum(i.width for i in images) + gap * (len(images) - 1), images[0].height), "#8a8f96")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    size = round(sheet.width * scale), round(sheet.height * scale)
    return sheet.resize(size, Image.Resampling.LANCZOS)


def main():
    report, name = Path(sys.argv[1]).resolve(), sys.argv[2]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for view, ((width, height), scheme, sections) in VIEWS.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(report.as_uri())
            images = list(screens(page, sections))
            path = DOCS / f"{name}_{view}.png"
            for scale, colours in ((0.75, 256), (0.75, 96), (0.6, 96), (0.5, 64)):
                joined(images, scale).quantize(colours, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
                if path.stat().st_size <= MOST_BYTES:
                    break
            print_lines(f"{path}: {path.stat().st_size} bytes")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
