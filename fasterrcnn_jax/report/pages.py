"""Writes pages: one HTML file each, which opens from disk and loads nothing.

Jinja2 fills the templates in `page/`. It escapes every value by default, so that a class or a file name from a stranger
cannot become markup because one call was forgotten; plain string templates would need that call at every place. Beside
it stands a Content-Security-Policy: the page may run the one script and the one style sheet whose digests it states,
show pictures that it holds itself, and load nothing.
"""

import base64
import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.printing import printable
from fasterrcnn_jax.report.charts import DASHES, svg

FOLDER = Path(__file__).parent / "page"
MOST_BYTES = 5_000_000  # of a whole page, where fewer pictures and shorter lists are enough for that
SPARE_BYTES = 50_000  # left over: sentences that depend on the pictures are not known before them
SHORTENED = (1, 2, 4, 8, 16, 32)  # by these numbers the lists of a page are divided until it is small enough


def write_page(path: Path, template: str, **values: Any) -> int:
    """Writes a page, whole or not at all; returns its number of bytes.

    Args:
      template: file name in `page/`.
    Raises:
      InputError: the file cannot be written; names it.
    """
    content = render(template, **values).encode()
    write_atomically(path, content)
    return len(content)


def render(template: str, **values: Any) -> str:
    """Returns a page as text, in which every value is escaped and printable."""
    script, style = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = itertools.count(1)
    environment.globals |= {"svg": lambda chart: svg(chart, next(numbers)), "dashes": DASHES, "floored": _floored}
    return environment.get_template(template).render(
        policy=policy(script, style), script=Markup(script), style=Markup(style), **values
    )


def room(template: str, **values: Any) -> int:
    """Returns how many bytes are left for pictures on a page that has none yet; negative if it is too large already."""
    return MOST_BYTES - SPARE_BYTES - len(render(template, **values).encode())


def policy(script: str, style: str) -> str:
    """Returns the Content-Security-Policy of a page with one script and one style sheet."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") for text in (script, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{digests[0]}'; style-src 'sha256-{digests[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _floored(score: float) -> float:
    """Returns a score rounded down to four digits, so that a score below a limit is not shown as the limit."""
    return math.floor(score * 10_000) / 10_000


def _shown(value: Any) -> Any:
    """Returns a text without characters that are not shown, for example those that turn the reading direction."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
