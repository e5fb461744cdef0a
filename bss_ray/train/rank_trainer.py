"""Ray Train's trainer for a run: elastic ranks, lost shards, a lost controller, time limits of all waits."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import ray
import ray.train
import ray.train.torch
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bss_ray.data.shards import Shards
from bss_ray.placement.cluster import read_nodes, read_room
from bss_ray.placement.fit import elastic_ranks, place_ranks
from bss_ray.placement.packing import ProcessGroup
from bss_ray.placement.resources import RANKS, rank_groups, rank_selectors
from bss_ray.runtime.ray_internals import Selectors, draining_nodes, is_alone, orphaned_placement_groups, train_parts

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
    """Until these nodes and all others have answered, or Ray has given them up.

    A lost node counts as alive for some seconds, and nobody must wait for its rows or put a rank on it.
    """
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes | (alive - draining_nodes())]
    ray.wait(
        [_answer.options(scheduling_strategy=node).remote() for node in there],
        num_returns=len(there),
        timeout=limit_s,
    )


@ray.remote(num_cpus=0, max_retries=0)
def _answer() -> None:
    """Does nothing: it only shows that the node can run a process."""


# Label of each node that Ray itself sets.
_NODE_ID = "ray.io/node-id"

# Seconds in which Ray hears that the ranks of the attempt before hold nothing any more.
_FREED_S = 5.0


@dataclass(frozen=True)
class PinRanks:
    """Gives each rank of an attempt a node, so that ranks, scorers, holders and spare CPUs fit together.

    Ray Train places ranks without regard to the run's other processes; a label selector tells it where each goes. It is
    made for every attempt, from what is there and free at that moment: a node of the attempt before may be lost. Where
    no place is found for all, ranks go where Ray puts them, as soon as there is room.

    Attributes:
        scaling: The user's settings of the ranks.
        groups: All processes of the run.
        prefix: Prefix of the names of the run's actors.
    """

    scaling: ray.train.ScalingConfig
    groups: Sequence[ProcessGroup]
    prefix: str

    def __call__(self, selectors: Selectors) -> None:
        """Add its node to each rank's selector."""
        ranks = rank_groups(self.scaling, selectors)
        groups = [*(group for group in self.groups if not group.name.startswith(RANKS)), *ranks]
        spread = self.scaling.placement_strategy.endswith("SPREAD")
        deadline = time.monotonic() + _FREED_S
        while True:
            nodes, standing = read_room(self.prefix)
            if len(nodes) == 1:
                return
            placed = place_ranks(nodes, groups, standing, ranks=RANKS, spread=spread)
            if placed is not None:
                break
            if time.monotonic() > deadline:
                logging.getLogger("bss_ray").info("no place found for all ranks at once: Ray places them")
                return
            time.sleep(_POLL_S / 5)
        left = {frozenset(group.selector.items()): iter(placed[group.name]) for group in ranks}
        for selector in selectors:
            selector[_NODE_ID] = next(left[frozenset(selector.items())])


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
    prefix: str,
    shards: Sequence[Shards],
    wait_limit_s: float,
    scaling_config: ray.train.ScalingConfig,
    run_config: ray.train.RunConfig,
) -> ray.train.Result:
    """Let Ray Train run the ranks: elastic ranks leave room for the run's other processes, and every wait has a limit.

    Args:
        train_loop: Runs in each rank.
        groups: All processes of the run; the last are the ranks.
        prefix: Prefix of the names of the run's actors.
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
            lambda counted: elastic_ranks(read_nodes(), groups, counted, at_least=scaling_config.min_workers),
        )
    elif alone and not scaling_config.elasticity_enabled:
        policy = parts.fixed_policy(scaling_config)
    await_shards, pin_ranks = AwaitLostShards(shards, wait_limit_s), PinRanks(scaling_config, groups, prefix)

    def prepare(selectors: Selectors | None) -> None:
        await_shards()
        if selectors is not None:  # Ray Train reserves slices of TPUs itself
            pin_ranks(selectors)

    trainer = parts.trainer(
        train_loop,
        policy=policy,
        torch_config=ray.train.torch.TorchConfig(timeout_s=max(1, round(wait_limit_s))),
        scaling_config=scaling_config if scaling_config.use_tpu else _with_selectors(scaling_config),
        run_config=replace(run_config, callbacks=[*(run_config.callbacks or []), parts.before_start(prepare)]),
    )
    # Without ranks the loop runs in this process, whose environment stays the same.
    ranks_elsewhere = scaling_config.num_workers != 0
    with _controller_environment(wait_limit_s, preemptions=not alone) if ranks_elsewhere else contextlib.nullcontext():
        return trainer.fit()


def _with_selectors(scaling: ray.train.ScalingConfig) -> ray.train.ScalingConfig:
    """The settings with a selector for each rank, to which `PinRanks` adds; Ray Train pins no rank then.

    Ray's autoscaler sees the user's own selectors alone, and so makes room on other nodes than those of now.
    """
    return replace(scaling, label_selector=rank_selectors(scaling, scaling.max_workers))


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
