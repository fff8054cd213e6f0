"""Many pictures at once by threads, and batches that are made while the last one is still in use."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Threads that read and decode: one for each core that this process may use, up to 8. Pillow releases the GIL.
WORKERS = min(8, len(os.sched_getaffinity(0)))


def in_threads(function: Callable[[T], R], items: Sequence[T], *, alone: bool = False) -> list[R]:
    """`function` of every item, in order, by `WORKERS` threads that end with the call, or without them if `alone`."""
    if alone or WORKERS < 2 or len(items) < 2:
        return list(map(function, items))
    with ThreadPoolExecutor(min(WORKERS, len(items))) as pool:
        return list(pool.map(function, items))


class Ahead(Generic[T]):
    """`make` of one number after another, while a thread makes the next two of them.

        with Ahead(make) as load:
            for step in range(start, end):
                batch = load(step)

    `make` must be a pure function of the number, so that it does not matter when it is called. Numbers may be skipped
    and asked for again. An error of `make` is raised where its number is asked for.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._pending: dict[int, Future[T]] = {}

    def __enter__(self) -> "Ahead[T]":
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches ahead")
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, number: int) -> T:
        """`make(number)`."""
        # Forget what was skipped, ask for what comes next.
        needed = range(number, number + 3)
        for other in self._pending.keys() - needed:
            self._pending.pop(other).cancel()
        for each in needed:
            if each not in self._pending:
                self._pending[each] = self._pool.submit(self._make, each)
        return self._pending.pop(number).result()
