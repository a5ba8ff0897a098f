"""Results in order, ahead of the consumer: exceptions, positions, early stops and the number of items in work."""

import gc
import threading
import time

import pytest

from fasterrcnn_jax.data.read_ahead import ReadAhead

NUMBERS = range(100, 130)


def read(load=lambda number: number, *, threads=2, ahead=4):
    return ReadAhead(NUMBERS, load, threads=threads, ahead=ahead)


def test_results_come_in_the_order_of_the_items():
    def load(number):
        time.sleep(0.01 * (number % 3))
        return number

    assert list(read(load, threads=5)) == list(NUMBERS)


def test_an_exception_comes_in_the_place_of_its_item_and_again():
    def load(number):
        if number == 103:
            raise OSError("no item 103")
        return number

    results = read(load)
    assert [next(results) for _ in range(3)] == [100, 101, 102]
    for _ in range(2):
        with pytest.raises(OSError, match="no item 103"):
            next(results)
        assert results.get_state() == {"next_index": 3}


def test_the_position_is_a_number_and_can_be_set_in_the_middle():
    results = read()
    next(results)
    assert results.get_state() == {"next_index": 1}
    results.set_state({"next_index": 20})
    assert next(results) == 120
    assert list(results) == list(NUMBERS)[21:]


def held():
    """Returns results of one thread that are loaded with one permit each, one of them given, and the begun items."""
    permits, begun = threading.Semaphore(1), []

    def load(number):
        begun.append(number)
        assert permits.acquire(timeout=10)
        return number

    return read(load, threads=1), permits, begun


def test_a_new_position_cancels_the_items_that_no_thread_has_begun():
    results, permits, begun = held()
    assert next(results) == 100
    results.set_state({"next_index": 20})
    permits.release(10)
    assert next(results) == 120
    assert [number for number in begun if number < 120] in ([100], [100, 101])


def test_a_dropped_iterator_cancels_what_no_thread_has_begun():
    results, permits, begun = held()
    next(results)
    del results
    gc.collect()
    permits.release(10)
    time.sleep(0.5)
    assert begun in ([100], [100, 101])


def test_an_item_that_fails_once_is_loaded_again():
    failures = [OSError("once")]

    def load(number):
        if number == 103 and failures:
            raise failures.pop()
        return number

    results = read(load)
    found = [next(results) for _ in range(3)]
    with pytest.raises(OSError, match="once"):
        next(results)
    assert found + list(results) == list(NUMBERS)


def test_the_number_of_items_in_work_is_bounded():
    loaded = []

    def load(number):
        loaded.append(number)
        return number

    results = read(load, ahead=4)
    for consumed in range(1, 11):
        next(results)
        assert len(loaded) <= consumed + 4
    deadline = time.monotonic() + 10
    while len(loaded) < 14 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(loaded) == 10 + 4


@pytest.mark.parametrize("position", [-1, 31, True, 1.5, "2", None])
def test_what_is_no_position_is_refused(position):
    with pytest.raises((TypeError, ValueError), match="next_index must be"):
        read().set_state({"next_index": position})
    with pytest.raises(KeyError):
        read().set_state({})
