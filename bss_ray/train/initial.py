"""Scores that a run begins with: of an earlier run, or of `bss-ray score`."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from bss_ray.data.shards import Shards
from bss_ray.errors import DataError, first_ids, nearest
from bss_ray.sample.state import PartState
from bss_ray.storage import StoragePath

_MEASURES = ("similarity", "information")


class ScoresFile:
    """A Parquet file or folder of scores, as `SavedScores`: each holder reads what overlaps its rows.

    Rows are matched by the data's id column where the file has it too, else by `row_id`. A row whose score is null
    counts as not scored yet. Columns `similarity` and `information` are taken along; without them rows have no measures
    until they are measured again.

    Args:
        path: Parquet file or folder, or a URI; all nodes can read it.
        shards: the training rows.

    Raises:
        DataError: no such file or column, or another number of rows than the data.
    """

    def __init__(self, path: str, shards: Shards) -> None:
        self._path = StoragePath.of(path)
        self._shards = shards
        dataset = self._open()
        names = dataset.schema.names
        own_id = shards.columns.id
        self._key: str = own_id if own_id is not None and own_id in names else "row_id"
        for name in (self._key, "score"):
            if name not in names:
                raise DataError(
                    f"initial scores need the columns `score` and `row_id` (or the data's id column): {path} has no "
                    f"{name!r}; {nearest(name, names)}"
                )
        self._columns = [self._key, "score", *(name for name in _MEASURES if name in names)]
        rows = dataset.count_rows()
        if rows != shards.rows:
            raise DataError(
                f"initial scores must be of the training rows, one each: {path} has {rows} rows, the data "
                f"{shards.rows}. Score this data with `bss-ray score`"
            )

    def scores(self, start: int, stop: int) -> list[PartState]:
        """Scores of rows [start, stop).

        Raises:
            DataError: a row has none, or more than one; a score is no number in [-1, 1]; ids are of another kind.
        """
        if self._key == "row_id":
            wanted = pa.array(np.arange(start, stop))
            keep = (pc.field("row_id") >= start) & (pc.field("row_id") < stop)
        else:
            wanted = pa.array(self._shards.gather(np.arange(start, stop), (self._key,))[self._key])
            keep = None
        table = self._open().to_table(columns=self._columns, filter=keep).combine_chunks()
        keys = self._as_ids(table[self._key], wanted.type)
        self._refuse_twice(keys)
        places = pc.index_in(wanted, value_set=keys)
        if places.null_count:
            missing = first_ids(np.asarray(places.is_null()), start)
            raise DataError(f"initial scores: {self._path} has none for {missing}, matched by {self._key!r}")
        return [self._part(start, table.take(places))]

    def _as_ids(self, keys: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
        """The file's keys as the data has them."""
        try:
            return keys.cast(kind).combine_chunks()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"initial scores: column {self._key!r} of {self._path} holds {keys.type}, that of the data {kind}. "
                "Write ids of one kind"
            ) from error

    def _part(self, start: int, table: pa.Table) -> PartState:
        part = PartState.empty(start, len(table))
        for values in (part.similarity, part.information):
            values[:] = np.nan  # not in the file: no number that a normalisation over all rows would count
        for name in self._columns[1:]:
            try:
                getattr(part, name)[:] = table[name].to_numpy().astype(np.float32)
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"initial scores: column {name!r} of {self._path} must hold numbers; it holds {table[name].type}"
                ) from error
        unscored = np.isnan(part.score)
        bad = ~unscored & ~(np.abs(part.score) <= 1)
        if bad.any():
            raise DataError(
                f"balance scores lie in [-1, 1]: {self._path} holds others in {first_ids(bad, start)}. Normalise them"
            )
        for values in (part.score, part.similarity, part.information):
            values[unscored] = 0
        part.last_measured[~unscored] = 1
        return part

    def _refuse_twice(self, keys: pa.Array) -> None:
        if len(pc.unique(keys)) == len(keys):
            return
        counts = pc.value_counts(keys)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        values = "1 value" if len(twice) == 1 else f"{len(twice)} values"
        raise DataError(
            f"initial scores: {self._path} holds {values} of {self._key!r} more than once, first "
            f"{twice[0]['values'].as_py()!r}"
        )

    def _open(self) -> pa.dataset.Dataset:
        try:
            return pa.dataset.dataset(self._path.path, filesystem=self._path.system, format="parquet")
        except FileNotFoundError:
            raise DataError(f"initial scores: no such file or folder: {self._path}") from None
        except (OSError, ValueError) as error:
            raise DataError(f"initial scores cannot be read from {self._path}: {error}") from error
