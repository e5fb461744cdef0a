"""Holders and the coordinator as Ray actors through a part of the contract for samplers.

All of it is run on the coordinator's service in this process (`tests/unit/test_sampler_contract.py`); what is left to
show here is that nothing of it is lost on the way to actors and back.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
import ray

from bss_ray.data.columns import Columns
from bss_ray.data.shards import Shard, Shards
from bss_ray.data.store import ObjectStore
from bss_ray.sample.actors import start_coordinator, start_holders
from bss_ray.sample.client import CoordinatorClient
from bss_ray.testing import Setup
from tests.support import cut
from tests.unit import test_sampler_contract as local

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

# The actors do not know this module: send what it defines along.
ray.cloudpickle.register_pickle_by_value(local)


class CoordinatorActorContract(local.ServiceContract):
    """Of the coordinator's actor over two holder actors."""

    def __init__(self) -> None:
        self.handles: list[ray.actor.ActorHandle] = []
        self._clients: dict[bytes, CoordinatorClient] = {}

    def client(self, setup: Setup) -> CoordinatorClient:
        # Actors are expensive: samplers that differ in their ranks alone share them, and load their scores again.
        key = pickle.dumps(replace(setup, ranks=1))
        if key not in self._clients:
            parts = tuple(Shard(first, count, "") for first, count in cut(len(setup.weights), 5))
            shards = Shards(Columns(modalities=("a", "b")), parts, {}, 2, "", ObjectStore([]))
            holders, handles = start_holders(shards, count=2)
            make = functools.partial(local.make_coordinator, setup=setup)
            self._clients[key], handle = start_coordinator(holders, make)
            self.handles += [handle, *handles]
        return self._clients[key]


@pytest.fixture
def contract(ray_session: None) -> Iterator[CoordinatorActorContract]:
    contract = CoordinatorActorContract()
    yield contract
    for handle in contract.handles:
        ray.kill(handle)


def test_coordinator_actor(contract: CoordinatorActorContract) -> None:
    contract.test_each_row_of_positive_weight_comes_once()
    contract.test_resume_at_every_step()
    contract.test_resize_in_the_middle_of_an_epoch()
    contract.test_more_rows_than_positive_weights_are_refused()
