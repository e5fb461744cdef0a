"""Exact global answers from counts: selection, windows, sums and the order of bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from bss_ray.sample import radix
from bss_ray.sample.radix import (
    Counts,
    cut_windows,
    digit_counts,
    exact_sum,
    ordered_bits,
    radix_select,
    within,
)


def counts_of(*holders: np.ndarray) -> Counts:
    """`Counts` over the uint64 values of some holders."""
    return lambda prefixes, shift: np.sum([digit_counts(values, prefixes, shift) for values in holders], axis=0)


# Values that crowd in few of the top bins, tie, and touch both ends of the range.
VALUES = {
    "spread": np.random.default_rng(0).integers(0, 2**64, 400, dtype=np.uint64),
    "crowded": np.random.default_rng(1).integers(2**40, 2**40 + 300, 400, dtype=np.uint64),
    "ends": np.array([0, 2**64 - 1, 0, 2**63, 2**63 - 1, 2**64 - 1, 1, 2**16, 2**16 - 1, 2**48], dtype=np.uint64),
    "one": np.array([12345], dtype=np.uint64),
    "equal": np.full(50, 2**60 + 7, dtype=np.uint64),
    "keys": np.random.default_rng(2).standard_exponential(400).view(np.uint64),
}
all_values = pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())


class TestSelect:
    @all_values
    def test_every_rank(self, values: np.ndarray) -> None:
        ascending = np.sort(values).tolist()
        for rank in range(0, len(values), max(1, len(values) // 40)):
            value, among_equals = radix_select(counts_of(values), rank)
            assert value == ascending[rank]
            assert among_equals == rank - ascending.index(value)

    @all_values
    def test_any_number_of_holders(self, values: np.ndarray) -> None:
        whole = radix_select(counts_of(values), len(values) // 2)
        for holders in (2, 3, 7):
            # Also holders without values.
            assert radix_select(counts_of(*np.array_split(values, holders)), len(values) // 2) == whole

    def test_rank_behind_the_last_value_is_a_bug(self) -> None:
        with pytest.raises(AssertionError):
            radix_select(counts_of(VALUES["ends"]), len(VALUES["ends"]))


class TestWindows:
    @pytest.mark.parametrize("limit", [1, 7, 64, 10_000])
    @all_values
    def test_cover_in_order_within_the_limit(self, values: np.ndarray, limit: int) -> None:
        windows = cut_windows(counts_of(values), size=len(values), limit=limit)
        held = [np.sort(values[(values >= w.low) & (values <= w.high - 1)]) for w in windows]
        assert np.concatenate(held).tolist() == np.sort(values).tolist()
        for window, inside in zip(windows, held, strict=True):
            assert window.rows == len(inside) > 0
            # The one exception: a single value that occurs more often than the limit.
            assert window.rows <= limit or len(np.unique(inside)) == 1
        for before, after in itertools.pairwise(windows):
            assert before.high <= after.low

    def test_a_bin_larger_than_the_limit_is_refined(self) -> None:
        asked: list[int] = []
        values = VALUES["crowded"]  # all in one bin of the top 16 bits, and of the next 16

        def counts(prefixes: Sequence[int], shift: int) -> np.ndarray:
            asked.append(shift)
            return digit_counts(values, prefixes, shift)

        windows = cut_windows(counts, size=400, limit=50)
        assert max(window.rows for window in windows) <= 50
        assert sorted(set(asked), reverse=True) == [48, 32, 16, 0]

    def test_no_refinement_where_none_is_needed(self) -> None:
        asked: list[int] = []

        def counts(prefixes: Sequence[int], shift: int) -> np.ndarray:
            asked.append(shift)
            return digit_counts(VALUES["keys"], prefixes, shift)

        assert len(cut_windows(counts, size=400, limit=400)) == 1
        assert asked == [48]  # one round of messages is the normal case

    @pytest.mark.parametrize("size", [1, 13, 200, 399])
    def test_stops_where_the_size_is_reached(self, size: int) -> None:
        values = VALUES["spread"]
        windows = cut_windows(counts_of(values), size=size, limit=20)
        rows = np.cumsum([window.rows for window in windows])
        assert rows[-1] >= size
        assert len(rows) == 1 or rows[-2] < size  # no window beyond the one that reaches it

    def test_windows_do_not_depend_on_the_holders(self) -> None:
        values = VALUES["keys"]
        whole = cut_windows(counts_of(values), size=300, limit=9)
        assert cut_windows(counts_of(*np.array_split(values, 5)), size=300, limit=9) == whole

    def test_more_than_there_are_is_a_bug(self) -> None:
        with pytest.raises(AssertionError):
            cut_windows(counts_of(VALUES["one"]), size=2, limit=5)


TINY = np.nextafter(0.0, 1.0)
ADDENDS = {
    "uniform": np.random.default_rng(3).random(500),
    "any bits": np.random.default_rng(4).integers(0, 0x7FE0 << 48, 300).view(np.float64),
    "twelve hundred orders": 2.0 ** np.random.default_rng(5).uniform(-900, 900, 300),
    "subnormal": np.array([TINY, 3 * TINY, 2.0**-1022 - TINY, 2.0**-1022, 2.0**-1030 + TINY, 1.0]),
    "zeros": np.zeros(4),
    "nothing": np.empty(0),
    "all mantissa bits": np.array([np.nextafter(1.0, 0.0), np.nextafter(2.0, 0.0), 2.0**53 - 1, 2.0**53 + 2]),
    "of both signs": np.random.default_rng(8).normal(size=300) * 2.0 ** np.arange(-150, 150),
    "lost in floats": np.array([1.0] * 50 + [1e16, 1e-300] + [1.0] * 9),
}
all_addends = pytest.mark.parametrize("values", ADDENDS.values(), ids=ADDENDS.keys())


class TestExactSum:
    @all_addends
    def test_equals_rational_sum(self, values: np.ndarray) -> None:
        exact = sum((Fraction(value) for value in values.tolist()), start=Fraction(0))
        assert exact_sum(values) == exact

    @all_addends
    def test_independent_of_the_split_and_the_order(self, values: np.ndarray) -> None:
        whole = exact_sum(values)
        for parts in (2, 3, 11):
            assert sum(exact_sum(part) for part in np.array_split(values, parts)) == whole
        assert exact_sum(np.random.default_rng(6).permutation(values)) == whole

    def test_total_is_correctly_rounded(self) -> None:
        values = ADDENDS["uniform"]
        exact = sum((Fraction(value) for value in values.tolist()), start=Fraction(0))
        assert float(exact_sum(values)) == float(exact)
        assert float(exact_sum(np.array([0.1]))) == 0.1
        assert exact_sum(np.empty(0)) == 0

    def test_float_sums_do_depend_on_the_order(self) -> None:
        # Why this function exists: without such a case the ones above would prove nothing.
        values = ADDENDS["lost in floats"]
        assert np.cumsum(values)[-1] != np.cumsum(values[::-1])[-1]


class TestOrderedBits:
    values = np.array([-np.inf, -1e300, -1.0, -0.5, -1e-300, -5e-324, 0.0, 5e-324, 1e-300, 0.5, 1.0, 1e300, np.inf])

    def test_same_order(self) -> None:
        bits = ordered_bits(self.values)
        assert bits.dtype == np.uint64
        assert (bits[:-1] < bits[1:]).all()

    def test_same_order_for_scores(self) -> None:
        scores = np.random.default_rng(7).uniform(-1, 1, 1000)
        assert (np.argsort(ordered_bits(scores), kind="stable") == np.argsort(scores, kind="stable")).all()

    def test_zeros_are_alike(self) -> None:
        # Else the negated score 0.0 and -0.0 would not tie, and the row id would not decide.
        positive, negative = ordered_bits(np.array([0.0, -0.0])).tolist()
        assert positive == negative

    def test_equal_values_have_equal_bits(self) -> None:
        assert (ordered_bits(self.values) == ordered_bits(self.values.copy())).all()


def test_refined_bins_do_not_swallow_their_neighbours() -> None:
    # Two crowded bins and a thin one between them: pieces of the outer ones must not be joined over it.
    crowd = np.arange(40, dtype=np.uint64)
    values = np.concatenate([crowd + np.uint64(digit << 48) for digit in (3, 4, 5)] + [[np.uint64(4 << 48)]])
    values = np.delete(values, slice(41, 79))
    windows = cut_windows(counts_of(values), size=len(values), limit=20)
    held = np.concatenate([np.sort(values[within(values, w.low, w.high)]) for w in windows])
    assert held.tolist() == np.sort(values).tolist()


def test_digits_of_one_holder() -> None:
    values = np.array([0x0001_0002_0003_0004, 0x0001_0002_0003_0005, 0x0001_FFFF_0000_0000], dtype=np.uint64)
    (top,) = digit_counts(values, [0], radix.TOP_SHIFT)
    assert (top[1], top.sum(), len(top)) == (3, 3, radix.BINS)
    (second,) = digit_counts(values, [0x0001], 32)
    assert (second[0x0002], second[0xFFFF], second.sum()) == (2, 1, 3)
    (last,) = digit_counts(values, [0x0001_0002_0003], 0)
    assert (last[4], last[5], last.sum()) == (1, 1, 2)
    assert digit_counts(values, [0x0002], 32).sum() == 0


def test_digits_of_several_prefixes_in_one_pass() -> None:
    values = np.array([0x0001_0002_0003_0004, 0x0007_0002_0003_0005, 0x0001_FFFF_0000_0000, 5], dtype=np.uint64)
    prefixes = [0x0001, 0x0003, 0x0007]
    together = digit_counts(values, prefixes, 32)
    assert together.shape == (3, radix.BINS)
    for row, prefix in zip(together, prefixes, strict=True):
        assert (row == digit_counts(values, [prefix], 32)[0]).all()
    assert together.sum() == 3  # the value below prefix 0 is nobody's
