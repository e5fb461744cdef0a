"""A holder of scores: runs of neighbouring shards, keys that are kept for the next windows, rows that were drawn."""

from __future__ import annotations

import numpy as np
import pytest

from bss_ray.errors import WeightError
from bss_ray.sample import holder as holder_module
from bss_ray.sample.client import LocalHolders
from bss_ray.sample.coordinator import NEGLECT_EPOCHS, Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.plan import Draw
from bss_ray.sample.radix import TOP_SHIFT
from bss_ray.sample.state import LostStateError, ScoreBlock
from bss_ray.schedule import Heuristic, Learning, Scheduler, Uniform
from tests.support import cut, local_coordinator, order_of, saved

ROWS = 3000
SCORE = np.random.default_rng(0).uniform(-1, 1, ROWS).astype(np.float32)
DRAW = Draw(seed=1, epoch=2, version=1, scheduler=Learning(temperature=0.5))


def holder(spans: list[tuple[int, int]]) -> Holder:
    holder = Holder(spans)
    holder.load(saved(SCORE), 1)
    return holder


class TestRuns:
    def test_neighbouring_shards_are_one(self) -> None:
        parts = holder([(0, 100), (100, 50), (200, 10), (210, 5)]).state(1)
        assert [(part.first_row, len(part.score)) for part in parts] == [(0, 150), (200, 15)]
        assert parts[1].score.tolist() == SCORE[200:215].tolist()

    def test_a_block_of_ids_is_drawn_once_whatever_the_shards(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # 300 shards of ten rows lie in one block: its 65,536 numbers must not be drawn 300 times.
        drawn: list[int] = []
        real = holder_module.race_keys
        monkeypatch.setattr(
            holder_module,
            "race_keys",
            lambda *args, **place: (drawn.append(place["first_row"]), real(*args, **place))[1],
        )
        holder(cut(ROWS, 300)).key_counts(DRAW, [0], TOP_SHIFT)
        assert drawn == [0]

    def test_sixteen_bytes_a_row(self) -> None:
        (part,) = holder([(0, ROWS)]).state(1)
        assert sum(values.nbytes for values in part.arrays.values()) == 16 * ROWS


class TestPreparedKeys:
    """A holder of many windows' rows makes its keys once for several windows."""

    @pytest.fixture
    def passes(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Counts the passes over all keys."""
        passes: list[int] = []
        real = Holder._prepare
        monkeypatch.setattr(Holder, "_prepare", lambda self, *args: (passes.append(1), real(self, *args))[1])
        return passes

    @pytest.mark.parametrize("reach", [1, 200, 1000, 10_000])
    def test_same_order_however_many_are_kept(
        self, reach: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, _ = order_of(local_coordinator(SCORE, DRAW.scheduler), 2)
        passes.clear()
        monkeypatch.setattr(holder_module, "WINDOW_ROWS", reach)
        order, plan = order_of(local_coordinator(SCORE, DRAW.scheduler, window_rows=100), 2)
        assert order.tolist() == whole.tolist()
        assert len(plan.window_ends) > 25
        assert len(passes) <= -(-ROWS // reach) + 5

    def test_windows_in_any_order(self) -> None:
        coordinator = local_coordinator(SCORE, DRAW.scheduler, holders=2, shards=4, window_rows=100)
        forward, plan = order_of(coordinator, 2)
        for index in reversed(range(len(plan.window_ends))):
            start = plan.window_ends[index - 1] if index else 0
            assert coordinator.window(2, index).tolist() == forward[start : plan.window_ends[index]].tolist()

    def test_another_epoch_or_version_is_not_served_from_the_old_keys(self) -> None:
        coordinator = local_coordinator(SCORE, DRAW.scheduler)
        second, third = order_of(coordinator, 2)[0], order_of(coordinator, 3)[0]
        assert second.tolist() != third.tolist()
        assert order_of(coordinator, 2)[0].tolist() == second.tolist()
        coordinator.load(saved(-SCORE), 2)
        fresh = local_coordinator(-SCORE, DRAW.scheduler)
        assert order_of(coordinator, 2)[0].tolist() == order_of(fresh, 2)[0].tolist()


class TestDrawnRows:
    def marks(self, coordinator: Coordinator) -> np.ndarray:
        return np.concatenate([part.last_drawn for part in sorted(coordinator.state(), key=lambda p: p.first_row)])

    @pytest.mark.parametrize("window_rows", [64, 1 << 24])
    @pytest.mark.parametrize("replacement", [False, True])
    def test_exactly_the_rows_of_the_order(self, replacement: bool, window_rows: int) -> None:
        scheduler = Learning(temperature=0.5, fraction=0.3, replacement=replacement)
        coordinator = local_coordinator(SCORE, scheduler, shards=3, holders=2, window_rows=window_rows)
        order, plan = order_of(coordinator, 7)
        marks = self.marks(coordinator)
        assert plan.size == 900
        assert sorted(set(order.tolist())) == np.flatnonzero(marks).tolist()
        assert set(marks[order].tolist()) == {8}

    def test_neglected_rows(self) -> None:
        scheduler = Learning(burn_in=1, temperature=0.05, fraction=0.1)
        coordinator = local_coordinator(SCORE, scheduler, holders=2, shards=2)
        last = np.full(ROWS, -1)
        for epoch in range(9):
            last[order_of(coordinator, epoch)[0]] = epoch
            expected = 0 if epoch + 1 < NEGLECT_EPOCHS else int((last <= epoch - NEGLECT_EPOCHS).sum())
            assert coordinator.review(epoch).neglected_rows == expected
        assert expected > ROWS // 10
        warning = coordinator.review(8).warnings["neglected"]
        assert f"{expected} of {ROWS} rows" in warning
        assert "uniform_mix (now 0)" in warning

    def test_the_marks_are_saved_and_restored(self) -> None:
        scheduler = Learning(temperature=0.05, fraction=0.1)
        straight, first = (local_coordinator(SCORE, scheduler, shards=3) for _ in range(2))
        for epoch in range(4):
            order_of(straight, epoch)
            order_of(first, epoch)
        second = local_coordinator(SCORE, scheduler, shards=5, holders=2)
        second.load(first.state(), first.version)
        for epoch in range(4, 8):
            order_of(straight, epoch)
            order_of(second, epoch)
            assert second.review(epoch) == straight.review(epoch)

    def test_a_curriculum_leaves_rows_out_on_purpose(self) -> None:
        coordinator = local_coordinator(SCORE, Heuristic(initial=0.1, grow_epochs=1000))
        for epoch in range(1, 9):
            order_of(coordinator, epoch)
        review = coordinator.review(8)
        assert review.neglected_rows > ROWS // 2
        assert review.warnings == {}


class TestWarnings:
    @pytest.mark.parametrize(
        ("scheduler", "knob"),
        [
            (
                Learning(temperature=0.01),
                "Raise temperature (now 0.01), or mix in the uniform distribution by uniform_mix",
            ),
            (Learning(temperature=0.02, fraction=0.5), "Raise temperature (now 0.02)"),
        ],
    )
    def test_a_peaked_distribution_names_the_knob(self, scheduler: Scheduler, knob: str) -> None:
        plan = local_coordinator(SCORE, scheduler).plan(1)
        text = plan.warnings["peaked"]
        assert knob in text
        assert f"effective sample size is {plan.diagnostics['effective_sample_size']:.1f}" in text
        assert f"draws {plan.size} of {ROWS} rows" in text

    @pytest.mark.parametrize("scheduler", [Uniform(), Learning(), Learning(temperature=0.25), Heuristic()])
    def test_none_where_there_is_nothing_to_say(self, scheduler: Scheduler) -> None:
        assert local_coordinator(SCORE, scheduler).plan(1).warnings == {}

    def test_figures(self) -> None:
        plan = local_coordinator(SCORE, Learning(temperature=0.25, fraction=0.5)).plan(1)
        weights = np.exp(SCORE.astype(np.float64) / 0.25)
        p = weights / weights.sum()
        assert plan.diagnostics == pytest.approx(
            {
                "eligible_rows": ROWS,
                "effective_sample_size": 1 / (p**2).sum(),
                "entropy": -(p * np.log(p)).sum(),
                "largest_share": p.max(),
                "expected_draws": 0.5,
            }
        )


class BadScheduler(Learning):
    def weights(self, score: np.ndarray) -> np.ndarray:
        return np.where(score > 0.9, np.nan, 1.0)


def test_bad_weights_of_a_scheduler_name_the_rows() -> None:
    bad = np.flatnonzero(SCORE > 0.9)
    for shards, holders in ((1, 1), (7, 3)):  # counted over all holders, and the first of all
        with pytest.raises(WeightError, match=f"{len(bad)} rows; first row ids {bad[0]}, {bad[1]}"):
            local_coordinator(SCORE, BadScheduler(), shards=shards, holders=holders).plan(1)


class ShortScheduler(Learning):
    def weights(self, score: np.ndarray) -> np.ndarray:
        return np.ones(len(score) - 1)


def test_a_scheduler_that_returns_too_few_weights() -> None:
    with pytest.raises(WeightError, match=r"weights must return one weight a row; \(3000,\) scores gave"):
        local_coordinator(SCORE, ShortScheduler()).plan(1)


def test_every_call_that_depends_on_scores_names_their_version() -> None:
    fresh = Holder([(0, 10)])
    for call in (
        lambda: fresh.moments(DRAW),
        lambda: fresh.key_counts(DRAW, [0], TOP_SHIFT),
        lambda: fresh.window(DRAW, 0, 1 << 62),
        lambda: fresh.state(1),
    ):
        with pytest.raises(LostStateError):
            call()


def test_a_missing_part_of_the_scores_is_no_silent_zero() -> None:
    coordinator = Coordinator(LocalHolders([Holder([(0, 10)])]), rows=10, scheduler=Uniform(), batch_size=1)
    with pytest.raises(ValueError, match="7 of the 10 rows"):
        coordinator.load([ScoreBlock.empty(0, 7)], 1)
