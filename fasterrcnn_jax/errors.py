"""The errors that are meant for the person at the keyboard.

The scripts print their message without a traceback and exit with status 2; everything else is a defect
and keeps its traceback.
"""


class InputError(ValueError):
    """Something the user gave cannot be used; one sentence that names the file, the field and the value."""


class NonFiniteLossError(ArithmeticError):
    """Training diverged; one sentence that names the step, the loss and the images."""


def quoted(value: object) -> str:
    """Returns a value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."
