"""Elastic ranks: as many as fit beside the run's other processes.

Ray Train counts how many ranks the nodes' resources allow. It does not look at labels, nor at what scorers take and
spare CPUs need, and may count a lost node for 20 s more; the ranks then wait for what never comes, a minute at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray.train
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from bss_ray.train.cluster import read_nodes
from bss_ray.train.packing import Group, Node, most


class PlannedScaling(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray Train's policy, with fewer ranks where all that it counts would not stand at the same time."""

    def __init__(self, scaling: ray.train.ScalingConfig, groups: Sequence[Group]) -> None:
        super().__init__(scaling)
        self._groups = groups

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        counted: int = super()._count_possible_workers(reserved_resources)
        return seats_of_ranks(read_nodes(), self._groups, counted, at_least=self.scaling_config.min_workers)


def seats_of_ranks(nodes: Sequence[Node], groups: Sequence[Group], counted: int, *, at_least: int) -> int:
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
