"""Columns of a shard as an Arrow record batch, and back as views of its buffers.

Numbers and tensors of numbers become Arrow numbers and fixed-size lists, which other tools read too.
Booleans become uint8, since Arrow packs eight into a byte, which no NumPy array is a view of. All else of
fixed width (text, dates) becomes fixed-size binary. Shape and dtype stand in the field's metadata.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa

from bss_ray.data.store import Arrays
from bss_ray.errors import DataError


def to_batch(arrays: Arrays, notes: dict[str, str] | None = None) -> pa.RecordBatch:
    """Columns (rows, ...) as a record batch, without a copy where they are contiguous.

    Args:
        arrays: `{column: (rows, ...)}`.
        notes: metadata of the schema.

    Raises:
        DataError: a column of Python objects that Arrow has no type for.
    """
    columns = {name: _encode(values, name) for name, values in arrays.items()}
    fields = [
        pa.field(name, column.type, metadata={"shape": json.dumps(values.shape[1:]), "dtype": values.dtype.str})
        for (name, values), column in zip(arrays.items(), columns.values(), strict=True)
    ]
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=pa.schema(fields, metadata=notes or {}))


def to_arrays(batch: pa.RecordBatch) -> Arrays:
    """The columns of `to_batch`: read-only views of the batch's buffers, except for Python objects."""
    return {field.name: to_array(batch.column(field.name), field) for field in batch.schema}


def to_array(column: pa.Array, field: pa.Field) -> np.ndarray:
    """One column (rows, ...) of `to_batch`; see `to_arrays`."""
    dtype, shape = np.dtype(field.metadata[b"dtype"].decode()), json.loads(field.metadata[b"shape"])
    if dtype.kind == "O":
        return np.fromiter(column.to_pylist(), dtype=object, count=len(column))
    values = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    width = values.type.bit_width // 8
    raw = np.frombuffer(values.buffers()[-1], np.uint8, count=len(values) * width, offset=values.offset * width)
    array: np.ndarray = raw.view(dtype).reshape(len(column), *shape)
    array.flags.writeable = False  # Arrow has buffers that could be written
    return array


def _encode(values: np.ndarray, name: str) -> Any:
    """A column as an Arrow array."""
    if values.dtype.kind == "O":
        try:
            return pa.array(values.tolist(), from_pandas=True)  # Ray Data gives NaN for some nulls
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"column {name!r} holds Python objects that only the object store can keep ({error}). Give it one "
                "type in Ray Data, or choose store.kind=object"
            ) from error
    rows, items = len(values), math.prod(values.shape[1:])
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values))]
    if values.dtype.kind not in "fiub" or not values.dtype.isnative or values.dtype.itemsize > 8:
        return pa.Array.from_buffers(pa.binary(items * values.dtype.itemsize), rows, buffers)
    kind = pa.uint8() if values.dtype.kind == "b" else pa.from_numpy_dtype(values.dtype)
    flat = pa.Array.from_buffers(kind, rows * items, buffers)
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, items)
