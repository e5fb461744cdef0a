"""A run as a state machine: draw, observe, publish, save, restore and resize in any order.

Beside the coordinator and its holders runs a slow model of them: whole arrays in one place, and the
formulas of docs/method.md and docs/order.md written out again. Whatever happens, both must draw the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bss_ray.measure.score import Accumulation
from bss_ray.sample import permutation
from bss_ray.sample.client import LocalHolders, Publication
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.plan import Order, share_out
from bss_ray.sample.state import LostStateError, MeasureBatch
from bss_ray.schedule import Heuristic, Learning, Scheduler, Uniform
from tests.support import cut

BLOCK = 16  # row ids of a block: few rows then cross several


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutation, "BLOCK_ROWS", BLOCK)
        yield


# ---- the model: the formulas, for all rows at once -------------------------------------------------


def normalised(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    low, high = float(values[known].min()), float(values[known].max())
    return (values.astype(float) - low) / (high - low) if high > low else np.zeros(len(values))


def arrival_times(seed: int, epoch: int, row: int, weight: float, *, again: bool) -> list[float]:
    """When a row of this weight arrives, once or again and again: sums of its own Exp(1) numbers over the weight."""

    def stream(purpose: int, *counter: int) -> np.random.Generator:
        key = np.array([seed, purpose], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array(counter, dtype=np.uint64)))

    block, place = divmod(row, BLOCK)
    rounds = 16 if again else 1
    waits = [stream(0, 0, round_, block, epoch).standard_exponential(BLOCK)[place] for round_ in range(rounds)]
    if again:
        waits += stream(1, 0, 0, row, epoch).standard_exponential(256).tolist()
    return [float(elapsed / weight) for elapsed in itertools.accumulate(waits)]


@dataclass(frozen=True)
class Model:
    """Everything that a run knows of its rows and its place. Values are replaced, never changed.

    Attributes:
        similarity, information: (N,) what the network of the run says of each row at the moment.
        published_similarity, published_information: (N,) what it said when the row was last measured.
        measured: (N,) score version in which that was; 0 for never.
        score: (N,) of the last publication.
        version: publications so far.
        epoch, batch: the next global batch.
        seen: row ids of the unfinished epoch so far.
    """

    similarity: np.ndarray
    information: np.ndarray
    published_similarity: np.ndarray
    published_information: np.ndarray
    measured: np.ndarray
    score: np.ndarray
    version: int = 0
    epoch: int = 0
    batch: int = 0
    seen: tuple[int, ...] = field(default=())

    def published(self, momentum: float, rows: list[int]) -> Model:
        """After a publication for which these rows were measured; the others keep what they have."""
        new = np.isin(np.arange(len(self.score)), rows)
        similarity = np.where(new, self.similarity, self.published_similarity)
        information = np.where(new, self.information, self.published_information)
        known = new | (self.measured > 0)
        current = normalised(similarity, known) - normalised(information, known)
        mixed = momentum * self.score.astype(float) + (1 - momentum) * current
        score = np.where(new, np.where(self.measured > 0, mixed, current), self.score)
        return replace(
            self,
            published_similarity=similarity,
            published_information=information,
            measured=np.where(new, self.version + 1, self.measured),
            score=score.astype(np.float32),
            version=self.version + 1,
        )

    def weights(self, scheduler: Scheduler) -> np.ndarray:
        """(N,) float64 sampling weights of the epoch."""
        rows = len(self.score)
        if scheduler.is_burn_in(self.epoch) or isinstance(scheduler, Uniform):
            return np.ones(rows)
        score = self.score.astype(float)
        if isinstance(scheduler, Heuristic):
            best = np.lexsort((np.arange(rows), -score))[: scheduler.subset_size(self.epoch, rows)]
            return np.isin(np.arange(rows), best).astype(float)
        assert isinstance(scheduler, Learning)
        if scheduler.temperature is None:
            weights = 1 + score + 0.01
        else:
            weights = np.array([math.exp(value / scheduler.temperature) for value in score])
        mix = scheduler.uniform_mix
        return (1 - mix) * weights / math.fsum(weights) + mix / rows

    def order(self, scheduler: Scheduler, seed: int) -> list[int]:
        """Row ids of the whole epoch: the first to arrive."""
        weights, burn_in = self.weights(scheduler), scheduler.is_burn_in(self.epoch)
        again = scheduler.replacement and not burn_in
        arrivals = [
            (time, row)
            for row in np.flatnonzero(weights).tolist()
            for time in arrival_times(seed, self.epoch, row, weights[row], again=again)
        ]
        size = len(self.score) if burn_in else scheduler.epoch_size(self.epoch, len(self.score))
        return [row for _, row in sorted(arrivals)[:size]]


# ---- the machine ----------------------------------------------------------------------------------

# Eighths: many rows have the same score.
eighths = st.integers(0, 8).map(lambda value: np.float32(value / 8))
schedulers: st.SearchStrategy[Scheduler] = st.one_of(
    st.builds(Uniform, update_interval=st.just(1)),
    st.builds(
        Heuristic, burn_in=st.integers(0, 2), initial=st.sampled_from([0.1, 0.5]), grow_epochs=st.sampled_from([1, 6])
    ),
    st.builds(
        Learning,
        burn_in=st.integers(0, 2),
        temperature=st.sampled_from([None, 0.1, 0.5]),
        fraction=st.sampled_from([0.3, 0.8, 1.0]),
        uniform_mix=st.sampled_from([0.0, 0.2]),
        replacement=st.booleans(),
    ),
)


@dataclass(frozen=True)
class Cut:
    """How rows are cut into shards, dealt to holders, and how large windows of the order may be."""

    shards: int
    holders: int
    window_rows: int


cuts = st.builds(
    Cut, shards=st.sampled_from([1, 2, 5]), holders=st.integers(1, 3), window_rows=st.sampled_from([3, 11, 1 << 24])
)


class Run(RuleBasedStateMachine):
    """A run: the coordinator and its holders on one side, the model on the other."""

    # ---- rules ----

    @initialize(
        rows=st.integers(2, 50),
        scheduler=schedulers,
        seed=st.sampled_from([0, 3, 2**64 - 1]),
        batch_size=st.integers(1, 12),
        momentum=st.sampled_from([0.0, 0.5]),
        where=cuts,
        data=st.data(),
    )
    def start(
        self,
        rows: int,
        scheduler: Scheduler,
        seed: int,
        batch_size: int,
        momentum: float,
        where: Cut,
        data: st.DataObject,
    ) -> None:
        self.rows, self.scheduler, self.seed, self.momentum = rows, scheduler, seed, momentum
        self.batch_size = min(batch_size, rows)
        self.ranks = 8
        similarity, information = (self._column(data) for _ in range(2))
        nothing = np.zeros(rows, np.float32)
        self.model = Model(similarity, information, nothing, nothing, np.zeros(rows, int), nothing)
        self._build(where)
        if scheduler.scores_due_after(-1):
            self._publish(list(range(rows)))
        self.saves: list[tuple[Model, list[Any]]] = [(self.model, self._parts())]

    @rule(batches=st.integers(1, 20))
    def draw(self, batches: int) -> None:
        """The next global batches, by way of all ranks; at the end of an epoch the first of the next."""
        plan = self.coordinator.plan(self.model.epoch)
        order = Order(plan, lambda index: self.coordinator.window(plan.epoch, index))
        expected = self.model.order(self.scheduler, self.seed)
        assert (plan.epoch, plan.version, plan.size) == (self.model.epoch, self.model.version, len(expected))
        weights = self.model.weights(self.scheduler)
        for number in range(self.model.batch, min(self.model.batch + batches, plan.batches)):
            start, stop = plan.span(number)
            ids = order.take(start, stop)
            owners = share_out(ids % 3, np.arange(self.ranks) % 2)
            parts = [ids[owners == rank].tolist() for rank in range(self.ranks)]
            assert sorted(row for part in parts for row in part) == sorted(expected[start:stop])
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert (weights[ids] > 0).all()
            self.model = replace(self.model, batch=number + 1, seen=(*self.model.seen, *ids.tolist()))
        if self.model.batch == plan.batches:
            self._end_epoch(expected)

    def _end_epoch(self, expected: list[int]) -> None:
        """Complete, whatever happened on the way; then new scores if they are due, and the next epoch."""
        assert list(self.model.seen) == expected
        if self.scheduler.scores_due_after(self.model.epoch):
            self._publish(list(range(self.rows)))
        self._next_epoch()

    @rule(data=st.data())
    def observe(self, data: st.DataObject) -> None:
        """The network learns, and would now measure other values. Until they are published it changes nothing."""
        self.model = replace(self.model, similarity=self._column(data), information=self._column(data))

    @rule(data=st.data(), share=st.sampled_from(["all", "some"]))
    def publish(self, data: st.DataObject, share: str) -> None:
        """New scores, whether due or not. A loop that has begun an epoch leaves it and goes on to the next."""
        everyone = list(range(self.rows))
        some = st.lists(st.sampled_from(everyone), min_size=1, unique=True)
        # The first scores are of all rows, or a scheduler would draw rows that it knows nothing of.
        self._publish(everyone if share == "all" or not self.model.version else data.draw(some), data)
        if self.model.batch:
            self._next_epoch()

    @rule(wrong=st.sampled_from([-1, 0, 2]))
    def publish_again(self, wrong: int) -> None:
        """A version that is stale, comes twice, or too early is refused."""
        publication = self.coordinator.publish(self.model.version + wrong)
        assert (publication.version, publication.measured) == (self.model.version, 0)
        assert publication.refused > 0

    @rule()
    def save(self) -> None:
        self.saves.append((self.model, self._parts()))

    @rule(where=st.one_of(st.none(), cuts), data=st.data())
    def restore(self, where: Cut | None, data: st.DataObject) -> None:
        """Go on from any save, with the processes at hand or in new ones with other shards and holders."""
        self.model, parts = data.draw(st.sampled_from(self.saves))
        if where is not None:
            self._build(where)
        self._load(parts)

    @rule(ranks=st.sampled_from([1, 2, 8]))
    def resize(self, ranks: int) -> None:
        self.ranks = ranks

    @rule(data=st.data())
    def lose_a_holder(self, data: st.DataObject) -> None:
        """One comes back as of another version: nothing may be drawn, saved or published with it, only restored."""
        version, parts = self.model.version, self._parts()
        others = sorted({0, abs(version - 1), version + 1} - {version})
        lost = data.draw(st.sampled_from(self.each))
        lost.load(parts, data.draw(st.sampled_from(others)), self.coordinator.attempt)
        for use in (
            lambda: self.coordinator.window(self.model.epoch, 0),
            self.coordinator.state,
            lambda: self._deliver_and_publish(list(range(self.rows))),
        ):
            with pytest.raises(LostStateError, match=rf"not {version}\b"):
                use()
        self.restore(None, data)

    # ---- invariants ----

    @invariant()
    def versions_agree(self) -> None:
        assert self.coordinator.version == self.model.version

    @invariant()
    def scores_agree(self) -> None:
        for part in self._parts():
            here = slice(part.first_row, part.first_row + len(part.score))
            assert part.score.tolist() == self.model.score[here].tolist()
            assert part.last_measured.tolist() == self.model.measured[here].tolist()

    # ---- helpers ----

    def _column(self, data: st.DataObject) -> np.ndarray:
        return np.array(data.draw(st.lists(eighths, min_size=self.rows, max_size=self.rows)))

    def _build(self, where: Cut) -> None:
        spans = cut(self.rows, where.shards)
        self.each = [Holder(spans[index :: where.holders]) for index in range(where.holders)]
        self.holders = LocalHolders(self.each)
        self.coordinator = Coordinator(
            self.holders,
            rows=self.rows,
            scheduler=self.scheduler,
            seed=self.seed,
            batch_size=self.batch_size,
            accumulation=Accumulation(momentum=self.momentum),
            window_rows=where.window_rows,
        )

    def _publish(self, rows: list[int], data: st.DataObject | None = None) -> None:
        """Rows are measured: delivered in several parts, in any order, some of them twice, some too late."""
        if data is not None:
            rows = data.draw(st.permutations(rows))
            again = data.draw(st.lists(st.sampled_from(rows), max_size=3))
            self._deliver(again)
            wrong = np.full(len(rows), 99, np.float32)
            self.holders.deliver(MeasureBatch.of(np.array(rows), wrong, wrong), attempt="of earlier ranks")
        assert self._deliver_and_publish(rows).version == self.model.version + 1
        self.model = self.model.published(self.momentum, rows)

    def _deliver_and_publish(self, rows: list[int]) -> Publication:
        for part in (rows[::2], rows[1::2]):
            self._deliver(part)
        return self.coordinator.publish(self.model.version + 1, expected=len(rows))

    def _deliver(self, rows: list[int]) -> None:
        index = np.array(rows, dtype=np.int64)
        delivery = MeasureBatch.of(index, self.model.similarity[index], self.model.information[index])
        self.holders.deliver(delivery, attempt=self.coordinator.attempt)

    def _next_epoch(self) -> None:
        self.model = replace(self.model, epoch=self.model.epoch + 1, batch=0, seen=())

    def _load(self, parts: list[Any]) -> None:
        """Put all holders where the model stands."""
        if self.model.version:
            self.coordinator.load(parts, self.model.version)
        else:
            self.coordinator.reset()

    def _parts(self) -> list[Any]:
        return self.coordinator.state() if self.model.version else []


TestRun = Run.TestCase
TestRun.settings = settings(
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
