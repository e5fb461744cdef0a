"""Ray Train's trainer for a run: elastic ranks, lost shards, a lost controller, time limits of all waits."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import ray
import ray.train
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bss_ray.data.shards import Shards
from bss_ray.placement.cluster import read_nodes
from bss_ray.placement.packing import Node, ProcessGroup, most
from bss_ray.runtime.ray_internals import is_alone, orphaned_placement_groups, train_parts


def seats_of_ranks(nodes: Sequence[Node], groups: Sequence[ProcessGroup], counted: int, *, at_least: int) -> int:
    """Number of ranks to start.

    Args:
        nodes: Nodes; those that do not exist yet do not count.
        groups: All processes of the run; the last are the ranks.
        counted: Number of ranks that Ray takes for possible.
        at_least: Number of ranks that need not leave room for the other processes, without which a run can do for a
            while.
    """
    *others, ranks = groups
    here = [node for node in nodes if node.there]
    for beside in (others, []):
        seats = most(here, [*beside, replace(ranks, count=counted)], ranks.name)
        if seats >= at_least:
            return seats
    return 0


_POLL_S = 0.5


class AwaitLostShards:
    """Runs in Ray Train's controller, before it reserves anything for the ranks.

    Args:
        shards: Shards of all splits.
        limit_s: Seconds after which the ranks start even without all shards; they report which shards they lack.
    """

    def __init__(self, shards: Sequence[Shards], limit_s: float) -> None:
        self._stores = [split.store for split in shards]
        self._limit_s = limit_s
        self._in_memory: list[set[int]] | None = None

    def __call__(self) -> None:
        """The first time record which shards could be lost with a node; later wait for these shards."""
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
        """Number of shards without a copy on any living node."""
        assert self._in_memory is not None
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return sum(
            not copies.get(shard, set()) & alive
            for wanted, copies in zip(self._in_memory, (store.copies() for store in self._stores), strict=True)
            for shard in wanted
        )


def _settle(nodes: set[str], limit_s: float) -> None:
    """Wait until each node has answered, or Ray declares it dead: a lost node counts as alive for some seconds."""
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    ray.wait(
        [_answer.options(scheduling_strategy=node).remote() for node in there],
        num_returns=len(there),
        timeout=limit_s,
    )


@ray.remote(num_cpus=0, max_retries=0)
def _answer() -> None:
    """Does nothing: it only shows that the node can run a process."""


def free_lost_groups() -> int:
    """Remove the placement groups of this job that have lost their Ray Train controller; returns their number."""
    orphaned = orphaned_placement_groups()
    for group in orphaned:
        remove_placement_group(group)
    return len(orphaned)


def remove_orphaned_placement_groups(limit_s: float = 10.0) -> None:
    """`free_lost_groups` as soon as Ray's tables know of the loss; a starting controller has no group yet."""
    end = time.monotonic() + limit_s
    while not free_lost_groups() and time.monotonic() < end:
        time.sleep(0.1)


def fit_ranks(
    train_loop: Callable[[], object],
    *,
    groups: Sequence[ProcessGroup],
    shards: Sequence[Shards],
    wait_limit_s: float,
    scaling_config: ray.train.ScalingConfig,
    run_config: ray.train.RunConfig,
) -> ray.train.Result:
    """Let Ray Train run the ranks: elastic ranks leave room for the run's other processes, and every wait has a limit.

    Args:
        train_loop: Runs in each rank.
        groups: All processes of the run; the last are the ranks.
        shards: Shards of all splits.
        wait_limit_s: Longest time that processes wait for each other.
        scaling_config: Ranks and their resources.
        run_config: Name and storage of the run.
    """
    parts = train_parts()
    policy, alone = None, is_alone()
    # A selector for each rank makes several kinds of ranks, of which Ray starts the first ranks.
    if scaling_config.elasticity_enabled and not isinstance(scaling_config.label_selector, list):
        policy = parts.scaling_policy(
            scaling_config,
            lambda counted: seats_of_ranks(read_nodes(), groups, counted, at_least=scaling_config.min_workers),
        )
    elif alone and not scaling_config.elasticity_enabled:
        policy = parts.fixed_policy(scaling_config)
    before = parts.before_start(AwaitLostShards(shards, wait_limit_s))
    trainer = parts.trainer(
        train_loop,
        policy=policy,
        timeout_s=max(1, round(wait_limit_s)),
        scaling_config=scaling_config,
        run_config=replace(run_config, callbacks=[*(run_config.callbacks or []), before]),
    )
    # Without ranks the loop runs in this process, whose environment stays the same.
    ranks_elsewhere = scaling_config.num_workers != 0
    with _controller_environment(wait_limit_s, preemptions=not alone) if ranks_elsewhere else contextlib.nullcontext():
        return trainer.fit()


@contextlib.contextmanager
def _controller_environment(limit_s: float, *, preemptions: bool) -> Iterator[None]:
    """Give Ray Train's own waits the limit of this project, unless the user has set a limit.

    Ranks wait in Ray Train's barriers without a limit. Its controller polls every rank, and after an outage of the
    network the answer may never come: by default the controller abandons a rank after ten minutes.

    Args:
        limit_s: Longest wait.
        preemptions: Whether a node can be taken away with notice. If not, no actor needs to watch for that.
    """
    settings = {
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": limit_s,
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": min(limit_s, 600.0),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": int(preemptions),
    }
    ours = {name: str(value) for name, value in settings.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
