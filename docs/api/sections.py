"""Sections of our docstrings follow each other without an empty line, and Griffe wants one before each."""

import re

import griffe


class Sections(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            header = r"(?<=[^\n])\n(Args|Returns|Yields|Raises|Examples):\n"
            obj.docstring.value = re.sub(header, r"\n\n\1:\n", obj.docstring.value)
