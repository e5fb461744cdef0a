"""The plan of one epoch: number of rows, global batches, and which rank takes which row."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import numpy as np

from bss_ray.errors import Problem
from bss_ray.sample.permutation import weight_problems
from bss_ray.sample.radix import exact_sum, within
from bss_ray.schedule.schedulers import Scheduler


@dataclass(frozen=True)
class Draw:
    """Everything that a holder needs to make the keys of its rows for one epoch.

    Attributes:
        seed: Seed of the run.
        epoch: Epoch, from 0.
        version: Score version that the draw is made from.
        scheduler: Scheduler, which gives the weight of a score.
        cutoff: None, or (bits, row): only rows of a score above that of `bits` (`ordered_bits`, of
            the negated score), or of the same score and a row id up to `row`.
        added_weight: Weight of the uniform mix, which is added to each eligible row's weight.
        horizon: None without replacement; else the time of the last arrival.
    """

    seed: int
    epoch: int
    version: int
    scheduler: Scheduler
    cutoff: tuple[int, int] | None = None
    added_weight: float = 0.0
    horizon: float | None = None


@dataclass(frozen=True)
class Moments:
    """Figures of the weights w of some rows.

    Attributes:
        positive: Number of rows with w > 0.
        total: Sum of w. This and the next two sums are exact, so they do not depend on which holder has which row.
        squares: Sum of w^2.
        w_log_w: Sum of w log w.
        largest: Largest w.
        problems: Problems of the weights; the other figures leave such rows out.
    """

    positive: int = 0
    total: Fraction = Fraction(0)
    squares: Fraction = Fraction(0)
    w_log_w: Fraction = Fraction(0)
    largest: float = 0.0
    problems: tuple[Problem, ...] = ()

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.positive + other.positive,
            self.total + other.total,
            self.squares + other.squares,
            self.w_log_w + other.w_log_w,
            max(self.largest, other.largest),
            self.problems + other.problems,
        )

    @staticmethod
    def of(weights: np.ndarray, first_row: int) -> Moments:
        """Figures of the weights (n,) float64 of the rows from `first_row` on."""
        problems = weight_problems(weights, first_row)
        if problems:
            return Moments(problems=tuple(problems))
        positive = weights[weights > 0]
        highest = float(positive.max(initial=0.0))
        # Squares of very large or small weights leave the range of float64, so a power of two is divided out first.
        scale = math.frexp(highest)[1]
        squares = exact_sum(np.ldexp(positive, -scale) ** 2) * Fraction(4) ** scale
        w_log_w = exact_sum(positive * np.log(positive))  # np.log: nothing is drawn from it
        return Moments(len(positive), exact_sum(positive), squares, w_log_w, highest)


class Keys(NamedTuple):
    """Drawable rows with their keys, for the epoch's race.

    Attributes:
        keys: (k,) float64.
        rows: (k,) int64 row ids, ascending.
    """

    keys: np.ndarray
    rows: np.ndarray

    def within(self, low: int, high: int) -> Keys:
        """The rows whose key bits are in [low, high)."""
        here = within(self.keys.view(np.uint64), low, high)
        return Keys(self.keys[here], self.rows[here])


Tail = Literal["keep", "drop"]
TAILS: tuple[str, ...] = get_args(Tail)


@dataclass(frozen=True)
class Plan:
    """The order of one epoch, cut into windows and global batches.

    It has no row ids: windows of the order are requested one at a time (`Order`), so a plan is small for any
    number of rows.

    Attributes:
        epoch: Epoch, from 0.
        version: Score version that the order is drawn from; 0 before any scores.
        size: Number of rows drawn, in global batches 0, 1, ... of `batch_size`.
        batch_size: Number of rows of a global batch, over all ranks.
        tail: Whether the last, smaller batch is kept or dropped.
        window_ends: End position of each window, ascending; the last is `size`.
        diagnostics: Figures of the sampling distribution p: `eligible_rows` (p > 0), `effective_sample_size` (1 / sum
            of p^2), `entropy` (nats; at most the log of the eligible rows), `largest_share` (largest p),
            `expected_draws` (draws per eligible row, on average).
        warnings: Messages to the user about the distribution in plain words, by the kind of trouble.
    """

    epoch: int
    version: int
    size: int
    batch_size: int
    tail: Tail
    window_ends: tuple[int, ...]
    diagnostics: dict[str, float] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)

    @property
    def batches(self) -> int:
        """Number of global batches."""
        whole, rest = divmod(self.size, self.batch_size)
        return whole + (1 if rest and self.tail == "keep" else 0)

    @property
    def rows(self) -> int:
        """Number of rows that the epoch presents: `size` without a dropped tail."""
        return min(self.size, self.batches * self.batch_size)

    def span(self, batch: int) -> tuple[int, int]:
        """Positions [start, stop) of global batch `batch` in the order."""
        return batch * self.batch_size, min((batch + 1) * self.batch_size, self.size)

    def window_of(self, position: int) -> int:
        """Index of the window that holds a position of the order."""
        return bisect.bisect_right(self.window_ends, position)


class Order:
    """The row ids of a plan by position, read window by window.

    Args:
        plan: Plan of the epoch.
        window: Function that returns window `i` of the plan as (rows,) int64 row ids.
    """

    def __init__(self, plan: Plan, window: Callable[[int], np.ndarray]) -> None:
        self._plan = plan
        self._window = window
        self._current: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def take(self, start: int, stop: int) -> np.ndarray:
        """Row ids (stop - start,) int64 at positions [start, stop); moving forward is cheap, moving back is not."""
        parts: list[np.ndarray] = []
        while start < stop:
            index = self._plan.window_of(start)
            if index != self._current[0]:
                self._current = (index, self._window(index))
            first = self._plan.window_ends[index - 1] if index else 0
            parts.append(self._current[1][start - first : stop - first])
            start += len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def share_out(homes: np.ndarray, rank_homes: np.ndarray) -> np.ndarray:
    """Which rank takes which row of a global batch.

    The ranks' numbers of rows differ by at most one. Rows go to the ranks of the node that holds them as long
    as these have room; the remaining rows fill up the other ranks.

    Args:
        homes: (b,) int node of each row's shard.
        rank_homes: (ranks,) int node of each rank.

    Returns:
        (b,) int64 rank of each row.
    """
    rows, ranks = len(homes), len(rank_homes)
    room = np.full(ranks, rows // ranks)
    room[: rows % ranks] += 1
    owner = np.full(rows, -1, dtype=np.int64)
    for node in np.unique(rank_homes):
        seats = np.repeat(np.flatnonzero(rank_homes == node), room[rank_homes == node])
        at_home = np.flatnonzero(homes == node)[: len(seats)]
        owner[at_home] = seats[: len(at_home)]
    room -= np.bincount(owner[owner >= 0], minlength=ranks)
    owner[owner < 0] = np.repeat(np.arange(ranks), room)
    return owner
