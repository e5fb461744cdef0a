"""Exact global answers from small messages: selection, windows and sums over many holders.

No process sees all rows. A holder counts its own 64-bit values by 16 of their bits. The sum of all holders'
counts tells in which of 65,536 bins an answer is, and four such rounds give its exact bits. Integer sums do
not depend on the order of summation, so the answers do not either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS
TOP_SHIFT = 64 - DIGIT_BITS

# (ascending prefixes, shift) -> (prefixes, 65536) int64: how many values v have v >> (shift + 16) ==
# prefix, by the next 16 bits (v >> shift) & 0xFFFF, summed over all holders.
Counts = Callable[[Sequence[int], int], np.ndarray]

# float64 = mantissa (53 bits) * 2^exponent; exact sums count in units of the smallest subnormal.
_EXACT_UNIT = 1074
_FRACTION_BITS = 52
_HALF_BITS = 26


def ordered_bits(values: np.ndarray) -> np.ndarray:
    """float64 values (n,) as uint64 that compare in the same order (-0.0 and 0.0 are equal)."""
    bits = (values + 0.0).view(np.uint64)  # -0.0 + 0.0 is 0.0
    negative = bits >> np.uint64(63) == 1
    return np.where(negative, ~bits, bits | np.uint64(1 << 63))


def digit_counts(values: np.ndarray, prefixes: Sequence[int], shift: int) -> np.ndarray:
    """One holder's part of `Counts` for uint64 `values` (n,)."""
    # Values below 2^63 as int64, which bincount accepts without a copy.
    if shift == TOP_SHIFT:
        return np.bincount((values >> np.uint64(shift)).view(np.int64), minlength=BINS)[None]
    wanted = np.array(prefixes, dtype=np.uint64)
    above = values >> np.uint64(shift + DIGIT_BITS)
    place = np.minimum(np.searchsorted(wanted, above), len(wanted) - 1)
    here = wanted[place] == above
    digits = (values[here] >> np.uint64(shift)) & np.uint64(BINS - 1)
    bins = place[here] * BINS + digits.view(np.int64)
    return np.bincount(bins, minlength=len(wanted) * BINS).reshape(len(wanted), BINS)


def radix_select(counts: Counts, rank: int) -> tuple[int, int]:
    """The value at position `rank` (from 0) in ascending order, and its rank among equal values.

    Args:
        counts: Counts of the values over all holders.
        rank: Rank of the value, from 0, below the number of values.
    """
    prefix = 0
    for shift in range(TOP_SHIFT, -1, -DIGIT_BITS):
        below = np.cumsum(counts([prefix], shift)[0])
        digit = int(np.searchsorted(below, rank, side="right"))
        assert digit < BINS, f"rank lies {rank - int(below[-1])} behind the last value"
        if digit:
            rank -= int(below[digit - 1])
        prefix = prefix << DIGIT_BITS | digit
    return prefix, rank


@dataclass(frozen=True)
class Window:
    """Values in [low, high), and their number."""

    low: int
    high: int
    rows: int


def within(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """Ascending positions (k,) int64 of the uint64 `values` (n,) in [low, high)."""
    # One comparison is enough: below `low` the difference wraps around to a large number.
    return np.flatnonzero(values - np.uint64(low) <= np.uint64(high - 1 - low))


class _Bins(NamedTuple):
    """Ranges of values in ascending order: (m,) first value, last value (uint64), rows (int64)."""

    first: np.ndarray
    last: np.ndarray
    rows: np.ndarray

    def of(self, chosen: np.ndarray | slice) -> _Bins:
        return _Bins(self.first[chosen], self.last[chosen], self.rows[chosen])


def cut_windows(counts: Counts, *, size: int, limit: int) -> list[Window]:
    """Cut the first `size` values into consecutive windows of at most `limit` values.

    A window is larger only if a single value occurs more often than `limit`. The last window may extend
    beyond `size`.

    Args:
        counts: Counts of the values over all holders.
        size: Number of values, at least 1 and at most as many as there are.
        limit: Size of the largest window.
    """
    bins = _digit_bins(counts([0], TOP_SHIFT)[0], 0, TOP_SHIFT)
    assert bins.rows.sum() >= size > 0, f"{size} values wanted, {bins.rows.sum()} there"
    for shift in range(TOP_SHIFT - DIGIT_BITS, -1, -DIGIT_BITS):
        bins = bins.of(np.cumsum(bins.rows) - bins.rows < size)
        large = bins.rows > limit
        if not large.any():
            break
        # One pass over the values refines all bins that are too large.
        prefixes = [int(first) >> (shift + DIGIT_BITS) for first in bins.first[large]]
        refined = zip(prefixes, counts(prefixes, shift), strict=True)
        # Bins of a sixteenth of a window are small enough to fill windows well, and there are few of them.
        finer = [_joined(_digit_bins(digits, prefix, shift), max(1, limit // 16)) for prefix, digits in refined]
        bins = _ascending([bins.of(~large), *finer])
    windows = _joined(bins.of(np.cumsum(bins.rows) - bins.rows < size), limit)
    return [Window(int(first), int(last) + 1, int(rows)) for first, last, rows in zip(*windows, strict=True)]


def _digit_bins(digits: np.ndarray, prefix: int, shift: int) -> _Bins:
    """The non-empty bins of counts (65536,) of the values below `prefix`."""
    filled = np.flatnonzero(digits)
    first = (np.uint64(prefix << DIGIT_BITS) | filled.astype(np.uint64)) << np.uint64(shift)
    return _Bins(first, first | np.uint64((1 << shift) - 1), digits[filled])


def _ascending(parts: Sequence[_Bins]) -> _Bins:
    first, last, rows = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return _Bins(first, last, rows).of(np.argsort(first))


def _joined(bins: _Bins, limit: int) -> _Bins:
    """Neighbouring bins joined into as few as possible of at most `limit` rows each (or a single bin)."""
    below = np.concatenate([[0], np.cumsum(bins.rows)])
    edges = [0]
    while edges[-1] < len(bins.rows):
        full = int(np.searchsorted(below, below[edges[-1]] + limit, side="right")) - 1
        edges.append(max(full, edges[-1] + 1))
    start, stop = np.array(edges[:-1], dtype=np.intp), np.array(edges[1:], dtype=np.intp)
    return _Bins(bins.first[start], bins.last[stop - 1], below[stop] - below[start])


def exact_sum(values: np.ndarray) -> Fraction:
    """Exact sum of finite float64 (n,).

    Floating-point sums depend on the grouping of rows. A fraction does not, so parts of any number of holders
    add up to the same total.
    """
    total = 0
    # A cache-sized part at a time; float64 adds integers below 2^27 exactly up to 2^26 of them.
    for start in range(0, len(values), 1 << 16):
        total += _exact_sum(np.ascontiguousarray(values[start : start + (1 << 16)]))
    return Fraction(total, 1 << _EXACT_UNIT)


def _exact_sum(values: np.ndarray) -> int:
    """Sum of (n,) values in units of 2^-1074."""
    bits = values.view(np.int64)
    exponent = bits >> _FRACTION_BITS & 0x7FF
    mantissa = bits & (1 << _FRACTION_BITS) - 1
    mantissa |= (exponent > 0).astype(np.int64) << _FRACTION_BITS  # normal numbers have a hidden bit
    total = 0
    for half, up in ((mantissa >> _HALF_BITS, _HALF_BITS), (mantissa & (1 << _HALF_BITS) - 1, 0)):
        sums = np.bincount(exponent, weights=np.copysign(half, values))
        for place in np.flatnonzero(sums):
            # Exponent 0 (subnormal) and 1 both count in units of 2^-1074.
            total += int(sums[place]) << (max(int(place), 1) - 1 + up)
    return total
