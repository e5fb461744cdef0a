"""Exact global answers from small messages: selection, windows and sums over many holders.

No process sees all rows. A holder counts its own 64-bit values by 16 of their bits; the counts of all
holders, summed, tell in which of 65,536 bins an answer lies, and four such rounds pin it down to the
bit. Integer sums do not depend on the order of summation, so neither does any answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS
TOP_SHIFT = 64 - DIGIT_BITS

# (prefix, shift) -> (65536,) int64: how many values v have v >> (shift + 16) == prefix, by the next
# 16 bits (v >> shift) & 0xFFFF, summed over all holders.
Counts = Callable[[int, int], np.ndarray]

# float64 = mantissa (53 bits) * 2^exponent; exact sums count in units of the smallest subnormal.
_EXACT_UNIT = 1074


def ordered_bits(values: np.ndarray) -> np.ndarray:
    """float64 values (n,) as uint64 that compare in the same order (-0.0 and 0.0 alike)."""
    bits = (values + 0.0).view(np.uint64)  # -0.0 + 0.0 is 0.0
    negative = bits >> np.uint64(63) == 1
    return np.where(negative, ~bits, bits | np.uint64(1 << 63))


def digit_counts(values: np.ndarray, prefix: int, shift: int) -> np.ndarray:
    """One holder's part of `Counts` for uint64 `values` (n,)."""
    if shift < TOP_SHIFT:
        values = values[values >> np.uint64(shift + DIGIT_BITS) == prefix]
    digits = (values >> np.uint64(shift)) & np.uint64(BINS - 1)
    return np.bincount(digits.astype(np.intp), minlength=BINS)


def radix_select(counts: Counts, rank: int) -> tuple[int, int]:
    """The value that stands at `rank` (from 0) in ascending order, and its rank among its equals.

    Args:
        counts: counts of the values over all holders.
        rank: below the number of values.
    """
    prefix = 0
    for shift in range(TOP_SHIFT, -1, -DIGIT_BITS):
        below = np.cumsum(counts(prefix, shift))
        digit = int(np.searchsorted(below, rank, side="right"))
        assert digit < BINS, f"rank lies {rank - int(below[-1])} behind the last value"
        if digit:
            rank -= int(below[digit - 1])
        prefix = prefix << DIGIT_BITS | digit
    return prefix, rank


@dataclass(frozen=True)
class Window:
    """A run of the order: all values in [low, high), of which there are `rows`."""

    low: int
    high: int
    rows: int


def cut_windows(counts: Counts, *, size: int, limit: int) -> list[Window]:
    """Cut the first `size` values in ascending order into windows of at most `limit` values.

    The last window may reach beyond `size`; its surplus is cut off after sorting. Only a single value
    that occurs more than `limit` times makes a larger window.

    Args:
        counts: counts of the values over all holders.
        size: how many values are wanted, at most as many as there are.
        limit: largest window.
    """
    windows: list[Window] = []
    done = 0
    for low, high, rows in _bins(counts, 0, TOP_SHIFT, limit):
        if windows and windows[-1].rows + rows <= limit:
            windows[-1] = Window(windows[-1].low, high, windows[-1].rows + rows)
        else:
            windows.append(Window(low, high, rows))
        done += rows
        if done >= size:
            break
    assert done >= size, f"{size} values wanted, {done} there"
    return windows


def _bins(counts: Counts, prefix: int, shift: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """Non-empty bins (low, high, values) in ascending order; one of over `limit` values is refined."""
    by_digit = counts(prefix, shift)
    for digit in np.flatnonzero(by_digit):
        value, rows = prefix << DIGIT_BITS | int(digit), int(by_digit[digit])
        if rows > limit and shift:
            yield from _bins(counts, value, shift - DIGIT_BITS, limit)
        else:
            yield value << shift, (value + 1) << shift, rows


def exact_sum(values: np.ndarray) -> Fraction:
    """Exact sum of finite, non-negative float64 (n,).

    Floating-point sums depend on how the rows are grouped; a fraction does not, so parts of any
    number of holders add up to the same total.
    """
    total = 0
    # Half a mantissa is below 2^27, and float64 adds integers exactly up to 2^53: 2^26 at a time.
    for start in range(0, len(values), 1 << 26):
        mantissa, exponent = np.frexp(values[start : start + (1 << 26)])
        integer = np.ldexp(mantissa, 53).astype(np.int64)
        lowest = int(exponent.min(initial=0))
        for half, up in ((integer >> 26, 26), (integer & (1 << 26) - 1, 0)):
            for place, part in enumerate(np.bincount(exponent - lowest, weights=half)):
                shift = place + lowest - 53 + up + _EXACT_UNIT
                # Subnormals have zeros where a negative shift would cut.
                total += int(part) << shift if shift >= 0 else int(part) >> -shift
    return Fraction(total, 1 << _EXACT_UNIT)
