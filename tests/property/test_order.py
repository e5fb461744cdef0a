"""Properties of the order of an epoch, whatever the scores, the scheduler and the cut of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from bss_ray.sample import permutation
from bss_ray.sample.client import LocalHolders
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.permutation import race_keys, weighted_permutation
from bss_ray.sample.plan import Order, share_out
from bss_ray.schedule import Heuristic, Learning, Scheduler, Uniform
from tests.support import cut, local_coordinator, order_of

settings.register_profile(
    "order",
    derandomize=True,  # the same examples in every run
    deadline=None,
    max_examples=120,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
reproducible = settings.get_profile("order")  # by decorator: other modules keep their own settings


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Blocks of 16 row ids instead of 65,536: few rows then cross many of them, and draws are cheap.

    No property depends on the size of a block; `tests/unit/test_permutation.py` has it real.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutation, "BLOCK_ROWS", 16)
        yield


# ---- what is drawn ------------------------------------------------------------------------------

# Few different values make ties, the rest is arbitrary; -0.0 and the ends of the range are among them.
score_values = st.one_of(
    st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.25, 1.0]), st.floats(-1, 1, allow_subnormal=False, width=32)
)
scores = st.lists(score_values, min_size=1, max_size=90).map(np.array)
shares = st.floats(0.02, 1.0)
heuristics = st.builds(
    Heuristic,
    initial=shares,
    grow_epochs=st.integers(1, 12),
    shape=st.sampled_from(["root", "linear", "geometric", "step"]),
)
learnings = st.builds(
    Learning,
    temperature=st.one_of(st.none(), st.sampled_from([0.01, 0.05, 0.25, 1.0, 10.0])),
    uniform_mix=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    fraction=shares,
    replacement=st.booleans(),
)
schedulers: st.SearchStrategy[Scheduler] = st.one_of(learnings, heuristics, st.just(Uniform()))
# Built anew and not filtered: Hypothesis would throw most examples away.
without_replacement = st.one_of(
    st.builds(replace, learnings, replacement=st.just(False)), heuristics, st.just(Uniform())
)
plain_learnings = st.builds(replace, learnings, replacement=st.just(False), uniform_mix=st.just(0.0))
epochs = st.integers(0, 5)  # epoch 0 is burn-in of all but Uniform
seeds = st.one_of(st.integers(0, 5), st.integers(0, 2**63 - 1))
shard_numbers = st.sampled_from([1, 2, 3, 7])
scorer_numbers = st.sampled_from([1, 2, 5])
windows = st.sampled_from([1, 4, 17, 1 << 24])


@dataclass(frozen=True)
class Cut:
    """How rows are cut into shards, dealt to holders, and how large windows may be."""

    shards: int
    holders: int
    window_rows: int


cuts = st.builds(Cut, shards=shard_numbers, holders=scorer_numbers, window_rows=windows)


def make(score: np.ndarray, scheduler: Scheduler, seed: int, where: Cut, batch_size: int = 1) -> Coordinator:
    return local_coordinator(
        score,
        scheduler,
        shards=where.shards,
        holders=where.holders,
        window_rows=where.window_rows,
        seed=seed,
        batch_size=batch_size,
    )


WHOLE = Cut(shards=1, holders=1, window_rows=1 << 24)


# ---- the properties -----------------------------------------------------------------------------


@reproducible
@given(score=scores, scheduler=schedulers, seed=seeds, epoch=epochs, where=cuts)
def test_order_does_not_depend_on_the_cut(
    score: np.ndarray, scheduler: Scheduler, seed: int, epoch: int, where: Cut
) -> None:
    expected, whole = order_of(make(score, scheduler, seed, WHOLE), epoch)
    order, plan = order_of(make(score, scheduler, seed, where), epoch)
    event(f"{type(scheduler).__name__}, windows: {min(len(plan.window_ends), 3)}")
    assert order.dtype == np.int64
    assert order.tolist() == expected.tolist()
    assert (plan.size, plan.diagnostics) == (whole.size, whole.diagnostics)  # figures too, to the bit


@reproducible
@given(score=scores, scheduler=schedulers, seed=seeds, epoch=epochs, where=cuts)
def test_size_is_the_scheduler_s(score: np.ndarray, scheduler: Scheduler, seed: int, epoch: int, where: Cut) -> None:
    order, plan = order_of(make(score, scheduler, seed, where), epoch)
    expected = len(score) if scheduler.is_burn_in(epoch) else scheduler.epoch_size(epoch, len(score))
    assert len(order) == plan.size == plan.window_ends[-1] == expected
    assert (order >= 0).all()
    assert (order < len(score)).all()
    if not scheduler.replacement or scheduler.is_burn_in(epoch):
        assert len(np.unique(order)) == expected  # every row at most once
    # A window is larger than its limit only where keys are equal, which floats of 64 bits hardly are.
    assert max(np.diff((0, *plan.window_ends))) <= where.window_rows


@reproducible
@given(score=scores, scheduler=plain_learnings, seed=seeds)
def test_learning_is_a_weighted_permutation(score: np.ndarray, scheduler: Learning, seed: int) -> None:
    order, plan = order_of(make(score, scheduler, seed, Cut(3, 2, 17)), 2)
    expected = weighted_permutation(scheduler.weights(score), seed=seed, epoch=2, size=plan.size)
    assert order.tolist() == expected.tolist()


@reproducible
@given(score=scores, scheduler=heuristics, seed=seeds, epoch=st.integers(1, 14), where=cuts)
def test_heuristic_takes_exactly_the_best_rows(
    score: np.ndarray, scheduler: Heuristic, seed: int, epoch: int, where: Cut
) -> None:
    order, plan = order_of(make(score, scheduler, seed, where), epoch)
    best = np.lexsort((np.arange(len(score)), -score))[: scheduler.subset_size(epoch, len(score))]
    assert sorted(order.tolist()) == sorted(best.tolist())
    # Within the subset the order is that of a uniform draw: the scores' ranks play no part.
    keys = race_keys(np.ones(len(score)), seed=seed, epoch=epoch)
    assert order.tolist() == sorted(best.tolist(), key=lambda row: (keys[row], row))
    assert plan.diagnostics["eligible_rows"] == len(best)


@reproducible
@given(
    score=scores,
    scheduler=schedulers,
    where=cuts,
    batch_size=st.integers(1, 20),
    tail=st.sampled_from(["keep", "drop"]),
    data=st.data(),
)
def test_ranks_share_every_global_batch(
    score: np.ndarray, scheduler: Scheduler, where: Cut, batch_size: int, tail: str, data: st.DataObject
) -> None:
    batch_size = min(batch_size, len(score))
    coordinator = local_coordinator(
        score,
        scheduler,
        shards=where.shards,
        holders=where.holders,
        window_rows=where.window_rows,
        batch_size=batch_size,
        tail=tail,
    )
    whole, plan = order_of(coordinator, 1)
    node_of_row = np.array(data.draw(st.lists(st.integers(-1, 2), min_size=len(score), max_size=len(score))))
    for ranks in (1, 2, 4):
        rank_homes = np.array(data.draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks)))
        order, seen = Order(plan, lambda index: coordinator.window(1, index)), []
        for batch in range(plan.batches):
            ids = order.take(*plan.span(batch))
            owner = share_out(node_of_row[ids], rank_homes)
            parts = [ids[owner == rank].tolist() for rank in range(ranks)]
            # As multisets: with replacement a batch may hold a row twice.
            assert sorted(row for part in parts for row in part) == sorted(ids.tolist())
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            seen += ids.tolist()
        # The content of the epoch does not depend on the number of ranks.
        assert seen == whole[: plan.rows].tolist()
        if tail == "drop":
            assert len(seen) == plan.size // batch_size * batch_size
        else:
            assert len(seen) == plan.size


@reproducible
@given(
    score=scores,
    scheduler=schedulers,
    seed=seeds,
    before=cuts,
    after=cuts,
    batch_size=st.integers(1, 9),
    data=st.data(),
)
def test_resume_goes_on_where_it_stopped(
    score: np.ndarray,
    scheduler: Scheduler,
    seed: int,
    before: Cut,
    after: Cut,
    batch_size: int,
    data: st.DataObject,
) -> None:
    batch_size = min(batch_size, len(score))
    first = make(score, scheduler, seed, before, batch_size)
    whole, plan = order_of(first, 2)
    batch = data.draw(st.integers(0, plan.batches - 1), label="next global batch")
    saved = first.state()

    # Nothing but the saved scores and the three numbers (epoch, next global batch, score version).
    spans = cut(len(score), after.shards)
    fresh = Coordinator(
        LocalHolders([Holder(spans[index :: after.holders]) for index in range(after.holders)]),
        rows=len(score),
        scheduler=scheduler,
        seed=seed,
        batch_size=batch_size,
        window_rows=after.window_rows,
    )
    fresh.load(data.draw(st.permutations(saved)), first.version)
    again = fresh.plan(2)
    assert (again.version, again.size, again.batches) == (plan.version, plan.size, plan.batches)
    order = Order(again, lambda index: fresh.window(2, index))
    rest = [order.take(*again.span(index)).tolist() for index in range(batch, again.batches)]
    assert [row for ids in rest for row in ids] == whole[plan.span(batch)[0] :].tolist()


def place(order: np.ndarray, row: int) -> int:
    """Position of a row in an order; behind the last if it was not drawn."""
    found = np.flatnonzero(order == row)
    return int(found[0]) if len(found) else len(order)


@reproducible
@given(score=scores, scheduler=without_replacement, seed=seeds, epoch=st.integers(0, 5), data=st.data())
def test_a_higher_score_never_moves_a_row_back(
    score: np.ndarray, scheduler: Scheduler, seed: int, epoch: int, data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, len(score) - 1), label="row")
    raised = score.copy()
    raised[row] = data.draw(st.floats(float(score[row]), 1.0), label="its new score")
    low, _ = order_of(make(score, scheduler, seed, Cut(2, 1, 1 << 24)), epoch)
    high, _ = order_of(make(raised, scheduler, seed, Cut(2, 1, 1 << 24)), epoch)
    assert place(high, row) <= place(low, row)


@reproducible
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-200, 1e200)), min_size=1, max_size=60).map(np.array),
    factor=st.floats(1.0, 1e50),
    seed=seeds,
    data=st.data(),
)
def test_a_higher_weight_never_raises_a_key(weights: np.ndarray, factor: float, seed: int, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(weights) - 1), label="row")
    raised = weights.copy()
    raised[row] *= factor
    low, high = (race_keys(w, seed=seed, epoch=0, first_row=9) for w in (weights, raised))
    assert high[row] <= low[row]
    others = np.arange(len(weights)) != row
    assert high[others].tolist() == low[others].tolist()


@reproducible
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-100, 1e100)), min_size=1, max_size=60).map(np.array),
    power=st.integers(-400, 400),
    seed=seeds,
)
def test_only_ratios_of_weights_matter(weights: np.ndarray, power: int, seed: int) -> None:
    if not weights.any():
        return
    order = weighted_permutation(weights, seed=seed)
    assert sorted(order.tolist()) == np.flatnonzero(weights).tolist()
    assert weighted_permutation(weights * 2.0**power, seed=seed).tolist() == order.tolist()
