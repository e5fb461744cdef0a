"""A run as a state machine: draw, observe, publish, save, restore and resize in any order.

Beside the coordinator and its scorers runs a slow model of them: whole arrays in one place, and the
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
from torch import Tensor, nn

from bss_ray.measure.criteria import Measurer, Measures
from bss_ray.measure.score import Bounds
from bss_ray.sample import permutation
from bss_ray.sample.coordinator import Coordinator, LocalHolders
from bss_ray.sample.plan import Order, share_out
from bss_ray.sample.scorer import LostStateError, Scorer
from bss_ray.schedule import Heuristic, Learning, Scheduler, Uniform
from tests.support import cut

BLOCK = 16  # row ids of a block: few rows then cross several


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutation, "BLOCK_ROWS", BLOCK)
        yield


# ---- what is tested: real scorers, measuring with a model that says what it is told ----------------


class Told(nn.Module):
    """Hands the given measures on as outputs."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch


class ToldMeasurer(Measurer):
    """Takes the measures as they are."""

    def measure(self, outputs: Any, labels: Tensor) -> Measures:
        return Measures(outputs["similarity"], outputs["information"])


class ToldScorer(Scorer):
    """A scorer that is given the measures of all rows in place of a model."""

    def __init__(self, spans: list[tuple[int, int]]) -> None:
        super().__init__(spans, measurer=ToldMeasurer(), batch_size=7)
        self._own = spans

    def measure(self, similarity: Any, information: Any) -> tuple[Bounds, Bounds]:
        def read(index: int) -> dict[str, np.ndarray]:
            first, rows = self._own[index]
            here = slice(first, first + rows)
            return {"similarity": similarity[here], "information": information[here], "label": np.zeros(rows, int)}

        return super().measure(Told(), read)


# ---- the model: the formulas, for all rows at once -------------------------------------------------


def normalised(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
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
        score: (N,) of the last publication.
        version: publications so far.
        epoch, batch: the next global batch.
        seen: row ids of the unfinished epoch so far.
    """

    similarity: np.ndarray
    information: np.ndarray
    score: np.ndarray
    version: int = 0
    epoch: int = 0
    batch: int = 0
    seen: tuple[int, ...] = field(default=())

    def published(self, momentum: float) -> Model:
        score = normalised(self.similarity) - normalised(self.information)
        if self.version:
            score = momentum * self.score.astype(float) + (1 - momentum) * score
        return replace(self, score=score.astype(np.float32), version=self.version + 1)

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
    """How rows are cut into shards, dealt to scorers, and how large windows of the order may be."""

    shards: int
    scorers: int
    window_rows: int


cuts = st.builds(
    Cut, shards=st.sampled_from([1, 2, 5]), scorers=st.integers(1, 3), window_rows=st.sampled_from([3, 11, 1 << 24])
)


class Run(RuleBasedStateMachine):
    """A run: the coordinator and its scorers on one side, the model on the other."""

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
        self.model = Model(similarity, information, np.zeros(rows, np.float32))
        self._build(where)
        if scheduler.scores_due_after(-1):
            self._publish()
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
            self._publish()
        self._next_epoch()

    @rule(data=st.data())
    def observe(self, data: st.DataObject) -> None:
        """The network learns, and would now measure other values. Until they are published it changes nothing."""
        self.model = replace(self.model, similarity=self._column(data), information=self._column(data))

    @rule()
    def publish(self) -> None:
        """New scores, whether due or not. A loop that has begun an epoch leaves it and goes on to the next."""
        self._publish()
        if self.model.batch:
            self._next_epoch()

    @rule()
    def save(self) -> None:
        self.saves.append((self.model, self._parts()))

    @rule(where=st.one_of(st.none(), cuts), data=st.data())
    def restore(self, where: Cut | None, data: st.DataObject) -> None:
        """Go on from any save, with the processes at hand or in new ones with other shards and scorers."""
        self.model, parts = data.draw(st.sampled_from(self.saves))
        if where is not None:
            self._build(where)
        self._load(parts)

    @rule(ranks=st.sampled_from([1, 2, 8]))
    def resize(self, ranks: int) -> None:
        self.ranks = ranks

    @rule(data=st.data())
    def lose_a_scorer(self, data: st.DataObject) -> None:
        """One comes back as of another version: nothing may be drawn, saved or published with it, only restored."""
        version, parts = self.model.version, self._parts()
        others = sorted({0, abs(version - 1), version + 1} - {version})
        data.draw(st.sampled_from(self.scorers)).load(parts, data.draw(st.sampled_from(others)))
        for use in (
            lambda: self.coordinator.window(self.model.epoch, 0),
            self.coordinator.state,
            lambda: self.coordinator.score(self.model.similarity, self.model.information),
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

    # ---- helpers ----

    def _column(self, data: st.DataObject) -> np.ndarray:
        return np.array(data.draw(st.lists(eighths, min_size=self.rows, max_size=self.rows)))

    def _build(self, where: Cut) -> None:
        spans = cut(self.rows, where.shards)
        self.scorers = [ToldScorer(spans[index :: where.scorers]) for index in range(where.scorers)]
        self.coordinator = Coordinator(
            LocalHolders(self.scorers),
            rows=self.rows,
            scheduler=self.scheduler,
            seed=self.seed,
            batch_size=self.batch_size,
            momentum=self.momentum,
            window_rows=where.window_rows,
        )

    def _publish(self) -> None:
        published = self.coordinator.score(self.model.similarity, self.model.information)
        assert published == self.model.version + 1
        self.model = self.model.published(self.momentum)

    def _next_epoch(self) -> None:
        self.model = replace(self.model, epoch=self.model.epoch + 1, batch=0, seen=())

    def _load(self, parts: list[Any]) -> None:
        """Put all scorers where the model stands."""
        if self.model.version:
            self.coordinator.load(parts, self.model.version)
        else:
            self.coordinator.reset()

    def _parts(self) -> list[Any]:
        return self.coordinator.state() if self.model.version else []


TestRun = Run.TestCase
TestRun.settings = settings(
    derandomize=True,  # the same examples in every run
    database=None,
    deadline=None,
    max_examples=100,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
