"""Runs cases in a child process, so that a case that crashes, hangs or breaks the device does not stop the others.

A case has sides, for example one of our implementations and the other library. The child writes one JSON line when it
starts a side, when it has new figures of a case, and when a case is done. If the child dies, or writes nothing for too
long, its current side has failed. A new child then continues with the same case without that side, and with the later
cases. If the time ends within a case, the figures that it had so far are its result.
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
    """Ends a child whose device does not answer any more."""


class Journal:
    """The lines that a child writes. It writes each line at once, because it may be killed at any time."""

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
      run_case: takes a case's name, the sides to leave out, a function to call with a side's name before
        turning to it, and a function to call with the figures so far; returns the result. It raises `DeviceLost`
        where nothing more can run.
    """
    journal = Journal(path)
    journal.write(environment=environment())
    for case in cases:
        left_out = {side for entry in without for named, side in [entry.rsplit("/", 1)] if named == case}
        try:
            result = run_case(
                case,
                left_out,
                lambda side, case=case: journal.write(case=case, side=side),
                lambda figures, case=case: journal.write(case=case, figures=figures),
            )
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
    kept: Callable[[str, dict, dict], None] = lambda *_: None,
) -> None:
    """Runs `command --child PATH --cases ... --without ...` until every case has a result.

    Args:
      path: the journal; written anew by each child.
      seconds: time limit for all cases; cases without a figure have the error `NO_TIME`, and a case that was
        under way has its figures so far and the entry `cut`.
      silence: seconds without a new line after which a child counts as hanging.
      each_alone: use one child per case, so that its peak memory belongs to that case.
      done: called with a case, its result and the child's environment, as soon as they are known.
        `result["failed"]` gives the reason for each side without times, `result["error"]` the reason if the whole case
        has none, and `result["cut"]` the reason if it ended early.
      kept: called in the same way with the figures that a case has so far.
    """
    end = time.monotonic() + seconds
    waiting, blamed, so_far, environment, at = list(cases), {}, {}, {}, None

    def with_failed(case: str, result: dict) -> dict:
        of_case = {side: reason for (blamed_case, side), reason in blamed.items() if blamed_case == case}
        return result | {"failed": of_case | result.get("failed", {})}

    def finish(case: str, result: dict) -> None:
        waiting.remove(case)
        done(case, with_failed(case, result), environment)

    def give_up(case: str, reason: str, side: str | None) -> None:
        ended = {"cut": reason} if case in so_far else {"error": reason}
        finish(case, so_far.get(case, {}) | ended | ({"at": side} if side else {}))

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
            elif "figures" in event:
                so_far[event["case"]] = event["figures"]
                kept(event["case"], with_failed(event["case"], event["figures"] | {"cut": NO_TIME}), environment)
        unfinished = [case for case in batch if case in waiting]
        if not unfinished or time.monotonic() >= end:
            continue
        if at is None or at in blamed:
            # It did not get as far as a side, or not without it: trying again would be the same.
            give_up(unfinished[0], reason, None)
        else:
            blamed[at] = reason
    for case in waiting[:]:
        give_up(case, NO_TIME, at[1] if at and at[0] == case else None)


def _events(child: subprocess.Popen, path: Path, end: float, silence: float) -> Iterator[dict]:
    """Yields the lines of the child, and at the end the reason why it ended, unless the child wrote it itself."""
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
    """Returns the type and the first line of an error, short enough for a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
