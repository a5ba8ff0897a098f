"""Starts train.py in child processes that can be killed. They are forked from a process that has imported everything.

    with Launcher(environment) as launcher:
        run = launcher.start(["--config", ...], log=path)
        launcher.status(run)  # None while it runs
        launcher.wait(run)

Importing takes seconds, and a kill test starts many runs. JAX is not initialised before the fork.
"""

import functools
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Launcher:
    def __init__(self, **environment):
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._statuses = {}

    def _ask(self, **question):
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, argv, *, log, threads=2, file_limit=None, plain_user=False, signal_at=None):
        """Returns the process id of `train.py argv`, whose output goes to the file `log`.

        Args:
          threads: threads of the loader.
          file_limit: largest size of a file in bytes; imitates a full disk.
          plain_user: file permissions bind the process even if it runs as root.
          signal_at: (MODULE:FUNCTION, call, signal): the process gets the signal when that call of the function begins.
        """
        argv = [str(argument) for argument in argv]
        options = dict(threads=threads, file_limit=file_limit, plain_user=plain_user, signal_at=signal_at)
        return self._ask(argv=argv, log=str(log), **options)

    def status(self, pid):
        """Returns the exit status, negative for the signal that ended it, or None while it runs."""
        if pid not in self._statuses:
            status = self._ask(pid=pid)
            if status is None:
                return None
            self._statuses[pid] = status
        return self._statuses[pid]

    def wait(self, pid, *, seconds=120):
        deadline = time.monotonic() + seconds
        while (status := self.status(pid)) is None:
            assert time.monotonic() < deadline, f"process {pid} does not end"
            time.sleep(0.002)
        return status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def drop_capabilities():
    """Drops the Linux capabilities of root, so that file permissions bind the process. The user id stays."""
    import ctypes

    words = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(words, nothing) == 0


def send_signal_at(place, call, number):
    module, _, name = place.partition(":")
    *outer, last = name.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    function, calls = getattr(owner, last), itertools.count(1)

    @functools.wraps(function)
    def signalling(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(owner, last, signalling)


def serve():
    from fasterrcnn_jax.data import loader
    from fasterrcnn_jax.scripts import cli, train

    for line in sys.stdin:
        question = json.loads(line)
        if "pid" in question:
            pid, status = os.waitpid(question["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                break
        print(json.dumps(answer), flush=True)
    else:
        return

    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    loader.THREADS = question["threads"]
    if question["file_limit"] is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (question["file_limit"],) * 2)
    if question["plain_user"] and os.geteuid() == 0:
        drop_capabilities()
    # A shell that starts the tests in the background lets them, and so their children, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if question["signal_at"] is not None:
        send_signal_at(*question["signal_at"])
    cli.run_as_program(functools.partial(train.main, question["argv"]))


if __name__ == "__main__":
    serve()
