"""Shards of NumPy arrays in this process, without Ray: for in-process runs, tests and benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from bss_ray.data.checks import check_input, check_labels, check_presence, count_outputs, store_labels
from bss_ray.data.columns import Columns
from bss_ray.data.manifest import fingerprint, row_hashes, rows_digest
from bss_ray.data.shards import Feature, Shard, Shards
from bss_ray.data.store import Arrays, MappedStore
from bss_ray.errors import DataError, nearest, raise_first_problem
from bss_ray.names import presence_column


class ArrayStore(MappedStore):
    """Shards as arrays of this process, which travel with the store.

    Args:
        shards: Columns `{column: (rows, ...)}` of each shard; they are not copied.
    """

    on_cluster: ClassVar[bool] = False

    def __init__(self, shards: Sequence[Arrays]) -> None:
        super().__init__(len(shards))
        self.arrays = [{name: values.view() for name, values in arrays.items()} for arrays in shards]
        for values in itertools.chain(*(arrays.values() for arrays in self.arrays)):
            values.flags.writeable = False

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.arrays,)  # arrays forget on the way that they are read-only

    def open(self, shard: int) -> Arrays:
        return self.arrays[shard]

    def only(self, shards: Sequence[int]) -> ArrayStore:
        return type(self)([self.arrays[shard] for shard in shards])


def shards_of_arrays(
    arrays: Mapping[str, np.ndarray],
    columns: Columns,
    *,
    nodes: Sequence[str] = ("",),
    num_classes: int | None = None,
) -> Shards:
    """Shards of rows that fit into this process's memory; the rows are checked, and have the fingerprint, as elsewhere.

    Args:
        arrays: Columns `{column: (rows, ...)}`: all of `columns.all`, and a boolean `has_<modality>` (rows,) for each
            modality that some row lacks.
        columns: Roles of the columns.
        nodes: Node of each shard; there are as many shards of nearly equal length. Empty names mean that all nodes
            read the shard alike.
        num_classes: Number of values that a head returns; None takes it from the labels.

    Raises:
        DataError: A column is missing, or rows break a rule of the data.
    """
    for name in columns.all:
        if name not in arrays:
            raise DataError(f"the dataset has no column {name!r}; {nearest(name, arrays)}")
    rows = len(arrays[columns.label])
    lengths = {name: len(values) for name, values in arrays.items()}
    if set(lengths.values()) != {rows} or rows < len(nodes):
        raise DataError(
            f"all columns need one row count, and each of {len(nodes)} shards a row; received the lengths {lengths}"
        )
    everywhere = np.ones(rows, bool)
    present = {name: arrays.get(presence_column(name), everywhere) for name in columns.modalities}
    problems = check_presence(present, 0)
    for name in columns.modalities:
        problems += check_input(arrays[name], name, 0)
    problems += check_labels(arrays[columns.label], everywhere, columns, 0, num_classes)
    raise_first_problem(problems, DataError)
    if columns.id is not None and len(np.unique(arrays[columns.id])) < rows:
        raise DataError(f"ids must be unique: column {columns.id!r} holds some of them more than once")

    held = {name: np.ascontiguousarray(arrays[name]) for name in columns.all}
    held |= {presence_column(name): there for name, there in present.items()}
    held[columns.label] = store_labels(held[columns.label], columns.task)
    complete = {presence_column(name) for name, there in present.items() if there.all()}
    names = (*columns.inputs, *(presence_column(name) for name in columns.modalities))
    features = {name: Feature(held[name].shape[1:], str(held[name].dtype)) for name in names if name not in complete}
    edges = [rows * index // len(nodes) for index in range(len(nodes) + 1)]
    spans = list(itertools.pairwise(edges))
    return Shards(
        columns=columns,
        parts=tuple(Shard(start, stop - start, node) for (start, stop), node in zip(spans, nodes, strict=True)),
        features=features,
        num_classes=num_classes or count_outputs(held[columns.label], columns.task),
        fingerprint=fingerprint(
            features,
            rows,
            [{name: rows_digest(row_hashes(values, name), 0) for name, values in held.items()}],
            leave_out=complete,
        ),
        store=ArrayStore([{name: values[start:stop] for name, values in held.items()} for start, stop in spans]),
    )
