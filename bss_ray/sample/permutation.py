"""Random numbers that belong to rows, and the weighted permutation they make.

For seed s and epoch e every block of 65,536 consecutive row ids draws its own Exp(1) numbers from a
counter-based generator. A row's key is E / weight; rows in ascending (key, row id) are a weighted
permutation without replacement (Efraimidis and Spirakis 2006). A key depends on (seed, epoch, row id,
weight) only, so the order is the same however the rows are divided among shards, holders and workers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bss_ray.errors import ConfigError, Problem, WeightError, find_problem, raise_first_problem
from bss_ray.runtime.threads import in_threads
from bss_ray.sample.radix import Window, cut_windows, digit_counts, within

BLOCK_ROWS = 65_536

# Keys are E / weight with E in about [2^-60, 2^6]; within these bounds no key overflows to infinity.
MIN_WEIGHT, MAX_WEIGHT = 2.0**-900, 2.0**900

# Rounds of arrivals that a whole block draws together. Rows that still arrive after them are very heavy and
# hence few, and use a generator of their own.
_BLOCK_ROUNDS = 16

# Number of keys in a part that stays in cache while it is searched.
_PART_ROWS = 1 << 18

# Number of keys sorted at once: their arrays are just below 32 MiB, which malloc reuses. It returns larger ones
# to the system, and page faults of new memory take longer than the sort (10^7 keys: 0.24 s; 2^23 at once 0.60 s).
_SORT_ROWS = 1 << 22

# Purpose of a generator, as part of its key, so that streams of different purposes never overlap.
_BLOCK_STREAM, _ROW_STREAM = 0, 1


def check_seed(seed: int) -> int:
    """`seed` itself, if a 64-bit generator key can hold it.

    Raises:
        ConfigError: The seed is negative or needs more than 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed must lie in [0, 2**64); received {seed}")
    return seed


def exponentials(seed: int, epoch: int, block: int, round_: int = 0) -> np.ndarray:
    """Exp(1) numbers of one block of row ids.

    `standard_exponential` is a table method (ziggurat), whose bits do not depend on the CPU's SIMD
    level; `-np.log(u)` differs between machines.

    Args:
        seed: Seed of the run, in [0, 2**64).
        epoch: Epoch, from 0.
        block: Block of row ids: rows [65536 * block, 65536 * (block + 1)).
        round_: 0 for the first arrivals; 1, 2, ... for later ones (drawing with replacement).

    Returns:
        (65536,) float64.
    """
    # The lowest counter word counts within a stream, so streams 2^64 apart can never overlap.
    return _generator(seed, _BLOCK_STREAM, 0, round_, block, epoch).standard_exponential(BLOCK_ROWS)


def _generator(seed: int, stream: int, *counter: int) -> np.random.Generator:
    """The generator of one purpose and place."""
    # As uint64, because NumPy makes floats of a list with numbers above 2^63 and loses their last bits.
    key, words = np.array([seed, stream], dtype=np.uint64), np.array(counter, dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=words))


def check_weights(weights: np.ndarray, first_row: int = 0) -> np.ndarray:
    """Sampling weights as contiguous float64, if an order can be drawn from them.

    Args:
        weights: (n,) numbers.
        first_row: Row id of `weights[0]`, for the message.

    Raises:
        WeightError: A weight is NaN, infinite, negative, or positive but outside [2^-900, 2^900].
    """
    weights = np.ascontiguousarray(weights, dtype=np.float64)
    if weights.ndim != 1:
        raise WeightError(f"weights must be one number a row; received shape {weights.shape}")
    raise_first_problem(weight_problems(weights, first_row), WeightError)
    return weights


def weight_problems(weights: np.ndarray, first_row: int = 0) -> list[Problem]:
    """Rules that some of these weights (n,) float64 break; no order can be drawn from them."""
    if len(weights) == 0:
        return []
    lowest, highest = weights.min(), weights.max()  # both are NaN if any weight is
    if lowest >= MIN_WEIGHT and highest <= MAX_WEIGHT:
        return []
    tiny, huge = (weights > 0) & (weights < MIN_WEIGHT), weights > MAX_WEIGHT
    return (
        find_problem("weights must be finite: NaN or infinite", ~np.isfinite(weights), first_row)
        or find_problem("weights cannot be negative", weights < 0, first_row)
        or find_problem(
            "positive weights must lie within [2^-900, 2^900]; rescale them, only their ratios matter: received "
            f"{lowest:g} to {highest:g}",
            tiny | huge,
            first_row,
        )
    )


def race_keys(weights: np.ndarray, *, seed: int, epoch: int, first_row: int = 0) -> np.ndarray:
    """Keys of consecutive rows: ascending (key, row id) is their weighted permutation.

    Args:
        weights: (n,) float64, checked (see `check_weights`).
        seed: Seed of the run.
        epoch: Epoch, from 0.
        first_row: Row id of `weights[0]`.

    Returns:
        (n,) float64; infinity for rows of weight 0.
    """
    keys = np.empty(len(weights))

    def race(place: tuple[int, int, int]) -> None:
        block, start, stop = place
        offset = first_row + start - block * BLOCK_ROWS
        draws = exponentials(seed, epoch, block)[offset : offset + stop - start]
        with np.errstate(divide="ignore", invalid="ignore"):
            np.divide(draws, weights[start:stop], out=keys[start:stop])
        keys[start:stop][weights[start:stop] == 0] = np.inf  # also if E itself is 0, because 0 / 0 is NaN

    for _ in in_threads(race, _blocks(first_row, len(weights))):
        pass
    return keys


def arrivals(
    weights: np.ndarray, *, horizon: float, seed: int, epoch: int, first_row: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draws with replacement, as arrivals before `horizon` of one Poisson process per row.

    Row i arrives at rate weight_i, at E1 / w, (E1 + E2) / w, ...; the arrivals of all rows in the order of
    time are independent draws with probability weight_i / sum(weights). The first arrival is the key of the
    draw without replacement. All arrivals depend on the row only.

    Args:
        weights: (n,) float64, checked.
        horizon: Time of the last arrival to return.
        seed: Seed of the run.
        epoch: Epoch, from 0.
        first_row: Row id of `weights[0]`.

    Returns:
        keys (d,) float64 and row ids (d,) int64; row ids ascend.
    """
    keys: list[np.ndarray] = [np.empty(0)]
    rows: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    for block, start, stop in _blocks(first_row, len(weights)):
        offset = first_row + start - block * BLOCK_ROWS
        alive = np.flatnonzero(weights[start:stop])
        elapsed = np.zeros(len(alive))
        for round_ in range(_BLOCK_ROUNDS):
            if len(alive) == 0:
                break
            elapsed = elapsed + exponentials(seed, epoch, block, round_)[offset + alive]
            time = elapsed / weights[start + alive]
            here = time <= horizon
            alive, elapsed = alive[here], elapsed[here]
            keys.append(time[here])
            rows.append(first_row + start + alive)
        for row, before in zip(alive, elapsed, strict=True):
            row_id, weight = first_row + start + int(row), float(weights[start + row])
            times = _later_arrivals(seed, epoch, row_id, float(before), weight, horizon)
            keys.append(times)
            rows.append(np.full(len(times), row_id))
    all_rows = np.concatenate(rows)
    ascending = np.argsort(all_rows, kind="stable")
    return np.concatenate(keys)[ascending], all_rows[ascending]


def _later_arrivals(seed: int, epoch: int, row_id: int, elapsed: float, weight: float, horizon: float) -> np.ndarray:
    """Arrival times of one heavy row after its first `_BLOCK_ROUNDS`."""
    generator = _generator(seed, _ROW_STREAM, 0, 0, row_id, epoch)
    times: list[np.ndarray] = []
    while elapsed / weight <= horizon:
        # Chunks of a fixed size, because sums would round differently if it depended on the horizon.
        steps = elapsed + np.cumsum(generator.standard_exponential(1024))
        elapsed = float(steps[-1])
        times.append(steps / weight)
    joined = np.concatenate(times) if times else np.empty(0)
    return joined[joined <= horizon]


def horizon_for(draws: int, total_weight: float) -> float:
    """A time before which there are almost certainly at least `draws` arrivals (probability of fewer below 1e-20).

    The number of arrivals before t is Poisson with mean t * total_weight; ten standard deviations.
    """
    return (draws + 10 * math.sqrt(draws) + 50) / total_weight


def sort_by_key(keys: np.ndarray) -> np.ndarray:
    """Positions of `keys` in ascending order; equal keys keep their order.

    Non-negative float64 numbers compare like their bits. The leading bits of a key and its position share one
    64-bit word, and the words are sorted in place: NumPy's vectorised sort of plain words takes a fifth of the
    time of a sort that carries positions along (2^24 keys: 0.13 s against 0.68 s of `torch.sort`). All words
    are different, so neither an unstable sort nor the SIMD level can change the result. The few keys whose
    leading bits are equal are sorted at the end.

    Args:
        keys: (n,) float64, non-negative, contiguous.

    Returns:
        (n,) int64.
    """
    if len(keys) == 0:
        return np.empty(0, dtype=np.int64)
    bits = keys.view(np.uint64)
    low, high = int(bits.min()), int(bits.max())
    position_bits = (len(keys) - 1).bit_length()
    cut_off = max(0, (high - low).bit_length() + position_bits - 64)
    words = bits - np.uint64(low)
    words >>= np.uint64(cut_off)
    words <<= np.uint64(position_bits)
    words |= np.arange(len(keys), dtype=np.uint64)
    words.sort()
    positions = (words & np.uint64((1 << position_bits) - 1)).view(np.int64)
    if cut_off:
        words >>= np.uint64(position_bits)
        _settle(keys, positions, words)
    return positions


def _settle(keys: np.ndarray, positions: np.ndarray, leading: np.ndarray) -> None:
    """Sort `positions` by whole keys where the sorted leading bits of keys are equal."""
    equal = leading[1:] == leading[:-1]
    if not equal.any():
        return
    tied = np.flatnonzero(np.append(equal, False) | np.append(False, equal))
    if len(tied) > len(keys) // 8:  # many keys in a small part of their range
        positions[:] = np.argsort(keys, kind="stable")
        return
    among = positions[tied]
    positions[tied] = among[np.lexsort((among, keys[among], leading[tied]))]


def weighted_permutation(
    weights: np.ndarray | Any, *, seed: int, epoch: int = 0, size: int | None = None, first_row: int = 0
) -> np.ndarray:
    """Row ids in the order of a weighted draw without replacement.

    The first row is row i with probability weight_i / sum(weights), the second row is drawn in the same way
    from the remaining rows, and so on. Rows of weight 0 never occur. The same arguments give the same order
    on any machine, and no global random state is read or written.

    Args:
        weights: (n,) numbers, finite and non-negative; only their ratios matter.
        seed: Seed of the run, in [0, 2**64).
        epoch: Epoch, from 0; each epoch has its own order.
        size: Number of rows; None for all rows of positive weight.
        first_row: Row id of `weights[0]`.

    Returns:
        (size,) int64 row ids.

    Raises:
        WeightError: Weights are NaN, infinite, negative or all zero, or `size` exceeds the number of rows of
            positive weight.

    Example:
        >>> weighted_permutation([1.0, 0.0, 2.0], seed=0).tolist()
        [2, 0]
    """
    weights = check_weights(np.asarray(weights), first_row)
    positive = int(np.count_nonzero(weights))
    if positive == 0:
        raise WeightError(f"no row can be drawn: all {len(weights)} weights are 0")
    if size is None:
        size = positive
    if not 0 <= size <= positive:
        raise WeightError(
            f"a draw without replacement can take 0 to {positive} rows (those of positive weight, of "
            f"{len(weights)}); received size={size}"
        )
    keys = race_keys(weights, seed=check_seed(seed), epoch=epoch, first_row=first_row)
    order = _first_by_key(keys, size)
    order += first_row
    return order


def _first_by_key(keys: np.ndarray, size: int) -> np.ndarray:
    """Positions (size,) int64 of the `size` smallest keys in ascending order; equal keys keep their order.

    It uses windows like the distributed sampler: only the needed keys are sorted, and a sort needs little
    additional memory.
    """
    order = np.empty(size, dtype=np.int64)
    if size == 0:
        return order
    bits = keys.view(np.uint64)
    parts = [slice(start, start + _PART_ROWS) for start in range(0, len(keys), _PART_ROWS)]

    def counts(prefixes: Sequence[int], shift: int) -> np.ndarray:
        found: np.ndarray = np.sum(
            list(in_threads(lambda part: digit_counts(bits[part], prefixes, shift), parts)), axis=0
        )
        return found

    def sort(window: tuple[int, Window]) -> None:
        start, bounds = window
        rows = np.concatenate([part.start + within(bits[part], bounds.low, bounds.high) for part in parts])
        stop = min(start + len(rows), size)
        order[start:stop] = rows[sort_by_key(keys[rows])[: stop - start]]

    windows = cut_windows(counts, size=size, limit=_SORT_ROWS)
    starts = itertools.accumulate((window.rows for window in windows), initial=0)
    for _ in in_threads(sort, zip(starts, windows, strict=False)):
        pass
    return order


def _blocks(first_row: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """(block of ids, start, stop) that cut rows [first_row, first_row + rows), relative to first_row."""
    start = 0
    while start < rows:
        block = (first_row + start) // BLOCK_ROWS
        stop = min(rows, (block + 1) * BLOCK_ROWS - first_row)
        yield block, start, stop
        start = stop
