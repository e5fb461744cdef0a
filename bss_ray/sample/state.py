"""State of holders: scores and measures of rows, measures in delivery, and ages of scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class LostStateError(RuntimeError):
    """A holder or the coordinator was restarted and has lost its scores.

    This is no error of the user: the ranks start again, and every start loads the scores of the checkpoint.
    """


@dataclass(frozen=True)
class ScoreBlock:
    """Scores of consecutive rows, as holders keep and save them.

    Attributes:
        first_row: Row id of the first row.
        score: (n,) float32.
        similarity: (n,) float32, of the last measurement; NaN for a row with fewer than two modalities.
        information: (n,) float32, of the last measurement.
        last_drawn: (n,) uint16, epoch + 1 in which the row was last drawn; 0 for never.
        last_measured: (n,) uint16, score version in which the row was last measured; 0 for never.
        pending: Measures of the next version that exist already.
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
        """Row id after the last row."""
        return self.first_row + len(self.score)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, without those of the next version."""
        return {name: getattr(self, name) for name in STATE_COLUMNS}

    def copy(self) -> ScoreBlock:
        """A copy of the scores, without measures of a next version."""
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
    """Measures of some rows that are not published yet.

    A row that is measured again keeps the measure of the higher step, and of equal steps the higher information. So
    within an epoch neither the order of arrival nor a repeated delivery changes anything. Ranks meet at a barrier
    between epochs, so all measures of an epoch arrive before those of the next epoch.

    Attributes:
        similarity: (n,) float32.
        information: (n,) float32.
        step: (n,) int32 global batch, from 1, of the current epoch; 0 from an earlier epoch; -1: not measured.
    """

    similarity: np.ndarray
    information: np.ndarray
    step: np.ndarray

    @staticmethod
    def empty(rows: int) -> PendingMeasures:
        """No measures."""
        similarity, information = (np.zeros(rows, np.float32) for _ in range(2))
        return PendingMeasures(similarity, information, np.full(rows, -1, np.int32))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in PENDING_COLUMNS}

    def copy(self) -> PendingMeasures:
        """A copy of the measures."""
        return PendingMeasures(*(values.copy() for values in self.arrays.values()))

    @property
    def measured(self) -> np.ndarray:
        """(n,) true for rows that have been measured."""
        return np.asarray(self.step >= 0)

    def take(self, rows: np.ndarray, new: MeasureBatch) -> None:
        """Keep new measures (k,) of `rows` (k,), which are ascending positions with possible repeats."""
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
        last = order[np.flatnonzero(np.diff(places[order], append=-1))]  # the last of each position is the greatest
        for array, values in zip(own, both, strict=True):
            array[places[last]] = values[last]


PENDING_COLUMNS = ("similarity", "information", "step")


class MeasureBatch(NamedTuple):
    """Measures in delivery to the holders.

    Attributes:
        rows: (k,) int64 row ids, ascending.
        similarity: (k,) float32.
        information: (k,) float32.
        step: (k,) int32 global batch, from 1; 0 for rows that are not measured in a training step.
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
        """The measures of rows whose outputs are finite; other rows keep their score."""
        good = ~np.isnan(self.information)
        return self if good.all() else MeasureBatch(*(column[good] for column in self))

    def within(self, start: int, stop: int) -> MeasureBatch:
        """The measures of rows [start, stop)."""
        low, high = np.searchsorted(self.rows, [start, stop])
        return MeasureBatch(*(column[low:high] for column in self))


class Ages(NamedTuple):
    """Ages of the scores of some rows, in versions.

    Attributes:
        scored: Number of rows that have ever been measured.
        total: Sum of their ages.
        oldest: Largest of their ages.
    """

    scored: int = 0
    total: int = 0
    oldest: int = 0

    def __add__(self, other: Ages) -> Ages:  # type: ignore[override]
        return Ages(self.scored + other.scored, self.total + other.total, max(self.oldest, other.oldest))
