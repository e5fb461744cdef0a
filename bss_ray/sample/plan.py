"""The plan of one epoch: number of rows, global batches, and which rank takes which row."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

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
