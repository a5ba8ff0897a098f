"""Calls a function on the items of a sequence in threads, ahead of the consumer, and returns the results in order."""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from fasterrcnn_jax.errors import quoted

Item = TypeVar("Item")
ItemOf = TypeVar("ItemOf", covariant=True)
Result = TypeVar("Result")


@runtime_checkable
class Items(Protocol[ItemOf]):
    """What `ReadAhead` needs of a sequence: a length, and items by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ItemOf: ...


def in_threads(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[tuple[Item, Result]]:
    """Yields each item with the result of `function`, in order; at most `ahead` + 1 items are in work at a time.

    An exception of `function` is raised in the place of its result. After it, or if the caller stops early, the items
    that no thread has begun are cancelled.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


class ReadAhead(Iterator[Result], Generic[Item, Result]):
    """Iterates over `load(item)` for every item of `source`, and can tell and set its position.

    At most `ahead` + 1 items are in work at a time. If `load` raises an exception, the `next` that asks for the item
    raises it, and the position stays: another `next` loads the item again. Only one thread may call `next`.
    """

    def __init__(self, source: Items[Item], load: Callable[[Item], Result], *, threads: int, ahead: int):
        self._length, self._ahead, self._next = len(source), ahead, 0
        # Not a method: the threads would keep the iterator alive.
        self._load = functools.partial(_load, source, load)
        self._results: Iterator[tuple[int, Result]] | None = None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")

    def __next__(self) -> Result:
        if self._results is None:
            self._results = in_threads(self._pool, self._load, range(self._next, self._length), self._ahead)
        try:
            _, result = next(self._results)
        except StopIteration:
            raise
        except BaseException:
            self._results = None  # the next call tries the same item again
            raise
        self._next += 1
        return result

    def get_state(self) -> dict[str, Any]:
        """Returns the position, which JSON can hold: the number of the item that is next."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position that `get_state` returned, in this process or another one.

        Raises:
          KeyError, TypeError, ValueError: it is no position in the source.
        """
        position = state["next_index"]
        if type(position) is not int:  # True is an int too
            raise TypeError(f"next_index must be an integer, got {quoted(position)}")
        if not 0 <= position <= self._length:
            raise ValueError(f"next_index must be from 0 to {self._length}, got {position}")
        self._next, self._results = position, None


def _load(source: Items[Item], load: Callable[[Item], Result], index: int) -> Result:
    return load(source[index])
