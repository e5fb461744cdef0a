"""Rows of shards, wherever they are: this node's are copied, other nodes' are picked out there and sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bss_ray.data.shards import Shards
from bss_ray.data.store import Arrays
from bss_ray.sample.transfer import BufferRing

# Writes the columns of a batch into arrays.
Fill = Callable[[Arrays], None]

# A group of batches: so many bytes, and so many batches.
_GROUP_BYTES = 8 << 20
_GROUP_BATCHES = 64


class Request(NamedTuple):
    """Rows of consecutive batches, on their way.

    Attributes:
        batches: row ids of each batch, each (b,) int64.
        order: (n,) positions in the batches' joined rows, in the order in which they are staged: this node's
            first, then each other node's. None: not staged.
        near: how many are this node's.
        sent: what comes from other nodes, in that order: rows, and a reference to their columns.
    """

    batches: list[np.ndarray]
    order: np.ndarray | None
    near: int
    sent: list[tuple[int, Any]]


class RowReader:
    """Reads rows for one node.

    Args:
        shards: the rows.
        node: id of the node that reads.

    Attributes:
        row_bytes: bytes of a row's columns.
    """

    def __init__(self, shards: Shards, node: str) -> None:
        self._shards = shards
        self._first_rows = shards.first_rows
        self.row_bytes = sum(shards.features[name].row_bytes for name in shards.columns.inputs)
        # Shards without a node are read by all nodes alike.
        self._others = list(dict.fromkeys(part.node for part in shards.parts if part.node not in ("", node)))
        numbers = {other: number for number, other in enumerate(self._others)}
        # (shards,) which of the other nodes holds each shard; -1 for what this node reads itself.
        self._holders = np.array([numbers.get(part.node, -1) for part in shards.parts])

    def locate(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) index of the shard that holds each row."""
        return np.searchsorted(self._first_rows, row_ids, side="right") - 1

    def far(self, row_ids: np.ndarray) -> int:
        """How many of the rows another node holds."""
        return int(np.count_nonzero(self._holders_of(row_ids) >= 0)) if self._others else 0

    def group_size(self, rows: int) -> int:
        """How many batches of so many rows to load at a time: handing one over between threads costs 40 us."""
        return min(max(_GROUP_BYTES // max(rows * self.row_bytes, 1), 1), _GROUP_BATCHES)

    @property
    def is_staged(self) -> bool:
        """Whether the batches of a group are gathered in one go, into a buffer, and copied from there.

        That is a second copy. It pays where rows come from other nodes, by a task for a whole group, or
        out of a store that is slow with few rows at a time.
        """
        return bool(self._others) or self._shards.store.bulk

    def staging(self, rows: int, slots: int) -> BufferRing[Arrays]:
        """Buffers for groups of at most so many rows. Used again: fresh ones would cost their page faults."""
        features = {name: self._shards.features[name] for name in self._shards.columns.inputs}
        return BufferRing(
            lambda: {name: np.empty((rows, *feature.shape), feature.dtype) for name, feature in features.items()},
            slots,
        )

    def request(self, batches: list[np.ndarray]) -> Request:
        """Ask other nodes for their rows; returns at once.

        Args:
            batches: row ids of each batch, each (b,) int64.
        """
        if not self.is_staged:
            return Request(batches, None, sum(map(len, batches)), [])
        row_ids = np.concatenate(batches)
        holders = self._holders_of(row_ids)
        order = np.argsort(holders, kind="stable")
        cuts = np.searchsorted(holders[order], np.arange(len(self._others) + 1)).tolist()
        sent = [
            (stop - start, self._pick(node, row_ids[order[start:stop]]))
            for node, start, stop in zip(self._others, cuts[:-1], cuts[1:], strict=True)
            if stop > start
        ]
        return Request(batches, order, cuts[0], sent)

    def fills(self, request: Request, staging: Arrays) -> Iterator[Fill]:
        """For each batch of a request what writes its columns; use them before the next is asked for.

        Args:
            request: what was asked for.
            staging: buffers of at least as many rows, if it is staged.
        """
        if request.order is None:
            for batch in request.batches:
                yield lambda out, here=batch: self._gather(here, out)  # type: ignore[misc]
            return
        row_ids = np.concatenate(request.batches)[request.order]
        self._gather(row_ids[: request.near], {name: values[: request.near] for name, values in staging.items()})
        start = request.near
        for rows, reference in request.sent:
            for name, values in ray.get(reference).items():
                staging[name][start : start + rows] = values
            start += rows
        places = np.empty_like(request.order)
        places[request.order] = np.arange(len(places))
        stops = np.cumsum([len(batch) for batch in request.batches])
        for batch_places in np.split(places, stops[:-1]):
            yield lambda out, here=batch_places: _take(staging, here, out)  # type: ignore[misc]

    def _gather(self, row_ids: np.ndarray, out: Arrays) -> None:
        self._shards.gather(row_ids, tuple(out), out)

    def _holders_of(self, row_ids: np.ndarray) -> np.ndarray:
        holders: np.ndarray = self._holders[self.locate(row_ids)]
        return holders

    def _pick(self, node: str, row_ids: np.ndarray) -> Any:
        """A reference to rows that a task on the node that holds them picks out."""
        # Soft: if the node is lost the task runs elsewhere, and Ray makes the shards again or says that it cannot.
        where = NodeAffinitySchedulingStrategy(node, soft=True)
        shards = self._shards.only(np.unique(self.locate(row_ids)).tolist())
        return _pick_rows.options(scheduling_strategy=where).remote(shards, row_ids)


@ray.remote(num_cpus=0)
def _pick_rows(shards: Shards, row_ids: np.ndarray) -> Arrays:
    return shards.gather(row_ids)


def _take(source: Arrays, rows: np.ndarray, out: Arrays) -> None:
    for name, target in out.items():
        # "clip": NumPy buffers `out` in its default mode. The rows are there.
        source[name].take(rows, 0, target, "clip")
