"""How a process of a run works: in threads, ahead of its consumer, and with the memory that it has freed."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_KEPT_BYTES = 1 << 30
_HEAP_BYTES = 32 << 20  # the largest value that glibc accepts

# For processes that work in another thread than the first, as those of Ray Train and Ray Data do. In glibc threads
# have arenas of their own, which keep no freed memory, also after `keep_freed_memory`. With one arena for all threads
# there are no page faults (otherwise 16 a row of AV-Digits, a third to a half of a forward pass).
ONE_ARENA = {"env_vars": {"MALLOC_ARENA_MAX": "1"}}


def keep_freed_memory() -> None:
    """Make malloc keep up to 1 GiB of freed memory in this process, if the C library is glibc.

    Otherwise malloc returns large arrays to the system, and requests them again in every batch. Page faults alone then
    make forward passes of convolutions on a CPU take more than twice as long (2,048 rows of AV-Digits: 89,000 faults
    and 0.22 s without this setting, none and 0.10 s with it).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has no mallopt
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, _HEAP_BYTES)


Part = TypeVar("Part")
Result = TypeVar("Result")


def in_threads(work: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[Result]:
    """`map(work, parts)` by as many threads as torch uses, or would use (`torch.set_num_threads`, `OMP_NUM_THREADS`).

    Results come in the order of `parts`, and only a few of them wait at a time.
    """
    threads = _num_threads()
    if threads == 1:
        yield from map(work, parts)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="bss-ray-sample") as pool:
        try:
            for part in parts:
                waiting.append(pool.submit(work, part))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after the caller stopped early, or a part failed
            for future in waiting:
                future.cancel()


def _num_threads() -> int:
    """Torch's number of threads if torch is imported already; it is not imported for this: holders do without."""
    if "torch" in sys.modules:
        return int(sys.modules["torch"].get_num_threads())
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


Item = TypeVar("Item")
Made = TypeVar("Made")


def work_ahead(
    items: Iterator[Item], work: Callable[[Item], Made], *, ahead: int, threads: int
) -> Generator[Made, None, None]:
    """`work(item)` of every item in their order, computed in the background before the loop requests it.

    A separate thread takes the items one after the other: an item may wait (e.g. for a window of the order)
    while earlier items are worked on. An exception there or in `work` reaches the loop in its turn, with its
    own traceback. The threads end with the loop, however it ends.

    Args:
        items: Iterator that is advanced in one thread only.
        work: Function that is called in several threads at a time.
        ahead: Largest number of items that are begun and not yet asked for; the last result, which the loop holds,
            is not one of them.
        threads: Number of threads that work at a time.
    """
    producer = ThreadPoolExecutor(1, "bss_ray-plan")
    workers = ThreadPoolExecutor(threads, "bss_ray-load")

    # Lists of one item, or empty lists at the end.
    def take() -> list[Item]:
        return list(itertools.islice(items, 1))

    def run(taken: Future[list[Item]]) -> list[Made]:
        return [work(item) for item in taken.result()]

    pending: deque[Future[list[Made]]] = deque()
    try:
        while True:
            while len(pending) <= ahead:  # one of them is requested now
                pending.append(workers.submit(run, producer.submit(take)))
            made = pending.popleft().result()
            if not made:
                return
            yield made.pop()  # a reference here would keep it alive until the next result exists
    finally:
        # The producer first: a worker may wait for an item, and a cancelled item ends this wait.
        for executor in (producer, workers):
            executor.shutdown(wait=True, cancel_futures=True)
