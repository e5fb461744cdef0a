"""One whole job of `bss-ray score`: measure missing rows, score all rows, write the folder."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import ray

from bss_ray.data.build import build_split
from bss_ray.data.columns import Columns
from bss_ray.data.shards import Feature
from bss_ray.data.sources import files_key, load_splits, parquet_paths
from bss_ray.errors import CheckpointError, DataError, Problem, StorageError
from bss_ray.measure.snapshot import pack_model
from bss_ray.runtime.messages import Notice, OnMessage, RowsProgress, ShardsProgress, Status
from bss_ray.runtime.wait import set_wait_limit, wait_for
from bss_ray.score.config import Job
from bss_ray.score.measure_files import find_measure_files, missing_rows
from bss_ray.score.measuring import kept_notice
from bss_ray.score.passes import MeasureFileReport, MeasurePass, measure_rows, score_rows
from bss_ray.score.pool import PoolSize
from bss_ray.score.read_tasks import ReadTask, known_features, parquet_tasks, shard_tasks
from bss_ray.score.summary import Summary
from bss_ray.storage import StoragePath
from bss_ray.storage.probe import check_storage
from bss_ray.train.folder import RunFolder
from bss_ray.train.run import roc_areas

SUMMARY_FILE = "summary.json"

# Most rows for the area under a ROC curve, which this process computes from all rows at once.
_MOST_ROC_ROWS = 1 << 23

# Shards for each actor on average, so that no actor waits long for the others at the end.
_SHARDS_PER_ACTOR = 4


@dataclass(frozen=True)
class Source:
    """The rows of a job.

    Attributes:
        tasks: What is read, in the order of the rows.
        features: Shape and dtype of the modalities.
        key: Name of the content.
    """

    tasks: Sequence[ReadTask]
    features: Mapping[str, Feature]
    key: str

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.tasks[-1].first_row + self.tasks[-1].rows


def score(job: Job, folder: RunFolder, on_message: OnMessage) -> dict[str, object]:
    """Score all rows, and write the folder. Ray must be running. A stopped job is resumed.

    Args:
        job: All settings, and the weights.
        folder: Folder that is claimed for these settings.
        on_message: Function that is called with each `Status`, `Notice`, `ShardsProgress` and `RowsProgress`.

    Returns:
        The content of `summary.json`.

    Raises:
        BssRayError: A setting, the weights, the data or the model is wrong; finished files stay.
        WaitError: There was no new result for `wait_limit_s`; finished files stay.
    """
    set_wait_limit(job.config.wait_limit_s)
    size = job.config.on_cluster()
    check_storage(folder.path)
    on_message(Status(f"looking at the {job.config.split} rows of {job.data}"))
    source = open_source(job, size, on_message)
    _claim_plan(folder.path / "plan.json", job, source)
    measures = folder.path / "measures"
    measures.mkdir()
    figures = _measure(job, source, measures, size, on_message)
    on_message(Status("scoring: second pass, over the measures"))
    summary, bounds = score_rows(job.measuring, measures, folder.path / "scores.parquet")
    areas = _roc_areas(job, folder.path, summary)
    result = {**_about(job), **figures, "bounds": bounds, **summary.to_json(), "score_roc_area": areas}
    folder.write_result(result)
    with contextlib.suppress(StorageError):  # the job is complete
        measures.remove()  # the scores have everything that is in them
    return result


def _about(job: Job) -> dict[str, object]:
    """The scored data and the weights, for the summary."""
    return {
        "data": job.data,
        "split": job.config.split,
        "checkpoint": job.weights.source,
        "weights": job.weights.digest,
        "normalise": job.config.normalise,
    }


def _roc_areas(job: Job, folder: StoragePath, summary: Summary) -> dict[str, float]:
    """Area under the ROC curve of the score for the rows that a boolean extra column marks."""
    if summary.bad_rows or summary.all_rows.rows > _MOST_ROC_ROWS:
        return {}
    path = folder / "scores.parquet"
    marks = tuple(name for name in job.columns.extra if _varies(path, name))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")  # columns are only read
        return roc_areas(path, marks)


def _varies(path: StoragePath, name: str) -> bool:
    """Whether a column is boolean and has both values."""
    with path.glob("*.parquet")[0].open_parquet() as part:
        if name not in part.schema_arrow.names:
            return False
    column = path.read_table([name])[name]
    return bool(pa.types.is_boolean(column.type)) and not column.null_count and len(column.unique()) == 2


def forget_beginning(path: StoragePath) -> None:
    """Remove the claim of a job that has failed before any row was measured, so that its name is free again."""
    measures = path / "measures"
    if find_measure_files(measures) or (path / SUMMARY_FILE).exists():
        return
    for name in ("measures", "plan.json", "config.yaml"):
        (path / name).remove()
    if not path.glob():  # otherwise the folder has files of others
        path.remove()


# ---- the rows -------------------------------------------------------------------------------------


def open_source(job: Job, size: PoolSize, on_message: OnMessage) -> Source:
    """The rows of the job: Parquet is read in place, other sources are made into shards first.

    Raises:
        DataError: The split does not exist, or its rows break a rule.
    """
    config, columns = job.config, job.columns
    path = parquet_paths(job.data)[config.split]
    if path is not None:
        tasks = parquet_tasks(path, columns)
        features = wait_for(_known_features.remote(tasks, columns), "a look at the rows")
        return Source(tasks, features, files_key(path) or "")
    dataset = load_splits(job.data, mispaired=config.mispaired or 0.0, seed=config.seed or 0)[config.split]
    if dataset is None:
        raise DataError(f"{job.data} has no split {config.split!r}. Choose another --split, or name its files: --data")
    on_message(Status(f"building shards of the {config.split} rows"))
    shards = build_split(
        config.split,
        dataset,
        columns,
        min_shards=_SHARDS_PER_ACTOR * size.max_actors,
        on_progress=lambda done, of: on_message(ShardsProgress(config.split, done, of)),
        on_notice=lambda text: on_message(Notice(text)),
    )
    return Source(shard_tasks(shards), shards.features, shards.fingerprint)


@ray.remote(name="bss_ray.look_at_rows")
def _known_features(tasks: Sequence[ReadTask], columns: Columns) -> dict[str, Feature]:
    """Runs as a task: the nodes that read the files list them, not the driver."""
    return known_features(tasks, columns)


def _claim_plan(path: StoragePath, job: Job, source: Source) -> None:
    """Write which rows and weights this job is about, or compare them with an earlier command's.

    Raises:
        CheckpointError: Rows or weights differ; the error names both values.
    """
    plan = {"rows": source.rows, "data": source.key, "weights": job.weights.digest}
    if not path.exists():
        path.write_text(json.dumps(plan))
        return
    try:
        there = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:  # no JSON, or something else than a plan
        raise CheckpointError(f"{path} is damaged ({error}). Choose another --name") from error
    changed = [f"{k}: {there.get(k)!r} there, {value!r} now" for k, value in plan.items() if there.get(k) != value]
    if changed:
        raise CheckpointError(
            f"{path.parent} holds measures of other rows or weights than these, although they have the same names; the "
            "two cannot be mixed.\n  " + "\n  ".join(changed) + "\nChoose another --name"
        )


# ---- first pass -----------------------------------------------------------------------------------


def _measure(job: Job, source: Source, folder: StoragePath, size: PoolSize, on_message: OnMessage) -> dict[str, object]:
    """Measure the rows that no measure file has; returns figures of the pass."""
    done = find_measure_files(folder)
    runs = missing_rows(done, source.rows)
    already = sum(file.rows for file in done)
    if already:
        text = f"{already} of {source.rows} rows are measured already"
        on_message(Notice(text))
    model = job.model(dict(source.features))  # also if no row is missing, because the weights must fit
    progress = _Progress(already, source.rows, on_message)
    if runs:
        snapshot = ray.put(pack_model(model))  # alive until all rows are measured
        settings = MeasurePass(job.measuring, source.features, folder, job.config.piece_rows)
        on_message(Status(f"measuring with {_actors(size)}"))
        for report in measure_rows(source.tasks, runs, snapshot, settings, size):
            progress.add(report)
    return progress.finish()


def _actors(size: PoolSize) -> str:
    bounds = f"{size.min_actors} to {size.max_actors}" if size.max_actors > size.min_actors else str(size.min_actors)
    return f"{bounds} actor{'' if bounds == '1' else 's'}, {size.cpus:g} CPU and {size.gpus:g} GPU each"


class _Progress:
    """Counts rows and time, and passes on each notice once."""

    def __init__(self, already: int, rows: int, on_message: OnMessage) -> None:
        self._already = self._done = already
        self._rows = rows
        self._on_message = on_message
        self._started = time.monotonic()
        self._warm: tuple[float, int] | None = None  # time of the first measure file, and rows done by then
        self._said: set[str] = set()
        self._bad: list[Problem] = []

    def add(self, report: MeasureFileReport) -> None:
        """Add a finished measure file."""
        self._done += report.file.rows
        self._warm = self._warm or (time.monotonic(), self._done)
        self._bad += report.bad
        for text in report.notices:
            if text not in self._said:
                self._on_message(Notice(text))
                self._said.add(text)
        self._on_message(RowsProgress(self._done, self._rows, self._speed))

    @property
    def _speed(self) -> float:
        """Rows a second of this command; without the start of its actors if there is more than one measure file."""
        since, before = self._started, self._already
        if self._warm is not None and self._warm[1] < self._done:
            since, before = self._warm
        return (self._done - before) / max(time.monotonic() - since, 1e-9)

    def finish(self) -> dict[str, object]:
        """Figures of the pass, and a notice of rows without measures."""
        if self._bad:
            self._on_message(Notice(kept_notice(self._bad)))
        seconds = time.monotonic() - self._started
        return {
            "measured_rows": self._done - self._already,
            "measured_earlier": self._already,
            "seconds": seconds,
            "rows_per_second": self._speed if self._done > self._already else None,
        }
