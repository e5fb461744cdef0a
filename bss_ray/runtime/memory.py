"""Settings of malloc: whether a process keeps the memory that it frees."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_KEPT_BYTES = 1 << 30
_HEAP_BYTES = 32 << 20  # the largest that glibc takes

# For processes whose work is done in another thread than the first, as Ray Train's and Ray Data's is. Threads have
# arenas of their own in glibc, which keep no freed memory, whatever `keep_freed_memory` says; with one arena for all
# there are no page faults (16 a row of AV-Digits, a third to a half of a forward pass).
ONE_ARENA = {"env_vars": {"MALLOC_ARENA_MAX": "1"}}


def keep_freed_memory() -> None:
    """Have malloc keep up to 1 GiB of freed memory in this process, where the C library is glibc.

    It would give large arrays back to the system, and ask for them again in every batch: forward passes of
    convolutions on a CPU then take more than twice as long, for page faults alone (2,048 rows of AV-Digits: 89,000
    faults and 0.22 s without, none and 0.10 s with).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, _HEAP_BYTES)
