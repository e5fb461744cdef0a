"""Settings of malloc: whether a process keeps the memory that it frees."""

from __future__ import annotations

import ctypes
import sys

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
