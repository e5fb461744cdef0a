"""Rows of other nodes, which a process of the run picks out there and sends. Loaders use Ray only here."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bss_ray.data.shards import Shards
from bss_ray.data.store import Arrays
from bss_ray.load.rows import Receive
from bss_ray.runtime.logs import Named
from bss_ray.runtime.wait import wait_for

# Number of requests that the server of a node answers at a time.
_SERVER_THREADS = 2


class RowServer(Named):
    """Picks rows out of the shards of its node for all ranks of a run.

    A task for each request would need a process for each simultaneous request, that is ranks times groups of batches,
    and each process takes seconds to start.
    """

    def pick(self, shards: Shards, row_ids: np.ndarray) -> Arrays:
        """Columns of the rows, in the order of `row_ids` (n,)."""
        return shards.gather(row_ids)


class RemoteRows:
    """Asks other nodes for rows.

    Args:
        prefix: Prefix of the names of the run's actors.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._servers: dict[str, Any] = {}

    def ask(self, node: str, shards: Shards, row_ids: np.ndarray) -> Receive:
        """Request rows from their node; see `bss_ray.load.rows.Ask`."""
        sent = self._send(node, shards, row_ids)

        def receive() -> Arrays:
            try:
                arrays: Arrays = wait_for(sent, "rows of another node")
            except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError):
                # The server ends with its node and with the rank that has started it; then a task does its work.
                self._servers[node] = None
                again = self._send(node, shards, row_ids)
                arrays = wait_for(again, "rows of another node, which have been asked for again")
            return arrays

        return receive

    def _send(self, node: str, shards: Shards, row_ids: np.ndarray) -> Any:
        """A reference to rows that are picked out on their node, by its server if it has one."""
        server = self._server(node)
        if server is not None:
            return server.pick.options(name="bss_ray.pick_rows").remote(shards, row_ids)
        # Soft: if the node is lost the task runs elsewhere, and Ray makes the shards again or says that it cannot.
        where = NodeAffinitySchedulingStrategy(node, soft=True)
        return _pick_rows.options(scheduling_strategy=where).remote(shards, row_ids)

    def _server(self, node: str) -> Any | None:
        """The server of the node, which the first rank that needs it starts; None if it was lost."""
        if node not in self._servers:
            self._servers[node] = (
                ray.remote(RowServer)
                .options(
                    name=f"{self._prefix}rows-{node[:6]}",
                    get_if_exists=True,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                    num_cpus=0,
                    memory=1,  # a byte: see `actors.near`
                    max_concurrency=_SERVER_THREADS,
                )
                .remote()
            )
        return self._servers[node]


@ray.remote(num_cpus=0, name="bss_ray.pick_rows")
def _pick_rows(shards: Shards, row_ids: np.ndarray) -> Arrays:
    return shards.gather(row_ids)
