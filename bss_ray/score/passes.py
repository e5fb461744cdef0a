"""The two passes of a job: measure the rows into files; then norms over all rows, scores, and a summary."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from bss_ray.data.shards import Feature
from bss_ray.errors import CheckpointError, DataError, ModelOutputError, Problem, raise_first_problem
from bss_ray.measure.normalise import MinMaxNorm
from bss_ray.measure.score import ScoreRule
from bss_ray.runtime.wait import iterate_with_timeout, wait_for
from bss_ray.score.measure_files import (
    MeasureFile,
    clear_marks,
    cut_runs,
    find_measure_files,
    group_measure_files,
    marked,
    read_measure_file,
    runs_within,
    write_measure_file,
)
from bss_ray.score.measuring import (
    Look,
    Measuring,
    Norms,
    RowMeasurer,
    bad_outputs,
    prepare_actor,
    snapshot_of,
    with_row_ids,
    with_scores,
)
from bss_ray.score.pool import PoolSize, settings_of
from bss_ray.score.read_tasks import Arrays, ReadTask, Runs
from bss_ray.score.summary import Summary
from bss_ray.storage import StoragePath


@dataclass(frozen=True)
class MeasurePass:
    """Settings for all processes of the measure pass.

    Attributes:
        measuring: How rows are measured.
        features: Shape and dtype of the modalities.
        folder: Folder of the measure files, to which all nodes can write.
        file_rows: Largest number of rows of a measure file.
    """

    measuring: Measuring
    features: Mapping[str, Feature]
    folder: StoragePath
    file_rows: int


class MeasureFileReport(NamedTuple):
    """Report on a measure file that is on the disk.

    Attributes:
        file: The measure file.
        bad: Problems of rows without measures.
        notices: Messages to the user.
    """

    file: MeasureFile
    bad: list[Problem]
    notices: list[str]


# A read task and the runs of its rows that are measured.
Work = Sequence[tuple[ReadTask, Runs]]


def measure_rows(
    tasks: Sequence[ReadTask], runs: Runs, snapshot: ray.ObjectRef, settings: MeasurePass, size: PoolSize
) -> Iterator[MeasureFileReport]:
    """Measure the rows of `runs`; yields a report for each measure file as soon as it is written.

    Args:
        tasks: All read tasks of the data.
        runs: Ascending runs of row ids to measure.
        snapshot: Reference to the model's snapshot.
        settings: What is done with the rows.
        size: Number and resources of the actors.

    Raises:
        BssRayError: Rows break a rule; finished files stay.
    """
    pairs = [(task, runs_within(runs, task.first_row, task.first_row + task.rows)) for task in tasks]
    work = [pair for pair in pairs if pair[1]]
    if not work:
        return
    clear_marks(settings.folder)
    # Blocks hold numbers of read tasks: references to shards may be sent with a function, but not in blocks.
    dataset = ray.data.range(len(work), override_num_blocks=len(work))
    dataset = dataset.map_batches(
        _read, batch_size=None, batch_format="numpy", fn_args=(ray.put(work), settings), num_cpus=1
    )
    dataset = dataset.map_batches(
        _MeasureRows, batch_size=None, batch_format="numpy", fn_constructor_args=(snapshot, settings), **size.options
    )
    with settings_of(dataset):
        for table in iterate_with_timeout(_tables_of(dataset), "the next rows to be measured"):
            yield from map(pickle.loads, table["report"].to_pylist())


def _tables_of(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """The tables as a generator, because the call itself waits for the first table."""
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _read(batch: Arrays, work: ray.ObjectRef, settings: MeasurePass) -> Iterator[Arrays]:
    """The rows of read tasks with their `row_id`, in parts.

    Raises:
        DataError: Rows break a rule.
    """
    measuring, tasks = settings.measuring, cast(Work, ray.get(work))
    finite = measuring.forward.bad_rows == "error"
    for number in batch["id"]:
        task, runs = tasks[number]
        for first_row, rows in task.read(measuring.columns, settings.features, runs, finite=finite):
            raise_first_problem(rows.problems, DataError)
            count = len(next(iter(rows.arrays.values())))
            yield {"row_id": np.arange(first_row, first_row + count), **rows.arrays}


class _MeasureRows:
    """The actor."""

    def __init__(self, snapshot: ray.ObjectRef, settings: MeasurePass) -> None:
        self._settings = settings
        self._measurer = RowMeasurer(snapshot_of(snapshot), settings.measuring, prepare_actor())

    def __call__(self, batch: Arrays) -> Iterator[pa.Table]:
        """Measure rows, and write a file for each group of consecutive rows.

        After the death of an actor Ray Data gives its rows to another: rows in finished files are not measured again.
        """
        folder = self._settings.folder
        row_ids = batch.pop("row_id", np.empty(0, np.int64))
        for rows, file in cut_runs(row_ids, self._settings.file_rows):
            if (folder / file.name).exists():
                report = MeasureFileReport(file, bad_outputs(read_measure_file(folder, file), file.first_row), [])
            else:
                with marked(folder, file):
                    report = self._measure({name: values[rows] for name, values in batch.items()}, file)
            yield pa.table({"report": pa.array([pickle.dumps(report)], pa.binary())})

    def _measure(self, arrays: Arrays, file: MeasureFile) -> MeasureFileReport:
        """Measure and write one measure file.

        Raises:
            DataError: Labels do not fit the model.
            ModelOutputError: Outputs are not finite, and the settings make this an error.
        """
        found = self._measurer.measure(arrays, file.first_row)
        if found.table is None:
            raise_first_problem(found.problems, DataError)
        if self._settings.measuring.forward.bad_rows == "error":
            raise_first_problem(found.problems, ModelOutputError)
        assert found.table is not None
        write_measure_file(self._settings.folder, file, with_row_ids(found.table, file.first_row))
        return MeasureFileReport(file, found.problems, found.notices)


# ---- the normalise pass -------------------------------------------------------------------------


# Smallest number of rows of a file of scores.
_PART_ROWS = 1 << 20


class Scored(NamedTuple):
    """Result of the normalise pass.

    Attributes:
        summary: Summary of the scores.
        bounds: Smallest and largest value of each measure, if the normalisation uses them.
    """

    summary: Summary
    bounds: dict[str, list[float]] | None


def score_rows(measuring: Measuring, measures: StoragePath, path: StoragePath) -> Scored:
    """Write the scores of all measured rows into a folder of Parquet files, which replaces an older folder.

    Args:
        measuring: How rows are measured and scored.
        measures: Folder of the measure files.
        path: Folder of the scores.

    Raises:
        CheckpointError: A measure file is damaged.
        DataError: Rows have fewer than two modalities, and the settings make this an error.
        ModelOutputError: Files of an earlier command have bad rows, and the settings now make this an error.
    """
    groups = group_measure_files(find_measure_files(measures), _PART_ROWS)
    if not groups:
        raise CheckpointError(f"{measures} holds no measures. Give the same command again")
    looking = [_look.remote(measures, group, measuring.rule) for group in groups]
    look = Look.union([wait_for(one, "a look at the next measures") for one in looking])
    look.check(measuring.forward.bad_rows)
    norms = Norms.union(look.norms)
    shared = ray.put(norms)
    with path.replaced() as folder:
        writing = [
            _write_part.remote(measures, group, shared, measuring, folder / f"part-{index:05d}.parquet")
            for index, group in enumerate(groups)
        ]
        parts = [wait_for(part, "the next part of the scores") for part in writing]
    return Scored(Summary.union(parts), _bounds(norms))


@ray.remote(name="bss_ray.look_at_measures")
def _look(measures: StoragePath, group: Sequence[MeasureFile], rule: ScoreRule) -> Look:
    """Norms of some measure files, and rows that may be an error."""
    look = Look()
    for file in group:
        look.add(read_measure_file(measures, file), file.first_row, rule)
    return look.joined()


@ray.remote(name="bss_ray.write_scores")
def _write_part(
    measures: StoragePath, group: Sequence[MeasureFile], norms: Norms, measuring: Measuring, path: StoragePath
) -> Summary:
    """Write the scores of some measure files into one file; returns their summary."""
    table = pa.concat_tables([read_measure_file(measures, file) for file in group], promote_options="permissive")
    table = with_scores(table, norms, measuring.rule.unpaired)
    path.write(lambda stream: pq.write_table(table, stream))
    return Summary.of(table, measuring.columns)


def _bounds(norms: Norms) -> dict[str, list[float]] | None:
    """Smallest and largest measure, if the normalisation uses them."""
    if not isinstance(norms.similarity, MinMaxNorm) or not isinstance(norms.information, MinMaxNorm):
        return None
    both = {"similarity": norms.similarity, "information": norms.information}
    return {name: [norm.low, norm.high] for name, norm in both.items() if norm.low <= norm.high}
