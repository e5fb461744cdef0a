"""TensorBoard events of a run."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter

from bss_ray.storage import StoragePath


class Events:
    """Writes the metrics of epochs as TensorBoard events.

    A file of events is appended to, which an object store cannot do. So what is to lie there is written on this
    machine, and copied whole after each epoch: a file of a few kB for each command of the run.

    Args:
        folder: where they lie in the end.

    Raises:
        StorageError: on a copy that fails.
    """

    def __init__(self, folder: StoragePath) -> None:
        self._folder = folder
        self._here = None if folder.local is not None else tempfile.TemporaryDirectory(prefix="bss_ray-")
        self._writer = SummaryWriter(str(folder.local) if self._here is None else self._here.name)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write the finite metrics of an epoch."""
        for name, value in row.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        self._copy()

    def _copy(self) -> None:
        if self._here is None:
            return
        self._writer.flush()
        self._folder.mkdir()
        for path in Path(self._here.name).iterdir():
            (self._folder / path.name).write_bytes(path.read_bytes())

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if self._here is not None:
            with self._here:
                if error is None:  # else it would hide that error
                    self._copy()
