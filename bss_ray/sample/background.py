"""Work done ahead of a loop, in threads that end with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_END: Any = object()


def work_ahead(
    items: Iterator[Item], work: Callable[[Item], Result], *, ahead: int, threads: int
) -> Generator[Result, None, None]:
    """`work(item)` of every item, in their order, made in the background before the loop asks for it.

    The items are made in a thread of their own, one after the other: an item may wait (for a window of the
    order, say) while earlier ones are worked on. An exception there or in `work` reaches the loop in its
    turn, with its own traceback. When the loop ends, however it ends, so do the threads.

    Args:
        items: advanced in one thread only.
        work: called in several threads at a time.
        ahead: items that are begun and not yet asked for, at most. Who holds the last result adds to it.
        threads: that work at a time.
    """
    producer = ThreadPoolExecutor(1, "bss_ray-plan")
    workers = ThreadPoolExecutor(threads, "bss_ray-load")

    def run(item: Future[Any]) -> Any:
        made = item.result()
        return _END if made is _END else work(made)

    pending: deque[Future[Any]] = deque()
    try:
        while True:
            while len(pending) <= ahead:  # one of them is asked for now
                pending.append(workers.submit(run, producer.submit(next, items, _END)))
            result = pending.popleft().result()
            if result is _END:
                return
            yield result
            del result  # or it would stay alive until the next one is there
    finally:
        # Producer first: a worker may be waiting for an item, and a cancelled item ends that.
        for executor in (producer, workers):
            executor.shutdown(wait=True, cancel_futures=True)
