"""Columns of blocks as arrays, also columns with nulls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from ray.data.block import Block

from bss_ray.data.shards import Feature
from bss_ray.errors import DataError
from bss_ray.runtime.ray_internals import block_accessor

# Types of values that stand for a missing object: None, or NaN as pandas writes it.
_NULL_KINDS = (type(None), float, np.floating)


class Partial(NamedTuple):
    """A column in which some rows may have no value.

    Attributes:
        values: (k, ...) values of the rows that have one; None if not even the type of the blocks tells shape and
            dtype.
        present: (n,) bool, true for rows that have a value.
    """

    values: np.ndarray | None
    present: np.ndarray

    def filled(self, feature: Feature | None = None) -> np.ndarray:
        """(n, ...) with zeros for the rows without a value.

        Args:
            feature: Shape and dtype, for columns whose `values` do not tell them.
        """
        if self.values is not None and self.present.all():
            return self.values
        if self.values is None:
            assert feature is not None, "nobody knows the shape"
            return np.zeros((len(self.present), *feature.shape), feature.dtype)
        filled = np.zeros((len(self.present), *self.values.shape[1:]), self.values.dtype)
        filled[self.present] = self.values
        return filled


def read_column(blocks: Sequence[Block], name: str) -> np.ndarray:
    """One column (n, ...) of consecutive blocks; nulls become what Ray Data makes of them.

    Raises:
        DataError: rows of more than one shape.
    """
    return _join([_to_numpy(block_accessor(block).to_numpy(name), name) for block in blocks], name)


def read_partial(blocks: Sequence[Block], name: str) -> Partial:
    """One column of consecutive blocks, without its nulls.

    Raises:
        DataError: rows of more than one shape.
    """
    parts = [_split_nulls(block, name) for block in blocks]
    # A block of nulls only has a shape and dtype that Ray has made up, unless it is typed as tensors.
    values = [part for part, _ in parts if len(part) or part.ndim > 1]
    return Partial(_join(values, name) if values else None, np.concatenate([present for _, present in parts]))


def _split_nulls(block: Block, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The values (k, ...) of the rows that have one, and a mask (n,) of these rows."""
    present = np.ones(block_accessor(block).num_rows(), dtype=bool)
    if isinstance(block, pa.Table) and block.column(name).null_count:
        # Nulls are removed before the array is made: Arrow makes no array of a tensor column with nulls.
        valid = block.column(name).is_valid()
        present = valid.to_numpy()
        block = block.select([name]).filter(valid)
    values = block_accessor(block).to_numpy(name)
    if values.dtype.kind == "O" and any(issubclass(kind, _NULL_KINDS) for kind in set(map(type, values))):
        there = np.array([not _is_null(value) for value in values], dtype=bool)
        present[present] = there
        values = values[there]
    return _to_numpy(values, name), present


def _is_null(value: object) -> bool:
    return value is None or (isinstance(value, (float, np.floating)) and math.isnan(value))


def _to_numpy(values: np.ndarray, name: str) -> np.ndarray:
    """A column of a block as one array (n, ...); lists become tensors, text fixed-width strings."""
    if values.dtype.kind != "O" or len(values) == 0:
        return values
    kinds = {type(value) for value in values}
    if kinds <= {str}:
        return values.astype(str)
    if kinds & {list, np.ndarray}:
        try:
            return np.stack([np.asarray(value) for value in values])
        except ValueError as error:
            raise DataError(
                f"all rows of column {name!r} need one shape: {error}. Pad or crop them in Ray Data first"
            ) from error
    return values  # nulls and mixed types: the checks report them


def _join(pieces: list[np.ndarray], name: str) -> np.ndarray:
    shapes = {piece.shape[1:] for piece in pieces}
    if len(shapes) > 1:
        raise DataError(f"all rows of column {name!r} need one shape; received {sorted(shapes)}")
    return np.concatenate(pieces)
