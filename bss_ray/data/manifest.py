"""What shards are, without where they are: the part of `Shards` that outlives a Ray session."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from bss_ray.data.columns import Columns
from bss_ray.data.shards import Feature, Shard, Shards
from bss_ray.data.store import Store

# Version of what stores keep on disk; part of every name, so that other versions are not found.
# 2: every shard says which rows have which modality; labels have a task.
FORMAT = 2


def to_manifest(shards: Shards) -> dict[str, Any]:
    """Description of shards, for JSON. It names no nodes: their ids differ between Ray sessions."""
    return {
        "format": FORMAT,
        "fingerprint": shards.fingerprint,
        "num_classes": shards.num_classes,
        "columns": dataclasses.asdict(shards.columns),
        "features": {name: [list(feature.shape), feature.dtype] for name, feature in shards.features.items()},
        "shards": [[part.first_row, part.rows] for part in shards.parts],
    }


def from_manifest(manifest: dict[str, Any], store: Store, nodes: Sequence[str]) -> Shards:
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


def name_of(manifest: dict[str, Any]) -> str:
    """Name of a data set: rows, cuts and roles give it, so equal names mean equal files."""
    return f"{manifest['fingerprint']}-{digest(manifest, size=4)}"


def digest(content: Any, *, size: int = 16) -> str:
    """Hexadecimal digest of what JSON can write."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=size).hexdigest()
