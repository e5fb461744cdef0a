"""Read tasks: row groups of a Parquet file, or a shard. Row ids are the same as in training."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from bss_ray.data.checks import check_input, check_labels, check_presence, store_labels
from bss_ray.data.columns import Columns
from bss_ray.data.read import Partial, read_column, read_partial
from bss_ray.data.shards import Feature, Shards
from bss_ray.errors import DataError, Problem, nearest, raise_first_problem
from bss_ray.names import presence_column
from bss_ray.score.measure_files import runs_within
from bss_ray.storage import StoragePath

Arrays = dict[str, np.ndarray]


class Rows(NamedTuple):
    """Consecutive rows.

    Attributes:
        arrays: Modalities, `has_<modality>`, label, id and extra columns, (n, ...) each; some are missing if there are
            problems.
        problems: Rules that rows break.
    """

    arrays: Arrays
    problems: list[Problem]


def read_rows(
    blocks: Sequence[pa.Table], columns: Columns, first_row: int, features: Mapping[str, Feature], *, finite: bool
) -> Rows:
    """Columns of consecutive blocks, in the same form as in training.

    A modality that is null becomes zeros, and `has_<modality>` says so. These columns always exist, because a model
    that was trained on rows with nulls may need them.

    Args:
        blocks: Arrow tables.
        columns: Roles of their columns.
        first_row: Row id of the first row.
        features: Shape and dtype of modalities, as far as they are known.
        finite: Whether inputs must be finite.
    """
    try:
        inputs = {name: read_partial(blocks, name) for name in columns.modalities}
        labels = read_partial(blocks, columns.label)
        carried = {name: read_column(blocks, name) for name in columns.all if name not in columns.inputs}
    except DataError as error:
        return Rows({}, [Problem(str(error), 0, [])])
    problems = check_presence({name: part.present for name, part in inputs.items()}, first_row)
    arrays: Arrays = {}
    for name, part in inputs.items():
        arrays[name], found = _fill(name, part, features.get(name), first_row, finite=finite)
        problems += found
    problems += check_labels(labels.values, labels.present, columns, first_row, None)
    if not problems:
        arrays[columns.label] = store_labels(labels.filled(), columns.task)
        arrays |= {presence_column(name): part.present for name, part in inputs.items()}
    return Rows({**arrays, **carried}, problems)


def _fill(
    name: str, part: Partial, expected: Feature | None, first_row: int, *, finite: bool
) -> tuple[np.ndarray, list[Problem]]:
    """A modality of all rows, and its problems."""
    if part.values is None and expected is None:
        return np.empty(0), [Problem(_UNKNOWN.format(name), 0, [])]
    values = part.filled(expected)
    found = Feature(values.shape[1:], str(values.dtype))
    if expected not in (None, found):
        assert expected is not None
        return values, [Problem(_differ(name, expected, found), 0, [])]
    if finite or values.dtype.kind not in "fiub":
        return values, check_input(values, name, first_row)
    return values, []


_UNKNOWN = (
    "modality {!r} is null in all rows of a block, and its type does not tell the shape that it would have. Write it "
    "as a column of tensors, or score it from Parquet with bss-ray score"
)


def _differ(name: str, expected: Feature, found: Feature) -> str:
    return (
        f"all rows of column {name!r} need one shape and dtype; received {expected.dtype} {expected.shape} and "
        f"{found.dtype} {found.shape}"
    )


# Approximate size of a read task in bytes, as Parquet counts them; it has at least one row group. Ray Data passes rows
# on in blocks of the same size.
_TASK_BYTES = 128 << 20

# Number of bytes that are decoded at a time.
_BATCH_BYTES = 16 << 20

_FOOTER_THREADS = 16

Runs = Sequence[tuple[int, int]]


class ReadTask(Protocol):
    """Consecutive rows that one task reads."""

    @property
    def first_row(self) -> int:
        """Row id of the first row."""
        ...

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    def read(
        self, columns: Columns, features: Mapping[str, Feature], runs: Runs, *, finite: bool
    ) -> Iterator[tuple[int, Rows]]:
        """Rows of ascending `runs` of row ids, in parts of first row id and rows (see `read_rows`)."""
        ...


@dataclass(frozen=True)
class ParquetTask:
    """Row groups of a Parquet file.

    Attributes:
        file: Path of the file.
        row_groups: Numbers of consecutive row groups.
        first_row: Row id of the first row.
        rows: Number of rows.
        batch_rows: Number of rows that are decoded at a time.
    """

    file: StoragePath
    row_groups: tuple[int, ...]
    first_row: int
    rows: int
    batch_rows: int

    def read(
        self, columns: Columns, features: Mapping[str, Feature], runs: Runs, *, finite: bool
    ) -> Iterator[tuple[int, Rows]]:
        """See `ReadTask`. Rows outside of `runs` are decoded too, as Parquet reads whole row groups, and dropped."""
        first_row = self.first_row
        with _open(self.file) as file:
            for batch in file.iter_batches(self.batch_rows, row_groups=list(self.row_groups), columns=[*columns.all]):
                table = pa.Table.from_batches([batch])
                for start, stop in runs_within(runs, first_row, first_row + len(table)):
                    part = table.slice(start - first_row, stop - start)
                    yield start, read_rows([part], columns, start, features, finite=finite)
                first_row += len(table)


@dataclass(frozen=True)
class ShardTask:
    """A shard, whose rows are checked already.

    Attributes:
        shards: Shards with only this shard in it.
    """

    shards: Shards

    @property
    def first_row(self) -> int:
        """Row id of the first row."""
        return self.shards.parts[0].first_row

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.shards.parts[0].rows

    def read(
        self, columns: Columns, features: Mapping[str, Feature], runs: Runs, *, finite: bool
    ) -> Iterator[tuple[int, Rows]]:
        """See `ReadTask`."""
        arrays: Arrays = self.shards.read(0)
        step = max(1, _BATCH_BYTES // sum(values[:1].nbytes for values in arrays.values()))
        for start, stop in runs_within(runs, self.first_row, self.first_row + self.rows):
            for low in range(start, stop, step):
                here = slice(low - self.first_row, min(low + step, stop) - self.first_row)
                yield low, Rows({name: values[here] for name, values in arrays.items()}, [])


def shard_tasks(shards: Shards) -> list[ReadTask]:
    """All shards."""
    return [ShardTask(shards.only([index])) for index in range(len(shards.parts))]


def parquet_tasks(path: str, columns: Columns) -> list[ReadTask]:
    """All row groups of a Parquet file or folder, in the order in which Ray Data reads them.

    Raises:
        DataError: There are no files, a column is missing, or a file is not Parquet.
    """
    files = _files(path)
    with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
        footers = list(threads.map(_footer, files))
    tasks: list[ReadTask] = []
    for file, footer in zip(files, footers, strict=True):
        _check_columns(file, footer, columns)
        first_row = tasks[-1].first_row + tasks[-1].rows if tasks else 0
        tasks += _cut_file(file, footer, first_row)
    if not tasks:
        raise DataError(f"{path} holds no rows. Check the path")
    return tasks


def _cut_file(file: StoragePath, footer: pq.FileMetaData, first_row: int) -> list[ReadTask]:
    """Read tasks of a file; small row groups are read together."""
    tasks: list[ReadTask] = []
    groups: list[int] = []
    rows = size = 0

    def close() -> None:
        nonlocal first_row, rows, size
        if rows:
            batch_rows = max(1, min(rows, _BATCH_BYTES * rows // max(size, 1)))
            tasks.append(ParquetTask(file, tuple(groups), first_row, rows, batch_rows))
        groups.clear()
        first_row, rows, size = first_row + rows, 0, 0

    for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        if size + group.total_byte_size > _TASK_BYTES:
            close()
        groups.append(index)
        rows, size = rows + group.num_rows, size + group.total_byte_size
    close()
    return tasks


def _files(path: str) -> list[StoragePath]:
    """Files under a path or URI, in Ray Data's order: sorted by their whole path, without hidden files."""
    place = StoragePath.of(path)
    try:
        if place.is_file():
            return [place]
        found = place.system.get_file_info(pyarrow.fs.FileSelector(place.path, recursive=True, allow_not_found=True))
    except OSError as error:
        raise DataError(f"cannot list {place}: {error}") from error
    names = sorted(entry.path for entry in found if entry.is_file and not _hidden(entry.path, place.path))
    if not names:
        raise DataError(f"no such file or folder with files: {place}. --data takes a Parquet file or folder")
    return [place / name[len(place.path) :].strip("/") for name in names]


def _hidden(path: str, root: str) -> bool:
    return path[len(root) :].lstrip("/").startswith((".", "_"))


def _open(path: StoragePath) -> pq.ParquetFile:
    """A Parquet file.

    Raises:
        DataError: The file is not Parquet, or is not there for this node.
    """
    try:
        return path.open_parquet()
    except FileNotFoundError as error:  # the driver has found it
        raise DataError(
            f"{path} is not there on the node {socket.gethostname()}. Name files that all nodes can read: on a file "
            "system that they share, or by a URI such as s3://bucket/rows"
        ) from error
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot read Parquet from {path}: {error}") from error


def _footer(path: StoragePath) -> pq.FileMetaData:
    with _open(path) as file:
        return file.metadata


def _check_columns(file: StoragePath, footer: pq.FileMetaData, columns: Columns) -> None:
    names = footer.schema.to_arrow_schema().names
    for name in columns.all:
        if name not in names:
            raise DataError(f"{file} has no column {name!r}; {nearest(name, names)}")


def known_features(tasks: Sequence[ReadTask], columns: Columns) -> dict[str, Feature]:
    """Shape and dtype of all modalities, from the first rows that have them.

    Raises:
        DataError: The rows break a rule, or a modality is null in all rows.
    """
    features: dict[str, Feature] = {}
    for task in tasks:
        runs = [(task.first_row, task.first_row + task.rows)]
        for _, rows in task.read(columns, {}, runs, finite=False):
            if not rows.arrays:  # a column that cannot be read at all
                raise_first_problem(rows.problems, DataError)
            for name in columns.modalities:
                values = rows.arrays.get(name)
                if name not in features and values is not None and len(values):
                    features[name] = Feature(values.shape[1:], str(values.dtype))
            if len(features) == len(columns.modalities):
                return features
    missing = [name for name in columns.modalities if name not in features]
    raise DataError(
        f"modality {missing[0]!r} is null in all rows. Leave it out of columns.modalities, or look for what it is "
        "called in the source"
    )
