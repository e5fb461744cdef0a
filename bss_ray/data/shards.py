"""Shards: the rows of a data set in the object store, with stable row ids.

A shard is a run of consecutive rows, kept as plain NumPy arrays that every process of a node reads
without a copy. A row's id is its position in the data set's order. `bss_ray.data.build` makes shards
from a Ray Dataset.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from bss_ray.data.columns import Columns

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shard:
    """A run of consecutive rows held as one object.

    Attributes:
        first_row: row id of the first row.
        rows: number of rows.
        node: id of the node on which the shard was made.
        ref: the object: `{column: (rows, ...)}`.
    """

    first_row: int
    rows: int
    node: str
    ref: Any


@dataclass(frozen=True)
class Feature:
    """Shape of one row of a column, and its dtype."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Shards:
    """All rows of a data set.

    Attributes:
        columns: roles of the columns.
        parts: shards in the order of their rows.
        features: shape and dtype of each column that a batch holds (modalities and label).
        num_classes: C; labels lie in 0..C-1.
        fingerprint: digest of rows, schema and content.
    """

    columns: Columns
    parts: tuple[Shard, ...]
    features: dict[str, Feature]
    num_classes: int
    fingerprint: str
    _opened: dict[int, Arrays] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # What a process has opened is its own.
        return Shards, (self.columns, self.parts, self.features, self.num_classes, self.fingerprint)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(part.rows for part in self.parts)

    @property
    def first_rows(self) -> np.ndarray:
        """(shards,) int64 row id of each shard's first row."""
        return np.array([part.first_row for part in self.parts], dtype=np.int64)

    def read(self, index: int) -> Arrays:
        """Columns of shard `index`: read-only views into the object store, never copies."""
        if index not in self._opened:
            self._opened[index] = ray.get(self.parts[index].ref)
        return self._opened[index]

    def locate(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) index of the shard that holds each row id (n,)."""
        return np.searchsorted(self.first_rows, row_ids, side="right") - 1

    def gather(self, row_ids: np.ndarray, columns: tuple[str, ...] | None = None) -> Arrays:
        """Copy rows into fresh arrays, so that in-place operations on a batch harm nobody.

        Args:
            row_ids: (n,) int64.
            columns: names; None for the modalities and the label.

        Returns:
            `{column: (n, ...)}` in the order of `row_ids`.
        """
        names = self.columns.inputs if columns is None else columns
        owner = self.locate(row_ids)
        pieces = {int(index): np.flatnonzero(owner == index) for index in np.unique(owner)}
        batch: Arrays = {}
        for name in names:
            sources = {index: self.read(index)[name] for index in (pieces or [0])}
            kind = np.result_type(*(source.dtype for source in sources.values()))
            shape = next(iter(sources.values())).shape[1:]
            batch[name] = np.empty((len(row_ids), *shape), dtype=kind)
            for index, positions in pieces.items():
                batch[name][positions] = sources[index][row_ids[positions] - self.parts[index].first_row]
        return batch
