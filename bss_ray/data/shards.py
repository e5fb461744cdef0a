"""Shards: the rows of a dataset with stable row ids, in a store that many processes read, and its writer.

A shard holds consecutive rows. The id of a row is its position in the dataset's order.
`bss_ray.data.build` makes shards from a Ray Dataset.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bss_ray.data.columns import Columns
from bss_ray.data.store import Arrays, ObjectStore, Store

if TYPE_CHECKING:  # most stores need no Ray
    import ray


@dataclass(frozen=True)
class Shard:
    """Consecutive rows.

    Attributes:
        first_row: Row id of the first row.
        rows: Number of rows.
        node: Id of the node that holds the shard; empty if all nodes read it equally well.
    """

    first_row: int
    rows: int
    node: str


@dataclass(frozen=True)
class Feature:
    """Shape of one row of a column, and its dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Shards:
    """All rows of a dataset.

    Attributes:
        columns: Roles of the columns.
        parts: Shards in the order of their rows.
        features: Shape and dtype of each column that a batch holds: modalities, label, and `has_<modality>` for each
            modality that some row lacks.
        num_classes: Number of values that a head returns: classes C, or the D numbers of a regression.
        fingerprint: Digest of rows, schema and content.
        store: Store that keeps the rows.
    """

    columns: Columns
    parts: tuple[Shard, ...]
    features: dict[str, Feature]
    num_classes: int
    fingerprint: str
    store: Store

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(part.rows for part in self.parts)

    @cached_property
    def first_rows(self) -> np.ndarray:
        """(shards,) int64 row id of each shard's first row."""
        return np.array([part.first_row for part in self.parts], dtype=np.int64)

    @cached_property
    def _shard_rows(self) -> np.ndarray:
        return np.array([part.rows for part in self.parts], dtype=np.uint64)

    def nodes(self) -> list[str]:
        """Current node of each shard: if its node was lost, the node on which Ray has made the shard again."""
        known = [part.node for part in self.parts]
        if not (any(known) and self.store.on_cluster):
            return known
        import ray  # other shards need none

        alive = {"", *(node["NodeID"] for node in ray.nodes() if node["Alive"])}
        if alive.issuperset(known):
            return known
        copies = self.store.copies()
        there = [copies.get(index, set()) & alive for index in range(len(known))]
        return [node if node in alive or not made else min(made) for node, made in zip(known, there, strict=True)]

    def on(self, nodes: Sequence[str]) -> Shards:
        """The same shards, on these nodes."""
        return replace(
            self, parts=tuple(replace(part, node=node) for part, node in zip(self.parts, nodes, strict=True))
        )

    def read(self, index: int) -> Arrays:
        """Columns of shard `index`, read-only; views if the store can give views."""
        return self.store.read(index)

    def locate(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) index of the shard that holds each row id (n,)."""
        return np.searchsorted(self.first_rows, row_ids, side="right") - 1

    def only(self, indices: Sequence[int]) -> Shards:
        """These shards only (ascending); row ids stay the same."""
        return replace(self, parts=tuple(self.parts[index] for index in indices), store=self.store.only(indices))

    def gather(self, row_ids: np.ndarray, columns: tuple[str, ...] | None = None, out: Arrays | None = None) -> Arrays:
        """Copy rows into new arrays, so that in-place operations on a batch change nothing else.

        Args:
            row_ids: (n,) int64, in any order.
            columns: Names of the columns; None for all columns that a batch holds (`features`).
            out: Arrays `{column: (n, ...)}` to fill instead of new arrays, one for each name.

        Returns:
            `{column: (n, ...)}` in the order of `row_ids`.

        Raises:
            IndexError: A row is in none of the shards.
        """
        shards = self.locate(row_ids)
        rows = row_ids - self.first_rows[shards]
        # Rows before the first shard have negative positions, which as unsigned numbers are larger than any shard.
        strays = rows.view(np.uint64) >= self._shard_rows[shards]
        if strays.any():
            raise IndexError(f"no shard holds row {row_ids[strays][0]} ({strays.sum()} of {len(row_ids)} rows)")
        if out is None:
            out = self._empty(tuple(self.features) if columns is None else columns, shards)
        self.store.take(shards, rows, out)
        return out

    def _empty(self, names: tuple[str, ...], shards: np.ndarray) -> Arrays:
        """Uninitialised arrays for the rows of these shards (n,)."""
        arrays: Arrays = {}
        for name in names:
            if name in self.features:
                feature = self.features[name]
                arrays[name] = np.empty((len(shards), *feature.shape), feature.dtype)
            else:  # ids and extras: text is as wide as the widest of the shards
                sources = [self.read(shard)[name] for shard in np.unique(shards).tolist() or [0]]
                kind = np.result_type(*(source.dtype for source in sources))
                arrays[name] = np.empty((len(shards), *sources[0].shape[1:]), kind)
        return arrays


class Writer(abc.ABC):
    """Fills a store while a dataset is built; it is sent to the tasks that make the shards.

    Attributes:
        streams: Whether shards leave the object store as they are made, so that the rows need not fit into it.
        on_nodes: Whether a shard stays on the node that made it.
    """

    streams: ClassVar[bool] = True
    on_nodes: ClassVar[bool] = True

    @abc.abstractmethod
    def put(self, index: int, arrays: Arrays) -> object:
        """Keep the rows of shard `index`. Runs in the task that made them.

        Returns:
            What `draft` needs to know about the shard.

        Raises:
            StorageError: The rows cannot be written.
        """

    @abc.abstractmethod
    def draft(self, kept: Sequence[ray.ObjectRef]) -> Store:
        """A store of the shards that were put, to check them as a whole.

        Args:
            kept: References to the results of `put`, in the order of the shards.
        """

    def finish(self, shards: Shards, key: str | None) -> Shards:
        """Keep the shards, which are sound, for this run and for later runs.

        Args:
            shards: Shards over the draft store.
            key: Name of their source for `find`; None if the source has no name.

        Raises:
            StorageError: The shards cannot be kept.
        """
        return shards

    def discard(self) -> None:  # noqa: B027 - nothing to do unless a store says so
        """Remove what was put, because the build has failed."""

    def find(self, key: str) -> tuple[Shards | None, list[str]]:
        """The shards that an earlier run kept under this key.

        Returns:
            The shards, or None unless all of them exist and are undamaged; and messages to the user.
        """
        return None, []


class ObjectWriter(Writer):
    """What a task returns lies in the object store already."""

    streams = False

    def put(self, index: int, arrays: Arrays) -> Arrays:
        return arrays

    def draft(self, kept: Sequence[ray.ObjectRef]) -> ObjectStore:
        return ObjectStore(kept)
