"""Cases in a child process, so that one that crashes, hangs or breaks the device costs itself and not the run.

A case has sides (an implementation, the other library). The child writes one JSON line whenever it turns to a
side and whenever a case is done. When it dies, or is silent for too long, the side it was at is blamed; a new child
takes up the case without that side, and the cases after it.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# The child has caught an error after which its device does nothing more, an illegal address for example.
DEVICE_LOST = 3
NO_TIME = "no time left"


class DeviceLost(Exception):
    """Ends a child whose device answers no more."""


class Journal:
    """What a child has to say, line by line: it may be killed at any time."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def write(self, **event: Any) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()


def run_child(
    path: Path, cases: Iterable[str], without: Iterable[str], environment: Callable[[], dict], run_case: Callable
) -> None:
    """Runs cases one after another; the child's side of `run_isolated`.

    Args:
      without: sides to leave out, as CASE/SIDE.
      run_case: takes a case's name, the sides to leave out, and a function to call with a side's name before
        turning to it; returns the result. It raises `DeviceLost` where nothing more can run.
    """
    journal = Journal(path)
    journal.write(environment=environment())
    for case in cases:
        left_out = {side for entry in without for named, side in [entry.rsplit("/", 1)] if named == case}
        try:
            result = run_case(case, left_out, lambda side, case=case: journal.write(case=case, side=side))
        except DeviceLost as lost:
            journal.write(lost=str(lost))
            sys.exit(DEVICE_LOST)
        except Exception as error:  # of the case itself, inputs for example
            result = {"error": one_line(error)}
        journal.write(case=case, result=result)


def run_isolated(
    command: list[str],
    cases: list[str],
    path: Path,
    *,
    seconds: float,
    silence: float,
    each_alone: bool,
    done: Callable[[str, dict, dict], None],
) -> None:
    """Runs `command --child PATH --cases ... --without ...` until every case has a result.

    Args:
      path: the journal; written anew by each child.
      seconds: for all cases; what is not reached then has the error `NO_TIME`.
      silence: seconds without a new line after which a child is taken to hang.
      each_alone: one child per case, whose peak memory is then that case's.
      done: called with a case, its result and the child's environment, as soon as they are there.
        `result["failed"]` gives sides and why they have no figures, `result["error"]` why the whole case has none.
    """
    end = time.monotonic() + seconds
    waiting, blamed, environment, at = list(cases), {}, {}, None

    def finish(case: str, result: dict) -> None:
        waiting.remove(case)
        of_case = {side: reason for (blamed_case, side), reason in blamed.items() if blamed_case == case}
        done(case, result | {"failed": of_case | result.get("failed", {})}, environment)

    while waiting and time.monotonic() < end:
        batch = waiting[:1] if each_alone else waiting[:]
        path.write_text("")
        without = ["/".join(entry) for entry in blamed]
        child = subprocess.Popen(
            [*command, "--child", str(path), "--cases", *batch, "--without", *without], stdin=subprocess.DEVNULL
        )
        at, reason = None, None
        for event in _events(child, path, end, silence):
            environment = event.get("environment", environment)
            reason = event.get("lost", reason)
            if "side" in event:
                at = event["case"], event["side"]
            elif "result" in event:
                finish(event["case"], event["result"])
                at = None
        unfinished = [case for case in batch if case in waiting]
        if not unfinished or time.monotonic() >= end:
            continue
        if at is None or at in blamed:
            # It did not get as far as a side, or not without it: trying again would be the same.
            finish(unfinished[0], {"error": reason})
        else:
            blamed[at] = reason
    for case in waiting[:]:
        finish(case, {"error": NO_TIME} | ({"at": at[1]} if at and at[0] == case else {}))


def _events(child: subprocess.Popen, path: Path, end: float, silence: float) -> Iterator[dict]:
    """Yields what the child writes, and at its end why it ended, unless it said so itself."""
    heard, part, lost = time.monotonic(), "", None
    with path.open(encoding="utf-8") as journal:
        while True:
            ended = child.poll() is not None  # asked before reading: nothing comes after
            *lines, part = (part + journal.read()).split("\n")
            for line in lines:
                event = json.loads(line)
                lost = event.get("lost", lost)
                yield event
            now = time.monotonic()
            heard = now if lines else heard
            if ended:
                break
            if now >= end or now - heard > silence:
                child.kill()
                child.wait()
                lost = f"silent for {silence:.0f} s"
                break
            time.sleep(0.05)
    yield {"lost": lost or f"the process ended with status {child.returncode}"}


def one_line(error: BaseException) -> str:
    """Returns kind and first line of an error, short enough for a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
