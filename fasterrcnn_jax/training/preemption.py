"""Ends a run that is asked to stop: between two steps, with a checkpoint of the last one.

Schedulers send SIGTERM and, after a grace period, SIGKILL; the keyboard sends SIGINT. The training loop notes the first
signal. A second signal ends the process at once, and the steps since the last checkpoint are lost. Outside the loop
there is nothing to save: while data is read, while the first step compiles, and after the last checkpoint of a stage,
a signal ends the process at once.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command continues the run.
EXIT_STATUS = 75


class Stopped(Exception):
    """A signal asked the run to stop, and its last step is saved; the message says where."""


SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST = 1.0  # seconds; GNU timeout and some schedulers send a signal to the process and to its group


@contextlib.contextmanager
def noted_signals() -> Iterator[Callable[[], str | None]]:
    """Notes SIGTERM and SIGINT while the context is open. In other threads than the main one, it notes nothing.

    Yields:
      A function that returns the name of the signal that asked this process to stop, or None before any signal.
    """
    noted: list[tuple[str, float]] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # only the main thread may handle signals
        return

    def note(number: int, frame: FrameType | None) -> None:
        if not noted:
            noted.append((signal.Signals(number).name, time.monotonic()))
        elif time.monotonic() - noted[0][1] > ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: noted[0][0] if noted else None
    finally:
        for number, handler in before.items():
            # None: the handler was not installed from Python, so Python cannot restore it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
