"""How many trials run at a time: as many as the cluster has room for, so that none waits for ever."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import ray
import ray.train

from bss_ray.errors import ConfigError, ResourceError
from bss_ray.sample.scoring import Scoring
from bss_ray.train.resources import check_resources, resources_per_rank
from bss_ray.tune.config import TuneConfig
from bss_ray.tune.training import scoring_here

# A trial that takes nothing still takes a process.
_MOST = 64


def count_seats(config: TuneConfig, scaling: ray.train.ScalingConfig) -> int:
    """How many trials the cluster has room for at a time, at most `max_concurrent`.

    Raises:
        ResourceError: it has not room for one, ever.
        ConfigError: a population that must train side by side has no room.
    """
    scoring = scoring_here(config.train).scoring
    check_resources(scaling, scoring)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    own = trial_resources(config, scaling)
    apart = _apart(scaling, scoring)
    seats = sum(_fits(node, own) for node in nodes)
    if seats < 1:
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in own.items() if amount)
        raise ResourceError(
            f"a trial needs {wanted} on one node, and no node of the cluster has as much: {_shown(nodes, own)}. Lower "
            "cpus_per_trial or gpus_per_trial"
        )
    # Trials whose processes had all the CPUs would wait for ever for their own ranks and scorers.
    there = ray.cluster_resources()
    together = {name: own.get(name, 0) + apart.get(name, 0) for name in {*own, *apart}}
    seats = min(seats, _fits(there, together))
    if seats < 1:
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in sorted(together.items()) if amount)
        raise ResourceError(
            f"a trial with its ranks, holders and scorers needs {wanted}; the cluster has {_shown([there], together)}. "
            "Lower train.num_workers, or what scoring takes"
        )
    limited = config.max_concurrent is not None or scaling.num_workers > 1
    seats = int(min(seats, config.max_concurrent or seats))
    if config.algorithm == "pbt" and limited and seats < config.trials:
        raise ConfigError(
            f"algorithm=pbt trains its {config.trials} trials side by side, and there is room for {seats}. Lower "
            "trials; more of them take turns only where each has one worker and max_concurrent is null"
        )
    return seats


def trial_resources(config: TuneConfig, scaling: ray.train.ScalingConfig) -> dict[str, float]:
    """What a trial's own process takes."""
    if scaling.num_workers > 1:
        # Its ranks train. Ray Tune wants it to take something; a CPU would be one rank less.
        return {"CPU": 0.0, "GPU": 0.0, "memory": 1.0}
    gpus = config.gpus_per_trial if config.gpus_per_trial is not None else float(scaling.use_gpu)
    return {"CPU": config.cpus_per_trial, "GPU": gpus}


def _apart(scaling: ray.train.ScalingConfig, scoring: Scoring) -> dict[str, float]:
    """What a trial takes beside its own process."""
    cpus = gpus = 0.0
    actors = scoring.engine in ("actors", "auto")
    if actors or scaling.num_workers > 1:
        cpus += scoring.num_holders * scoring.cpus_per_holder
    if actors:
        cpus += scoring.num_scorers * scoring.cpus_per_scorer
        gpus += scoring.num_scorers * scoring.gpus_per_scorer
    if scaling.num_workers > 1:
        each = resources_per_rank(scaling)
        cpus += scaling.num_workers * each.get("CPU", 0)
        gpus += scaling.num_workers * each.get("GPU", 0)
    return {"CPU": cpus, "GPU": gpus}


def _fits(there: Mapping[str, float], each: Mapping[str, float]) -> int:
    seats = (math.floor(there.get(name, 0) / amount + 1e-9) for name, amount in each.items() if amount)
    return min(*seats, _MOST, _MOST)


def _shown(places: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> str:
    """What there is of the resources that are asked for."""
    return "; ".join(", ".join(f"{place.get(name, 0):g} {name}" for name in sorted(each)) for place in places)
