"""The plan of an epoch: its batches, its order by position, and which rank takes which row."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from bss_ray.errors import ConfigError, ScheduleError, WeightError
from bss_ray.sample.plan import Order, Plan, Tail, share_out
from bss_ray.schedule import Heuristic, Learning, Scheduler, Uniform
from tests.support import local_coordinator, order_of


def make_plan(size: int, batch_size: int, tail: Tail = "keep", window_ends: tuple[int, ...] | None = None) -> Plan:
    return Plan(epoch=0, version=0, size=size, batch_size=batch_size, tail=tail, window_ends=window_ends or (size,))


class TestPlan:
    @pytest.mark.parametrize(
        ("size", "batch_size", "tail", "spans"),
        [
            (10, 4, "keep", [(0, 4), (4, 8), (8, 10)]),
            (10, 4, "drop", [(0, 4), (4, 8)]),
            (8, 4, "keep", [(0, 4), (4, 8)]),
            (8, 4, "drop", [(0, 4), (4, 8)]),
            (3, 4, "keep", [(0, 3)]),
            (3, 4, "drop", []),
            (4, 4, "drop", [(0, 4)]),
            (3, 1, "keep", [(0, 1), (1, 2), (2, 3)]),
        ],
    )
    def test_batches(self, size: int, batch_size: int, tail: Tail, spans: list[tuple[int, int]]) -> None:
        plan = make_plan(size, batch_size, tail)
        assert plan.batches == len(spans)
        assert [plan.span(batch) for batch in range(plan.batches)] == spans
        assert plan.rows == sum(stop - start for start, stop in spans)

    @pytest.mark.parametrize("tail", ["keep", "drop"])
    def test_spans_follow_each_other(self, tail: Tail) -> None:
        for size in range(1, 40):
            for batch_size in range(1, 12):
                plan = make_plan(size, batch_size, tail)
                edges = [edge for batch in range(plan.batches) for edge in plan.span(batch)]
                assert edges[1:-1:2] == edges[2::2]
                assert plan.rows == (edges[-1] if edges else 0)
                assert size - plan.rows == (size % batch_size if tail == "drop" else 0)


class TestOrder:
    ids = np.array([7, 3, 9, 0, 5, 8, 2, 6, 1, 4])
    ends = (3, 4, 9, 10)

    def order(self) -> tuple[Order, list[int]]:
        read: list[int] = []

        def window(index: int) -> np.ndarray:
            read.append(index)
            return np.split(self.ids, self.ends[:-1])[index]

        return Order(make_plan(10, 4, window_ends=self.ends), window), read

    def test_every_span_across_windows(self) -> None:
        for start in range(11):
            for stop in range(start, 11):
                order, _ = self.order()
                taken = order.take(start, stop)
                assert taken.tolist() == self.ids[start:stop].tolist()
                assert taken.dtype == np.int64

    def test_reads_each_window_once_on_the_way(self) -> None:
        order, read = self.order()
        for start in range(0, 10, 2):
            order.take(start, start + 2)
        assert read == [0, 1, 2, 3]

    def test_reads_only_what_it_needs(self) -> None:
        order, read = self.order()
        order.take(5, 8)
        assert read == [2]  # resuming in the middle does not replay the epoch

    def test_may_go_back(self) -> None:
        order, _ = self.order()
        assert order.take(8, 10).tolist() == [1, 4]
        assert order.take(0, 5).tolist() == [7, 3, 9, 0, 5]


class TestShareOut:
    def test_sizes_within_one_and_every_row_once(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(300):
            ranks, nodes, rows = int(rng.integers(1, 9)), int(rng.integers(1, 5)), int(rng.integers(1, 40))
            rank_homes = rng.integers(0, nodes, ranks)
            homes = rng.integers(-1, nodes + 1, rows)  # also homes without a rank, and unknown ones (-1)
            owner = share_out(homes, rank_homes)
            assert owner.shape == (rows,)
            sizes = np.bincount(owner, minlength=ranks)  # fails on a row without a rank (-1)
            assert len(sizes) == ranks
            assert sizes.sum() == rows
            assert sizes.max() - sizes.min() <= 1

    def test_home_node_is_as_full_as_its_room_allows(self) -> None:
        rng = np.random.default_rng(1)
        for _ in range(300):
            ranks, nodes, rows = int(rng.integers(1, 9)), int(rng.integers(1, 4)), int(rng.integers(1, 40))
            rank_homes, homes = rng.integers(0, nodes, ranks), rng.integers(0, nodes, rows)
            owner = share_out(homes, rank_homes)
            sizes = np.bincount(owner, minlength=ranks)
            for node in range(nodes):
                room = int(sizes[rank_homes == node].sum())
                stayed = int((rank_homes[owner[homes == node]] == node).sum())
                assert stayed == min(room, int((homes == node).sum()))

    def test_all_rows_at_home_stay_there_when_there_is_room(self) -> None:
        homes, rank_homes = np.array([1, 0, 1, 0, 0, 1, 1, 0]), np.array([0, 1])
        assert (rank_homes[share_out(homes, rank_homes)] == homes).all()

    def test_all_rows_on_one_node_are_levelled_out(self) -> None:
        assert np.bincount(share_out(np.zeros(10, int), np.array([0, 0, 1]))).tolist() == [4, 3, 3]

    def test_fewer_rows_than_ranks(self) -> None:
        sizes = np.bincount(share_out(np.array([2, 2]), np.array([0, 1, 2, 2])), minlength=4)
        assert sizes.sum() == 2
        assert sizes.max() == 1

    def test_depends_on_its_arguments_alone(self) -> None:
        # Ranks work it out each for themselves: they must all come to the same answer.
        homes, rank_homes = np.array([0, 1, 1, 0, 2, 1]), np.array([1, 0, 1])
        first = share_out(homes, rank_homes)
        assert (share_out(homes.copy(), rank_homes.copy()) == first).all()
        assert homes.tolist() == [0, 1, 1, 0, 2, 1]


class PositiveOnly(Scheduler):
    """Weight 0 for rows of negative score: none of the built-in schedulers can run out of rows."""

    uses_scores: ClassVar[bool] = True

    def weights(self, score: np.ndarray) -> np.ndarray:
        return (score > 0).astype(np.float64)


class Huge(Scheduler):
    """Weights of a range whose squares leave float64 at both ends."""

    uses_scores: ClassVar[bool] = True

    def weights(self, score: np.ndarray) -> np.ndarray:
        return 10.0 ** (200 * score)


class TestCoordinatorPlans:
    score = np.linspace(-1, 1, 50)

    def test_figures_of_a_uniform_plan(self) -> None:
        _, plan = order_of(local_coordinator(self.score, Uniform(), batch_size=8), 0)
        assert (plan.epoch, plan.version, plan.size, plan.batches) == (0, 1, 50, 7)
        assert plan.diagnostics["eligible_rows"] == 50
        assert plan.diagnostics["effective_sample_size"] == pytest.approx(50)
        assert plan.diagnostics["largest_share"] == pytest.approx(1 / 50)

    def test_figures_of_a_weighted_plan(self) -> None:
        _, plan = order_of(local_coordinator(self.score, Learning(temperature=0.3), shards=3, holders=2), 1)
        weights = np.exp(self.score / 0.3)
        assert plan.diagnostics["effective_sample_size"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
        assert plan.diagnostics["largest_share"] == pytest.approx(weights.max() / weights.sum())

    @pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (1.0, 1.0), (-1.0, -1.0)])
    def test_figures_of_extreme_weights(self, low: float, high: float) -> None:
        order, plan = order_of(local_coordinator(np.linspace(low, high, 50), Huge(), shards=3, holders=2), 1)
        assert sorted(order.tolist()) == list(range(50))
        weights = np.ones(50) if low == high else 10.0 ** (200 * (np.linspace(low, high, 50) - high))
        assert plan.diagnostics["effective_sample_size"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
        assert plan.diagnostics["largest_share"] == pytest.approx(weights.max() / weights.sum())

    def test_figures_of_a_heuristic_plan(self) -> None:
        _, plan = order_of(local_coordinator(self.score, Heuristic(initial=0.1, grow_epochs=40), shards=3), 1)
        assert plan.size == plan.diagnostics["eligible_rows"] == 9  # floor(0.1865 * 50)

    def test_uniform_mix_blends_the_distribution(self) -> None:
        scheduler = Learning(temperature=0.3, uniform_mix=0.25)
        _, plan = order_of(local_coordinator(self.score, scheduler, shards=3, holders=2), 1)
        weights = np.exp(self.score / 0.3)
        share = 0.75 * weights / weights.sum() + 0.25 / 50
        assert plan.diagnostics["largest_share"] == pytest.approx(share.max())
        assert plan.diagnostics["effective_sample_size"] == pytest.approx(1 / (share**2).sum())

    def test_full_uniform_mix_is_uniform(self) -> None:
        mixed, _ = order_of(local_coordinator(self.score, Learning(temperature=0.3, uniform_mix=1.0)), 1)
        uniform, _ = order_of(local_coordinator(self.score, Uniform()), 1)
        assert mixed.tolist() == uniform.tolist()

    def test_burn_in_is_uniform_over_all_rows(self) -> None:
        uniform, _ = order_of(local_coordinator(self.score, Uniform()), 0)
        for scheduler in (Heuristic(), Learning(temperature=0.1, fraction=0.5), Learning(replacement=True)):
            burn_in, _ = order_of(local_coordinator(self.score, scheduler), 0)
            assert burn_in.tolist() == uniform.tolist()

    def test_scores_are_needed_after_burn_in(self) -> None:
        coordinator = local_coordinator(self.score, Learning())
        coordinator.reset()
        assert coordinator.plan(0).version == 0
        with pytest.raises(ScheduleError, match=r"epoch 1 of Learning .* burn_in"):
            coordinator.plan(1)

    def test_more_rows_than_weight(self) -> None:
        with pytest.raises(WeightError, match=r"50 different rows, and 25 of 50"):
            local_coordinator(self.score, PositiveOnly(), shards=3, holders=2).plan(1)

    def test_no_weight_at_all(self) -> None:
        with pytest.raises(WeightError, match=r"50 different rows, and 0 of 50"):
            local_coordinator(-np.ones(50), PositiveOnly(), shards=3, holders=2).plan(1)

    @pytest.mark.parametrize(
        ("score", "message"),
        [(float("nan"), "finite"), (float("inf"), "finite"), (-1.5, "negative")],
    )
    def test_bad_scores_name_their_rows(self, score: float, message: str) -> None:
        scores = self.score.copy()
        scores[[31, 44]] = score
        # Holders see their own rows; the ids must be those of the data set.
        with pytest.raises(WeightError, match=rf"{message}.*31, 44"):
            local_coordinator(scores, Learning(), shards=2, holders=2).plan(1)

    @pytest.mark.parametrize("batch_size", [0, -3])
    def test_batch_size_at_least_one(self, batch_size: int) -> None:
        with pytest.raises(ConfigError, match=f"batch_size.*{batch_size}"):
            local_coordinator(self.score, Uniform(), batch_size=batch_size)

    def test_batch_larger_than_the_data(self) -> None:
        with pytest.raises(ConfigError, match="batch_size=51, rows=50"):
            local_coordinator(self.score, Uniform(), batch_size=51)

    def test_unknown_tail(self) -> None:
        with pytest.raises(ConfigError, match="'kep'; did you mean 'keep'"):
            local_coordinator(self.score, Uniform(), tail="kep")
