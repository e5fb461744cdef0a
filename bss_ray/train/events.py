"""TensorBoard events of a run."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from bss_ray.storage import StoragePath


class Events:
    """Writes the metrics of epochs as TensorBoard events, each epoch at once.

    Not by a `SummaryWriter`: it writes in a thread, and its `flush` does not wait for that.

    A file of events is appended to, which an object store cannot do. So what is to lie there is written on this
    machine, and copied whole after each epoch: a file of a few kB for each command of the run.

    Args:
        folder: where they lie in the end.

    Raises:
        StorageError: on a copy that fails.
    """

    def __init__(self, folder: StoragePath) -> None:
        self._folder = folder
        folder.mkdir()
        self._here = None if folder.local is not None else tempfile.TemporaryDirectory(prefix="bss_ray-")
        self._writer = EventsWriter(f"{folder.local if self._here is None else self._here.name}/events")

    def add(self, row: Mapping[str, Any]) -> None:
        """Write the finite metrics of an epoch."""
        event = Event(wall_time=time.time(), step=row["epoch"])
        for name, value in row.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                event.summary.MergeFrom(scalar(name.replace("_", "/", 1), value))
        self._writer.write_event(event)
        self._writer.flush()
        self._copy()

    def _copy(self) -> None:
        if self._here is not None:
            for path in Path(self._here.name).iterdir():
                (self._folder / path.name).write_bytes(path.read_bytes())

    def __enter__(self) -> Events:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._writer.close()
        if self._here is not None:
            with self._here:
                if error is None:  # else it would hide that error
                    self._copy()
