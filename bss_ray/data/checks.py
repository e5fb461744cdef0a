"""The rules for rows: what a shard's task looks at, and how the first broken rule is told."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from bss_ray.errors import DataError

_NAMED_IDS = 5


@dataclass(frozen=True)
class Problem:
    """A rule that some rows of a shard break."""

    rule: str
    count: int
    first_ids: list[int]


def _problem(rule: str, bad: np.ndarray, first_row: int) -> list[Problem]:
    rows = np.flatnonzero(bad)
    if len(rows) == 0:
        return []
    return [Problem(rule, len(rows), [first_row + int(row) for row in rows[:_NAMED_IDS]])]


def check_input(values: np.ndarray, name: str, first_row: int) -> list[Problem]:
    """Inputs (n, ...) are numeric and finite."""
    if values.dtype.kind not in "fiub":
        return _problem(
            f"modality {name!r} must hold numeric tensors, not {values.dtype} values. Decode it in Ray Data first "
            "(dataset.map_batches)",
            np.ones(len(values), dtype=bool),
            first_row,
        )
    if values.dtype.kind != "f":
        return []
    # The sum of a row is finite only if all of it is (or, rarely, if huge values overflow: look again).
    flat = values.reshape(len(values), -1)
    suspects = ~np.isfinite(flat.sum(axis=1, dtype=np.float64))
    suspects[suspects] = ~np.isfinite(flat[suspects]).all(axis=1)
    return _problem(f"inputs must be finite: NaN or infinite values in modality {name!r}", suspects, first_row)


def check_labels(values: np.ndarray, name: str, first_row: int, num_classes: int | None) -> list[Problem]:
    """Labels (n,) are integers in 0..C-1, and none is missing."""
    if values.ndim != 1:
        return _problem(
            f"label column {name!r} must hold one integer a row, not shape {values.shape[1:]}",
            np.ones(len(values), dtype=bool),
            first_row,
        )
    if values.dtype.kind not in "iu":
        missing = np.asarray(pa.array(values, from_pandas=True).is_null())
        return _problem(f"labels must not be missing: nulls in column {name!r}", missing, first_row) or _problem(
            f"labels must be integers 0..C-1: column {name!r} holds {values.dtype} values",
            np.ones(len(values), dtype=bool),
            first_row,
        )
    if num_classes is None:
        return _problem(f"labels must lie in 0..C-1: negative labels in column {name!r}", values < 0, first_row)
    return _problem(
        f"labels must lie in 0..{num_classes - 1} (num_classes={num_classes}): column {name!r} holds "
        f"{int(values.min())}..{int(values.max())}",
        (values < 0) | (values >= num_classes),
        first_row,
    )


def raise_first_problem(found: list[Problem]) -> None:
    """Raise for the first broken rule, with its count and first row ids over all shards.

    Args:
        found: problems of all shards, in the shards' order.

    Raises:
        DataError: if there is any.
    """
    if not found:
        return
    # The same rule can name other values in other shards: group by what comes before them.
    rule = found[0].rule
    same = [problem for problem in found if problem.rule.split(":")[0] == rule.split(":")[0]]
    count = sum(problem.count for problem in same)
    ids = [row for problem in same for row in problem.first_ids][:_NAMED_IDS]
    if not ids:
        raise DataError(rule)
    raise DataError(f"{rule} ({count} {'row' if count == 1 else 'rows'}; first row ids {', '.join(map(str, ids))})")
