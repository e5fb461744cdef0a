"""Rows of shards on any node: rows of this node are copied, rows of other nodes are picked out there and sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bss_ray.data.shards import Shards
from bss_ray.data.store import Arrays

# Waits for requested rows, and returns their columns in the order of the request.
Receive = Callable[[], Arrays]

# Requests rows (n,) of these shards from a node, and returns at once.
Ask = Callable[[str, Shards, np.ndarray], Receive]

# Most bytes and most batches of a group of batches.
_GROUP_BYTES = 16 << 20
_GROUP_BATCHES = 64


class RowRequest(NamedTuple):
    """Requested rows.

    Attributes:
        row_ids: (n,) int64.
        near: (k,) positions of the rows that this node reads itself; None for all.
        sent: (m,) positions of the rows that another node sends, and how to wait for them; an entry for each node.
    """

    row_ids: np.ndarray
    near: np.ndarray | None
    sent: list[tuple[np.ndarray, Receive]]


class RowReader:
    """Reads rows for one node.

    Args:
        shards: The rows.
        node: Id of the node that reads.
        ask: How rows of other nodes are requested; None if no other node has any.

    Attributes:
        row_bytes: Number of bytes of a row's columns.
    """

    def __init__(self, shards: Shards, node: str, ask: Ask | None = None) -> None:
        self._shards = shards
        self.row_bytes = sum(feature.row_bytes for feature in shards.features.values())
        # All nodes read shards without a node equally well.
        self._others = list(dict.fromkeys(part.node for part in shards.parts if part.node not in ("", node)))
        numbers = {other: number for number, other in enumerate(self._others)}
        # (shards,) number of the other node that holds each shard; -1 for shards that this node reads itself.
        self._holders = np.array([numbers.get(part.node, -1) for part in shards.parts])
        self._ask = ask

    def far(self, row_ids: np.ndarray) -> int:
        """Number of the rows that other nodes hold."""
        return int(np.count_nonzero(self._holders_of(row_ids) >= 0)) if self._others else 0

    def group_size(self, rows: int) -> int:
        """Number of batches of `rows` rows to load at a time.

        Passing a result between threads costs 40 us, a request to another node more, and few copies of many rows
        share their overhead: a batch of 256 rows of 4 kB takes 181 us of a core alone and 90 to 140 us in a group of 8.
        """
        return min(max(_GROUP_BYTES // max(rows * self.row_bytes, 1), 1), _GROUP_BATCHES)

    def request(self, row_ids: np.ndarray) -> RowRequest:
        """Request the rows of other nodes; returns at once.

        Args:
            row_ids: (n,) int64, in any order.
        """
        if not self.far(row_ids):
            return RowRequest(row_ids, None, [])
        holders = self._holders_of(row_ids)
        wanted = [(node, np.flatnonzero(holders == number)) for number, node in enumerate(self._others)]
        sent = [(places, self._send(node, row_ids[places])) for node, places in wanted if len(places)]
        return RowRequest(row_ids, np.flatnonzero(holders < 0), sent)

    def fill(self, request: RowRequest, out: Arrays) -> None:
        """Write the rows of a request into arrays `{column: (n, ...)}`."""
        names = tuple(out)
        if request.near is None:
            self._shards.gather(request.row_ids, names, out)
            return
        near = self._shards.gather(request.row_ids[request.near], names)  # while the other rows are being sent
        far = ((places, receive()) for places, receive in request.sent)
        for places, arrays in ((request.near, near), *far):
            for name, target in out.items():
                target[places] = arrays[name]

    def _holders_of(self, row_ids: np.ndarray) -> np.ndarray:
        holders: np.ndarray = self._holders[self._shards.locate(row_ids)]
        return holders

    def _send(self, node: str, row_ids: np.ndarray) -> Receive:
        """Request rows with a description of their shards only."""
        assert self._ask is not None, "there are other nodes"
        return self._ask(node, self._shards.only(np.unique(self._shards.locate(row_ids)).tolist()), row_ids)
