"""Makes text safe to print: names from files cannot steer a terminal, forge a line, or hide.

The names of files, classes, arrays and fields come from strangers. CWE-150 describes what control characters in them
can do to a terminal or a log.
"""

import unicodedata

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


def _shown(character: str) -> str:
    hidden = unicodedata.category(character) in _ESCAPED
    return character.encode("unicode_escape").decode("ascii") if hidden else character
