"""Runs a function on hostile inputs, each in a process of its own, and measures its time and its memory.

A test calls `check("module:function", inputs)`. One process imports the module and forks for each input, so that an
input that hangs, aborts or fills the memory ends only its own process.
"""

import importlib
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MAX_SECONDS = 10.0  # of processor time, so that other work on the machine does not count
MAX_WAIT = 90.0  # a process that waits for something is stopped after these seconds
MAX_MEGABYTES = 1000.0  # above the idle process
# A process that asks for more than this gets a MemoryError, so that the machine stays usable.
HARD_LIMIT = 6 * 2**30
STATM = Path("/proc/self/statm")


class Outcome(NamedTuple):
    ended: str  # "returned", "InputError: its message", "killed by signal 24" (too much processor time) or "stopped"
    seconds: float  # of processor time
    megabytes: float  # peak above the idle process


def outcomes(function: str, inputs: Sequence[Any]) -> list[Outcome]:
    """Returns what `function` ("module:function", of one argument) does with each input.

    Relative to the tests' folder and to the path of this process, as a test would import it.
    """
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-W", "ignore", __file__, function]
    environment = os.environ | {"PYTHONPATH": path}
    ran = subprocess.run(command, input=pickle.dumps(list(inputs)), stdout=subprocess.PIPE, env=environment, check=True)
    return [Outcome(*measured) for measured in pickle.loads(ran.stdout)]


def check(function: str, inputs: Sequence[Any]) -> list[str]:
    """Returns how `function` ended with each input: "returned" or the message of an InputError.

    Raises:
      AssertionError: an input took too much time or memory, or ended in any other way.
    """
    found = outcomes(function, inputs)
    assert len(found) == len(inputs)
    for given, outcome in zip(inputs, found, strict=True):
        fits = outcome.seconds < MAX_SECONDS and outcome.megabytes < MAX_MEGABYTES
        assert fits and outcome.ended.startswith(("returned", "InputError: ")), f"{str(given)[:200]}: {outcome}"
    return [outcome.ended.removeprefix("InputError: ") for outcome in found]


def _measured(function: Any, given: Any) -> Outcome:
    result, told = os.pipe()
    deadline = time.monotonic() + MAX_WAIT
    child = os.fork()
    if child == 0:
        os.close(result)
        os.dup2(2, 1)  # what the function prints is no result
        size, resident = (int(pages) * resource.getpagesize() for pages in STATM.read_text().split()[:2])
        os.write(told, f"{resident}\n".encode())
        resource.setrlimit(resource.RLIMIT_AS, (size + HARD_LIMIT, size + HARD_LIMIT))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(MAX_SECONDS), int(MAX_SECONDS) + 1))
        text = "returned"
        try:
            function(given)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        # What the function made is freed by now, which can fail too.
        os.write(told, text[:4000].encode(errors="replace"))
        os._exit(0)
    os.close(told)
    told, in_time = _read_to_end(result, deadline)
    os.close(result)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    idle, _, text = told.partition("\n")
    if os.WIFSIGNALED(status):
        text = f"killed by signal {os.WTERMSIG(status)}" if in_time else "stopped"
    return Outcome(text, usage.ru_utime + usage.ru_stime, (usage.ru_maxrss * 1024 - int(idle)) / 1e6)


def _read_to_end(pipe: int, deadline: float) -> tuple[str, bool]:
    """Returns the text and whether the process at the other end closed the pipe before the deadline."""
    text = b""
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(pipe, 2**16)
        if not part:
            return text.decode(), True
        text += part
    return text.decode(), False


def main() -> None:
    warnings.simplefilter("ignore")  # JAX warns of every fork; no backend runs here before it
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    results = [tuple(_measured(function, given)) for given in pickle.load(sys.stdin.buffer)]
    sys.stdout.buffer.write(pickle.dumps(results))


if __name__ == "__main__":
    main()
