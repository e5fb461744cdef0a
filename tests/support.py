"""What several test modules share: a coordinator over holders in this process, and the end of calls given up."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from bss_ray.sample.client import CoordinatorClient, LocalHolders
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.plan import Plan
from bss_ray.sample.state import ScoreBlock
from bss_ray.schedule import Scheduler


def cut(rows: int, parts: int) -> list[tuple[int, int]]:
    """(first row id, rows) of `parts` runs of nearly equal length; runs without rows are left out."""
    edges = [rows * part // parts for part in range(parts + 1)]
    return [(start, stop - start) for start, stop in itertools.pairwise(edges) if stop > start]


def saved(score: np.ndarray, parts: int = 1) -> list[ScoreBlock]:
    """`score` (N,) as a checkpoint of `parts` parts; the measures do not matter to an order."""
    states = [ScoreBlock.empty(first, n) for first, n in cut(len(score), parts)]
    for state in states:
        state.score[:] = np.asarray(score)[state.first_row : state.stop_row]
    return states


@dataclass(frozen=True)
class SavedParts:
    """Parts as `SavedScores`: what holders load from."""

    parts: list[ScoreBlock]

    def scores(self, start: int, stop: int) -> list[ScoreBlock]:
        return [part for part in self.parts if part.first_row < stop and part.stop_row > start]


def local_coordinator(
    score: np.ndarray, scheduler: Scheduler, *, shards: int = 1, holders: int = 1, **settings: Any
) -> Coordinator:
    """A coordinator whose holders hold `score` (N,) as version 1; shards are dealt out in turn."""
    spans = cut(len(score), shards)
    holders = LocalHolders([Holder(spans[index::holders]) for index in range(holders)])
    settings = {"seed": 3, "batch_size": 1, **settings}
    coordinator = Coordinator(holders, rows=len(score), scheduler=scheduler, **settings)
    coordinator.load(saved(score), 1)
    return coordinator


def order_of(coordinator: Coordinator, epoch: int) -> tuple[np.ndarray, Plan]:
    """All row ids of an epoch in their order, and its plan."""
    plan = coordinator.plan(epoch)
    return np.concatenate([coordinator.window(epoch, index) for index in range(len(plan.window_ends))]), plan


def state_of(coordinator: CoordinatorClient, version: int) -> ScoreBlock:
    """Scores and measures of all rows, in one block."""
    held = [part for shared in coordinator.states(version) for part in shared.get("scores")]
    parts = sorted(held, key=lambda part: part.first_row)
    return ScoreBlock(0, **{name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays})


def join_calls() -> None:
    """Wait for abandoned calls (`runtime.wait`): Ray ends a process in which one of them outlives its session."""
    for thread in threading.enumerate():
        if thread.name.startswith(("bss-ray-call", "bss-ray-then", "StreamingExecutor")):
            thread.join(60)
            assert not thread.is_alive(), thread
