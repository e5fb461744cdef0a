"""The run folder: the files of a run next to Ray Train's checkpoints, all of them readable by people.

config.yaml      resolved configuration; the same command with the same configuration resumes the run
metrics.csv      a line per epoch
tensorboard/     the same figures as events
scores.parquet/  final scores: row_id, similarity, information, score, label, id and extra columns
result.json      the chosen epoch and its test metrics; written last: the run is complete
report.html      figures, if plotly is installed
"""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from bss_ray.errors import CheckpointError, ConfigError, StorageError
from bss_ray.names import PLACES
from bss_ray.runtime.messages import Metrics
from bss_ray.storage import StoragePath, absolute


class Events:
    """Writes the metrics of epochs as TensorBoard events, each epoch at once.

    It uses no `SummaryWriter`, which writes in a thread for which its `flush` does not wait.

    A file of events is appended to, which an object store cannot do. For an object store it is written on this
    machine and copied as a whole after each epoch: a file of a few kB for each command of the run.

    Args:
        folder: Final folder of the events.

    Raises:
        StorageError: A copy fails.
    """

    def __init__(self, folder: StoragePath) -> None:
        self._folder = folder
        folder.mkdir()
        self._here = None if folder.local is not None else tempfile.TemporaryDirectory(prefix="bss_ray-")
        self._writer: EventsWriter | None = None  # from the first epoch: a run that fails earlier leaves no file

    def add(self, row: Metrics) -> None:
        """Write the finite metrics of an epoch."""
        event = Event(wall_time=time.time(), step=row["epoch"])
        for name, value in row.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                event.summary.MergeFrom(scalar(name.replace("_", "/", 1), value))
        if self._writer is None:
            self._writer = EventsWriter(f"{self._folder.local if self._here is None else self._here.name}/events")
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
        if self._writer is not None:
            self._writer.close()
        if self._here is not None:
            with self._here:
                if error is None:  # otherwise it would hide that error
                    self._copy()


# Settings that may differ between two commands of one training run: where it runs and how it is shown, not what is
# computed. Another number of ranks changes only the rounding of gradients.
_MAY_CHANGE = frozenset(
    {
        "num_workers",
        "use_gpu",
        "placement",
        "max_failures",
        "max_preemptions",
        "wait_limit_s",
        "store",
        "log_format",
        "profile",
        "verbose",
        "ray_address",
    }
)


class RunFolder:
    """Writes and reads a run folder.

    Args:
        storage_path: Folder of all runs, on a file system that all nodes share, or a URI (see `bss_ray.storage`).
        name: Name of the run.
        may_change: Settings that may differ between two commands of one run.
        result_file: Name of the file that is written last.

    Raises:
        StorageError: The folder cannot be made or written.
        ConfigError: The kind of the URI is unknown, or the name is no folder name.
    """

    def __init__(
        self,
        storage_path: str,
        name: str,
        *,
        may_change: Collection[str] = _MAY_CHANGE,
        result_file: str = "result.json",
    ) -> None:
        self._may_change = may_change
        self._result_file = result_file
        if not name or name in (".", "..") or "/" in name:
            raise ConfigError(f"name must be the name of one folder; received {name!r}")
        self.storage_path = StoragePath.of(storage_path)
        self.path = self.storage_path / name
        try:
            self.path.check_writable()
        except StorageError as error:
            raise StorageError(f"the run folder {error}. It is in --storage_path") from error

    @property
    def local(self) -> Path:
        """The folder of a run that is never on an object store."""
        path = self.path.local
        assert path is not None, "its configuration refuses URIs"
        return path

    # ---- configuration ------------------------------------------------------------------------

    def claim(self, config: str) -> bool:
        """Write the resolved configuration, or compare it with the existing one.

        Args:
            config: All settings as YAML.

        Returns:
            Whether the folder already holds this run.

        Raises:
            ConfigError: The folder holds a run of another configuration; the error names the settings and both values.
        """
        path = self.path / "config.yaml"
        if not path.exists():
            path.write_text(config)
            return False
        there, here = _flatten(_parse(path)), _flatten(yaml.safe_load(config))
        changed = [
            f"{key}: {there.get(key)!r} there, {here.get(key)!r} now"
            for key in sorted({*there, *here})
            if key.split(".")[0] not in self._may_change and not _same(key, there.get(key), here.get(key))
        ]
        if changed:
            raise ConfigError(
                f"{self.path} holds a run of another configuration; a run is resumed only with its own settings.\n  "
                + "\n  ".join(changed)
                + "\nChoose another --name, or give the run's settings again: --config "
                + (str(path) if path.local is not None else f"with a copy of {path}")
            )
        return True

    def release(self) -> None:
        """Free the name of a run that has failed before its first checkpoint for a run with other settings."""
        if not self.path.glob("checkpoint_*"):
            (self.path / "config.yaml").remove()

    # ---- metrics ------------------------------------------------------------------------------

    def write_metrics(self, history: Sequence[Metrics]) -> None:
        """Write all epochs to `metrics.csv` again, so that it always agrees with the checkpoints."""
        names = list(dict.fromkeys(name for row in history for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(history)
        self.write_text("metrics.csv", text.getvalue())

    # ---- result -------------------------------------------------------------------------------

    def result(self) -> dict[str, Any] | None:
        """The result of a complete run; None if the run is not complete."""
        path = self.path / self._result_file
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path} is damaged ({error}). Remove it and give the same command again") from error

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the folder completely or not at all."""
        (self.path / name).write_text(text)

    def write_result(self, result: Mapping[str, object]) -> None:
        """Mark the run as complete."""
        self.write_text(self._result_file, json.dumps(result, indent=1))


def _parse(path: StoragePath) -> dict[str, object]:
    try:
        return dict(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}). Restore it, or choose another --name") from error


def _same(name: str, there: object, here: object) -> bool:
    """Whether two values of a setting are one; a path may be relative in one of them."""
    if name.removeprefix("train.") in PLACES and isinstance(there, str) and isinstance(here, str):
        return absolute(there) == absolute(here)
    return there == here


def _flatten(tree: object, prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted name."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
