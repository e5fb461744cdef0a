"""What a run asks of the cluster: refused at once where the cluster could only leave it pending for ever."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import ray
import ray.train

from bss_ray.errors import ResourceError
from bss_ray.sample.scoring import Scoring, choose_engine


@dataclass(frozen=True)
class _Group:
    """Processes of one kind, and what each of them takes."""

    name: str
    count: int
    each: dict[str, float]

    def text(self, resource: str) -> str:
        return f"{self.count} {self.name} x {self.each[resource]:g}"


def _groups(scaling: ray.train.ScalingConfig, scoring: Scoring) -> list[_Group]:
    workers = scaling.num_workers if isinstance(scaling.num_workers, int) else min(scaling.num_workers)
    per_rank = dict(scaling.resources_per_worker or {})
    per_rank.setdefault("GPU" if scaling.use_gpu else "CPU", 1)
    groups = [
        _Group("ranks", workers, per_rank),
        _Group("holders", scoring.num_holders, {"CPU": scoring.cpus_per_holder}),
    ]
    if scoring.engine == "actors":
        each = {"CPU": scoring.cpus_per_scorer, "GPU": scoring.gpus_per_scorer}
        groups.append(_Group("scorers", scoring.num_scorers, each))
    return groups


def check_resources(scaling: ray.train.ScalingConfig, scoring: Scoring) -> None:
    """Refuse at once what the cluster could only leave pending for ever.

    Raises:
        ResourceError: names the resource, what is asked for and what there is.
    """
    groups, there = _groups(scaling, scoring), ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name in sorted({name for group in groups for name in group.each}):
        asking = [group for group in groups if group.each.get(name)]
        wanted = sum(group.count * group.each[name] for group in asking)
        if wanted > there.get(name, 0) + 1e-9:
            parts = " + ".join(group.text(name) for group in asking)
            raise ResourceError(
                f"the run needs {wanted:g} {name} ({parts}); the cluster has {there.get(name, 0):g}. Lower their "
                "numbers, or give them less each"
            )
        for group in asking:
            seats = sum(math.floor(node.get(name, 0) / group.each[name] + 1e-9) for node in nodes)
            if seats < group.count:
                raise ResourceError(
                    f"each of the {group.name} needs {group.each[name]:g} {name} on one node, and the nodes have room "
                    f"for {seats} of {group.count}"
                )


def settle_engine(scaling: ray.train.ScalingConfig, scoring: Scoring) -> tuple[Scoring, str]:
    """The settings with the engine that `auto` stands for on this cluster, and why it is that one."""
    ranks = next(group for group in _groups(scaling, scoring) if group.name == "ranks")
    if ranks.count == 0 and scoring.engine == "auto" and not scoring.overlap:
        return replace(scoring, engine="workers"), "num_workers=0 trains and scores in this process"
    there = ray.cluster_resources()
    cpus, gpus = (there.get(name, 0) - ranks.count * ranks.each.get(name, 0) for name in ("CPU", "GPU"))
    engine, why = choose_engine(scoring, spare_cpus=cpus, spare_gpus=gpus, ranks_use_gpu=scaling.use_gpu)
    return replace(scoring, engine=engine), why


def in_this_process(scaling: ray.train.ScalingConfig, scoring: Scoring) -> bool:
    """Whether a run needs no process but the one that trains: no ranks elsewhere, and no scorers that deliver."""
    return scaling.num_workers == 0 and scoring.engine != "actors"
