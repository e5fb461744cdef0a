"""This project's samplers through the contract that it ships for everybody's."""

from __future__ import annotations

import abc
import functools
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import bss_ray
from bss_ray.data.arrays import shards_of_arrays
from bss_ray.data.columns import Columns
from bss_ray.data.shards import Shards
from bss_ray.errors import CheckpointError
from bss_ray.load.loader import FILLER, Loader, RankBatch
from bss_ray.sample.client import CoordinatorClient, Holders, LocalHolders
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.plan import Order, Plan, share_out
from bss_ray.sample.service import CoordinatorService
from bss_ray.sample.state import ScoreBlock
from bss_ray.schedule import Scheduler
from bss_ray.testing import SamplerContract, Setup, SlicedSampler
from bss_ray.testing.sampler import global_batches
from tests.support import SavedParts, cut, saved


class PermutationSampler(SlicedSampler):
    """`weighted_permutation`, cut into batches."""

    def order(self, epoch: int) -> np.ndarray:
        setup = self.setup
        return bss_ray.weighted_permutation(setup.weights, seed=setup.seed, epoch=epoch, size=setup.size)


class TestWeightedPermutation(SamplerContract):
    checks_rows = False  # there are as many rows as weights

    def make(self, setup: Setup) -> PermutationSampler:
        return PermutationSampler(setup)


# ---- the coordinator ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Given(Scheduler):
    """Weights as they are given: the "score" of a row is its row id, which float32 holds exactly."""

    table: tuple[float, ...]
    size: int

    uses_scores: ClassVar[bool] = True

    @staticmethod
    def of(setup: Setup) -> Given:
        size = len(setup.positive) if setup.size is None else setup.size
        return Given(table=tuple(setup.weights.tolist()), size=size)

    def epoch_size(self, epoch: int, rows: int) -> int:
        return self.size

    def weights(self, score: np.ndarray) -> np.ndarray:
        return np.array(self.table)[score.astype(np.int64)]


class CoordinatorSampler:
    """A coordinator with the ranks' part of the work: reading the order, and sharing out each batch.

    Args:
        coordinator: over holders that stand at version 1.
        nodes: rows and ranks lie on so many nodes in turn.
    """

    def __init__(self, setup: Setup, coordinator: Coordinator | AsCoordinator, *, nodes: int = 1) -> None:
        self.setup = setup
        self._coordinator = coordinator
        self._nodes = nodes
        self._position = (0, 0)

    def batches(self, epoch: int) -> Iterator[list[np.ndarray]]:
        plan = self._coordinator.plan(epoch)
        order = Order(plan, lambda index: self._coordinator.window(epoch, index))
        at, start = self._position
        rank_homes = np.arange(self.setup.ranks) % self._nodes
        for batch in range(start if at == epoch else 0, plan.batches):
            self._position = (epoch, batch + 1)
            ids = order.take(*plan.span(batch))
            owners = share_out(ids % self._nodes, rank_homes)
            yield [ids[owners == rank] for rank in range(self.setup.ranks)]

    def state(self) -> dict[str, Any]:
        return {
            "position": self._position,
            "seed": self.setup.seed,
            "data": self.setup.weights.tolist(),
            "parts": self._coordinator.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        for name, own in (("seed", self.setup.seed), ("data", self.setup.weights.tolist())):
            if state[name] != own:
                raise CheckpointError(f"made with another {name}: {state[name]}, now {own}")
        self._coordinator.load(state["parts"], 1)
        self._position = state["position"]


class CoordinatorContract(SamplerContract):
    """Of a coordinator over holders in this process; subclasses say how rows are cut.

    Attributes:
        shards, holders: rows lie in so many shards, dealt to so many holders in turn.
        nodes: rows and ranks lie on so many nodes in turn.
        window_rows: largest window of the order.
        sampler: what hands out the batches.
    """

    shards: ClassVar[int]
    holders: ClassVar[int]
    nodes: ClassVar[int] = 1
    window_rows: ClassVar[int] = 1 << 24
    sampler: ClassVar[type[CoordinatorSampler]] = CoordinatorSampler

    json_state = False  # scores are arrays

    def make(self, setup: Setup) -> CoordinatorSampler:
        rows = len(setup.weights) if setup.rows is None else setup.rows
        spans = cut(rows, self.shards)
        holders = LocalHolders([Holder(spans[index :: self.holders]) for index in range(self.holders)])
        coordinator = make_coordinator(holders, setup, self.window_rows)
        coordinator.load(saved(np.arange(len(setup.weights))), 1)
        return self.sampler(setup, coordinator, nodes=self.nodes)

    # Weights come from scores, one a row. What can be missing is a part of the saved scores; rows that
    # do not exist are passed over, as another holder's are.
    checks_rows = False

    def test_a_missing_part_is_refused(self) -> None:
        with pytest.raises(CheckpointError, match="41 of the 42 rows"):
            self.make(Setup(rows=42))


class TestOneHolder(CoordinatorContract):
    shards, holders = 1, 1
    other_process = False  # slow to start, and its order is that of `TestManyHolders`


class TestManyHolders(CoordinatorContract):
    shards, holders, nodes, window_rows = 7, 3, 3, 4
    seeds = 8


class TestHoldersWithoutRows(CoordinatorContract):
    shards, holders, window_rows = 2, 4, 1
    other_process = False
    seeds = 8


# ---- the coordinator at work --------------------------------------------------------------------


class AsCoordinator:
    """A client of a coordinator that stands at score version 1, with the methods that a `CoordinatorSampler` calls."""

    def __init__(self, client: CoordinatorClient) -> None:
        self._client = client

    def load(self, parts: list[ScoreBlock], version: int) -> None:
        self._client.load(SavedParts(parts), version)

    def state(self) -> list[ScoreBlock]:
        return [part for held in self._client.states(1) for part in held.get("scores")]

    def plan(self, epoch: int) -> Plan:
        return self._client.plan(epoch, 1)

    def window(self, epoch: int, index: int) -> np.ndarray:
        return self._client.window(epoch, index, 1).get("a window")


class ServiceContract(CoordinatorContract):
    """Of a coordinator as ranks see it: by its client."""

    other_process = False  # it has threads, or is an actor
    picklable = False
    seeds = 2  # each call goes to another thread; the order is that of `TestOneHolder`, which looks closer

    @abc.abstractmethod
    def client(self, setup: Setup) -> CoordinatorClient:
        """A coordinator, at any score version, over holders of as many rows as the setup says."""

    def make(self, setup: Setup) -> CoordinatorSampler:
        coordinator = AsCoordinator(self.client(setup))
        coordinator.load(saved(np.arange(len(setup.weights))), 1)
        return CoordinatorSampler(setup, coordinator)


def make_coordinator(holders: Holders, setup: Setup, window_rows: int = 1 << 24) -> Coordinator:
    return Coordinator(
        holders,
        rows=len(setup.weights) if setup.rows is None else setup.rows,
        scheduler=Given.of(setup),
        seed=setup.seed,
        batch_size=setup.batch_size,
        window_rows=window_rows,
    )


class TestService(ServiceContract):
    @pytest.fixture(autouse=True)
    def services(self) -> Iterator[None]:
        self._services: list[CoordinatorService] = []
        yield
        for service in self._services:
            service.close()

    def client(self, setup: Setup) -> CoordinatorService:
        spans = cut(len(setup.weights) if setup.rows is None else setup.rows, 5)
        holders = LocalHolders([Holder(spans[:2]), Holder(spans[2:])])
        make = functools.partial(make_coordinator, setup=setup, window_rows=3)
        self._services.append(CoordinatorService(holders, make))
        return self._services[-1]


# ---- the ranks' loaders -------------------------------------------------------------------------


class LoaderSampler(CoordinatorSampler):
    """Each rank's part by way of its `Loader`: tensors, made ahead in threads, with filler rows."""

    def batches(self, epoch: int) -> Iterator[list[np.ndarray]]:
        plan = self._coordinator.plan(epoch)
        at, start = self._position
        ranks, lock = self.setup.ranks, threading.Lock()

        def window(index: int) -> np.ndarray:
            with lock:  # ranks are processes, which the coordinator's actor serves in turn
                return self._coordinator.window(epoch, index)

        shards = _numbered_shards(len(self.setup.weights))
        loaders = [
            Loader(shards, rank=r, rank_nodes=["here"] * ranks, device=torch.device("cpu")) for r in range(ranks)
        ]
        loaded = (loader.batches(plan, Order(plan, window), start if at == epoch else 0) for loader in loaders)
        for parts in zip(*loaded, strict=True):
            self._position = (epoch, parts[0].number + 1)
            assert sum(part.loss_scale for part in parts) == pytest.approx(ranks)
            yield [_rows_of(part) for part in parts]


def _numbered_shards(rows: int) -> Shards:
    """Shards whose every value is the id of its row."""
    ids = np.arange(rows)
    columns = {"a": ids[:, None].astype(np.float32), "b": ids.astype(np.int32), "label": ids}
    return shards_of_arrays(columns, Columns(modalities=("a", "b")), nodes=["here"] * min(rows, 3))


def _rows_of(part: RankBatch) -> np.ndarray:
    row_ids: np.ndarray = part.tensors["row_id"].numpy().copy()
    if part.loss_scale == 0:
        assert row_ids.tolist() == [FILLER]
        return row_ids[:0]
    for name in ("a", "b", "label"):
        assert part.tensors[name].flatten().tolist() == row_ids.tolist(), f"column {name!r} is of other rows"
    return row_ids


class TestLoaders(CoordinatorContract):
    shards, holders, window_rows = 3, 2, 16
    sampler = LoaderSampler
    other_process = False
    seeds = 2


def test_they_all_draw_the_same() -> None:
    makers = [TestWeightedPermutation(), TestOneHolder(), TestManyHolders(), TestHoldersWithoutRows(), TestLoaders()]
    for epoch in range(2):
        batches = [global_batches(contract.make(Setup(ranks=3)), epoch) for contract in makers]
        assert all(one == other for one, other in itertools.pairwise(batches))
