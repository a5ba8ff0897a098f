"""TensorBoard events, written in the calling thread.

The usual writer of tensorboardX has a thread of its own. When the disk is full, that thread ends and the next call
blocks for ever. Written here, the error arrives where it can be handled.
"""

import contextlib
import logging
import time
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter

# protobuf makes the classes when the module is imported.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 10.0


class TensorBoard:
    """Writes scalars and images into one event file of a run folder.

    The events are a convenience beside metrics.jsonl: when they cannot be written, one warning is logged and the run
    goes on without them.
    """

    def __init__(self, run: Path, *, purge_step: int):
        """Opens a new event file.

        Args:
          purge_step: TensorBoard drops older events from this step on: an interrupted run makes these steps again.
        """
        self._run, self._writer, self._flushed = run, None, time.monotonic()
        try:
            self._writer = EventsWriter(str(run / "events"))
        except OSError as error:
            self._give_up(error)
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._write(Event(step=step, summary=summary.scalar(name, value)))

    def add_image(self, name: str, pixels: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        self._write(Event(step=step, summary=summary.image(name, pixels, dataformats="HWC")))

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)
            self._writer = None

    def _write(self, event: Event) -> None:
        if self._writer is None:
            return
        event.wall_time = time.time()
        try:
            self._writer.write_event(event)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()
        reason = error.strerror or error
        logger.warning("%s: TensorBoard events cannot be written (%s); the run goes on without them", self._run, reason)
