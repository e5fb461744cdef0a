"""Torch profiles as Chrome traces, from whichever process works, by way of the board."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from torch.profiler import ProfilerActivity, profile

STEP, SCORING = "step-rank0.json", "scoring.json"

# Operators that a summary names.
_ROWS = 15

Post = Callable[[dict[str, Any]], object]


@contextlib.contextmanager
def recorded(file: str, post: Post) -> Iterator[None]:
    """Profile what is done inside, and put it on the board unless that fails.

    The message is `{"kind": "profile", "file", "trace": [reference to bytes], "summary"}`: a trace may have many
    megabytes, so it stays in the object store until the driver takes it.

    Args:
        file: name of the trace.
        post: puts a message on the board.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        yield
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    summary = profiler.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=60)
    post({"kind": "profile", "file": file, "trace": [ray.put(_chrome_trace(profiler))], "summary": summary})


def _chrome_trace(profiler: profile) -> bytes:
    with tempfile.TemporaryDirectory(prefix="bss_ray-") as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return path.read_bytes()
