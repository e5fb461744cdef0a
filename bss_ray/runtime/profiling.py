"""Torch profiles as Chrome traces: which step and which scoring pass is recorded, and where the driver writes them."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bss_ray.runtime.messages import Message, ProfileRecorded
from bss_ray.runtime.wait import WaitError, wait_for
from bss_ray.storage import StoragePath

STEP, SCORING = "step-rank0.json", "scoring.json"

# Number of operators in a summary.
_ROWS = 15


@contextlib.contextmanager
def recorded(file: str, post: Callable[[Message], object]) -> Iterator[None]:
    """Profile what is done inside, and post the profile unless that fails.

    Args:
        file: Name of the trace.
        post: Function that posts a message to the event log.
    """
    import ray  # a rank without a profile needs no object store

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        yield
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    summary = profiler.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=60)
    post(ProfileRecorded(file, ray.put(_chrome_trace(profiler)), summary))


def _chrome_trace(profiler: profile) -> bytes:
    with tempfile.TemporaryDirectory(prefix="bss_ray-") as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return path.read_bytes()


# Steps of an epoch before the profiled step, after which allocators, kernels and the loader are warm.
_WARM_UP = 10

_ABSENT = {
    STEP: "no step: the command trained none",
    SCORING: "no scoring pass: scoring.engine=online makes none (but see scoring.sweep_every), or no scores were due",
}


class Profiler:
    """Records one step and one scoring pass of a rank.

    Args:
        wanted: Whether anything is recorded.
        post: Function that posts a message to the event log.
    """

    def __init__(self, wanted: bool, post: Callable[[Message], object]) -> None:
        self._left = {STEP, SCORING} if wanted else set()
        self._post = post
        self._steps = 0

    def step(self, batch: int, batches: int, *, due: bool) -> contextlib.AbstractContextManager[None]:
        """Context of the training step of a batch.

        Args:
            batch: Number of the batch in its epoch.
            batches: Number of batches of the epoch.
            due: Whether steps of this epoch are profiled.
        """
        if STEP not in self._left or not due:
            return contextlib.nullcontext()
        self._steps += 1
        if self._steps <= _WARM_UP and batch + 1 < batches:
            return contextlib.nullcontext()
        self._left.remove(STEP)
        return recorded(STEP, self._post)

    def scoring(self) -> contextlib.AbstractContextManager[None]:
        """Context of a scoring pass of this rank."""
        return recorded(SCORING, self._post) if self.takes_scoring() else contextlib.nullcontext()

    def takes_scoring(self) -> bool:
        """Whether to profile this scoring pass; only one pass is profiled."""
        taken = SCORING in self._left
        self._left.discard(SCORING)
        return taken


class ProfileFolder:
    """Writes `profile/` of a run folder, in the driver.

    Args:
        run: Folder of the run.
    """

    def __init__(self, run: StoragePath) -> None:
        self._folder = run / "profile"
        self._began = time.time()
        self._summaries: dict[str, str] = {}

    def take(self, message: ProfileRecorded) -> str:
        """Write a trace that a process has recorded; returns a message to the user."""
        import ray

        file = message.file
        try:
            trace: bytes = wait_for(message.trace, f"the trace {file}")
        except (ray.exceptions.RayError, WaitError) as error:
            return f"Warning: profile/{file} is lost with the process that recorded it: {type(error).__name__}"
        self._write(file, trace.decode())
        self._summaries[file] = message.summary
        return f"wrote profile/{file}"

    def finish(self) -> None:
        """Write the timeline of the command's tasks and actors, and the summary."""
        import ray

        # Events of all jobs of the cluster, because events of workers do not name their job.
        events = [event for event in ray.timeline() if event["ts"] >= 1e6 * self._began]
        self._write("timeline.json", json.dumps(events))
        parts = [f"{file}\n\n{self._summaries.get(file, why)}\n" for file, why in _ABSENT.items()]
        self._write("summary.txt", "\n".join(parts))

    def _write(self, file: str, text: str) -> None:
        self._folder.mkdir()
        (self._folder / file).write_text(text)
