"""How many trials run at a time: as many as the cluster has room for, so that none waits for ever."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import ray
import ray.train

from bss_ray.errors import ResourceError
from bss_ray.train.resources import check_resources
from bss_ray.tune.config import TuneConfig

# A trial that takes nothing still takes a process.
_MOST = 64


def count_seats(config: TuneConfig, scaling: ray.train.ScalingConfig) -> int:
    """How many trials the cluster has room for at a time, at most `max_concurrent`.

    Raises:
        ResourceError: it has not room for one, ever.
    """
    check_resources(scaling, replace(config.train.scoring, engine="workers"))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    each = trial_resources(config, scaling)
    if scaling.num_workers > 1:
        per_worker = {"GPU": 1.0} if scaling.use_gpu else {"CPU": 1.0}
        seats = sum(_fits(node, per_worker) for node in nodes) // scaling.num_workers
    else:
        seats = sum(_fits(node, each) for node in nodes)
    if seats < 1:
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in each.items() if amount)
        raise ResourceError(
            f"a trial needs {wanted} on one node, and no node of the cluster has as much: {_shown(nodes, each)}. Lower "
            "cpus_per_trial or gpus_per_trial"
        )
    return int(min(seats, config.max_concurrent or seats))


def _shown(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> str:
    """What nodes have of the resources that are asked for."""
    return "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in each) for node in nodes)


def _fits(node: Mapping[str, float], each: Mapping[str, float]) -> int:
    return min(
        (math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in each.items() if amount), default=_MOST
    )


def trial_resources(config: TuneConfig, scaling: ray.train.ScalingConfig) -> dict[str, float]:
    """What a trial's own process takes; the workers of a nested run are counted apart."""
    if scaling.num_workers > 1:
        return {"CPU": 0.0, "GPU": 0.0}
    gpus = config.gpus_per_trial if config.gpus_per_trial is not None else float(scaling.use_gpu)
    return {"CPU": config.cpus_per_trial, "GPU": gpus}
