"""Measure files: files of measures of consecutive rows. They alone say what a job has done."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bss_ray.errors import CheckpointError, ResourceError
from bss_ray.storage import StoragePath

# Rows of a measure file, which a killed actor has to measure again. Such a file has about 2 MB.
FILE_ROWS = 1 << 16

# Rows that have killed this number of actors are not given to another. Ray Data would retry them forever.
_MAX_DEATHS = 3

_NAME = re.compile(r"measures-(\d{12})-(\d{9})\.parquet")


class MeasureFile(NamedTuple):
    """Rows [first_row, first_row + rows) of the dataset."""

    first_row: int
    rows: int

    @property
    def stop_row(self) -> int:
        """Row id after the last row."""
        return self.first_row + self.rows

    @property
    def name(self) -> str:
        """Name of the file with the measures."""
        return f"measures-{self.first_row:012d}-{self.rows:09d}.parquet"


def cut_runs(row_ids: np.ndarray, file_rows: int = FILE_ROWS) -> Iterator[tuple[slice, MeasureFile]]:
    """The measure files of ascending row ids (n,): without gaps, and divided at multiples of `file_rows`.

    The boundaries are positions in the dataset, so the same rows make the same files however they arrive.
    """
    if len(row_ids) == 0:
        return
    new = (np.diff(row_ids) != 1) | (row_ids[1:] % file_rows == 0)
    edges = [0, *(np.flatnonzero(new) + 1).tolist(), len(row_ids)]
    for start, stop in itertools.pairwise(edges):
        yield slice(start, stop), MeasureFile(int(row_ids[start]), stop - start)


def write_measure_file(folder: StoragePath, file: MeasureFile, table: pa.Table) -> None:
    """Write a measure file completely or not at all.

    Raises:
        StorageError: The disk is full, or the folder cannot be written to.
    """
    (folder / file.name).write(lambda stream: pq.write_table(table, stream))


def read_measure_file(folder: StoragePath, file: MeasureFile) -> pa.Table:
    """The measures of a measure file.

    Raises:
        CheckpointError: The file is missing or damaged, or has another number of rows.
    """
    path = folder / file.name
    try:
        table = path.read_table()
    except (OSError, pa.ArrowInvalid) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Remove it and give the same command again: its rows are scored again"
        ) from error
    if len(table) != file.rows:
        raise CheckpointError(
            f"{path} holds {len(table)} rows and not {file.rows}. Remove it and give the same command again: its rows "
            "are scored again"
        )
    return table


def find_measure_files(folder: StoragePath) -> list[MeasureFile]:
    """Finished measure files, ascending; files that overlap another file are left out."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("measures-*.parquet"))
    found = sorted((MeasureFile(int(name[1]), int(name[2])) for name in names if name), key=lambda p: (p[0], -p[1]))
    kept: list[MeasureFile] = []
    for file in found:
        if not kept or file.first_row >= kept[-1].stop_row:
            kept.append(file)
    return kept


def missing_rows(done: Sequence[MeasureFile], rows: int) -> list[tuple[int, int]]:
    """Runs [start, stop) of the rows 0..rows that no measure file has; the files ascend and do not overlap."""
    runs, reached = [], 0
    for file in done:
        if file.first_row > reached:
            runs.append((reached, file.first_row))
        reached = file.stop_row
    if reached < rows:
        runs.append((reached, rows))
    return runs


def runs_within(runs: Iterable[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """The parts of ascending runs that are in [start, stop)."""
    cut = ((max(low, start), min(high, stop)) for low, high in runs)
    return [(low, high) for low, high in cut if low < high]


def group_measure_files(files: Sequence[MeasureFile], rows: int) -> list[list[MeasureFile]]:
    """Measure files in groups of at least `rows` rows; the last group may have fewer."""
    groups: list[list[MeasureFile]] = []
    room = 0
    for file in files:
        if room <= 0:
            groups.append([])
            room = rows
        groups[-1].append(file)
        room -= file.rows
    return groups


# ---- rows that end their actors -----------------------------------------------------------------


@contextlib.contextmanager
def marked(folder: StoragePath, file: MeasureFile) -> Iterator[None]:
    """Leave a file behind if the process dies in the block.

    Raises:
        ResourceError: This has happened too often with this measure file.
    """
    marks = _marks(folder)
    deaths = len(marks.glob(f"{file.first_row}-*"))
    if deaths >= _MAX_DEATHS:
        raise ResourceError(
            f"{deaths} actors were lost while they scored rows {file.first_row}..{file.stop_row - 1}. Most often the "
            "memory of the node does not suffice: lower --batch_size or --max_actors, or look into Ray's logs"
        )
    mark = marks / f"{file.first_row}-{os.getpid()}-{uuid.uuid4().hex}"
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
