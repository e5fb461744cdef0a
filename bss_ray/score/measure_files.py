"""Pieces: files of measures of consecutive rows. What a job has done is what its files hold."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bss_ray.errors import CheckpointError
from bss_ray.storage import StoragePath

# Rows of a piece: what a killed actor has to do again. A file of so many rows is about 2 MB.
FILE_ROWS = 1 << 16

_NAME = re.compile(r"measures-(\d{12})-(\d{9})\.parquet")


class MeasureFile(NamedTuple):
    """Rows [first_row, first_row + rows) of the data set."""

    first_row: int
    rows: int

    @property
    def stop_row(self) -> int:
        """Row id behind the last."""
        return self.first_row + self.rows

    @property
    def name(self) -> str:
        """Name of the file of its measures."""
        return f"measures-{self.first_row:012d}-{self.rows:09d}.parquet"


def cut_runs(row_ids: np.ndarray, piece_rows: int = FILE_ROWS) -> Iterator[tuple[slice, MeasureFile]]:
    """Which of some ascending row ids (n,) make a piece: no gaps, and cut at multiples of `piece_rows`.

    The cuts are places in the data set, so the same rows make the same pieces however they arrive.
    """
    if len(row_ids) == 0:
        return
    new = (np.diff(row_ids) != 1) | (row_ids[1:] % piece_rows == 0)
    edges = [0, *(np.flatnonzero(new) + 1).tolist(), len(row_ids)]
    for start, stop in itertools.pairwise(edges):
        yield slice(start, stop), MeasureFile(int(row_ids[start]), stop - start)


def write_measure_file(folder: StoragePath, piece: MeasureFile, table: pa.Table) -> None:
    """Write a piece's file, whole or not at all.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    (folder / piece.name).write(lambda stream: pq.write_table(table, stream))


def read_measure_file(folder: StoragePath, piece: MeasureFile) -> pa.Table:
    """A piece's measures.

    Raises:
        CheckpointError: the file is missing or damaged, or holds another number of rows.
    """
    path = folder / piece.name
    try:
        table = path.read_table()
    except (OSError, pa.ArrowInvalid) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Remove it and give the same command again: its rows are scored anew"
        ) from error
    if len(table) != piece.rows:
        raise CheckpointError(
            f"{path} holds {len(table)} rows and not {piece.rows}. Remove it and give the same command again: its rows "
            "are scored anew"
        )
    return table


def find_measure_files(folder: StoragePath) -> list[MeasureFile]:
    """Pieces that are finished, ascending; those that overlap another are left out."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("measures-*.parquet"))
    found = sorted((MeasureFile(int(name[1]), int(name[2])) for name in names if name), key=lambda p: (p[0], -p[1]))
    kept: list[MeasureFile] = []
    for piece in found:
        if not kept or piece.first_row >= kept[-1].stop_row:
            kept.append(piece)
    return kept


def missing_rows(done: Sequence[MeasureFile], rows: int) -> list[tuple[int, int]]:
    """Runs [start, stop) of the rows 0..rows that no piece holds; the pieces ascend and do not overlap."""
    runs, reached = [], 0
    for piece in done:
        if piece.first_row > reached:
            runs.append((reached, piece.first_row))
        reached = piece.stop_row
    if reached < rows:
        runs.append((reached, rows))
    return runs


def within(runs: Iterable[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """The parts of ascending runs that lie in [start, stop)."""
    cut = ((max(low, start), min(high, stop)) for low, high in runs)
    return [(low, high) for low, high in cut if low < high]


def group_measure_files(pieces: Sequence[MeasureFile], rows: int) -> list[list[MeasureFile]]:
    """Pieces in groups of at least so many rows, the last perhaps of fewer."""
    groups: list[list[MeasureFile]] = []
    room = 0
    for piece in pieces:
        if room <= 0:
            groups.append([])
            room = rows
        groups[-1].append(piece)
        room -= piece.rows
    return groups
