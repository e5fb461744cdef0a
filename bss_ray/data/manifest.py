"""The description of shards without their places: the part of `Shards` that outlives a Ray session."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from typing import Any, NotRequired, TypedDict

import numpy as np

from bss_ray.data.columns import Columns
from bss_ray.data.shards import Feature, Shard, Shards
from bss_ray.data.store import Store

_MASK = (1 << 64) - 1


def row_hashes(values: np.ndarray, name: str) -> np.ndarray:
    """(n,) uint64 hash of each row of `values` (n, ...), for a column of that name."""
    if values.dtype.kind in "OSU":
        return np.array([_hash_text(str(value)) for value in values], dtype=np.uint64)
    raw = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
    if raw.shape[1] % 8:
        raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 8)))
    words = raw.view(np.uint64)
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    factors = np.random.Philox(key=[seed, 0]).random_raw(words.shape[1]) | np.uint64(1)
    return _mix(words @ factors)


def rows_digest(hashes: np.ndarray, first_row: int) -> int:
    """Digest of consecutive rows; digests of parts are added modulo 2^64."""
    ids = np.arange(first_row, first_row + len(hashes), dtype=np.uint64)
    return int(_mix(hashes ^ _mix(ids + np.uint64(1))).sum(dtype=np.uint64))


def fingerprint(
    features: Mapping[str, Feature], rows: int, digests: Sequence[Mapping[str, int]], leave_out: Set[str]
) -> str:
    """Digest of the content of all rows.

    Args:
        features: Columns of the rows.
        rows: Number of rows.
        digests: `rows_digest` of each column, for each part of the rows.
        leave_out: Columns without information.
    """
    content = {
        "rows": rows,
        "schema": {name: [list(feature.shape), feature.dtype] for name, feature in features.items()},
        "columns": {name: sum(part[name] for part in digests) & _MASK for name in digests[0].keys() - leave_out},
    }
    return json_digest(content)


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every input bit reaches every output bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(words ^ (words >> np.uint64(31)))


# Version of the format on disk. It is part of every name, so that datasets of other versions are not found.
# 2: every shard stores which rows have which modality, and labels have a task.
FORMAT = 2


class ShardsManifest(TypedDict):
    """Description of shards, for JSON.

    Attributes:
        format: Version of the format.
        fingerprint: Digest of the rows.
        num_classes: Number of values that a head returns.
        columns: Arguments of `Columns`.
        features: Shape and dtype of each column.
        shards: First row and number of rows of each shard.
        files: Arguments of `FileEntry` of each shard's file, on a disk.
    """

    format: int
    fingerprint: str
    num_classes: int
    columns: dict[str, Any]
    features: dict[str, tuple[Sequence[int], str]]
    shards: list[tuple[int, int]]
    files: NotRequired[Sequence[tuple[str, int, int]]]


def to_manifest(shards: Shards) -> ShardsManifest:
    """Description of shards, for JSON. It names no nodes: their ids differ between Ray sessions."""
    return {
        "format": FORMAT,
        "fingerprint": shards.fingerprint,
        "num_classes": shards.num_classes,
        "columns": dataclasses.asdict(shards.columns),
        "features": {name: (feature.shape, feature.dtype) for name, feature in shards.features.items()},
        "shards": [(part.first_row, part.rows) for part in shards.parts],
    }


def from_manifest(manifest: ShardsManifest, store: Store, nodes: Sequence[str]) -> Shards:
    """The described shards over a store; `nodes` (shards,) says which node holds which."""
    parts = zip(manifest["shards"], nodes, strict=True)
    return Shards(
        columns=Columns(**manifest["columns"]),
        parts=tuple(Shard(first_row, rows, node) for (first_row, rows), node in parts),
        features={name: Feature(tuple(shape), dtype) for name, (shape, dtype) in manifest["features"].items()},
        num_classes=manifest["num_classes"],
        fingerprint=manifest["fingerprint"],
        store=store,
    )


def name_of(manifest: ShardsManifest) -> str:
    """Name of a dataset, made from rows, shard boundaries and roles, so that equal names mean equal files."""
    return f"{manifest['fingerprint']}-{json_digest(manifest, size=4)}"


def json_digest(content: object, *, size: int = 16) -> str:
    """Hexadecimal digest of a value that JSON can write."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=size).hexdigest()
