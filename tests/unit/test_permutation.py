"""The draw: its probabilities against brute force, its reproducibility, and what it refuses.

Statistical tests have fixed seeds, so they pass or fail for good; p > 1e-3 leaves room for the many
of them, and a wrong distribution misses it by many orders at these sample sizes.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy import stats

from bss_ray.errors import ConfigError, WeightError
from bss_ray.sample import holder, permutation
from bss_ray.sample.permutation import (
    BLOCK_ROWS,
    MAX_WEIGHT,
    MIN_WEIGHT,
    arrivals,
    exponentials,
    race_keys,
    sort_by_key,
    weighted_permutation,
)
from bss_ray.schedule import Heuristic, Learning, Uniform
from tests.support import local_coordinator, order_of

WEIGHTS = np.array([0.5, 3.0, 1.0, 0.2, 2.0])
EPOCHS = 3000

KNOWN_ORDER = [6, 11, 7, 9, 10, 0, 8, 4, 2, 3, 5, 1]
KNOWN_KEYS = [0.700649069619311, 1.4109056822314137, 0.8923672653052143]
KNOWN_OFFSET_ORDER = [5, 4, 3, 10, 6, 11, 7, 8, 9, 2, 0, 1]
KNOWN_DRAWS = [6, 11, 7, 9, 9, 7, 11, 7, 10, 8, 9, 11]


def successive_sampling(weights: np.ndarray, size: int) -> dict[tuple[int, ...], float]:
    """Probability of each ordered draw of `size` rows, by enumeration."""
    found = {}
    for rows in itertools.permutations(range(len(weights)), size):
        probability, left = 1.0, weights.sum()
        for row in rows:
            probability *= weights[row] / left
            left -= weights[row]
        found[rows] = probability
    assert sum(found.values()) == pytest.approx(1.0)
    return found


def p_value(found: Counter[Any], expected: dict[Any, float]) -> float:
    """Chi-square test of counts of categories against their probabilities."""
    assert set(found) <= set(expected), "a category of probability 0 occurred"
    draws = sum(found.values())
    cells = [(found[category], draws * probability) for category, probability in expected.items()]
    assert min(cell[1] for cell in cells) >= 5, "too few draws for a chi-square test"
    return float(stats.chisquare([cell[0] for cell in cells], [cell[1] for cell in cells]).pvalue)


@pytest.fixture(scope="module")
def orders() -> np.ndarray:
    """(EPOCHS, 5): the order of five rows in many epochs of one seed."""
    return np.array([weighted_permutation(WEIGHTS, seed=11, epoch=epoch) for epoch in range(EPOCHS)])


class TestProbabilities:
    def test_every_order_is_a_permutation(self, orders: np.ndarray) -> None:
        assert (np.sort(orders, axis=1) == np.arange(5)).all()

    def test_first_position(self, orders: np.ndarray) -> None:
        expected = {row: weight / WEIGHTS.sum() for row, weight in enumerate(WEIGHTS)}
        assert p_value(Counter(orders[:, 0].tolist()), expected) > 1e-3

    @pytest.mark.parametrize("size", [2, 3])
    def test_inclusion(self, orders: np.ndarray, size: int) -> None:
        # The set that is drawn, as one category a draw: rows of one draw are not independent of each other.
        expected: Counter[tuple[int, ...]] = Counter()
        for rows, probability in successive_sampling(WEIGHTS, size).items():
            expected[tuple(sorted(rows))] += probability  # type: ignore[assignment]
        found = Counter(tuple(sorted(order[:size])) for order in orders.tolist())
        assert p_value(found, dict(expected)) > 1e-3

    def test_order_of_the_first_two(self, orders: np.ndarray) -> None:
        found = Counter((order[0], order[1]) for order in orders.tolist())
        assert p_value(found, successive_sampling(WEIGHTS, 2)) > 1e-3

    def test_inclusion_of_each_row_within_a_binomial_bound(self, orders: np.ndarray) -> None:
        included = successive_sampling(WEIGHTS, 2)
        for row in range(5):
            probability = sum(p for rows, p in included.items() if row in rows)
            count = int((orders[:, :2] == row).any(axis=1).sum())
            assert stats.binomtest(count, EPOCHS, probability).pvalue > 1e-3

    def test_epochs_are_independent(self, orders: np.ndarray) -> None:
        share = WEIGHTS / WEIGHTS.sum()
        heavy = [1, 2, 4]  # the rest together, for enough draws in each cell
        names = [row if row in heavy else -1 for row in range(5)]
        expected: dict[tuple[int, int], float] = {}
        for a, b in itertools.product(range(5), repeat=2):
            pair = (names[a], names[b])
            expected[pair] = expected.get(pair, 0.0) + share[a] * share[b]
        firsts = [names[row] for row in orders[:, 0].tolist()]
        assert p_value(Counter(zip(firsts[::2], firsts[1::2], strict=True)), expected) > 1e-3

    @pytest.mark.parametrize(("seed", "epoch", "first_row"), [(0, 0, 0), (5, 3, 2 * BLOCK_ROWS)])
    def test_rows_of_a_block_are_independent(self, seed: int, epoch: int, first_row: int) -> None:
        # Consecutive fives of rows are races of their own.
        keys = race_keys(np.tile(WEIGHTS, 13_000), seed=seed, epoch=epoch, first_row=first_row).reshape(-1, 5)
        found = Counter(map(tuple, np.argsort(keys, axis=1)[:, :2].tolist()))
        assert p_value(found, successive_sampling(WEIGHTS, 2)) > 1e-3

    @pytest.mark.parametrize("round_", [0, 1])
    def test_exponentials(self, round_: int) -> None:
        draws = exponentials(seed=9, epoch=2, block=4, round_=round_)
        assert draws.shape == (BLOCK_ROWS,)
        assert stats.kstest(draws, "expon").pvalue > 1e-3

    def test_streams_differ(self) -> None:
        base = {"seed": 1, "epoch": 1, "block": 1, "round_": 1}
        streams = [base, *({**base, name: 2} for name in base)]
        # Swapped arguments must not meet either.
        streams += [{"seed": 1, "epoch": 2, "block": 3, "round_": 4}, {"seed": 1, "epoch": 3, "block": 2, "round_": 4}]
        firsts = [exponentials(**stream)[:4].tolist() for stream in streams]
        assert len(set(map(tuple, firsts))) == len(streams)


class TestReplacement:
    """Draws with replacement come from the coordinator: `Learning(replacement=True)`."""

    def draws(self, score: np.ndarray, temperature: float, epochs: int, **settings: Any) -> np.ndarray:
        """(epochs, N): N draws in each epoch."""
        scheduler = Learning(burn_in=0, replacement=True, temperature=temperature)
        coordinator = local_coordinator(score, scheduler, **settings)
        return np.array([order_of(coordinator, epoch)[0] for epoch in range(epochs)])

    def test_rows_and_consecutive_pairs(self) -> None:
        score = np.tile([-0.8, -0.1, 0.3, 0.6, 0.9], 8)
        draws = self.draws(score, 1.0, epochs=100, shards=2, holders=2)
        share = np.exp(score) / np.exp(score).sum()
        assert p_value(Counter(draws.ravel().tolist()), dict(enumerate(share))) > 1e-3

        level = draws % 5
        share_of_level = [share[row::5].sum() for row in range(5)]
        pairs = {(a, b): share_of_level[a] * share_of_level[b] for a in range(5) for b in range(5)}
        # Every second pair, so that no draw is counted twice.
        found = Counter(zip(level[:, ::2].ravel().tolist(), level[:, 1::2].ravel().tolist(), strict=True))
        assert p_value(found, pairs) > 1e-3

    def test_a_heavy_row_beyond_the_block_rounds(self) -> None:
        # 9 of 10 draws are one row: it arrives far more often than a block draws rounds for.
        score = np.zeros(40)
        score[13] = 1.0
        temperature = 1 / np.log(9 * 39)
        draws = self.draws(score, temperature, epochs=120)
        heavy = draws == 13
        assert stats.binomtest(int(heavy.sum()), heavy.size, 0.9).pvalue > 1e-3
        share = {row: 0.9 if row == 13 else 0.1 / 39 for row in range(40)}
        assert p_value(Counter(draws.ravel().tolist()), share) > 1e-3
        # Neither early nor late in the epoch: positions are alike.
        halves = [int(heavy[:, :20].sum()), int(heavy[:, 20:].sum())]
        assert stats.binomtest(halves[0], sum(halves), 0.5).pvalue > 1e-3

    def test_as_many_draws_as_asked_for(self) -> None:
        coordinator = local_coordinator(np.zeros(30), Learning(replacement=True, fraction=0.5))
        assert len(order_of(coordinator, 1)[0]) == 15
        lone = local_coordinator(np.zeros(1), Learning(replacement=True))
        assert order_of(lone, 1)[0].tolist() == [0]

    def test_first_arrival_is_the_key_without_replacement(self) -> None:
        weights = np.linspace(0.1, 3, 200)
        keys, rows = arrivals(weights, horizon=1.0, seed=4, epoch=2, first_row=500)
        race = race_keys(weights, seed=4, epoch=2, first_row=500)
        first = np.full(200, np.inf)
        np.minimum.at(first, rows - 500, keys)
        assert (first == np.where(race <= 1.0, race, np.inf)).all()
        assert (np.diff(rows) >= 0).all()

    def test_thousands_of_arrivals_of_one_row(self) -> None:
        # Past the block's rounds and over several chunks of the row's own generator: one Poisson process.
        keys, rows = arrivals(np.array([2.0]), horizon=4000.0, seed=4, epoch=2)
        assert (rows == 0).all()
        assert (np.diff(keys) > 0).all()
        assert stats.kstest(np.diff(keys, prepend=0.0) * 2.0, "expon").pvalue > 1e-3
        assert abs(len(keys) - 8000) < 4 * np.sqrt(8000)

    @pytest.mark.parametrize("heaviest", [3.0, 500.0])
    def test_a_longer_horizon_only_adds(self, heaviest: float) -> None:
        weights = np.array([0.0, 1.0, heaviest])
        keys, rows = arrivals(weights, horizon=5.0, seed=4, epoch=2)
        for horizon in (0.01, 0.3, 2.0, 4.9):
            short_keys, short_rows = arrivals(weights, horizon=horizon, seed=4, epoch=2)
            assert short_keys.tolist() == keys[keys <= horizon].tolist()
            assert short_rows.tolist() == rows[keys <= horizon].tolist()
        assert 0 not in rows


class TestSizes:
    weights = np.random.default_rng(0).exponential(size=300)

    @pytest.mark.parametrize("size", [0, 1, 2, 149, 150, 151, 299, 300])
    def test_a_shorter_draw_is_the_beginning_of_the_whole(self, size: int) -> None:
        whole = weighted_permutation(self.weights, seed=1)
        part = weighted_permutation(self.weights, seed=1, size=size)
        assert part.dtype == np.int64
        assert part.tolist() == whole[:size].tolist()

    def test_ascending_keys(self) -> None:
        keys = race_keys(self.weights, seed=1, epoch=0)
        assert weighted_permutation(self.weights, seed=1).tolist() == np.argsort(keys, kind="stable").tolist()

    def test_equal_keys_stay_in_the_order_of_rows(self) -> None:
        keys = np.array([2.0, 1.0, 2.0, 0.0, 1.0, 2.0, np.inf])
        assert sort_by_key(keys).tolist() == [3, 1, 4, 0, 2, 5, 6]

    def test_weight_zero_is_never_drawn(self) -> None:
        weights = np.zeros(2000)
        weights[::3] = self.weights.repeat(3)[: len(weights[::3])]
        weights[4] = -0.0
        positive = set(np.flatnonzero(weights).tolist())
        for epoch in range(20):
            order = weighted_permutation(weights, seed=2, epoch=epoch)
            assert len(order) == len(positive)
            assert set(order.tolist()) == positive

    def test_more_than_torch_can_draw(self) -> None:
        # torch.multinomial refuses more than 2^24 categories.
        rows = 2**24 + 3
        weights = np.full(rows, 1e-9)
        weights[-2:] = 1e9
        assert set(weighted_permutation(weights, seed=0, size=2).tolist()) == {rows - 2, rows - 1}

    def test_accepts_lists_and_other_dtypes(self) -> None:
        expected = weighted_permutation(np.array([1.0, 2.0, 3.0]), seed=5).tolist()
        for weights in ([1, 2, 3], np.array([1, 2, 3], np.int32), np.array([1, 2, 3], np.float32)):
            assert weighted_permutation(weights, seed=5).tolist() == expected

    def test_weights_are_left_alone(self) -> None:
        before = self.weights.copy()
        weighted_permutation(self.weights, seed=1)
        assert (self.weights == before).all()


class TestScale:
    weights = np.random.default_rng(1).uniform(0.01, 2.0, 500)

    @pytest.mark.parametrize("power", [-600, -3, 1, 64, 600])
    def test_a_power_of_two_changes_nothing(self, power: int) -> None:
        expected = weighted_permutation(self.weights, seed=3)
        assert weighted_permutation(self.weights * 2.0**power, seed=3).tolist() == expected.tolist()

    def test_extreme_range(self) -> None:
        weights = np.array([1e-200, 1.0, 1e200, 1e-100, 1e100])
        for epoch in range(50):
            # Factors of 1e100 leave nothing to chance.
            assert weighted_permutation(weights, seed=0, epoch=epoch).tolist() == [2, 4, 1, 3, 0]

    @pytest.mark.parametrize("scale", [1e-200, 1e200])
    def test_ratios_at_the_ends_of_the_range(self, scale: float) -> None:
        firsts = np.argmin(race_keys(np.tile(WEIGHTS * scale, 4000), seed=0, epoch=0).reshape(-1, 5), axis=1)
        expected = {row: weight / WEIGHTS.sum() for row, weight in enumerate(WEIGHTS)}
        assert p_value(Counter(firsts.tolist()), expected) > 1e-3

    def test_keys_stay_finite_at_the_bounds(self) -> None:
        keys = race_keys(np.tile([MIN_WEIGHT, MAX_WEIGHT], 30_000), seed=0, epoch=0)
        assert np.isfinite(keys).all()
        assert (keys > 0).all()


class TestSlices:
    """A row's key depends on its id and weight alone, not on the rows beside it."""

    rows = 2 * BLOCK_ROWS + 5000
    weights = np.random.default_rng(2).exponential(size=rows)
    spans = pytest.mark.parametrize(
        ("start", "stop"),
        [
            (0, 10),
            (17, 400),
            (BLOCK_ROWS - 3, BLOCK_ROWS + 4),
            (BLOCK_ROWS, BLOCK_ROWS + 1),
            (1000, rows),
            (rows - 1, rows),
        ],
    )

    @spans
    def test_keys_are_those_in_the_whole(self, start: int, stop: int) -> None:
        whole = race_keys(self.weights, seed=6, epoch=2)
        part = race_keys(self.weights[start:stop], seed=6, epoch=2, first_row=start)
        assert part.tolist() == whole[start:stop].tolist()

    @spans
    def test_order_is_the_whole_order_less_the_other_rows(self, start: int, stop: int) -> None:
        whole = weighted_permutation(self.weights, seed=6, epoch=2)
        part = weighted_permutation(self.weights[start:stop], seed=6, epoch=2, first_row=start)
        assert part.tolist() == whole[(whole >= start) & (whole < stop)].tolist()

    def test_short_draw_of_a_slice(self) -> None:
        whole = weighted_permutation(self.weights[100:300], seed=6, first_row=100)
        assert weighted_permutation(self.weights[100:300], seed=6, first_row=100, size=7).tolist() == whole[:7].tolist()

    def test_coordinator_over_several_blocks(self) -> None:
        # The same order from 7 shards, 3 holders and small windows as from one array.
        score = np.random.default_rng(3).uniform(-1, 1, self.rows).astype(np.float32)
        scheduler = Learning(temperature=0.3, fraction=0.4)
        coordinator = local_coordinator(score, scheduler, shards=7, holders=3, window_rows=20_000, seed=6)
        order, plan = order_of(coordinator, 1)
        expected = weighted_permutation(scheduler.weights(score), seed=6, epoch=1, size=plan.size)
        assert len(plan.window_ends) > 2
        assert (order == expected).all()

    @pytest.mark.parametrize(
        "scheduler", [Uniform(), Heuristic(initial=0.3), Learning(uniform_mix=0.2), Learning(replacement=True)]
    )
    def test_chunks_of_a_holder_do_not_matter(self, scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        score = np.round(np.random.default_rng(4).uniform(-1, 1, 100), 1)  # with ties across chunks
        whole, _ = order_of(local_coordinator(score, scheduler, shards=2), 1)
        monkeypatch.setattr(holder, "_CHUNK_ROWS", 7)
        chunked, _ = order_of(local_coordinator(score, scheduler, shards=2), 1)
        assert chunked.tolist() == whole.tolist()


class TestSort:
    """`sort_by_key` against NumPy's stable sort, where its words of 64 bits are too short."""

    rng = np.random.default_rng(9)
    cases: ClassVar[dict[str, np.ndarray]] = {
        "nothing": np.empty(0),
        "one": np.array([3.0]),
        "equal": np.full(1000, 0.25),
        "few different": rng.integers(0, 5, 5000) / 4,
        "exponentials": rng.standard_exponential(100_000),
        "any positive bits": rng.integers(0, 0x7FF0 << 48, 5000).view(np.float64),
        # Leading bits are equal almost everywhere, and the rest decides.
        "one far away": np.append(1.0 + np.arange(5000)[::-1] * 2.0**-52, 1e300),
        "some neighbours": np.concatenate(
            [rng.standard_exponential(5000), 1 + np.arange(90) * 2.0**-52, [1e-300, 1e300]]
        ),
    }

    @pytest.mark.parametrize("keys", cases.values(), ids=cases.keys())
    def test_stable(self, keys: np.ndarray) -> None:
        assert sort_by_key(keys).tolist() == np.argsort(keys, kind="stable").tolist()

    @pytest.mark.parametrize("size", [1, 17, 5000, 20_000])
    def test_windows_of_one_process(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = np.random.default_rng(1).random(20_000) + 0.01
        whole = weighted_permutation(weights, seed=1)
        monkeypatch.setattr(permutation, "_PART_ROWS", 999)
        monkeypatch.setattr(permutation, "_SORT_ROWS", 700)
        assert weighted_permutation(weights, seed=1, size=size).tolist() == whole[:size].tolist()

    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_any_number_of_threads(self, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        weights = np.random.default_rng(1).random(200_000)
        whole = weighted_permutation(weights, seed=1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(permutation, "_SORT_ROWS", 30_000)
        assert (weighted_permutation(weights, seed=1) == whole).all()


class TestTies:
    """Equal keys hardly ever occur; all the more must they not depend on who holds the rows."""

    @pytest.mark.parametrize("window_rows", [1, 10, 1 << 24])
    @pytest.mark.parametrize(("shards", "holders"), [(1, 1), (7, 1), (7, 3)])
    def test_lower_row_id_first(
        self, shards: int, holders: int, window_rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(permutation, "exponentials", lambda *_, **__: np.ones(BLOCK_ROWS))
        score = np.random.default_rng(5).integers(-2, 3, 80) / 2
        scheduler = Learning(fraction=0.8)
        coordinator = local_coordinator(score, scheduler, shards=shards, holders=holders, window_rows=window_rows)
        expected = np.lexsort((np.arange(80), -score))[:64].tolist()
        assert order_of(coordinator, 1)[0].tolist() == expected
        assert weighted_permutation(scheduler.weights(score), seed=0, size=64).tolist() == expected
        assert weighted_permutation(scheduler.weights(score), seed=0, size=9).tolist() == expected[:9]


class TestReproducible:
    def test_known_order(self) -> None:
        # Saved runs rely on these numbers: a change here is a new format of checkpoints.
        weights = np.arange(1, 13) / 4
        assert weighted_permutation(weights, seed=2025, epoch=3).tolist() == KNOWN_ORDER
        assert race_keys(weights[:3], seed=2025, epoch=3).tolist() == KNOWN_KEYS
        offset = weighted_permutation(weights, seed=2025, epoch=3, first_row=BLOCK_ROWS - 6) - (BLOCK_ROWS - 6)
        assert offset.tolist() == KNOWN_OFFSET_ORDER
        drawn, _ = order_of(local_coordinator(np.linspace(-1, 1, 12), Learning(replacement=True), seed=2025), 3)
        assert drawn.tolist() == KNOWN_DRAWS

    def test_other_process_other_hash_seed(self) -> None:
        program = (
            "import numpy as np\n"
            "from bss_ray.sample.permutation import weighted_permutation\n"
            "weights = np.random.default_rng(0).exponential(size=1000)\n"
            "print(*weighted_permutation(weights, seed=7, epoch=1, first_row=65_000))\n"
        )
        expected = weighted_permutation(
            np.random.default_rng(0).exponential(size=1000), seed=7, epoch=1, first_row=65_000
        )
        for hash_seed in ("1", "4242"):
            environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
            run = subprocess.run(
                [sys.executable, "-c", program],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
                timeout=120,
            )
            assert [int(row) for row in run.stdout.split()] == expected.tolist()

    def test_global_random_state_is_neither_read_nor_written(self) -> None:
        def draw() -> list[list[int]]:
            score = np.linspace(-1, 1, 40)
            schedulers = (Uniform(), Heuristic(), Learning(), Learning(replacement=True, uniform_mix=0.1))
            return [
                weighted_permutation(WEIGHTS, seed=1).tolist(),
                *(order_of(local_coordinator(score, scheduler), 1)[0].tolist() for scheduler in schedulers),
            ]

        def seed_all(seed: int) -> None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)

        seed_all(1)
        python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        first = draw()
        assert random.getstate() == python
        after = np.random.get_state()
        assert (after[0], after[2:]) == (numpy[0], numpy[2:])
        assert (after[1] == numpy[1]).all()
        assert torch.equal(torch.get_rng_state(), pytorch)
        seed_all(2)
        assert draw() == first

    def test_seeds_and_epochs_give_other_orders(self) -> None:
        weights = np.ones(30)
        orders = [weighted_permutation(weights, seed=s, epoch=e).tolist() for s in range(6) for e in range(6)]
        assert len(set(map(tuple, orders))) == 36

    def test_every_64_bit_seed_counts(self) -> None:
        # Large seeds come from hashes; none of their bits may be lost on the way into the generator.
        seeds = [0, 1, 2**31, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1]
        orders = {seed: tuple(weighted_permutation(np.ones(30), seed=seed).tolist()) for seed in seeds}
        assert len(set(orders.values())) == len(seeds)


class TestRefuses:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, bad: float) -> None:
        weights = np.ones(1000)
        weights[[17, 90, 91, 200, 300, 400, 500]] = bad
        with pytest.raises(WeightError, match=r"finite.*7 rows; first row ids 17, 90, 91, 200, 300\)$"):
            weighted_permutation(weights, seed=0)

    def test_row_ids_are_those_of_the_data_set(self) -> None:
        with pytest.raises(WeightError, match=r"1 row; first row ids 1002"):
            weighted_permutation([1.0, 1.0, np.nan], seed=0, first_row=1000)

    def test_negative(self) -> None:
        with pytest.raises(WeightError, match=r"negative.*2 rows; first row ids 1, 3"):
            weighted_permutation([1.0, -1e-12, 2.0, -3.0], seed=0)

    @pytest.mark.parametrize("size", [None, 0, 2])
    def test_all_zero(self, size: int | None) -> None:
        with pytest.raises(WeightError, match="all 4 weights are 0"):
            weighted_permutation(np.zeros(4), seed=0, size=size)

    def test_no_rows(self) -> None:
        with pytest.raises(WeightError, match="all 0 weights"):
            weighted_permutation([], seed=0)

    @pytest.mark.parametrize("size", [4, 6, 100, -1])
    def test_more_rows_than_weight(self, size: int) -> None:
        with pytest.raises(WeightError) as error:
            weighted_permutation([1.0, 0.0, 2.0, 0.0, 0.5], seed=0, size=size)
        for word in ("0 to 3 rows", "of 5", f"size={size}"):
            assert word in str(error.value)

    @pytest.mark.parametrize("weights", [[1.0, 1e-300], [1e300, 1.0], [5e-324, 0.0]])
    def test_beyond_the_range_of_keys(self, weights: list[float]) -> None:
        with pytest.raises(WeightError, match=r"\[2\^-900, 2\^900\].*rescale"):
            weighted_permutation(weights, seed=0)

    def test_not_one_number_a_row(self) -> None:
        with pytest.raises(WeightError, match=r"\(2, 3\)"):
            weighted_permutation(np.ones((2, 3)), seed=0)

    @pytest.mark.parametrize("seed", [-1, 2**64, 2**70])
    def test_seed_out_of_range(self, seed: int) -> None:
        with pytest.raises(ConfigError, match=rf"seed must lie in .*{seed}"):
            weighted_permutation([1.0], seed=seed)
        with pytest.raises(ConfigError, match=rf"{seed}"):
            local_coordinator(np.zeros(3), Uniform(), seed=seed)
