"""The first pass of a job: tasks read units, actors measure their rows and write them down, a file a piece."""

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
import ray
import ray.data

from bss_ray.data.shards import Feature
from bss_ray.errors import DataError, ModelOutputError, ResourceError, raise_first_problem
from bss_ray.score.measuring import INFORMATION, Measuring, RowMeasurer, prepare_actor, snapshot_of
from bss_ray.score.pieces import Piece, cut_runs, read_piece, within, write_piece
from bss_ray.score.pool import Room, settings_of, users_error
from bss_ray.score.scores import column, with_row_ids
from bss_ray.score.units import Unit
from bss_ray.storage import StoragePath
from bss_ray.wait import each_in_time

# Rows that so many actors have died of are not given to another. Ray Data would go on for ever.
_MAX_DEATHS = 3

# Bad rows of a piece that are named.
_NAMED = 5

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Pass:
    """What all processes of the pass are told.

    Attributes:
        measuring: how rows are measured.
        features: shape and dtype of the modalities.
        folder: of the pieces; all nodes can write there.
        piece_rows: most rows of a piece.
    """

    measuring: Measuring
    features: Mapping[str, Feature]
    folder: StoragePath
    piece_rows: int


class PieceReport(NamedTuple):
    """A piece that is on the disk.

    Attributes:
        piece: its rows.
        bad_rows: those of them without measures.
        bad_ids: the first of their row ids.
        notices: what the user should read.
    """

    piece: Piece
    bad_rows: int
    bad_ids: list[int]
    notices: list[str]


def measure_rows(
    units: Sequence[Unit], runs: Sequence[tuple[int, int]], snapshot: Any, task: Pass, room: Room
) -> Iterator[PieceReport]:
    """Measure the rows of `runs`; a report for each piece, as it gets done.

    Args:
        units: all units of the data.
        runs: ascending runs of row ids that are to be measured.
        snapshot: reference to the model.
        task: what is done with them.
        room: actors.

    Raises:
        BssRayError: rows break a rule; what is done stays.
    """
    pairs = [(unit, within(runs, unit.first_row, unit.first_row + unit.rows)) for unit in units]
    work = [pair for pair in pairs if pair[1]]
    if not work:
        return
    clear_marks(task.folder)
    # Blocks of numbers, and the units beside them: references to shards may travel with a function, but not in blocks.
    dataset = ray.data.range(len(work), override_num_blocks=len(work))
    dataset = dataset.map_batches(
        _read_units, batch_size=None, batch_format="numpy", fn_args=(ray.put(work), task), num_cpus=1
    )
    dataset = dataset.map_batches(
        _MeasurePieces, batch_size=None, batch_format="numpy", fn_constructor_args=(snapshot, task), **room.options
    )
    try:
        with settings_of(dataset):
            for table in each_in_time(_tables_of(dataset), "the next rows to be measured"):
                yield from map(_report_of, table["report"].to_pylist())
    except ray.exceptions.RayError as error:
        raise users_error(error) or error from None


def _tables_of(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """A generator, as already the call waits for the first table."""
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _report_of(text: str) -> PieceReport:
    piece, *others = json.loads(text)
    return PieceReport(Piece(*piece), *others)


def _read_units(batch: Batch, work: Any, task: Pass) -> Iterator[Batch]:
    """The rows of a unit, `row_id` and all, in parts.

    Raises:
        DataError: rows break a rule.
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

    def __init__(self, snapshot: Any, task: Pass) -> None:
        self._task = task
        self._measurer = RowMeasurer(snapshot_of(snapshot), task.measuring, prepare_actor())

    def __call__(self, batch: Batch) -> Iterator[dict[str, list[str]]]:
        """Measure rows, and write each piece that they make.

        After the death of an actor Ray Data hands its rows to another: pieces that it has left are not measured again.
        """
        row_ids = batch.pop("row_id", np.empty(0, np.int64))
        for rows, piece in cut_runs(row_ids, self._task.piece_rows):
            if (self._task.folder / piece.name).exists():
                report = _report_on(self._task.folder, piece)
            else:
                with marked(self._task.folder, piece):
                    report = self._measure({name: values[rows] for name, values in batch.items()}, piece)
            yield {"report": [json.dumps(report)]}

    def _measure(self, arrays: Batch, piece: Piece) -> PieceReport:
        """One piece.

        Raises:
            DataError: labels do not fit the model.
            ModelOutputError: outputs are not finite, and that is an error.
        """
        found = self._measurer.measure(arrays, piece.first_row)
        if found.table is None:
            raise_first_problem(found.problems, DataError)
        if self._task.measuring.bad_rows == "error":
            raise_first_problem(found.problems, ModelOutputError)
        assert found.table is not None
        write_piece(self._task.folder, piece, with_row_ids(found.table, piece.first_row))
        ids = [row for problem in found.problems for row in problem.first_ids]
        return PieceReport(piece, sum(problem.count for problem in found.problems), ids, found.notices)


def _report_on(folder: StoragePath, piece: Piece) -> PieceReport:
    """Of a piece that is there."""
    bad = np.isnan(column(read_piece(folder, piece), INFORMATION))
    ids = [piece.first_row + int(row) for row in np.flatnonzero(bad)[:_NAMED]]
    return PieceReport(piece, int(bad.sum()), ids, [])


# ---- rows that end their actors -----------------------------------------------------------------


@contextlib.contextmanager
def marked(folder: StoragePath, piece: Piece) -> Iterator[None]:
    """Leaves a file behind if the process dies in the block.

    Raises:
        ResourceError: that has happened too often with this piece.
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
    """Forget the deaths of an earlier command: it may have been killed as a whole."""
    marks = _marks(folder)
    marks.remove()
    marks.mkdir()  # once, not for each piece: on an object store it is several requests


def _marks(folder: StoragePath) -> StoragePath:
    return folder / ".begun"
