"""What holders know of rows: scores and measures, measures on their way, and how old they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class LostStateError(RuntimeError):
    """A holder or the coordinator was restarted and came back without its scores.

    No error of the user's: the ranks start again, and every start loads the scores of the checkpoint.
    """


@dataclass(frozen=True)
class ScoreBlock:
    """Scores of consecutive rows, as holders keep and save them.

    Attributes:
        first_row: row id of the first.
        score: (n,) float32.
        similarity: (n,) float32, of the last measurement; NaN for a row with fewer than two modalities.
        information: (n,) float32, of the last measurement.
        last_drawn: (n,) uint16, epoch + 1 in which the row was last drawn; 0 for never.
        last_measured: (n,) uint16, score version in which the row was last measured; 0 for never.
        pending: measures of the next version, as far as they are there.
    """

    first_row: int
    score: np.ndarray
    similarity: np.ndarray
    information: np.ndarray
    last_drawn: np.ndarray
    last_measured: np.ndarray
    pending: PendingMeasures | None = None

    @staticmethod
    def empty(first_row: int, rows: int) -> ScoreBlock:
        """The state before the first update."""
        score, similarity, information = (np.zeros(rows, np.float32) for _ in range(3))
        last_drawn, last_measured = (np.zeros(rows, np.uint16) for _ in range(2))
        return ScoreBlock(first_row, score, similarity, information, last_drawn, last_measured)

    @property
    def stop_row(self) -> int:
        """Row id behind the last."""
        return self.first_row + len(self.score)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name; without those of the next version."""
        return {name: getattr(self, name) for name in STATE_COLUMNS}

    def copy(self) -> ScoreBlock:
        """The same scores in arrays of their own, without measures of a next version."""
        score, similarity, information, last_drawn, last_measured = (values.copy() for values in self.arrays.values())
        return ScoreBlock(self.first_row, score, similarity, information, last_drawn, last_measured)


STATE_COLUMNS = ("score", "similarity", "information", "last_drawn", "last_measured")


class SavedScores(Protocol):
    """Saved scores that every node can read, such as a checkpoint."""

    def scores(self, start: int, stop: int) -> list[ScoreBlock]:
        """Saved scores that overlap rows [start, stop)."""
        ...


@dataclass(frozen=True)
class PendingMeasures:
    """Measures of some rows, not yet published.

    A row that is measured again keeps the later measure: that of the higher step, then of the higher information. So
    within an epoch neither the order in which measures arrive nor one that arrives twice changes anything. Ranks meet
    between epochs, so those of one epoch are all there before the next one's.

    Attributes:
        similarity: (n,) float32.
        information: (n,) float32.
        step: (n,) int32 global batch, from 1, of the epoch at hand; 0 from an earlier one; -1: not measured.
    """

    similarity: np.ndarray
    information: np.ndarray
    step: np.ndarray

    @staticmethod
    def empty(rows: int) -> PendingMeasures:
        """None yet."""
        similarity, information = (np.zeros(rows, np.float32) for _ in range(2))
        return PendingMeasures(similarity, information, np.full(rows, -1, np.int32))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in PENDING_COLUMNS}

    def copy(self) -> PendingMeasures:
        """The same measures in arrays of their own."""
        return PendingMeasures(*(values.copy() for values in self.arrays.values()))

    @property
    def measured(self) -> np.ndarray:
        """(n,) which rows have been measured."""
        return np.asarray(self.step >= 0)

    def take(self, rows: np.ndarray, new: MeasureBatch) -> None:
        """Keep new measures (k,) of `rows` (k,), positions that ascend; one may occur more than once."""
        own = self.arrays.values()
        fresh = (new.similarity, new.information, new.step)
        if (self.step[rows] < 0).all() and (np.diff(rows) > 0).all():
            for array, values in zip(own, fresh, strict=True):
                array[rows] = values
            return
        both = [np.concatenate([array[rows], values]) for array, values in zip(own, fresh, strict=True)]
        places = np.concatenate([rows, rows])
        similarity, information, step = both
        order = np.lexsort((similarity, information, step, places))
        last = order[np.flatnonzero(np.diff(places[order], append=-1))]  # the greatest of each place
        for array, values in zip(own, both, strict=True):
            array[places[last]] = values[last]


PENDING_COLUMNS = ("similarity", "information", "step")


class MeasureBatch(NamedTuple):
    """Measures on their way to the holders.

    Attributes:
        rows: (k,) int64 row ids, ascending.
        similarity: (k,) float32.
        information: (k,) float32.
        step: (k,) int32 global batch, from 1; 0 where rows are measured beside training.
    """

    rows: np.ndarray
    similarity: np.ndarray
    information: np.ndarray
    step: np.ndarray

    @staticmethod
    def of(
        rows: np.ndarray, similarity: np.ndarray, information: np.ndarray, step: np.ndarray | int = 0
    ) -> MeasureBatch:
        """A delivery of rows in any order."""
        step = np.broadcast_to(np.asarray(step, np.int32), rows.shape)
        columns = (rows, similarity, information, step)
        if (np.diff(rows) >= 0).all():
            return MeasureBatch(*columns)
        order = np.argsort(rows, kind="stable")
        return MeasureBatch(*(column[order] for column in columns))

    def sound(self) -> MeasureBatch:
        """Those of rows whose outputs were finite; the others keep the score that they have."""
        good = ~np.isnan(self.information)
        return self if good.all() else MeasureBatch(*(column[good] for column in self))

    def within(self, start: int, stop: int) -> MeasureBatch:
        """Those of rows [start, stop)."""
        low, high = np.searchsorted(self.rows, [start, stop])
        return MeasureBatch(*(column[low:high] for column in self))


class Ages(NamedTuple):
    """How old the scores of some rows are, in versions.

    Attributes:
        scored: rows that have been measured at all.
        total: sum of their ages.
        oldest: largest of them.
    """

    scored: int = 0
    total: int = 0
    oldest: int = 0

    def __add__(self, other: Ages) -> Ages:  # type: ignore[override]
        return Ages(self.scored + other.scored, self.total + other.total, max(self.oldest, other.oldest))
