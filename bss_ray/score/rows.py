"""From blocks as they are read to the columns of a batch: the rules and dtypes of training's shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bss_ray.data.checks import check_input, check_labels, check_presence, store_labels
from bss_ray.data.columns import Columns
from bss_ray.data.read import Partial, read_column, read_partial
from bss_ray.data.shards import Feature
from bss_ray.errors import DataError, Problem
from bss_ray.names import presence_column

Arrays = dict[str, np.ndarray]


class Rows(NamedTuple):
    """Consecutive rows.

    Attributes:
        arrays: modalities, `has_<modality>`, label, id and extra columns, (n, ...) each; not all, if there are
            problems.
        problems: rules that rows break.
    """

    arrays: Arrays
    problems: list[Problem]


def read_rows(
    blocks: Sequence[Any], columns: Columns, first_row: int, features: Mapping[str, Feature], *, finite: bool
) -> Rows:
    """Columns of consecutive blocks, as training keeps them.

    Zeros stand for a modality that is null, and `has_<modality>` says so. These columns are always there, since a model
    that was trained on rows with nulls may ask for them.

    Args:
        blocks: Arrow tables.
        columns: roles of their columns.
        first_row: row id of the first row.
        features: shape and dtype of modalities, as far as they are known.
        finite: inputs must be finite.
    """
    try:
        inputs = {name: read_partial(blocks, name) for name in columns.modalities}
        labels = read_partial(blocks, columns.label)
        carried = {name: read_column(blocks, name) for name in columns.all if name not in columns.inputs}
    except DataError as error:
        return Rows({}, [Problem(str(error), 0, [])])
    problems = check_presence({name: part.present for name, part in inputs.items()}, first_row)
    arrays: Arrays = {}
    for name, part in inputs.items():
        arrays[name], found = _fill(name, part, features.get(name), first_row, finite=finite)
        problems += found
    problems += check_labels(labels.values, labels.present, columns, first_row, None)
    if not problems:
        arrays[columns.label] = store_labels(labels.filled(), columns.task)
        arrays |= {presence_column(name): part.present for name, part in inputs.items()}
    return Rows({**arrays, **carried}, problems)


def _fill(
    name: str, part: Partial, expected: Feature | None, first_row: int, *, finite: bool
) -> tuple[np.ndarray, list[Problem]]:
    """A modality of all rows, and what is wrong with it."""
    if part.values is None and expected is None:
        return np.empty(0), [Problem(_UNKNOWN.format(name), 0, [])]
    values = part.filled(expected)
    found = Feature(values.shape[1:], str(values.dtype))
    if expected not in (None, found):
        assert expected is not None
        return values, [Problem(_differ(name, expected, found), 0, [])]
    if finite or values.dtype.kind not in "fiub":
        return values, check_input(values, name, first_row)
    return values, []


_UNKNOWN = (
    "modality {!r} is null in all rows of a block, and its type does not tell the shape that it would have. Write it "
    "as a column of tensors, or score it from Parquet with bss-ray score"
)


def _differ(name: str, expected: Feature, found: Feature) -> str:
    return (
        f"all rows of column {name!r} need one shape and dtype; received {expected.dtype} {expected.shape} and "
        f"{found.dtype} {found.shape}"
    )
