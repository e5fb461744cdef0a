"""Holders and the coordinator as Ray actors through the contract for samplers."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import ray
from bss_ray.sample.start import start_coordinator, start_holders

from bss_ray.data.columns import Columns
from bss_ray.data.shards import Shard, Shards
from bss_ray.data.store import ObjectStore
from bss_ray.sample.actors import ActorHolders
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.plan import Plan
from bss_ray.scoring.config import Scoring
from bss_ray.testing import Setup
from tests.support import cut, saved
from tests.unit import test_sampler_contract as local

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

# The actors do not know these modules: send what they define along.
for module in (sys.modules[__name__], local):
    ray.cloudpickle.register_pickle_by_value(module)


@dataclass(frozen=True)
class Saved:
    """Parts as `SavedScores`: what holder actors load from."""

    parts: list[Any]

    def scores(self, start: int, stop: int) -> list[Any]:
        return [part for part in self.parts if part.first_row < stop and part.first_row + len(part.score) > start]


def start(rows: int) -> tuple[ActorHolders, list[Any]]:
    """Two holder actors over five shards; their handles keep them alive."""
    parts = tuple(Shard(first, count, "") for first, count in cut(rows, 5))
    shards = Shards(Columns(modalities=("a", "b")), parts, {}, 2, "", ObjectStore([]))
    return start_holders(shards, Scoring(num_holders=2))


# Actors are dear. Holders hold no setup, so all samplers over as many rows share them.
@functools.cache
def holders_of(rows: int) -> tuple[ActorHolders, list[Any]]:
    return start(rows)


@pytest.fixture(scope="module", autouse=True)
def actors(ray_session: None) -> Any:
    yield
    holders_of.cache_clear()
    remote_coordinator.cache_clear()


class TestHolderActors(local.CoordinatorContract):
    """Of a coordinator in this process over holder actors."""

    other_process = False  # it would need a cluster of its own
    picklable = False  # actors
    seeds = 2  # calls of actors are slow; the order is that of `local.TestOneHolder`, which looks closer
    window_rows = 16

    def make(self, setup: Setup) -> local.CoordinatorSampler:
        rows = len(setup.weights) if setup.rows is None else setup.rows
        coordinator = Coordinator(
            holders_of(rows)[0],
            rows=rows,
            scheduler=local.Given.of(setup),
            seed=setup.seed,
            batch_size=setup.batch_size,
            window_rows=self.window_rows,
        )
        coordinator.load(Saved(saved(np.arange(len(setup.weights)))), 1)
        return local.CoordinatorSampler(setup, coordinator, load=Saved)


# ---- the coordinator's actor --------------------------------------------------------------------


class RemoteCoordinator:
    """What a `CoordinatorSampler` calls, by way of the actor, as ranks do."""

    def __init__(self, setup: Setup) -> None:
        holders, self._handles = start(len(setup.weights))
        self._actor = start_coordinator(
            holders,
            rows=len(setup.weights),
            scheduler=local.Given.of(setup),
            scoring=Scoring(num_holders=2),
            seed=setup.seed,
            batch_size=setup.batch_size,
            tail="keep",
        )

    def load(self, parts: Saved, version: int) -> None:
        ray.get(self._actor.load.remote(parts, version))

    def state(self) -> list[Any]:
        return [part for held in ray.get(self._actor.parts.remote(1)) for part in ray.get(held)]

    def plan(self, epoch: int) -> Plan:
        plan: Plan = ray.get(self._actor.plan.remote(epoch, 1))
        return plan

    def window(self, epoch: int, index: int) -> np.ndarray:
        window: np.ndarray = ray.get(ray.get(self._actor.window.remote(epoch, index, 1))[0])
        return window


@functools.cache
def remote_coordinator(weights: tuple[float, ...], seed: int, batch_size: int, size: int | None) -> RemoteCoordinator:
    return RemoteCoordinator(Setup(weights=np.array(weights), seed=seed, batch_size=batch_size, size=size))


class CoordinatorActorContract(local.CoordinatorContract):
    """Of the coordinator's actor over holder actors: a part of the contract, as each setup needs an actor."""

    def make(self, setup: Setup) -> local.CoordinatorSampler:
        coordinator = remote_coordinator(tuple(setup.weights.tolist()), setup.seed, setup.batch_size, setup.size)
        coordinator.load(Saved(saved(np.arange(len(setup.weights)))), 1)
        return local.CoordinatorSampler(setup, coordinator, load=Saved)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "test",
    [
        "test_each_row_of_positive_weight_comes_once",
        "test_number_of_ranks_changes_no_global_batch",
        "test_resume_at_every_step",
        "test_resize_in_the_middle_of_an_epoch",
        "test_restore_goes_back",
        "test_more_rows_than_positive_weights_are_refused",
    ],
)
def test_coordinator_actor(test: str) -> None:
    getattr(CoordinatorActorContract(), test)()
