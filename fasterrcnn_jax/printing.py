"""Makes text safe to print: names from files cannot steer a terminal, forge a line, or hide.

The names of files, classes, arrays and fields come from strangers. CWE-150 describes what control characters in them
can do to a terminal or a log.
"""

import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

# Seconds between two lines of progress where the error output is no terminal.
LINE_EVERY = 15.0

# Control characters, format characters (bidirectional overrides, zero width), lone surrogates (which stand for bytes
# of a file name that cannot be decoded), and the separators of lines and paragraphs. Unassigned characters are not
# in the list: they may be emoji that are newer than this Python.
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: object) -> str:
    r"""Returns `str(text)` with an escape such as `\n`, `\x1b` or `\u202e` for each character that is not shown.

    Text of any language and emoji stay as they are, except for the joiners of zero width (U+200C, U+200D), which can
    make two names look alike. Backslashes stay too, so printable text does not change.
    """
    text = str(text)
    return text if text.isprintable() else "".join(map(_shown, text))


def print_lines(*lines: object) -> None:
    """Prints one line per argument, made printable; every module prints with this function."""
    print("\n".join(map(printable, lines)))


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    title: str,
    total: int | None,
    unit: str,
    done: int = 0,
    shown: bool = True,
    rate: bool = False,
) -> Any:
    """Returns a progress bar around `items`; where the error output is no terminal, a line every LINE_EVERY seconds.

    Both appear only where the work takes longer than a second, or than LINE_EVERY seconds.

    Args:
      title: what is done, for example the name of a data set.
      total: number of items; None: it is not known.
      done: number of items that were done before.
      shown: False in all processes but one.
      rate: the lines say how many items were done in a second; the bar of a terminal always does.
    """
    from tqdm import tqdm

    how: dict[str, Any] = dict(leave=False, delay=1.0)
    if not sys.stderr.isatty():
        how = dict(
            file=_Lines(),
            position=0,  # a bar in a bar would move the cursor of a terminal
            mininterval=LINE_EVERY,
            delay=LINE_EVERY,
            bar_format="{desc}{n_fmt} of {total_fmt} {unit}s, {elapsed}" + ", {rate_noinv_fmt}" * rate + "{postfix}",
        )
    return tqdm(
        items,
        # tqdm adds the colon itself in its own format only.
        desc=printable(title and f"{title}: ") or None,
        total=total,
        unit=unit,
        initial=done,
        disable=not shown,
        **how,
    )


class _Lines:
    """An output for tqdm that makes each of its refreshes a line, and equal ones in a row a single line."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        text = text.strip()
        if text and text != self._last:
            print(text, file=sys.stderr, flush=True)
            self._last = text

    def flush(self) -> None:
        sys.stderr.flush()


def _shown(character: str) -> str:
    hidden = unicodedata.category(character) in _ESCAPED
    return character.encode("unicode_escape").decode("ascii") if hidden else character
