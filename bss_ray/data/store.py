"""Where the rows of shards are kept: the object store (this module), `bss_ray.data.disk` or `bss_ray.data.lance`.

A store is a small description that is sent to every process; what a process has opened is not sent with it.
"""

from __future__ import annotations

import abc
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np

from bss_ray.data.span import Span
from bss_ray.errors import ConfigError, check_one_of
from bss_ray.runtime.wait import wait_for

if TYPE_CHECKING:  # most stores need no Ray
    import ray

Arrays = dict[str, np.ndarray]

Kind = Literal["auto", "object", "disk", "lance"]
KINDS = ("auto", "object", "disk", "lance")


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Where rows are kept while a run reads them. The store does not change what a run computes.

    Args:
        kind: Where rows are kept. `object`: in memory, in Ray's object store; `disk`: in files on each node's local
            disk, which later runs use again; `lance`: in a Lance dataset, which may be on object storage; `auto`: in
            memory while rows fill at most 40 % of the object stores, else on disk.
        folder: Folder of the rows. `disk`: a folder on every node; null takes the node's environment variable
            BSS_RAY_CACHE, else ~/.cache/bss_ray. `lance`: folder or URI (s3://bucket/folder) of the Lance dataset.
        max_gib: Size in GiB above which a node removes the least recently used datasets of the store `disk`; null takes
            half of what is free on that disk or already used by the folder.

    Raises:
        ConfigError: The kind is unknown, `lance` has no folder, `disk` has a URI, a size is not positive, or
            a setting has no effect with this kind.
    """

    kind: Kind = "auto"
    folder: str | None = None
    max_gib: float | None = None

    def __post_init__(self) -> None:
        check_one_of("store.kind", self.kind, KINDS)
        if self.kind == "lance" and not self.folder:
            raise ConfigError(
                "store.kind=lance needs a place: --store.folder with a folder or a URI (s3://bucket/rows)"
            )
        if self.kind == "object" and self.folder is not None:
            raise ConfigError(f"store.kind=object has no use for store.folder={self.folder!r}; leave one of them out")
        if self.kind != "lance" and "://" in (self.folder or ""):
            raise ConfigError(
                f"store.folder must be a folder of each node's disk; received the URI {self.folder}. Object storage "
                "is for store.kind=lance"
            )
        if self.max_gib is not None and not (0 < self.max_gib < math.inf):
            raise ConfigError(f"store.max_gib must be positive; received {self.max_gib}")
        if self.max_gib is not None and self.kind in ("object", "lance"):
            raise ConfigError(f"store.max_gib is for store.kind=disk; store.kind={self.kind} has no use for it")


class Store(abc.ABC):
    """The rows of all shards of a dataset.

    Attributes:
        on_cluster: The nodes of its shards are nodes of Ray, which can be lost.
    """

    on_cluster: ClassVar[bool] = True

    @abc.abstractmethod
    def read(self, shard: int) -> Arrays:
        """All columns of one shard, `{column: (rows, ...)}`, read-only; views if the store can give views."""

    def take(self, shards: np.ndarray, rows: np.ndarray, out: Arrays) -> None:
        """Copy rows into arrays. Several threads may call this at a time.

        Args:
            shards: (n,) int64 shard of each row.
            rows: (n,) int64 position of each row in its shard; it must exist.
            out: `{column: (n, ...)}`, filled in this order.
        """
        for shard in np.unique(shards).tolist():
            here, arrays = np.flatnonzero(shards == shard), self.read(shard)
            for name, target in out.items():
                target[here] = arrays[name][rows[here]]

    @abc.abstractmethod
    def only(self, shards: Sequence[int]) -> Store:
        """A store of these shards only, numbered from 0: small enough to be sent with a task."""

    def copies(self) -> dict[int, set[str]]:
        """Nodes that have a copy of each shard in memory; no node for a shard that is lost or small (100 kB).

        Empty for a store whose shards are not in memory.
        """
        return {}


class _Mapped(NamedTuple):
    """Shards whose rows can be copied by one call.

    Attributes:
        place: (shards,) int64 place of each shard among the mapped shards; -1 for the others. None: all shards are
            mapped, each in its own place.
        spans: Span of each column; None if shards differ (text of different widths) or hold Python objects.
    """

    place: np.ndarray | None
    spans: dict[str, Span | None]


class MappedStore(Store):
    """A store whose shards are arrays in this process's memory once they are opened.

    Args:
        shards: Number of shards.
    """

    def __init__(self, shards: int) -> None:
        self._opened: dict[int, Arrays] = {}
        self._mapped = _Mapped(np.full(shards, -1), {})
        self._lock = threading.Lock()

    @abc.abstractmethod
    def open(self, shard: int) -> Arrays:
        """Columns of one shard, whose memory stays in place as long as anything refers to it."""

    def read(self, shard: int) -> Arrays:
        if shard not in self._opened:
            self._opened[shard] = self.open(shard)
        return self._opened[shard]

    def take(self, shards: np.ndarray, rows: np.ndarray, out: Arrays) -> None:
        mapped = self._mapped
        if mapped.place is not None and (mapped.place[shards] < 0).any():
            mapped = self._map(shards)
        place = shards if mapped.place is None else mapped.place[shards]
        for name, target in out.items():
            span = mapped.spans.get(name)
            if span is not None and target.dtype == span.dtype and target.flags.c_contiguous:
                span.take(place, rows, target)
            else:
                super().take(shards, rows, {name: target})

    def _map(self, shards: np.ndarray) -> _Mapped:
        """Open these shards in addition."""
        with self._lock:
            place = self._mapped.place
            if place is None:
                return self._mapped  # another thread was faster
            wanted = np.union1d(np.flatnonzero(place >= 0), shards)
            opened = [self.read(shard) for shard in wanted.tolist()]
            spans = {name: Span.over([arrays[name] for arrays in opened]) for name in opened[0]}
            place = np.full(len(place), -1)
            place[wanted] = np.arange(len(wanted))
            self._mapped = _Mapped(None if len(wanted) == len(place) else place, spans)
            return self._mapped


class ObjectStore(MappedStore):
    """Shards as objects of Ray's object store: every process of a node reads them without a copy.

    Args:
        refs: One object for each shard, `{column: (rows, ...)}`.
    """

    def __init__(self, refs: Sequence[ray.ObjectRef]) -> None:
        super().__init__(len(refs))
        self._refs = tuple(refs)

    def __reduce__(self) -> tuple[object, ...]:
        return ObjectStore, (self._refs,)

    def open(self, shard: int) -> Arrays:
        arrays: Arrays = wait_for(self._refs[shard], f"shard {shard} from the object store")
        return arrays

    def only(self, shards: Sequence[int]) -> ObjectStore:
        return ObjectStore([self._refs[shard] for shard in shards])

    def copies(self) -> dict[int, set[str]]:
        from bss_ray.runtime.ray_internals import object_nodes  # the other stores need no Ray

        return {shard: nodes for shard, nodes in enumerate(object_nodes(self._refs)) if nodes is not None}
