"""Errors whose message is written for the user.

The scripts print the message of these errors without a traceback and exit with status 2. Any other exception is a
defect and keeps its traceback.
"""

from fasterrcnn_jax.printing import printable


class InputError(ValueError):
    """An input of the user cannot be used; the message is one sentence with the file, the field and the value.

    The message is printable: it holds no control character of a name in it.
    """

    def __init__(self, message: object):
        super().__init__(printable(message))


class NonFiniteLossError(ArithmeticError):
    """Training diverged; the message is one printable sentence with the step, the loss and the images."""

    def __init__(self, message: object):
        super().__init__(printable(message))


def quoted(value: object) -> str:
    """Returns the `repr` of a value for a message, cut after 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."
