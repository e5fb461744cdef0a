"""Between two attempts of the ranks: shards that a node took with it are made again first.

Ray makes lost objects again by running their tasks, as soon as it knows that the node is gone. The tasks need CPUs.
Ranks that start again at once, on fewer nodes, may take all of them, and then wait for ever for rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bss_ray.data.shards import Shards

_POLL_S = 0.5


class AwaitLostShards(WorkerGroupCallback):  # type: ignore[misc]  # Ray is untyped
    """Runs in Ray Train's controller, before it reserves anything for the ranks.

    Ray Train has no public hook there: it is a developer API, and used here alone.

    Args:
        shards: of all splits.
        limit_s: seconds until the ranks start all the same; they say what they lack.
    """

    def __init__(self, shards: Sequence[Shards], limit_s: float) -> None:
        self._stores = [split.store for split in shards]
        self._limit_s = limit_s
        self._in_memory: list[set[int]] | None = None

    def before_worker_group_start(self, _context: Any) -> None:
        """The first time note which shards are where a node can take them along; later wait for these."""
        copies = [store.copies() for store in self._stores]
        if self._in_memory is None:
            self._in_memory = [{shard for shard, nodes in split.items() if nodes} for split in copies]
            return
        deadline = time.monotonic() + self._limit_s
        _settle(set().union(*(nodes for split in copies for nodes in split.values())), self._limit_s)
        lost = self._lost()
        if lost:
            logging.getLogger("bss_ray").warning(f"{lost} shards were lost with their node; they are made again")
        while self._lost() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _lost(self) -> int:
        """How many shards have no copy on any living node."""
        assert self._in_memory is not None
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return sum(
            not copies.get(shard, set()) & alive
            for wanted, copies in zip(self._in_memory, (store.copies() for store in self._stores), strict=True)
            for shard in wanted
        )


def _settle(nodes: set[str], limit_s: float) -> None:
    """Until each node has answered, or Ray has given it up: a lost one counts as alive for some seconds."""
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    ray.wait(
        [_answer.options(scheduling_strategy=node).remote() for node in there],
        num_returns=len(there),
        timeout=limit_s,
    )


@ray.remote(num_cpus=0, max_retries=0)
def _answer() -> None:
    """That a process can be run there is all there is to know."""
