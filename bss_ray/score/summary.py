"""The summary of all scores, in parts whose union is exactly the same however rows are grouped."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeVar

import numpy as np
import pyarrow as pa

from bss_ray.data.columns import Columns
from bss_ray.names import loss_column
from bss_ray.sample.radix import exact_sum
from bss_ray.score.measuring import INFORMATION, SCORE, SIMILARITY, carried_columns, column, no_similarity

BINS = 40  # number of bins of the histogram over [-1, 1]
EXTREMES = 10  # number of rows of lowest and of highest score

# What identifies a row, and its measures.
Row = dict[str, int | float | str]

K = TypeVar("K")
V = TypeVar("V")

_MEASURES = (SIMILARITY, INFORMATION, SCORE)


@dataclass(frozen=True)
class Total:
    """Sum and number of the values that are not null."""

    total: Fraction = Fraction(0)
    count: int = 0

    @staticmethod
    def of(values: np.ndarray) -> Total:
        """Sum and number of the finite values of (n,)."""
        there = values[np.isfinite(values)]
        return Total(exact_sum(there.astype(np.float64)), len(there))

    def plus(self, other: Total) -> Total:
        """The union of both."""
        return Total(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float | None:
        """Mean of the values; None without values."""
        return float(self.total / self.count) if self.count else None


@dataclass(frozen=True)
class Group:
    """Means of some rows: all rows, or the rows of a class.

    Attributes:
        rows: Number of rows.
        measures: Means of similarity, information and score.
    """

    rows: int = 0
    measures: dict[str, Total] = field(default_factory=lambda: dict.fromkeys(_MEASURES, Total()))

    @staticmethod
    def of(measures: dict[str, np.ndarray], rows: np.ndarray | slice) -> Group:
        """The group of these rows of the measures' columns."""
        chosen = {name: values[rows] for name, values in measures.items()}
        return Group(len(chosen[SCORE]), {name: Total.of(values) for name, values in chosen.items()})

    def plus(self, other: Group) -> Group:
        """The union of both."""
        both = {name: self.measures[name].plus(other.measures[name]) for name in self.measures}
        return Group(self.rows + other.rows, both)

    def to_json(self) -> dict[str, object]:
        """Number of rows and means by name."""
        return {"rows": self.rows, **{name: total.mean for name, total in self.measures.items()}}


@dataclass(frozen=True)
class Modality:
    """Loss of a modality, compared with the other modalities.

    Attributes:
        loss: Mean loss of the modality's head.
        compared: Number of rows that have this modality and another.
        weaker: Number of those rows in which the loss of this modality is the largest; of equal losses the first
            modality counts.
    """

    loss: Total = field(default_factory=Total)
    compared: int = 0
    weaker: int = 0

    def plus(self, other: Modality) -> Modality:
        """The union of both."""
        return Modality(self.loss.plus(other.loss), self.compared + other.compared, self.weaker + other.weaker)

    def to_json(self) -> dict[str, object]:
        """Figures by name."""
        share = self.weaker / self.compared if self.compared else None
        return {"rows": self.loss.count, "loss": self.loss.mean, "compared": self.compared, "weaker_share": share}


@dataclass(frozen=True)
class Summary:
    """Summary of some rows; the `union` of parts equals the summary of all their rows, bit for bit.

    Attributes:
        all_rows: Means over all rows.
        bad_rows: Number of rows whose outputs are not finite.
        unpaired: Number of rows with fewer than two modalities.
        histogram: (BINS,) int64 number of rows by score.
        lowest: Rows of lowest score; of equal scores the lower row id comes first.
        highest: Rows of highest score; of equal scores the lower row id comes first.
        classes: Groups by label, if labels are one integer for each row.
        modalities: Modalities by name.
    """

    all_rows: Group
    bad_rows: int
    unpaired: int
    histogram: np.ndarray
    lowest: list[Row]
    highest: list[Row]
    classes: dict[int, Group]
    modalities: dict[str, Modality]

    @staticmethod
    def of(table: pa.Table, columns: Columns) -> Summary:
        """The summary of a table of scores with `row_id`."""
        measures = {name: column(table, name) for name in _MEASURES}
        score = measures[SCORE]
        lowest, highest = _extremes(table, score, columns)
        return Summary(
            all_rows=Group.of(measures, slice(None)),
            bad_rows=int(np.isnan(measures[INFORMATION]).sum()),
            unpaired=int(no_similarity(table).sum()),
            histogram=np.histogram(score[~np.isnan(score)], bins=BINS, range=(-1, 1))[0],
            lowest=lowest,
            highest=highest,
            classes=_by_class(table, measures, columns),
            modalities=_by_modality(table, columns),
        )

    @staticmethod
    def union(parts: Sequence[Summary]) -> Summary:
        """The summary of all parts' rows; there must be at least one part."""
        return Summary(
            all_rows=functools.reduce(Group.plus, (part.all_rows for part in parts)),
            bad_rows=sum(part.bad_rows for part in parts),
            unpaired=sum(part.unpaired for part in parts),
            histogram=np.sum([part.histogram for part in parts], axis=0),
            lowest=_first((row for part in parts for row in part.lowest), 1),
            highest=_first((row for part in parts for row in part.highest), -1),
            classes=_merge([part.classes for part in parts], Group.plus),
            modalities=_merge([part.modalities for part in parts], Modality.plus),
        )

    def to_json(self) -> dict[str, object]:
        """Content of `summary.json`."""
        return {
            **self.all_rows.to_json(),
            "bad_rows": self.bad_rows,
            "unpaired_rows": self.unpaired,
            "histogram": {"low": -1, "high": 1, "rows": self.histogram.tolist()},
            "lowest": self.lowest,
            "highest": self.highest,
            "classes": [{"label": label, **group.to_json()} for label, group in sorted(self.classes.items())],
            "modalities": [{"modality": name, **found.to_json()} for name, found in self.modalities.items()],
        }


def _merge(parts: Sequence[dict[K, V]], plus: Callable[[V, V], V]) -> dict[K, V]:
    """Values of all parts by key, added up."""
    merged: dict[K, V] = {}
    for part in parts:
        for key, value in part.items():
            merged[key] = plus(merged[key], value) if key in merged else value
    return merged


def _extremes(table: pa.Table, score: np.ndarray, columns: Columns) -> tuple[list[Row], list[Row]]:
    """Rows of lowest and of highest score, with the columns that identify them."""
    known = np.flatnonzero(~np.isnan(score))
    shown = ["row_id", *(name for name in (columns.id, columns.label) if name in table.column_names), *_MEASURES]

    def first(sign: int) -> list[Row]:
        order = known[np.lexsort((known, sign * score[known]))][:EXTREMES]
        rows: list[Row] = table.select(shown).take(order).to_pylist()
        return rows

    return first(1), first(-1)


def _first(rows: Iterable[Row], sign: int) -> list[Row]:
    return heapq.nsmallest(EXTREMES, rows, key=lambda row: (sign * float(row[SCORE]), int(row["row_id"])))


def _by_class(table: pa.Table, measures: dict[str, np.ndarray], columns: Columns) -> dict[int, Group]:
    """Groups by label, if labels are classes."""
    if columns.task != "multiclass":
        return {}
    label = table[columns.label].to_numpy()
    order = np.argsort(label, kind="stable")
    classes, starts = np.unique(label[order], return_index=True)
    parts = np.split(order, starts[1:])
    return {int(one): Group.of(measures, rows) for one, rows in zip(classes, parts, strict=True)}


def _by_modality(table: pa.Table, columns: Columns) -> dict[str, Modality]:
    """Losses of each modality's head, compared row by row."""
    prefix, carried = loss_column(""), carried_columns(columns)
    made = [name for name in table.column_names if name.startswith(prefix) and name not in carried]
    names = [name.removeprefix(prefix) for name in made]
    losses = np.array([column(table, loss_column(name)) for name in names])
    there = ~np.isnan(losses)
    paired = there.sum(axis=0) >= 2
    weakest = np.where(there, losses, -np.inf).argmax(axis=0)
    return {
        name: Modality(
            loss=Total.of(losses[place]),
            compared=int((there[place] & paired).sum()),
            weaker=int((paired & (weakest == place)).sum()),
        )
        for place, name in enumerate(names)
    }
