"""Ray Train's trainer, as a run needs it: elastic ranks, lost shards, a lost controller, limits to all waits."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import ray
import ray.train
import ray.train.torch
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bss_ray.data.shards import Shards
from bss_ray.placement.cluster import read_nodes
from bss_ray.placement.packing import Node, ProcessGroup, most
from bss_ray.runtime.ray_internals import is_alone, orphaned_placement_groups, train_parts


def seats_of_ranks(nodes: Sequence[Node], groups: Sequence[ProcessGroup], counted: int, *, at_least: int) -> int:
    """How many ranks to start.

    Args:
        nodes: those that are not there yet do not count.
        groups: all processes of the run; the last are the ranks.
        counted: what Ray takes for possible.
        at_least: so many ranks need not leave room to the others, which a run can do without for a while.
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
        shards: of all splits.
        limit_s: seconds until the ranks start all the same; they say what they lack.
    """

    def __init__(self, shards: Sequence[Shards], limit_s: float) -> None:
        self._stores = [split.store for split in shards]
        self._limit_s = limit_s
        self._in_memory: list[set[int]] | None = None

    def __call__(self) -> None:
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


def free_lost_groups() -> int:
    """Remove the placement groups of this job that have lost their Ray Train controller; how many there were."""
    orphaned = orphaned_placement_groups()
    for group in orphaned:
        remove_placement_group(group)
    return len(orphaned)


def remove_orphaned_placement_groups(limit_s: float = 10.0) -> None:
    """`free_lost_groups` as soon as Ray's tables know of the loss; one that was starting had no group yet."""
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
    """Have Ray Train run the ranks: elastic ones leave room for the run's other processes, and every wait has a limit.

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
    # A selector for each rank makes several kinds of ranks, of which Ray starts the first ones.
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
        torch_config=ray.train.torch.TorchConfig(timeout_s=max(1, round(wait_limit_s))),
        scaling_config=scaling_config,
        run_config=replace(run_config, callbacks=[*(run_config.callbacks or []), before]),
    )
    # Without ranks of their own the loop runs in this process, whose environment stays what it is.
    ranks_elsewhere = scaling_config.num_workers != 0
    with _controller_environment(wait_limit_s, preemptions=not alone) if ranks_elsewhere else contextlib.nullcontext():
        return trainer.fit()


@contextlib.contextmanager
def _controller_environment(limit_s: float, *, preemptions: bool) -> Iterator[None]:
    """Ray Train's own waits end as this project's do, unless the user has set a limit.

    Ranks wait in its barriers without one. Its controller asks every rank how it is, and where the network was out at
    that moment the answer may never come: it gives a rank up after ten minutes.

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
