"""Rows of shards, wherever they are: this node's are copied, other nodes' are picked out there and sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bss_ray.data.shards import Shards
from bss_ray.data.store import Arrays

# Waits for rows that were asked for, and returns their columns in the order in which they were asked for.
Receive = Callable[[], Arrays]

# Asks a node for rows (n,) of these shards, and returns at once.
Ask = Callable[[str, Shards, np.ndarray], Receive]

# A group of batches: so many bytes, and so many batches.
_GROUP_BYTES = 16 << 20
_GROUP_BATCHES = 64


class RowRequest(NamedTuple):
    """Rows on their way.

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
        shards: the rows.
        node: id of the node that reads.
        ask: How rows of other nodes are asked for; None where no other node holds any.

    Attributes:
        row_bytes: bytes of a row's columns.
    """

    def __init__(self, shards: Shards, node: str, ask: Ask | None = None) -> None:
        self._shards = shards
        self.row_bytes = sum(feature.row_bytes for feature in shards.features.values())
        # Shards without a node are read by all nodes alike.
        self._others = list(dict.fromkeys(part.node for part in shards.parts if part.node not in ("", node)))
        numbers = {other: number for number, other in enumerate(self._others)}
        # (shards,) which of the other nodes holds each shard; -1 for what this node reads itself.
        self._holders = np.array([numbers.get(part.node, -1) for part in shards.parts])
        self._ask = ask

    def far(self, row_ids: np.ndarray) -> int:
        """How many of the rows another node holds."""
        return int(np.count_nonzero(self._holders_of(row_ids) >= 0)) if self._others else 0

    def group_size(self, rows: int) -> int:
        """How many batches of so many rows to load at a time.

        Handing something over between threads costs 40 us, a request of another node more, and few copies of
        many rows share their overhead: a batch of 256 rows of 4 kB takes 181 us of a core alone and 90 to 140
        in a group of 8.
        """
        return min(max(_GROUP_BYTES // max(rows * self.row_bytes, 1), 1), _GROUP_BATCHES)

    def request(self, row_ids: np.ndarray) -> RowRequest:
        """Ask other nodes for their rows; returns at once.

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
        near = self._shards.gather(request.row_ids[request.near], names)  # while the others are on their way
        far = ((places, receive()) for places, receive in request.sent)
        for places, arrays in ((request.near, near), *far):
            for name, target in out.items():
                target[places] = arrays[name]

    def _holders_of(self, row_ids: np.ndarray) -> np.ndarray:
        holders: np.ndarray = self._holders[self._shards.locate(row_ids)]
        return holders

    def _send(self, node: str, row_ids: np.ndarray) -> Receive:
        """Ask for rows, with the description of their shards alone."""
        assert self._ask is not None, "there are other nodes"
        return self._ask(node, self._shards.only(np.unique(self._shards.locate(row_ids)).tolist()), row_ids)
