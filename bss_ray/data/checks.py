"""The rules for rows, which the task of a shard checks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from bss_ray.data.columns import Columns, Task
from bss_ray.errors import Problem, find_problem

# Dtype in which labels are kept.
_DTYPES: dict[Task, type[np.generic]] = {"multiclass": np.int64, "multilabel": np.uint8, "regression": np.float32}


def check_input(values: np.ndarray, name: str, first_row: int) -> list[Problem]:
    """Inputs (n, ...) are numeric and finite."""
    if values.dtype.kind not in "fiub":
        return _all_rows(
            f"modality {name!r} must hold numeric tensors, not {values.dtype} values. Decode it in Ray Data first "
            "(dataset.map_batches)",
            values,
            first_row,
        )
    if values.dtype.kind != "f":
        return []
    # The sum of a row is finite only if all its values are (if huge values overflow, which is rare, check each value).
    flat = values.reshape(len(values), -1)
    suspects = ~np.isfinite(flat.sum(axis=1, dtype=np.float64))
    suspects[suspects] = ~np.isfinite(flat[suspects]).all(axis=1)
    return find_problem(f"inputs must be finite: NaN or infinite values in modality {name!r}", suspects, first_row)


def check_presence(present: Mapping[str, np.ndarray], first_row: int) -> list[Problem]:
    """Each row has a modality; `present` has for each modality a mask (n,) of the rows that have it."""
    return find_problem(
        f"a row needs at least one modality: nulls in all of {list(present)}. Filter such rows out in Ray Data first",
        ~np.logical_or.reduce(list(present.values())),
        first_row,
    )


def check_labels(
    values: np.ndarray | None, present: np.ndarray, columns: Columns, first_row: int, num_classes: int | None
) -> list[Problem]:
    """Labels are of the task's kind, and none is missing.

    Args:
        values: (k, ...) labels of the rows that have a label; None if they are not known.
        present: (n,) bool, true for rows that have a label.
        columns: Roles of the columns, with name and task of the labels.
        first_row: Row id of the first row.
        num_classes: Number of values a head returns; None for as many as the labels have.
    """
    name = columns.label
    if not present.all():
        return find_problem(f"labels must not be missing: nulls in column {name!r}", ~present, first_row)
    assert values is not None
    if columns.task == "multilabel":
        return _check_indicators(values, name, first_row, num_classes)
    if columns.task == "regression":
        return _check_numbers(values, name, first_row, num_classes)
    return _check_classes(values, name, first_row, num_classes)


def store_labels(values: np.ndarray, task: Task) -> np.ndarray:
    """Sound labels in the dtype that shards keep: int64 classes, uint8 indicators, float32 numbers."""
    return values.astype(_DTYPES[task])


def count_outputs(labels: np.ndarray, task: Task) -> int:
    """How many values a head must return for these stored labels: classes C, or the D numbers of a regression."""
    if task == "multiclass":
        return int(labels.max()) + 1
    return int(labels.shape[1]) if labels.ndim == 2 else 1


def _check_classes(values: np.ndarray, name: str, first_row: int, num_classes: int | None) -> list[Problem]:
    """Labels (n,) are integers in 0..C-1."""
    if values.ndim != 1:
        return _all_rows(
            f"label column {name!r} must hold one integer a row, not shape {values.shape[1:]}. Tensors of 0 and 1 are "
            "for columns.task=multilabel, of numbers for columns.task=regression",
            values,
            first_row,
        )
    if values.dtype.kind not in "iu":
        missing = np.asarray(pa.array(values, from_pandas=True).is_null())  # NaN, as pandas writes it
        return find_problem(f"labels must not be missing: nulls in column {name!r}", missing, first_row) or _all_rows(
            f"labels must be integers 0..C-1: column {name!r} holds {values.dtype} values", values, first_row
        )
    if num_classes is None:
        return find_problem(f"labels must lie in 0..C-1: negative labels in column {name!r}", values < 0, first_row)
    return find_problem(
        f"labels must lie in 0..{num_classes - 1} (num_classes={num_classes}): column {name!r} holds "
        f"{int(values.min())}..{int(values.max())}",
        (values < 0) | (values >= num_classes),
        first_row,
    )


def _check_indicators(values: np.ndarray, name: str, first_row: int, num_classes: int | None) -> list[Problem]:
    """Labels (n, C) are 0 or 1."""
    if values.ndim != 2 or values.dtype.kind not in "biuf" or values.shape[1] == 0:
        return _all_rows(
            f"labels of task multilabel must be a tensor (C,) of 0 and 1 a row: column {name!r} holds {values.dtype} "
            f"of shape {values.shape[1:]}. One class a row is for columns.task=multiclass",
            values,
            first_row,
        )
    sound = np.asarray(np.isin(values, (0, 1)).all(axis=1))
    return find_problem(
        f"labels of task multilabel must be 0 or 1: other values in column {name!r}", ~sound, first_row
    ) or _check_width(values, name, first_row, num_classes)


def _check_numbers(values: np.ndarray, name: str, first_row: int, num_classes: int | None) -> list[Problem]:
    """Labels (n,) or (n, D) are numbers that float32 can hold."""
    if values.ndim not in (1, 2) or values.dtype.kind not in "iuf" or 0 in values.shape[1:]:
        return _all_rows(
            f"labels of task regression must be a number, or a tensor (D,) of them, a row: column {name!r} holds "
            f"{values.dtype} of shape {values.shape[1:]}",
            values,
            first_row,
        )
    with np.errstate(over="ignore"):
        sound = np.asarray(np.isfinite(values.astype(np.float32)).reshape(len(values), -1).all(axis=1))
    return find_problem(
        f"labels of task regression must be finite: NaN, infinite or too large for float32 in column {name!r}",
        ~sound,
        first_row,
    ) or _check_width(values, name, first_row, num_classes)


def _check_width(values: np.ndarray, name: str, first_row: int, num_classes: int | None) -> list[Problem]:
    """The label of a row has as many values as a head returns."""
    width = values.shape[1] if values.ndim == 2 else 1
    if num_classes in (None, width):
        return []
    return _all_rows(
        f"labels must have num_classes={num_classes} values a row: column {name!r} has {width}. Leave num_classes out, "
        "or give all splits labels of one length",
        values,
        first_row,
    )


def _all_rows(rule: str, values: np.ndarray, first_row: int) -> list[Problem]:
    """The problem that a column as a whole breaks a rule."""
    return find_problem(rule, np.ones(len(values), dtype=bool), first_row)
