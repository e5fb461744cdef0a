"""Shards as memory-mapped files on the disks of the nodes that made them.

A process maps the files of its own node: a read is a view of the page cache, which all processes share. Rows on the
disk of another node are read there by a task, and only these rows travel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bss_ray.data import cache
from bss_ray.data.cache import FileEntry
from bss_ray.data.manifest import FORMAT, ShardsManifest, from_manifest, name_of, to_manifest
from bss_ray.data.shards import Shards, Writer
from bss_ray.data.store import Arrays, MappedStore
from bss_ray.errors import BssRayError, StorageError
from bss_ray.runtime.wait import wait_for

P = ParamSpec("P")
T = TypeVar("T")

# Shape of a row of each column, and its dtype.
_Kinds = dict[str, tuple[tuple[int, ...], "np.dtype[np.generic]"]]

_LAST_WORDS_S = 60.0


class NodeFile(NamedTuple):
    """The file of a shard, and where it is.

    Attributes:
        entry: Name, size and checksum of the file.
        folder: Folder of the file's dataset on the node. It is absolute, because the reader's environment may differ
            from the writer's.
        node: Id of the node that has the file; empty if every node has it.
    """

    entry: FileEntry
    folder: str
    node: str


class DiskStore(MappedStore):
    """Store of shards as files.

    Args:
        files: One file for each shard.
    """

    def __init__(self, files: Sequence[NodeFile]) -> None:
        super().__init__(len(files))
        self.files = tuple(files)

    def __reduce__(self) -> tuple[object, ...]:
        return DiskStore, (self.files,)

    def open(self, shard: int) -> Arrays:
        entry, folder, _ = self.files[shard]
        return _map(Path(folder) / entry.name, entry)

    def read(self, shard: int) -> Arrays:
        if self._away[shard] < 0:
            return super().read(shard)
        # Not kept: rows read from other nodes would fill the object store.
        return dict(_get(_ask(self.files[shard].node, _read, self.only([shard]))))

    def take(self, shards: np.ndarray, rows: np.ndarray, out: Arrays) -> None:
        away = self._away[shards]
        if len(away) == 0 or away.max() < 0:
            super().take(shards, rows, out)
            return
        kinds = {name: (values.shape[1:], values.dtype) for name, values in out.items()}
        asked = [
            (there, self._ask_for(shards[there], rows[there], kinds))
            for there in (np.flatnonzero(away == node) for node in np.unique(away[away >= 0]))
        ]
        here = np.flatnonzero(away < 0)
        near = {name: np.empty((len(here), *shape), dtype) for name, (shape, dtype) in kinds.items()}
        super().take(shards[here], rows[here], near)
        for places, arrays in ((here, near), *((there, _get(ref)) for there, ref in asked)):
            for name, target in out.items():
                target[places] = arrays[name]

    def only(self, shards: Sequence[int]) -> DiskStore:
        return DiskStore([self.files[shard] for shard in shards])

    @functools.cached_property
    def _away(self) -> np.ndarray:
        """(shards,) number of the other node that has the file; -1 if this node can read it."""
        nodes = {file.node for file in self.files} - {""}
        here = ray.get_runtime_context().get_node_id() if nodes else ""
        others = {node: number for number, node in enumerate(sorted(nodes - {here}))}
        return np.array([others.get(file.node, -1) for file in self.files])

    def _ask_for(self, shards: np.ndarray, rows: np.ndarray, kinds: _Kinds) -> ray.ObjectRef:
        """Reference to rows of shards on another node."""
        wanted, anew = np.unique(shards, return_inverse=True)
        return _ask(self.files[wanted[0]].node, _take, self.only(wanted.tolist()), anew, rows, kinds)


@functools.cache  # a process maps a file once, whatever the number of tasks it runs
def _map(path: Path, entry: FileEntry) -> Arrays:
    try:
        cache.hold(path.parent)
    except FileNotFoundError:
        raise StorageError(f"{path.parent} does not exist any more. Run again, then it is made again") from None
    return cache.map_shard(path, entry)


def _read(store: DiskStore) -> Arrays:
    return store.read(0)


def _take(store: DiskStore, shards: np.ndarray, rows: np.ndarray, kinds: _Kinds) -> Arrays:
    out = {name: np.empty((len(rows), *shape), dtype) for name, (shape, dtype) in kinds.items()}
    store.take(shards, rows, out)
    return out


# ---- other nodes ------------------------------------------------------------------------------


@ray.remote(num_cpus=0)
def _call(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | BssRayError:
    """The function's result, or the user error it raises: as a value the error comes without Ray's wrapper."""
    try:
        return function(*args, **kwargs)
    except BssRayError as error:
        return error


def _ask(node: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> ray.ObjectRef:
    """Reference to the function's result on that node."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = _call.options(scheduling_strategy=there, name=f"bss_ray.{function.__name__.lstrip('_')}")
    return task.remote(function, *args, **kwargs)


def _get(ref: ray.ObjectRef) -> Any:
    """Result of a task on another node.

    Raises:
        StorageError: The node and its files are lost.
    """
    try:
        result = wait_for(ref, "the disk store of a node")
    except ray.exceptions.RayTaskError:
        raise  # an error of this project, not a lost node
    except ray.exceptions.RayError as error:
        raise StorageError(
            f"a node is gone, and with it the shards on its disk ({error}). Run again: they are made again, and "
            "training resumes from the last checkpoint"
        ) from error
    if isinstance(result, BssRayError):
        raise result
    return result


def _on_every_node(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> list[ray.ObjectRef]:
    """References to the function's result on each node."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    return [_ask(node, function, *args, **kwargs) for node in nodes]


# ---- building ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiskWriter(Writer):
    """Writer of shards to the disk of the node on which they are made.

    Args:
        folder: Folder of all datasets on a node; None takes the node's own folder (`cache_folder`).
        max_gib: See `StoreConfig`.
        build: Name of this build.
    """

    folder: str | None
    max_gib: float | None = None
    build: str = field(default_factory=lambda: f".new-{uuid.uuid4().hex}")

    def put(self, index: int, arrays: Arrays) -> NodeFile:
        node = ray.get_runtime_context().get_node_id()
        # Each node has a folder of its own, also if the nodes share a disk: the first to finish removes its folder.
        folder = cache.cache_folder(self.folder) / f"{self.build}-{node[:8]}"
        notes = {"bss_ray": json.dumps({"format": FORMAT, "shard": index})}
        entry = cache.write_shard(folder / f"shard-{index:05d}.arrow", arrays, notes)
        return NodeFile(entry, str(folder), node)

    def draft(self, kept: Sequence[ray.ObjectRef]) -> DiskStore:
        return DiskStore(wait_for(list(kept), "what is known of the shards"))

    def finish(self, shards: Shards, key: str | None) -> Shards:
        assert isinstance(shards.store, DiskStore)
        files, manifest = shards.store.files, to_manifest(shards)
        data_set, manifest["files"] = name_of(manifest), [file.entry for file in files]
        refs = []
        for node in dict.fromkeys(file.node for file in files):
            mine = [file for file in files if file.node == node]
            refs.append(_ask(node, _publish, self, data_set, mine, manifest, key))
        for ref in refs:
            _get(ref)
        kept = [file._replace(folder=str(Path(file.folder).with_name(data_set))) for file in files]
        return dataclasses.replace(shards, store=DiskStore(kept))

    def discard(self) -> None:
        refs = _on_every_node(_discard, self)
        ray.wait(refs, num_returns=len(refs), timeout=_LAST_WORDS_S)

    def find(self, key: str) -> tuple[Shards | None, list[str]]:
        refs = _on_every_node(_find, self.folder, key)
        found: list[_Found] = [seen for seen in map(_get, refs) if seen is not None]
        told = [f"{path} was damaged (its checksum differs) and is removed" for seen in found for path in seen.damaged]
        for data_set in dict.fromkeys(seen.name for seen in found):
            holders = [seen for seen in found if seen.name == data_set]
            manifest = holders[0].manifest
            entries = [FileEntry(*entry) for entry in manifest["files"]]
            files = [_choose(entry, index, holders, nodes=len(refs)) for index, entry in enumerate(entries)]
            sound = [file for file in files if file is not None]
            if len(sound) == len(files):
                return from_manifest(manifest, DiskStore(sound), [file.node for file in sound]), told
            missing = len(files) - len(sound)
            told.append(f"{missing} of {len(files)} files of the stored dataset are missing: it is made again")
        return None, told


def _publish(
    writer: DiskWriter, data_set: str, files: list[NodeFile], manifest: ShardsManifest, key: str | None
) -> None:
    new = Path(files[0].folder)
    cache.publish(new, new.with_name(data_set), [file.entry for file in files], manifest, key)
    with contextlib.suppress(FileNotFoundError):  # another build may clean at the same time
        cache.clean(new.parent, None if writer.max_gib is None else writer.max_gib * 2**30)


def _discard(writer: DiskWriter) -> None:
    for folder in cache.cache_folder(writer.folder).glob(f"{writer.build}-*"):
        shutil.rmtree(folder, ignore_errors=True)


class _Found(NamedTuple):
    """The files of a dataset on one node: sound files by position, and the paths of damaged files."""

    node: str
    folder: str
    manifest: ShardsManifest
    sound: frozenset[int]
    damaged: list[Path]

    @property
    def name(self) -> str:
        """Manifest of the dataset."""
        return Path(self.folder).name


def _find(folder: str | None, key: str) -> _Found | None:
    root = cache.cache_folder(folder)
    known = cache.find(root, key)
    if known is None:
        return None
    path, manifest = root / known[0], known[1]
    sound, damaged = cache.survey(path, [FileEntry(*entry) for entry in manifest["files"]])
    return _Found(ray.get_runtime_context().get_node_id(), str(path), manifest, frozenset(sound), damaged)


def _choose(entry: FileEntry, index: int, found: list[_Found], *, nodes: int) -> NodeFile | None:
    """Node that reads a file: the nodes that have it take turns; none in particular if all share a folder."""
    holders = [seen for seen in found if index in seen.sound]
    if not holders:
        return None
    chosen = holders[index % len(holders)]
    shared = len(holders) == nodes > 1 and len({seen.folder for seen in holders}) == 1
    return NodeFile(entry, chosen.folder, "" if shared else chosen.node)
