"""Shards in a Lance dataset, which may be on object storage: every node reads rows from there.

All datasets under one URI are versions of one Lance dataset. A version is made by one commit and has two tags: the
name of its content and the key of its source. No code reads the latest version, so simultaneous builds do no harm.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from bss_ray.data.cache import to_arrays, to_batch
from bss_ray.data.manifest import ShardsManifest, from_manifest, name_of, to_manifest
from bss_ray.data.shards import Shards, Writer
from bss_ray.data.store import Arrays, Store
from bss_ray.errors import DataError, StorageError, first_line, optional_import
from bss_ray.runtime.wait import wait_for

if TYPE_CHECKING:
    import ray
    from lance import LanceDataset
    from lance.fragment import FragmentMetadata

_NOTE = b"bss_ray"
# Lance's own default. Builds that were stopped, or whose content existed already, leave versions without a tag.
_KEEP = datetime.timedelta(days=14)


def _lance() -> ModuleType:
    return optional_import("lance", extra="lance", needed_for="store.kind=lance")


@contextmanager
def _storage(doing: str) -> Iterator[None]:
    """Lance's errors as errors that say what the user can do.

    Raises:
        StorageError: Lance failed; the error says during which operation.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise StorageError(
            f"cannot {doing}: {first_line(error)}. Check --store.folder, its credentials in the environment "
            "(AWS_ACCESS_KEY_ID and the like), and the room there"
        ) from error


@functools.cache  # opening reads the version's manifest, so it is done once per process
def _open(uri: str, version: int) -> LanceDataset:
    with _storage(f"open version {version} of the Lance dataset {uri}"):
        return _lance().dataset(uri, version=version)


class LanceStore(Store):
    """Store of shards as consecutive rows of one version of a Lance dataset.

    Args:
        uri: URI of the Lance dataset.
        version: Version of the Lance dataset.
        spans: (first row, rows) of each shard in the version.
    """

    def __init__(self, uri: str, version: int, spans: Sequence[tuple[int, int]]) -> None:
        self._uri, self.version = uri, version
        self._spans = tuple(spans)

    def __reduce__(self) -> tuple[object, ...]:
        return LanceStore, (self._uri, self.version, self._spans)

    def read(self, shard: int) -> Arrays:
        first, rows = self._spans[shard]
        data = _open(self._uri, self.version)
        with _storage(f"read rows of {self._uri}"):
            return _arrays(data.scanner(offset=first, limit=rows).to_table())

    def take(self, shards: np.ndarray, rows: np.ndarray, out: Arrays) -> None:
        if len(rows) == 0:
            return
        first_rows = np.array([first for first, _ in self._spans], dtype=np.int64)
        data = _open(self._uri, self.version)
        with _storage(f"read rows of {self._uri}"):
            table = data.take(pa.array(first_rows[shards] + rows), columns=list(out))
        arrays = _arrays(table)
        for name, target in out.items():
            target[...] = arrays[name]

    def only(self, shards: Sequence[int]) -> LanceStore:
        return LanceStore(self._uri, self.version, [self._spans[shard] for shard in shards])


class Fragments(NamedTuple):
    """A fragment that a task has written: Lance's description of it, its schema, and its rows."""

    described: list[str]
    schema: pa.Schema
    rows: int


@dataclass(frozen=True)
class LanceWriter(Writer):
    """Writer of each shard as a fragment.

    Args:
        uri: URI of the Lance dataset: a folder that all nodes share, or object storage.

    Raises:
        MissingDependencyError: Lance is not installed.
    """

    uri: str

    on_nodes = False

    def __post_init__(self) -> None:
        _lance()

    def put(self, index: int, arrays: Arrays) -> Fragments:
        _lance()
        from lance.fragment import write_fragments

        batch = to_batch({name: _text_as_objects(values) for name, values in arrays.items()})
        table = pa.Table.from_batches([batch])
        with _storage(f"write to the Lance dataset {self.uri}"):
            # "overwrite" requires no agreement with the schema of other versions; it commits nothing.
            fragments = write_fragments(table, self.uri, schema=table.schema, mode="overwrite")
        return Fragments([json.dumps(fragment.to_json()) for fragment in fragments], batch.schema, batch.num_rows)

    def draft(self, kept: Sequence[ray.ObjectRef]) -> LanceStore:
        return self.commit(wait_for(list(kept), "what is known of the shards"))

    def commit(self, made: Sequence[Fragments]) -> LanceStore:
        """A store over a new version of these fragments, in their order."""
        from lance.fragment import FragmentMetadata

        schema = _common_schema([part.schema for part in made])
        starts = np.cumsum([0, *(part.rows for part in made)]).tolist()
        version = self._commit(schema, [FragmentMetadata.from_json(text) for part in made for text in part.described])
        return LanceStore(self.uri, version, [(start, part.rows) for start, part in zip(starts, made, strict=False)])

    def finish(self, shards: Shards, key: str | None) -> Shards:
        assert isinstance(shards.store, LanceStore)
        data, manifest = _open(self.uri, shards.store.version), to_manifest(shards)
        version = _tagged(data, name_of(manifest))
        if version is None:
            schema = data.schema.with_metadata({_NOTE: json.dumps(manifest)})
            version = self._commit(schema, [fragment.metadata for fragment in data.get_fragments()])
            version = _tag(data, name_of(manifest), version)
        if key is not None:
            _tag(data, key, version, move=True)
        with _storage(f"remove old versions of the Lance dataset {self.uri}"):
            data.cleanup_old_versions(_KEEP, error_if_tagged_old_versions=False)
        return _shards(self.uri, version)

    def find(self, key: str) -> tuple[Shards | None, list[str]]:
        try:
            version = _lance().dataset(self.uri, version=key).version
        except ValueError:  # no such dataset, or no such tag
            return None, []
        return _shards(self.uri, version), []

    def _commit(self, schema: pa.Schema, fragments: list[FragmentMetadata]) -> int:
        """Make a new version of these fragments; simultaneous calls get different numbers."""
        lance = _lance()
        with _storage(f"write to the Lance dataset {self.uri}"):
            made = lance.LanceDataset.commit(self.uri, lance.LanceOperation.Overwrite(schema, fragments))
        return int(made.version)


def _shards(uri: str, version: int) -> Shards:
    """The shards of a version, which all nodes read equally well."""
    manifest: ShardsManifest = json.loads(_open(uri, version).schema.metadata[_NOTE])
    store = LanceStore(uri, version, [(first_row, rows) for first_row, rows in manifest["shards"]])
    return from_manifest(manifest, store, [""] * len(manifest["shards"]))


def _tagged(data: LanceDataset, tag: str) -> int | None:
    """The version with this tag, if there is one."""
    with _storage(f"read the tags of the Lance dataset {data.uri}"):
        found = data.tags.list().get(tag)
    return None if found is None else int(found["version"])


def _tag(data: LanceDataset, tag: str, version: int, *, move: bool = False) -> int:
    """Give a version a tag; returns the version with this tag, which may be another build's unless the tag is moved."""
    try:
        data.tags.create(tag, version)
    except ValueError:  # the tag exists: made by an earlier or a simultaneous build
        if move:
            data.tags.update(tag, version)
    found = _tagged(data, tag)
    return version if found is None else found


def _common_schema(schemas: list[pa.Schema]) -> pa.Schema:
    """The common schema of the fragments.

    Raises:
        DataError: The schemas differ.
    """
    for schema in schemas:
        for here, there in zip(schema, schemas[0], strict=True):
            if not here.equals(there, check_metadata=True):
                raise DataError(
                    f"all rows of column {here.name!r} need one type in Lance; received {there.type} and {here.type}. "
                    "Give it one type in Ray Data, without nulls"
                )
    return schemas[0]


def _text_as_objects(values: np.ndarray) -> np.ndarray:
    """Text as Arrow's strings: the fixed width of text differs between shards, and a Lance column has one type."""
    return values.astype(object) if values.dtype.kind == "U" else values


def _arrays(table: pa.Table) -> Arrays:
    """Columns of the rows that Lance returned."""
    arrays = to_arrays(table.combine_chunks().to_batches()[0])
    for name, values in arrays.items():
        if pa.types.is_string(table.schema.field(name).type) and table.column(name).null_count == 0:
            arrays[name] = values.astype(str)
            arrays[name].flags.writeable = False
    return arrays
