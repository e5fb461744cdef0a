"""The data that coordinator and holders exchange for the draw of one epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

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
