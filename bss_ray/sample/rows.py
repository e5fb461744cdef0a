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

# When to gather several batches at a time; see `RowReader.group_size`.
_CALL_S = 1.25e-6
_COPY_BYTES_PER_S = 10e9
_GROUP_BYTES = 8 << 20
_GROUP_BATCHES = 64


class Request(NamedTuple):
    """Rows of consecutive batches, on their way.

    Attributes:
        batches: row ids of each batch, each (b,) int64.
        order: (n,) positions in the batches' joined rows, in the order in which they are staged: this node's
            first, then each other node's; row ids ascend in each. None: not staged.
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

    def is_staged(self, rows: int) -> bool:
        """Whether to gather the batches of a group, of so many rows each, in one go.

        Beside the bytes, gathering costs 1.25 us a shard and column. In one go the batches of a group share
        that, and cost a second copy, out of a staging buffer that stays in the cache as long as it is
        small. CPU time of a batch of 256 rows, one by one and in one go: 16 shards of 112 B rows 112 and 45 us,
        100 of 1 kB 356 and 97, 100 of 4 kB 552 and 345, 1,000 of 4 kB 1,003 and 721; but 16 of 4 kB 305 and 296,
        16 of 100 kB 2.4 and 3.6 ms.
        """
        calls = min(len(self._first_rows), rows) * len(self._shards.columns.inputs)
        # What other nodes send is staged in any case: a task for a whole group is cheaper.
        return bool(self._others) or calls * _CALL_S > 2 * rows * self.row_bytes / _COPY_BYTES_PER_S

    def staging(self, rows: int, slots: int) -> BufferRing[Arrays]:
        """Buffers for groups of at most so many rows. Used again: fresh ones would cost their page faults."""
        features = {name: self._shards.features[name] for name in self._shards.columns.inputs}
        return BufferRing(
            lambda: {name: np.empty((rows, *feature.shape), feature.dtype) for name, feature in features.items()},
            slots,
        )

    def request(self, batches: list[np.ndarray], *, staged: bool) -> Request:
        """Ask other nodes for their rows; returns at once.

        Args:
            batches: row ids of each batch, each (b,) int64 ascending.
            staged: whether they are gathered in one go; must be so if other nodes hold any.
        """
        if not staged:
            return Request(batches, None, sum(map(len, batches)), [])
        row_ids = np.concatenate(batches)
        if not self._others:
            return Request(batches, np.argsort(row_ids, kind="stable"), len(row_ids), [])
        holders = self._holders_of(row_ids)
        order = np.lexsort((row_ids, holders))
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
        """A reference to rows (ascending) that a task on the node that holds them picks out."""
        # Soft: if the node is lost the task runs elsewhere, and Ray makes the shards again or says that it cannot.
        where = NodeAffinitySchedulingStrategy(node, soft=True)
        shards = self._shards.only(np.unique(self.locate(row_ids)).tolist())
        return _pick_rows.options(scheduling_strategy=where).remote(shards, row_ids)


@ray.remote(num_cpus=0)
def _pick_rows(shards: Shards, row_ids: np.ndarray) -> Arrays:
    return shards.gather(row_ids)


def _take(source: Arrays, rows: np.ndarray, out: Arrays) -> None:
    for name, target in out.items():
        source[name].take(rows, 0, target, "clip")  # see Store.take
