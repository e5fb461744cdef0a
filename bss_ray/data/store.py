"""Where the rows of shards are kept: the object store, here; `bss_ray.data.disk` and `.lance` are the others.

A store is a small description that travels to every process; what a process has opened is its own.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import ray

Arrays = dict[str, np.ndarray]


class Piece(NamedTuple):
    """Rows of one shard that are wanted, and where they go.

    Attributes:
        shard: index of the shard.
        rows: (k,) int64 positions in the shard, ascending.
        start: where the first of them stands in the output; the others follow it.
    """

    shard: int
    rows: np.ndarray
    start: int


class Store(abc.ABC):
    """Rows of all shards of a data set."""

    @abc.abstractmethod
    def read(self, shard: int) -> Arrays:
        """All columns of one shard, `{column: (rows, ...)}`, read-only; views where the store can."""

    def take(self, pieces: Sequence[Piece], out: Arrays) -> None:
        """Copy rows into arrays.

        Args:
            pieces: which rows of which shards, in the order of the output.
            out: `{column: (n, ...)}`, filled in the order of `pieces`.
        """
        for shard, rows, start in pieces:
            arrays, stop = self.read(shard), start + len(rows)
            for name, target in out.items():
                source = arrays[name]
                if source.dtype == target.dtype:
                    # "clip": NumPy buffers `out` in its default mode. The rows are within the shard.
                    np.take(source, rows, axis=0, out=target[start:stop], mode="clip")
                else:  # text, whose width differs between shards
                    target[start:stop] = source[rows]

    @abc.abstractmethod
    def only(self, shards: Sequence[int]) -> Store:
        """The store of these shards alone, numbered anew: small enough to send along with a task."""


class ObjectStore(Store):
    """Shards as objects of Ray's object store: every process of a node reads them without a copy.

    Args:
        refs: one object a shard, `{column: (rows, ...)}`.
    """

    def __init__(self, refs: Sequence[Any]) -> None:
        self._refs = tuple(refs)
        self._opened: dict[int, Arrays] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self._refs,)

    def read(self, shard: int) -> Arrays:
        if shard not in self._opened:
            self._opened[shard] = ray.get(self._refs[shard])
        return self._opened[shard]

    def only(self, shards: Sequence[int]) -> ObjectStore:
        return ObjectStore([self._refs[shard] for shard in shards])
