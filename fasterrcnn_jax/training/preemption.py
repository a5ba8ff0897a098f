"""A run that is asked to stop ends between two steps, with a checkpoint of the last one.

Schedulers send SIGTERM and, after a grace period, SIGKILL; a keyboard sends SIGINT. The first signal is
noted and no more; another one ends the process at once, which costs the steps since the last checkpoint.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

# EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command continues the run.
EXIT_STATUS = 75

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST = 1.0  # seconds; GNU timeout and some schedulers send a signal to the process and to its group


@contextlib.contextmanager
def noted_signals() -> Iterator[Callable[[], str | None]]:
    """Notes SIGTERM and SIGINT meanwhile; in the main thread only.

    Yields:
      A function that returns the name of the signal that asked this process to stop, None until then.
    """
    noted: list[tuple[str, float]] = []

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
            # None: set by other than Python code, which cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
