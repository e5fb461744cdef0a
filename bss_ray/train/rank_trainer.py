"""Ray Train's trainer, as a run needs it: elastic ranks, lost shards, a lost controller, limits to all waits."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray._private.state import state as ray_state
from ray.core.generated import gcs_pb2
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.callback import RayTrainCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bss_ray.data.shards import Shards
from bss_ray.placement.cluster import read_nodes
from bss_ray.placement.packing import Node, ProcessGroup, most


class PlannedScaling(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray Train's policy, with fewer ranks where all that it counts would not stand at the same time."""

    def __init__(self, scaling: ray.train.ScalingConfig, groups: Sequence[ProcessGroup]) -> None:
        super().__init__(scaling)
        self._groups = groups

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        counted: int = super()._count_possible_workers(reserved_resources)
        return seats_of_ranks(read_nodes(), self._groups, counted, at_least=self.scaling_config.min_workers)


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


CONTROLLER = "TrainController"  # Ray Train's class


def free_lost_groups() -> int:
    """Remove the placement groups of this job that have lost their Ray Train controller; how many there were."""
    tables, freed = ray_state._connect_and_get_accessor(), 0
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    for entry in tables.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(entry)
        if group.creator_job_id != job.binary() or group.state == group.REMOVED or not group.creator_actor_dead:
            continue
        creator = tables.get_actor_info(ray.ActorID(group.creator_actor_id))
        if creator is not None and gcs_pb2.ActorTableData.FromString(creator).class_name == CONTROLLER:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            freed += 1
    return freed


def remove_orphaned_placement_groups(limit_s: float = 10.0) -> None:
    """`free_lost_groups` as soon as Ray's tables know of the loss; one that was starting had no group yet."""
    end = time.monotonic() + limit_s
    while not free_lost_groups() and time.monotonic() < end:
        time.sleep(0.1)


class RankTrainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]  # Ray ships no types
    """Elastic ranks that leave room for the run's other processes, no detached actor, and a limit to every wait.

    Args:
        groups: all processes of the run; the last are the ranks.
        wait_limit_s: longest time that processes wait for each other.
        **settings: of `TorchTrainer`.
    """

    def __init__(self, *args: Any, groups: Sequence[ProcessGroup], wait_limit_s: float, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._groups, self._wait_limit_s = groups, wait_limit_s

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        # In its place: `free_lost_groups`, which says why.
        made = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **settings: Any) -> ray.train.Result:
        # A selector for each rank makes several kinds of ranks, of which Ray starts the first ones.
        if self.scaling_config.elasticity_enabled and not isinstance(self.scaling_config.label_selector, list):
            settings["scaling_policy"] = PlannedScaling(self.scaling_config, self._groups)
        with _limited_waits(self._wait_limit_s):
            return super()._initialize_and_run_controller(**settings)


@contextlib.contextmanager
def _limited_waits(limit_s: float) -> Iterator[None]:
    """Ray Train's own waits end as this project's do, unless the user has set a limit.

    Ranks wait in its barriers without one. Its controller asks every rank how it is, and where the network was out at
    that moment the answer may never come: it gives a rank up after ten minutes.
    """
    limits = {
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": limit_s,
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": min(limit_s, 600.0),
    }
    ours = {name: str(limit) for name, limit in limits.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
