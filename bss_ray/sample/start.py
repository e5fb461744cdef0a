"""Starting a run's actors: how many, by which names, and on which nodes first."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from bss_ray.data.shards import Shards
from bss_ray.measure.measurer import Measurer
from bss_ray.runtime.ray_internals import near
from bss_ray.runtime.wait import wait_limit
from bss_ray.sample.coordinator_actor import CoordinatorActor
from bss_ray.sample.holder import WINDOW_ROWS
from bss_ray.sample.holder_actors import ActorHolders, HolderActor
from bss_ray.sample.plan import Tail
from bss_ray.schedule.schedulers import Scheduler
from bss_ray.scoring.actor import ScorerActor
from bss_ray.scoring.config import Scoring
from bss_ray.scoring.pool import ScorerPool


def start_holders(
    shards: Shards, scoring: Scoring, nodes: Sequence[str] = (), *, run: str = "run"
) -> tuple[ActorHolders, list[Any]]:
    """Start holder actors; shards are dealt out in runs, so that a holder's rows lie together.

    Args:
        shards: all rows.
        scoring: how many holders.
        nodes: where each of them goes first, see `_near`.
        run: its name, for people. All actors of one start are `bss_ray-<run>-<8 hex digits>-<role>`.

    Returns:
        All of them together, and their handles, which keep them alive.
    """
    count = min(scoring.num_holders, len(shards.parts))
    edges = [len(shards.parts) * index // count for index in range(count + 1)]
    # It comes back empty, and the next attempt of the ranks fills it from the checkpoint. A call whose connection turns
    # out to be broken is sent once more: it does the same twice, or finds another version than it wants.
    actor = ray.remote(num_cpus=scoring.cpus_per_holder, max_restarts=-1, max_task_retries=1)(HolderActor)
    spans = [(part.first_row, part.rows) for part in shards.parts]
    start = uuid.uuid4().hex[:8]
    names = [f"bss_ray-{run}-{start}-holder-{index}" for index in range(count)]
    handles = [
        actor.options(name=name, **_near(nodes, index)).remote(spans[begin:stop], wait_limit())
        for index, (name, (begin, stop)) in enumerate(zip(names, itertools.pairwise(edges), strict=True))
    ]
    return ActorHolders(names, [spans[edge][0] for edge in edges[:-1]]), handles


def start_scorers(
    shards: Shards,
    measurer: Measurer,
    scoring: Scoring,
    holders: ActorHolders,
    nodes: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Start the scorer actors of the run of these holders.

    Args:
        shards: all rows.
        measurer: how they are measured.
        scoring: how many scorers, and what each of them takes.
        holders: who gets the measures.
        nodes: where each of them goes first, see `_near`.
        options: further ones of Ray's, for each of them.

    Returns:
        Their handles, which keep them alive.
    """
    actor = ray.remote(num_cpus=scoring.cpus_per_scorer, num_gpus=scoring.gpus_per_scorer, max_restarts=-1)(ScorerActor)
    return [
        actor.options(name=name, **_near(nodes, index), **(options or {})).remote(
            shards.columns.label, measurer, scoring, holders, wait_limit()
        )
        for index, name in enumerate(scorer_names(holders, scoring))
    ]


def _near(nodes: Sequence[str], index: int) -> dict[str, Any]:
    """Ray's options of an actor that goes to its node while that is there and has room, and else elsewhere."""
    node = nodes[index] if nodes else ""
    if not node:
        return {}
    # A byte: Ray starts an actor that asks for no resource at all anywhere, whatever its strategy says.
    return {"scheduling_strategy": near(node), "memory": 1}


def scorer_names(holders: ActorHolders, scoring: Scoring) -> list[str]:
    """Names of the scorers of the run of these holders."""
    return [f"{holders.prefix}scorer-{index}" for index in range(scoring.num_scorers)]


def start_coordinator(holders: ActorHolders, *, scoring: Scoring, run: str = "run", **settings: Any) -> Any:
    """Start the coordinator actor of the run of these holders.

    Args:
        holders: of all rows.
        scoring: how rows are scored.
        run: its name, which metrics are tagged with.
        **settings: others of `coordinator_settings`.
    """
    pool = ScorerPool(scorer_names(holders, scoring), scoring.restart_timeout_s)
    actor = ray.remote(concurrency_groups={"board": 1})(CoordinatorActor)
    return actor.options(name=holders.prefix + "coordinator", num_cpus=0, max_restarts=-1).remote(
        holders, pool, coordinator_settings(scoring=scoring, **settings), run=run, wait_limit_s=wait_limit()
    )


def coordinator_settings(
    *,
    rows: int,
    scheduler: Scheduler,
    scoring: Scoring,
    seed: int,
    batch_size: int,
    tail: Tail,
    window_rows: int = WINDOW_ROWS,
) -> dict[str, Any]:
    """Arguments of a run's `Coordinator`."""
    return {
        "rows": rows,
        "scheduler": scheduler,
        "seed": seed,
        "batch_size": batch_size,
        "tail": tail,
        "window_rows": window_rows,
        "accumulation": scoring,
    }
