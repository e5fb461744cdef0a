"""The second pass: norms over all rows, joined from parts, then the score of each row. Pure; no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from bss_ray.errors import Problem, find_problem
from bss_ray.measure.normalise import NORMALISATIONS, Norm, Normalise, join
from bss_ray.measure.score import Unpaired, current_scores
from bss_ray.score.measuring import INFORMATION, SCORE, SIMILARITY

_NO_PAIR = (
    "a row needs two modalities for a similarity, as unpaired=error says. Let such rows count as unpaired=neutral or "
    "lowest, or filter them out"
)


@dataclass(frozen=True)
class Norms:
    """Normalisations of both measures, of some rows or of all.

    Attributes:
        similarity: of the rows that have two modalities.
        information: of the rows with sound outputs.
    """

    similarity: Norm
    information: Norm

    @staticmethod
    def of(table: pa.Table, normalise: Normalise) -> Norms:
        """Norms of a part."""
        kind = NORMALISATIONS[normalise]
        return Norms(*(kind.of(column(table, name)) for name in (SIMILARITY, INFORMATION)))

    @staticmethod
    def union(parts: Sequence[Norms]) -> Norms:
        """Norms over all parts, exactly; at least one."""
        return Norms(join([part.similarity for part in parts]), join([part.information for part in parts]))


def column(table: pa.Table, name: str) -> np.ndarray:
    """A measure (n,) float32; NaN where it is null."""
    values: np.ndarray = table[name].to_numpy(zero_copy_only=False).astype(np.float32)
    return values


def no_similarity(table: pa.Table) -> np.ndarray:
    """(n,) rows with sound outputs and fewer than two modalities."""
    return np.asarray(np.isnan(column(table, SIMILARITY)) & ~np.isnan(column(table, INFORMATION)))


def check_pairs(table: pa.Table, first_row: int, unpaired: Unpaired) -> list[Problem]:
    """Rows without a similarity, where they are an error."""
    return find_problem(_NO_PAIR, no_similarity(table), first_row) if unpaired == "error" else []


def with_scores(table: pa.Table, norms: Norms, unpaired: Unpaired) -> pa.Table:
    """The table and a column of scores: the bits of `balance_scores`; null where there is no information."""
    similarity, information = column(table, SIMILARITY), column(table, INFORMATION)
    scores = current_scores(similarity, information, (norms.similarity, norms.information), unpaired)
    missing = np.isnan(information)
    return table.append_column(SCORE, pa.array(scores.astype(np.float32), pa.float32(), mask=missing))


def with_row_ids(table: pa.Table, first_row: int) -> pa.Table:
    """The table with the row ids in front."""
    ids = np.arange(first_row, first_row + len(table), dtype=np.int64)
    return table.add_column(0, "row_id", pa.array(ids))
