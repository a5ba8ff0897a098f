"""A first request to stop is only noted; a second one ends the process."""

import contextlib
import signal
import subprocess
import sys

import pytest

from fasterrcnn_jax.training import preemption


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_the_first_signal_is_noted_by_name(number):
    with preemption.noted_signals() as asked_to_stop:
        assert asked_to_stop() is None
        signal.raise_signal(number)
        assert asked_to_stop() == signal.Signals(number).name


def test_signals_sent_to_process_and_group_at_once_are_one_request():
    with preemption.noted_signals() as asked_to_stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert asked_to_stop() == "SIGTERM"


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_previous_signal_handlers_are_restored(fails):
    met = []
    before = [signal.signal(number, lambda number, _: met.append(number)) for number in preemption.SIGNALS]
    try:
        with contextlib.suppress(ZeroDivisionError), preemption.noted_signals():
            1 / (not fails)
        for number in preemption.SIGNALS:
            signal.raise_signal(number)
        assert met == list(preemption.SIGNALS)
    finally:
        for number, handler in zip(preemption.SIGNALS, before):
            signal.signal(number, handler)


def test_a_handler_not_set_from_python_is_replaced_by_the_default(monkeypatch):
    """For example the handler of a distributed runtime, which Python cannot restore."""
    installed = {}

    def install(number, handler):
        installed[number] = handler
        assert handler is not None

    monkeypatch.setattr(signal, "signal", install)
    with preemption.noted_signals():
        pass
    assert installed == dict.fromkeys(preemption.SIGNALS, signal.SIG_DFL)


PROGRAM = """
import runpy, signal, sys, time
module = runpy.run_path(sys.argv[1])
with module["noted_signals"]() as asked_to_stop:
    print(asked_to_stop(), flush=True)
    for _ in range(2):
        signal.raise_signal(getattr(signal, sys.argv[2]))
        print(asked_to_stop(), flush=True)
        time.sleep(1.1 * module["ONE_REQUEST"])
print("not reached")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_request_ends_the_process_at_once(name):
    done = subprocess.run([sys.executable, "-c", PROGRAM, preemption.__file__, name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-getattr(signal, name), "")
    assert done.stdout.split() == ["None", name]
