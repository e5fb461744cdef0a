"""The blocks of a Ray Dataset, in order, and the rows of them that make a shard."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple, TypeAlias

import pyarrow as pa
import ray
import ray.data

from bss_ray.data.columns import Columns
from bss_ray.errors import DataError, nearest
from bss_ray.runtime.ray_internals import ref_bundles
from bss_ray.runtime.wait import WaitError, call_with_timeout, iterate_with_timeout

# What shards are made of. The rows of a table are in this process's memory already.
Rows: TypeAlias = ray.data.Dataset | pa.Table


class Block(NamedTuple):
    """Rows of a block: `rows` from its row `offset` on are rows `first_row` and following of the dataset."""

    ref: ray.ObjectRef
    first_row: int
    rows: int
    offset: int
    size_bytes: int


class Cut(NamedTuple):
    """Rows [start, stop) of the dataset, and the blocks that hold them."""

    start: int
    stop: int
    blocks: list[Block]

    @property
    def slices(self) -> list[tuple[int, int]]:
        """The rows of each block that belong to the cut."""
        return [
            (
                block.offset + max(self.start, block.first_row) - block.first_row,
                block.offset + min(self.stop, block.first_row + block.rows) - block.first_row,
            )
            for block in self.blocks
        ]


def execute(rows: Rows, columns: Columns) -> Generator[Block, None, None]:
    """Execute the dataset and yield its blocks in order, as they are made.

    Raises:
        DataError: The dataset lacks a column.
    """
    if isinstance(rows, pa.Table):
        check_columns(rows.schema, columns)
        yield from _table_block(rows.select(list(columns.all)))
        return
    try:
        schema = rows.schema(fetch_if_missing=False)
    except ValueError:
        # Ray Data has no type for a column of tensors in some blocks and of tensors and nulls in others, and needs a
        # type if blocks exist already. For blocks that are still to be made it needs none.
        rows = rows.map_batches(lambda block: block, batch_size=None, batch_format="pyarrow")
        schema = None
    if schema is not None:
        check_columns(schema, columns)
    selected = rows.select_columns(list(columns.all))
    selected.context.execution_options.preserve_order = True  # row ids are positions
    try:
        yield from blocks_of(selected)
    except (WaitError, GeneratorExit):
        raise
    except Exception:
        # To ask for the columns first would execute the dataset twice, once for its first rows: more than half of the
        # time of a small dataset. So only an error has them read; an error of the user's function is raised again.
        if schema is None:
            found = call_with_timeout(rows.schema, "the dataset's first rows")
            check_columns(found, columns)
        raise


def _table_block(table: pa.Table) -> Iterator[Block]:
    if table.num_rows:
        yield Block(ray.put(table), 0, table.num_rows, 0, table.nbytes)


def check_columns(schema: ray.data.Schema | pa.Schema | None, columns: Columns) -> None:
    """Refuse a dataset that lacks a column.

    Raises:
        DataError: The dataset lacks a column, or has no rows.
    """
    if schema is None:
        raise DataError("the dataset has no rows and no columns. Check the path, or the filter that left none")
    for name in columns.all:
        if name not in schema.names:
            raise DataError(f"the dataset has no column {name!r}; {nearest(name, schema.names)}")


def blocks_of(dataset: ray.data.Dataset) -> Generator[Block, None, None]:
    """Execute the dataset and yield its blocks that have rows, as they are made; in order, if it preserves order."""
    first_row = 0
    for bundle in iterate_with_timeout(ref_bundles(dataset), "the dataset's next rows"):
        for entry, cut in zip(bundle.blocks, bundle.slices, strict=True):
            all_rows, size = entry.metadata.num_rows, entry.metadata.size_bytes or 0
            offset, rows = (0, all_rows) if cut is None else (cut.start_offset, cut.num_rows)
            if rows:
                yield Block(entry.ref, first_row, rows, offset, size * rows // all_rows)
                first_row += rows


def take_until(blocks: Iterator[Block], limit: float) -> tuple[deque[Block], bool]:
    """Blocks of up to `limit` bytes and the block that exceeds it; and whether these are all blocks."""
    held: deque[Block] = deque()
    size = 0
    for block in blocks:
        held.append(block)
        size += block.size_bytes
        if size > limit:
            return held, False
    return held, True


def drain(held: deque[Block]) -> Iterator[Block]:
    """The blocks, released one by one: a block lives as long as a reference to it."""
    while held:
        yield held.popleft()


def cut_as_they_come(blocks: Iterable[Block], shard_bytes: int) -> Iterator[Cut]:
    """Cuts of about `shard_bytes`, as the blocks come; a larger block is divided into several cuts."""
    group: list[Block] = []
    size = 0
    for block in blocks:
        group.append(block)
        size += block.size_bytes
        if size >= shard_bytes:
            yield from cut_evenly(group, round(size / shard_bytes))
            group, size = [], 0
    if group:
        yield from cut_evenly(group, 1)


def cut_evenly(blocks: list[Block], count: int) -> Iterator[Cut]:
    """The blocks' rows in `count` cuts whose sizes differ by at most one row; fewer cuts if there are fewer rows."""
    first, rows = blocks[0].first_row, sum(block.rows for block in blocks)
    count = min(count, rows)
    for index in range(count):
        start, stop = first + rows * index // count, first + rows * (index + 1) // count
        parts = [block for block in blocks if block.first_row < stop and block.first_row + block.rows > start]
        yield Cut(start, stop, parts)
