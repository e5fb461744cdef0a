"""Rows of shards, wherever they are: this node's are copied, other nodes' are picked out there and sent."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bss_ray.data.shards import Shards
from bss_ray.data.store import Arrays
from bss_ray.runtime.wait import wait_for
from bss_ray.sample.holder_actors import Named

# Requests that a node's server answers at a time.
_SERVER_THREADS = 2

# A group of batches: so many bytes, and so many batches.
_GROUP_BYTES = 16 << 20
_GROUP_BATCHES = 64


class RowRequest(NamedTuple):
    """Rows on their way.

    Attributes:
        row_ids: (n,) int64.
        near: (k,) positions of the rows that this node reads itself; None for all.
        sent: node, (m,) positions of the rows that it sends, and a reference to their columns.
    """

    row_ids: np.ndarray
    near: np.ndarray | None
    sent: list[tuple[str, np.ndarray, Any]]


class RowServer(Named):
    """Picks rows out of the shards of its node, for all ranks of a run.

    A task for each request would be a process for each: Ray starts as many as there are requests at a time, that is
    ranks times groups of batches, and each takes seconds to start.
    """

    def pick(self, shards: Shards, row_ids: np.ndarray) -> Arrays:
        """Columns of the rows, in the order of `row_ids` (n,)."""
        return shards.gather(row_ids)


class RowReader:
    """Reads rows for one node.

    Args:
        shards: the rows.
        node: id of the node that reads.
        prefix: of the names of the run's actors.

    Attributes:
        row_bytes: bytes of a row's columns.
    """

    def __init__(self, shards: Shards, node: str, prefix: str) -> None:
        self._shards, self._prefix = shards, prefix
        self._servers: dict[str, Any] = {}
        self.row_bytes = sum(feature.row_bytes for feature in shards.features.values())
        # Shards without a node are read by all nodes alike.
        self._others = list(dict.fromkeys(part.node for part in shards.parts if part.node not in ("", node)))
        numbers = {other: number for number, other in enumerate(self._others)}
        # (shards,) which of the other nodes holds each shard; -1 for what this node reads itself.
        self._holders = np.array([numbers.get(part.node, -1) for part in shards.parts])

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
        sent = [(node, places, self._ask(node, row_ids[places])) for node, places in wanted if len(places)]
        return RowRequest(row_ids, np.flatnonzero(holders < 0), sent)

    def fill(self, request: RowRequest, out: Arrays) -> None:
        """Write the rows of a request into arrays `{column: (n, ...)}`."""
        names = tuple(out)
        if request.near is None:
            self._shards.gather(request.row_ids, names, out)
            return
        near = self._shards.gather(request.row_ids[request.near], names)  # while the others are on their way
        far = ((places, self._received(node, sent, request.row_ids[places])) for node, places, sent in request.sent)
        for places, arrays in ((request.near, near), *far):
            for name, target in out.items():
                target[places] = arrays[name]

    def _holders_of(self, row_ids: np.ndarray) -> np.ndarray:
        holders: np.ndarray = self._holders[self._shards.locate(row_ids)]
        return holders

    def _ask(self, node: str, row_ids: np.ndarray) -> Any:
        """A reference to rows that are picked out on their node, by its server if it has one."""
        shards = self._shards.only(np.unique(self._shards.locate(row_ids)).tolist())
        server = self._server(node)
        if server is not None:
            return server.pick.options(name="bss_ray.pick_rows").remote(shards, row_ids)
        # Soft: if the node is lost the task runs elsewhere, and Ray makes the shards again or says that it cannot.
        where = NodeAffinitySchedulingStrategy(node, soft=True)
        return _pick_rows.options(scheduling_strategy=where).remote(shards, row_ids)

    def _received(self, node: str, sent: Any, row_ids: np.ndarray) -> Arrays:
        """What was picked out; by a task where the server is no more."""
        try:
            arrays: Arrays = wait_for(sent, "rows of another node")
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError):
            # It ends with the rank that has started it, and with its node.
            self._servers[node] = None
            arrays = wait_for(self._ask(node, row_ids), "rows of another node, which have been asked for again")
        return arrays

    def _server(self, node: str) -> Any | None:
        """The node's server, which the first rank that needs one starts; None: it was lost."""
        if node not in self._servers:
            self._servers[node] = (
                ray.remote(RowServer)
                .options(
                    name=f"{self._prefix}rows-{node[:6]}",
                    get_if_exists=True,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                    num_cpus=0,
                    memory=1,  # a byte: see `start._near`
                    max_concurrency=_SERVER_THREADS,
                )
                .remote()
            )
        return self._servers[node]


@ray.remote(num_cpus=0, name="bss_ray.pick_rows")
def _pick_rows(shards: Shards, row_ids: np.ndarray) -> Arrays:
    return shards.gather(row_ids)
