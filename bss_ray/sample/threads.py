"""Work on parts of large arrays by all threads of this process.

NumPy releases Python's lock inside its loops, so threads over cache-sized parts use all cores.
"""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
    waiting: collections.deque[Future[Result]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="bss-ray-sample") as pool:
        try:
            for part in parts:
                waiting.append(pool.submit(work, part))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # the caller stopped early, or a part failed
            for future in waiting:
                future.cancel()


def _num_threads() -> int:
    """Torch is asked where it is there, and not imported: holders do without it."""
    if "torch" in sys.modules:
        return int(sys.modules["torch"].get_num_threads())
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
