"""The rules for rows: what a shard's task looks at."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from bss_ray.errors import Problem, find_problem


def check_input(values: np.ndarray, name: str, first_row: int) -> list[Problem]:
    """Inputs (n, ...) are numeric and finite."""
    if values.dtype.kind not in "fiub":
        return find_problem(
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
    return find_problem(f"inputs must be finite: NaN or infinite values in modality {name!r}", suspects, first_row)


def check_labels(values: np.ndarray, name: str, first_row: int, num_classes: int | None) -> list[Problem]:
    """Labels (n,) are integers in 0..C-1, and none is missing."""
    if values.ndim != 1:
        return find_problem(
            f"label column {name!r} must hold one integer a row, not shape {values.shape[1:]}",
            np.ones(len(values), dtype=bool),
            first_row,
        )
    if values.dtype.kind not in "iu":
        missing = np.asarray(pa.array(values, from_pandas=True).is_null())
        return find_problem(
            f"labels must not be missing: nulls in column {name!r}", missing, first_row
        ) or find_problem(
            f"labels must be integers 0..C-1: column {name!r} holds {values.dtype} values",
            np.ones(len(values), dtype=bool),
            first_row,
        )
    if num_classes is None:
        return find_problem(f"labels must lie in 0..C-1: negative labels in column {name!r}", values < 0, first_row)
    return find_problem(
        f"labels must lie in 0..{num_classes - 1} (num_classes={num_classes}): column {name!r} holds "
        f"{int(values.min())}..{int(values.max())}",
        (values < 0) | (values >= num_classes),
        first_row,
    )
