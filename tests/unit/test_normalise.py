"""Normalisation over all rows: the same whoever holds them; ranks, which one outlier cannot flatten."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import scipy.stats

from bss_ray.errors import ConfigError, WeightError
from bss_ray.measure import normalise
from bss_ray.measure.normalise import NORMALISATIONS, MinMaxNorm, RankNorm, join
from bss_ray.measure.score import Accumulation, balance_scores
from bss_ray.sample.client import LocalHolders
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.state import MeasureBatch
from bss_ray.schedule import Learning
from tests.support import cut

KINDS = sorted(NORMALISATIONS)


def ranks_of(values: np.ndarray) -> np.ndarray:
    """Average ranks in [0, 1]; NaN left out."""
    known = ~np.isnan(values)
    found = np.full(len(values), np.nan)
    found[known] = (scipy.stats.rankdata(values[known], method="average") - 1) / (known.sum() - 1)
    return found


def coarse(rng: np.random.Generator, size: int) -> np.ndarray:
    """Float32 values that differ, if at all, in their leading 24 bits."""
    bits = rng.normal(0, 3, size).astype(np.float32).view(np.uint32) & np.uint32(0xFFFFFF00)
    return bits.view(np.float32)


def bits(values: np.ndarray) -> list[int]:
    """What tells -0.0 from 0.0."""
    return np.asarray(values, np.float64).view(np.uint64).tolist()


@pytest.mark.parametrize("kind", KINDS)
class TestBothKinds:
    """min-max, and rank."""

    def columns(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        values = coarse(rng, 90)
        holes = values.copy()
        holes[rng.random(90) < 0.3] = np.nan
        zeros = rng.choice(np.array([-0.0, 0.0, 1.0], np.float32), 90)
        return {
            "any": values,
            "ties": np.round(values),
            "some without": holes,
            "zeros of both signs": zeros,
            "the smallest are zeros": np.where(rng.random(90) < 0.5, zeros, np.abs(values)).astype(np.float32),
            "constant": np.full(90, 0.25, np.float32),
            "one of 90": np.where(np.arange(90) == 71, np.float32(3), np.float32(np.nan)),
            "none": np.full(90, np.nan, np.float32),
        }

    @pytest.mark.parametrize("edges", [[0, 90], [0, 1, 2, 90], [0, 30, 30, 60, 90], list(range(0, 91, 9))])
    def test_the_union_of_parts_is_the_whole_to_the_bit(self, kind: str, edges: list[int]) -> None:
        of = NORMALISATIONS[kind].of
        for name, values in self.columns().items():
            expected = bits(of(values).apply(values))
            parts = [of(values[start:stop]) for start, stop in itertools.pairwise(edges)]
            for order in (parts, parts[::-1], parts[1::2] + parts[::2]):
                assert bits(join(order).apply(values)) == expected, name
            assert bits(join([join(parts[:1]), *map(pickle.loads, map(pickle.dumps, parts[1:]))]).apply(values)) == (
                expected
            ), name

    def test_nan_is_left_out_and_stays(self, kind: str) -> None:
        values = np.array([3.0, np.nan, 1.0, 2.0, np.nan], np.float32)
        found = NORMALISATIONS[kind].of(values).apply(values)
        assert found[[0, 2, 3]].tolist() == [1.0, 0.0, 0.5]
        assert np.isnan(found[[1, 4]]).all()

    def test_range(self, kind: str) -> None:
        for name, values in self.columns().items():
            found = NORMALISATIONS[kind].of(values).apply(values)
            assert found.dtype == np.float64
            assert (np.isnan(found) == np.isnan(values)).all(), name
            known = found[~np.isnan(found)]
            assert ((known >= 0) & (known <= 1)).all(), name

    @pytest.mark.parametrize("constant", [0.0, -0.0, -3.5, 7.0])
    def test_constant_columns_become_zero(self, kind: str, constant: float) -> None:
        values = np.array([constant, np.nan, constant, constant], np.float32)
        found = NORMALISATIONS[kind].of(values).apply(values)
        assert found[[0, 2, 3]].tolist() == [0, 0, 0]
        assert np.isnan(found[1])

    def test_zeros_of_both_signs_are_one_value(self, kind: str) -> None:
        for values in ([-0.0, 0.0, 2.0], [0.0, -0.0, 2.0], [-2.0, 0.0, -0.0]):
            column = np.array(values, np.float32)
            found = NORMALISATIONS[kind].of(column).apply(column)
            zeros = found[column == 0]
            assert zeros[0] == zeros[1]

    def test_no_rows(self, kind: str) -> None:
        nothing = np.empty(0, np.float32)
        empty, some = NORMALISATIONS[kind].of(nothing), np.array([1, 2, 4], np.float32)
        assert len(empty.apply(nothing)) == 0
        whole = NORMALISATIONS[kind].of(some)
        for parts in ([empty, whole], [whole, empty], [empty, empty, whole]):
            assert bits(join(parts).apply(some)) == bits(whole.apply(some))


class TestBounds:
    def test_min_and_max(self) -> None:
        values = np.array([0.3, -2.0, 5.0, 0.3], np.float32)
        wide = values.astype(float)
        np.testing.assert_allclose(MinMaxNorm.of(values).apply(values), (wide + 2) / 7, rtol=1e-15)

    def test_the_sign_of_zero_does_not_depend_on_the_order(self) -> None:
        # 0.0 - 0.0 is 0.0, and -0.0 - 0.0 is -0.0: of two equal minima one must not win by its place.
        values = np.array([0.0, -0.0, 1.0], np.float32)
        each = [MinMaxNorm.of(values[row : row + 1]) for row in range(3)]
        found = {tuple(bits(MinMaxNorm.union(order).apply(values))) for order in itertools.permutations(each)}
        assert found == {tuple(bits(MinMaxNorm.of(values).apply(values)))}


class TestRanks:
    @pytest.fixture(params=["sorted", "tables"], autouse=True)
    def either_way(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Few values are sorted, many looked up in tables."""
        if request.param == "tables":
            monkeypatch.setattr(normalise, "_MANY", 1)

    def test_parts_may_be_few_where_the_whole_is_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = coarse(np.random.default_rng(7), 900)
        expected = bits(RankNorm.of(values).apply(values))
        monkeypatch.setattr(normalise, "_MANY", 500)
        parts = [RankNorm.of(values[start:stop]) for start, stop in ((0, 100), (100, 700), (700, 900))]
        assert bits(pickle.loads(pickle.dumps(RankNorm.union(parts))).apply(values)) == expected

    @pytest.mark.parametrize("seed", range(3))
    def test_against_scipy(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        values = coarse(rng, 500)
        values[rng.random(500) < 0.2] = values[0]  # ties
        values[rng.random(500) < 0.1] = np.nan
        values[rng.random(500) < 0.1] = -0.0
        values[rng.random(500) < 0.1] = 0.0
        found = RankNorm.of(values).apply(values)
        np.testing.assert_allclose(found, ranks_of(values), rtol=1e-14)
        assert (values[~np.isnan(values)] < 0).any()

    def test_many_ties(self) -> None:
        values = np.random.default_rng(3).integers(-4, 5, 300).astype(np.float32)
        np.testing.assert_allclose(RankNorm.of(values).apply(values), ranks_of(values), rtol=1e-14)

    def test_known_numbers(self) -> None:
        values = np.array([-1.0, 5.0, 2.0, 2.0, -7.0], np.float32)
        # Rows below, and half of the other rows of the same value, of four others.
        assert RankNorm.of(values).apply(values).tolist() == [1 / 4, 4 / 4, 2.5 / 4, 2.5 / 4, 0 / 4]

    def test_values_that_differ_behind_their_leading_bits_are_one(self) -> None:
        one = np.float32(1)
        near = np.nextafter(one, np.float32(2))
        far = np.float32(1 + 2**-15)
        values = np.array([far, near, one, -one, -near, -far], np.float32)
        assert RankNorm.of(values).apply(values).tolist() == [5 / 5, 3.5 / 5, 3.5 / 5, 1.5 / 5, 1.5 / 5, 0 / 5]

    def test_of_two_values(self) -> None:
        values = np.array([0.5, 0.25], np.float32)
        assert RankNorm.of(values).apply(values).tolist() == [1, 0]

    def test_extremes(self) -> None:
        values = np.array([3e38, -3e38, 1e-45, -1e-45, 0.0, 2e-38], np.float32)
        assert RankNorm.of(values).apply(values).tolist() == pytest.approx([1, 0, 0.5, 0.2, 0.5, 0.8])

    def test_of_many_values(self) -> None:
        values = coarse(np.random.default_rng(4), 200_000)
        np.testing.assert_allclose(RankNorm.of(values).apply(values), ranks_of(values), rtol=1e-12)


class TestOneOutlier:
    """A single huge loss, as of a mislabelled or broken row."""

    def scores(self, information: np.ndarray, kind: str) -> np.ndarray:
        similarity = np.full(len(information), 0.5, np.float32)
        return balance_scores(similarity, information, normalise=kind)  # type: ignore[arg-type]

    def test_rank_scores_of_the_others_stay(self) -> None:
        information = np.random.default_rng(5).permutation(np.linspace(0.1, 3, 50)).astype(np.float32)
        worst = int(information.argmax())
        before = self.scores(information, "rank")
        information[worst] = 1e6
        assert self.scores(information, "rank").tolist() == before.tolist()

    def test_min_and_max_are_flattened_by_it(self) -> None:
        information = np.random.default_rng(5).permutation(np.linspace(0.1, 3, 50)).astype(np.float32)
        others = np.arange(50) != information.argmax()
        before = self.scores(information, "minmax")
        information[~others] = 1e6
        after = self.scores(information, "minmax")
        assert np.ptp(before[others]) > 0.9
        assert np.ptp(after[others]) < 1e-5


# ---- scores, as one process and as holders make them -----------------------------------------------


def reference_scores(similarity: np.ndarray, information: np.ndarray, kind: str, unpaired: float) -> np.ndarray:
    def norm(values: np.ndarray) -> np.ndarray:
        if kind == "rank":
            return ranks_of(values)
        low, high = np.nanmin(values), np.nanmax(values)
        return np.asarray((values.astype(float) - low) / (high - low))

    agreement = norm(similarity)
    return np.where(np.isnan(agreement), unpaired, agreement) - norm(information)


def measures(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    similarity, information = coarse(rng, rows), np.abs(coarse(rng, rows))
    similarity[rng.random(rows) < 0.25] = np.nan
    information[rng.random(rows) < 0.2] = information[0]
    return similarity, information


ROWS = 70
CUTS: list[Any] = [
    [[(0, 70)]],
    [[(0, 20), (20, 50)], []],
    [[(50, 20)], [(0, 7), (8, 42)], [(7, 1)]],
    [cut(70, 35)[index::3] for index in range(3)],
]


@pytest.mark.parametrize("kind", KINDS)
class TestScores:
    """min-max, and rank."""

    @pytest.mark.parametrize(("unpaired", "value"), [("neutral", 0.5), ("lowest", 0.0)])
    def test_rows_without_a_similarity(self, kind: str, unpaired: Any, value: float) -> None:
        similarity, information = measures(200, seed=6)
        found = balance_scores(similarity, information, normalise=kind, unpaired=unpaired)  # type: ignore[arg-type]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, reference_scores(similarity, information, kind, value), atol=1e-6)

    def test_rows_without_a_similarity_are_an_error_unless_said_otherwise(self, kind: str) -> None:
        similarity, information = np.array([0.1, np.nan, 0.3, np.nan]), np.arange(4.0)
        for settings in ({}, {"unpaired": "error"}):
            with pytest.raises(WeightError, match=r"similarity must be finite.*2 rows; first row ids 1, 3"):
                balance_scores(similarity, information, normalise=kind, **settings)  # type: ignore[arg-type]
        with pytest.raises(WeightError, match=r"similarity must be finite.*1 row; first row ids 2"):
            balance_scores(np.array([np.nan, 0, np.inf]), np.arange(3.0), normalise=kind, unpaired="neutral")  # type: ignore[arg-type]
        with pytest.raises(WeightError, match="information must be finite"):
            balance_scores(np.arange(2.0), np.array([1, np.nan]), normalise=kind, unpaired="neutral")  # type: ignore[arg-type]

    @pytest.mark.parametrize("dealt", CUTS)
    @pytest.mark.parametrize("unpaired", ["neutral", "lowest"])
    def test_holders_publish_the_same_bits(self, kind: str, dealt: Any, unpaired: Any) -> None:
        accumulation = Accumulation(momentum=0.4, normalise=kind, unpaired=unpaired)  # type: ignore[arg-type]
        holders = LocalHolders([Holder(spans) for spans in dealt])
        coordinator = Coordinator(holders, rows=ROWS, scheduler=Learning(), batch_size=8, accumulation=accumulation)
        score = None
        for version in (1, 2, 3):
            similarity, information = measures(ROWS, seed=10 + version)
            rows = np.random.default_rng(version).permutation(ROWS)
            for part in np.array_split(rows, 4):
                holders.deliver(MeasureBatch.of(part, similarity[part], information[part]))
            assert coordinator.publish(version, expected=ROWS).version == version
            score = balance_scores(
                similarity,
                information,
                previous=score,
                momentum=0.4,
                normalise=kind,  # type: ignore[arg-type]
                unpaired=unpaired,
            )
            parts = sorted(coordinator.state(), key=lambda part: part.first_row)
            published = np.concatenate([part.score for part in parts])
            assert published.view(np.uint32).tolist() == score.view(np.uint32).tolist()

    def test_rows_that_are_not_measured_again_count_with_what_they_had(self, kind: str) -> None:
        """A publication of some rows normalises over the latest measures of all."""
        holders = LocalHolders([Holder([(0, 30)]), Holder([(30, 40)])])
        accumulation = Accumulation(normalise=kind)  # type: ignore[arg-type]
        coordinator = Coordinator(holders, rows=ROWS, scheduler=Learning(), batch_size=8, accumulation=accumulation)
        old, new = measures(ROWS, seed=20), measures(ROWS, seed=21)
        everyone, some = np.arange(ROWS), np.arange(5, 60, 3)
        for version, (rows, (similarity, information)) in enumerate(((everyone, old), (some, new)), start=1):
            holders.deliver(MeasureBatch.of(rows, similarity[rows], information[rows]))
            coordinator.publish(version, expected=len(rows))
        latest = [column.copy() for column in old]
        for column, fresh in zip(latest, new, strict=True):
            column[some] = fresh[some]
        expected = reference_scores(*old, kind, 0.5)
        expected[some] = reference_scores(*latest, kind, 0.5)[some]
        published = np.concatenate([part.score for part in coordinator.state()])
        np.testing.assert_allclose(published, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalise": "ranks"}, "unknown normalise 'ranks'; did you mean 'rank'"),
        ({"unpaired": "lower"}, "unknown unpaired 'lower'; did you mean 'lowest'"),
    ],
)
def test_unknown_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Accumulation(**settings)
    with pytest.raises(ConfigError, match=message):
        balance_scores(np.zeros(2), np.zeros(2), **settings)
