"""The two passes of a job: measure the rows into files; then norms over all rows, scores, and a summary."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from bss_ray.data.columns import Columns
from bss_ray.data.shards import Feature
from bss_ray.errors import (
    CheckpointError,
    DataError,
    ModelOutputError,
    Problem,
    ResourceError,
    find_problem,
    raise_first_problem,
)
from bss_ray.measure.normalise import MinMaxNorm, Normalise
from bss_ray.measure.score import Unpaired
from bss_ray.runtime.wait import iterate_with_timeout, wait_for
from bss_ray.score.measure_files import (
    MeasureFile,
    cut_runs,
    find_measure_files,
    group_measure_files,
    read_measure_file,
    within,
    write_measure_file,
)
from bss_ray.score.measuring import (
    BAD_OUTPUTS,
    INFORMATION,
    Measuring,
    Norms,
    RowMeasurer,
    check_pairs,
    column,
    prepare_actor,
    snapshot_of,
    with_row_ids,
    with_scores,
)
from bss_ray.score.pool import PoolSize, settings_of
from bss_ray.score.read_tasks import ReadTask
from bss_ray.score.summary import Summary
from bss_ray.scoring.config import BadRows
from bss_ray.storage import StoragePath

# Rows that have killed this number of actors are not given to another. Ray Data would retry them forever.
_MAX_DEATHS = 3

# Most bad rows of a measure file that are named.
_NAMED = 5

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class MeasurePass:
    """Settings for all processes of the measure pass.

    Attributes:
        measuring: How rows are measured.
        features: Shape and dtype of the modalities.
        folder: Folder of the measure files, to which all nodes can write.
        piece_rows: Largest number of rows of a measure file.
    """

    measuring: Measuring
    features: Mapping[str, Feature]
    folder: StoragePath
    piece_rows: int


class MeasureFileReport(NamedTuple):
    """Report on a measure file that is on the disk.

    Attributes:
        piece: The measure file.
        bad_rows: Number of its rows without measures.
        bad_ids: First row ids of the rows without measures.
        notices: Messages to the user.
    """

    piece: MeasureFile
    bad_rows: int
    bad_ids: list[int]
    notices: list[str]


def measure_rows(
    units: Sequence[ReadTask], runs: Sequence[tuple[int, int]], snapshot: Any, task: MeasurePass, room: PoolSize
) -> Iterator[MeasureFileReport]:
    """Measure the rows of `runs`; yields a report for each measure file as soon as it is written.

    Args:
        units: All read tasks of the data.
        runs: Ascending runs of row ids to measure.
        snapshot: Reference to the model's snapshot.
        task: What is done with the rows.
        room: Number and resources of the actors.

    Raises:
        BssRayError: Rows break a rule; finished files stay.
    """
    pairs = [(unit, within(runs, unit.first_row, unit.first_row + unit.rows)) for unit in units]
    work = [pair for pair in pairs if pair[1]]
    if not work:
        return
    clear_marks(task.folder)
    # Blocks hold numbers of read tasks: references to shards may be sent with a function, but not in blocks.
    dataset = ray.data.range(len(work), override_num_blocks=len(work))
    dataset = dataset.map_batches(
        _read_units, batch_size=None, batch_format="numpy", fn_args=(ray.put(work), task), num_cpus=1
    )
    dataset = dataset.map_batches(
        _MeasurePieces, batch_size=None, batch_format="numpy", fn_constructor_args=(snapshot, task), **room.options
    )
    with settings_of(dataset):
        for table in iterate_with_timeout(_tables_of(dataset), "the next rows to be measured"):
            yield from map(_report_of, table["report"].to_pylist())


def _tables_of(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """The tables as a generator, because the call itself waits for the first table."""
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _report_of(text: str) -> MeasureFileReport:
    piece, *others = json.loads(text)
    return MeasureFileReport(MeasureFile(*piece), *others)


def _read_units(batch: Batch, work: Any, task: MeasurePass) -> Iterator[Batch]:
    """The rows of a read task with their `row_id`, in parts.

    Raises:
        DataError: Rows break a rule.
    """
    finite = task.measuring.bad_rows == "error"
    units = ray.get(work)
    for number in batch["id"]:
        unit, runs = units[number]
        for first_row, rows in unit.read(task.measuring.columns, task.features, runs, finite=finite):
            raise_first_problem(rows.problems, DataError)
            count = len(next(iter(rows.arrays.values())))
            yield {"row_id": np.arange(first_row, first_row + count), **rows.arrays}


class _MeasurePieces:
    """The actor."""

    def __init__(self, snapshot: Any, task: MeasurePass) -> None:
        self._task = task
        self._measurer = RowMeasurer(snapshot_of(snapshot), task.measuring, prepare_actor())

    def __call__(self, batch: Batch) -> Iterator[dict[str, list[str]]]:
        """Measure rows, and write a file for each group of consecutive rows.

        After the death of an actor Ray Data gives its rows to another: rows in finished files are not measured again.
        """
        row_ids = batch.pop("row_id", np.empty(0, np.int64))
        for rows, piece in cut_runs(row_ids, self._task.piece_rows):
            if (self._task.folder / piece.name).exists():
                report = _report_on(self._task.folder, piece)
            else:
                with marked(self._task.folder, piece):
                    report = self._measure({name: values[rows] for name, values in batch.items()}, piece)
            yield {"report": [json.dumps(report)]}

    def _measure(self, arrays: Batch, piece: MeasureFile) -> MeasureFileReport:
        """Measure and write one measure file.

        Raises:
            DataError: Labels do not fit the model.
            ModelOutputError: Outputs are not finite, and the settings make this an error.
        """
        found = self._measurer.measure(arrays, piece.first_row)
        if found.table is None:
            raise_first_problem(found.problems, DataError)
        if self._task.measuring.bad_rows == "error":
            raise_first_problem(found.problems, ModelOutputError)
        assert found.table is not None
        write_measure_file(self._task.folder, piece, with_row_ids(found.table, piece.first_row))
        ids = [row for problem in found.problems for row in problem.first_ids]
        return MeasureFileReport(piece, sum(problem.count for problem in found.problems), ids, found.notices)


def _report_on(folder: StoragePath, piece: MeasureFile) -> MeasureFileReport:
    """Report on a measure file that exists already."""
    bad = np.isnan(column(read_measure_file(folder, piece), INFORMATION))
    ids = [piece.first_row + int(row) for row in np.flatnonzero(bad)[:_NAMED]]
    return MeasureFileReport(piece, int(bad.sum()), ids, [])


# ---- rows that end their actors -----------------------------------------------------------------


@contextlib.contextmanager
def marked(folder: StoragePath, piece: MeasureFile) -> Iterator[None]:
    """Leave a file behind if the process dies in the block.

    Raises:
        ResourceError: This has happened too often with this measure file.
    """
    marks = _marks(folder)
    deaths = len(marks.glob(f"{piece.first_row}-*"))
    if deaths >= _MAX_DEATHS:
        raise ResourceError(
            f"{deaths} actors were lost while they scored rows {piece.first_row}..{piece.stop_row - 1}. Most often the "
            "memory of the node does not suffice: lower --batch_size or --max_actors, or look into Ray's logs"
        )
    mark = marks / f"{piece.first_row}-{os.getpid()}-{uuid.uuid4().hex}"
    mark.write_bytes(b"")
    try:
        yield
    finally:
        mark.remove()


def clear_marks(folder: StoragePath) -> None:
    """Forget the deaths of an earlier command, which may have been killed as a whole."""
    marks = _marks(folder)
    marks.remove()
    marks.mkdir()  # once, not for each file: on an object store this takes several requests


def _marks(folder: StoragePath) -> StoragePath:
    return folder / ".begun"


# Smallest number of rows of a file of scores.
_PART_ROWS = 1 << 20


@dataclass(frozen=True)
class NormalisePass:
    """Settings for all tasks of the normalise pass.

    Attributes:
        measures: Folder of the measure files.
        columns: Roles of the columns.
        normalise: Kind of normalisation.
        unpaired: How rows with fewer than two modalities count.
        bad_rows: Whether rows without measures are an error.
    """

    measures: StoragePath
    columns: Columns
    normalise: Normalise
    unpaired: Unpaired
    bad_rows: BadRows


class _Look(NamedTuple):
    """Norms and problems of a group of measure files."""

    norms: Norms
    unpaired: list[Problem]
    bad: list[Problem]


def score_rows(task: NormalisePass, path: StoragePath) -> dict[str, Any]:
    """Write the scores of all measured rows into a folder of Parquet files, which replaces an older folder.

    Returns:
        The summary of the scores (`Summary.to_json`), and the bounds of the measures.

    Raises:
        CheckpointError: A measure file is damaged.
        DataError: Rows have fewer than two modalities, and the settings make this an error.
        ModelOutputError: Files of an earlier command have bad rows, and the settings now make this an error.
    """
    groups = group_measure_files(find_measure_files(task.measures), _PART_ROWS)
    if not groups:
        raise CheckpointError(f"{task.measures} holds no measures. Give the same command again")
    looking = [_look.remote(task, group) for group in groups]
    looks: list[_Look] = [wait_for(look, "a look at the next measures") for look in looking]
    raise_first_problem([problem for look in looks for problem in look.unpaired], DataError)
    if task.bad_rows == "error":
        raise_first_problem([problem for look in looks for problem in look.bad], ModelOutputError)
    norms = Norms.union([look.norms for look in looks])
    shared = ray.put(norms)
    with path.replaced() as folder:
        writing = [_write_part.remote(task, group, shared, folder, index) for index, group in enumerate(groups)]
        parts = [wait_for(part, "the next part of the scores") for part in writing]
    return {"bounds": _bounds(norms), **Summary.union(parts).to_json()}


@ray.remote(name="bss_ray.look_at_measures")
def _look(task: NormalisePass, group: Sequence[MeasureFile]) -> _Look:
    """Norms of some measure files, and rows that may be an error."""
    norms, unpaired, bad = [], list[Problem](), list[Problem]()
    for piece in group:
        table = read_measure_file(task.measures, piece)
        norms.append(Norms.of(table, task.normalise))
        unpaired += check_pairs(table, piece.first_row, task.unpaired)
        bad += find_problem(BAD_OUTPUTS, np.isnan(column(table, INFORMATION)), piece.first_row)
    return _Look(Norms.union(norms), unpaired, bad)


@ray.remote(name="bss_ray.write_scores")
def _write_part(
    task: NormalisePass, group: Sequence[MeasureFile], norms: Norms, folder: StoragePath, index: int
) -> Summary:
    """Write the scores of some measure files into one file; returns their summary."""
    table = pa.concat_tables([read_measure_file(task.measures, piece) for piece in group], promote_options="permissive")
    table = with_scores(table, norms, task.unpaired)
    (folder / f"part-{index:05d}.parquet").write(lambda stream: pq.write_table(table, stream))
    return Summary.of(table, task.columns)


def _bounds(norms: Norms) -> dict[str, Any] | None:
    """Smallest and largest measure, if the normalisation uses them."""
    if not isinstance(norms.similarity, MinMaxNorm) or not isinstance(norms.information, MinMaxNorm):
        return None
    both = {"similarity": norms.similarity, "information": norms.information}
    return {name: [norm.low, norm.high] for name, norm in both.items() if norm.low <= norm.high}
