"""From a Ray Dataset to shards: execute it once, check every row, cut it into runs of rows."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.data.block import BlockAccessor

from bss_ray.data.checks import Problem, check_input, check_labels, raise_first_problem
from bss_ray.data.columns import Columns
from bss_ray.data.digest import add_digests, row_hashes, rows_digest
from bss_ray.data.shards import Feature, Shard, Shards
from bss_ray.data.store import Arrays, ObjectStore
from bss_ray.errors import DataError, nearest

# Large enough that a shard's overhead (a few hundred microseconds to open) is nothing, small enough
# that shards spread evenly over nodes and scorers.
SHARD_BYTES = 128 << 20


@dataclass(frozen=True)
class _Report:
    """What a shard's task found out about its rows."""

    rows: int
    node: str
    features: dict[str, Feature]
    digests: dict[str, int]
    largest_label: int
    problems: list[Problem] = field(default_factory=list)


def build_shards(
    dataset: ray.data.Dataset,
    columns: Columns,
    *,
    num_classes: int | None = None,
    min_shards: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Shards:
    """Execute a Ray Dataset once, check every row, and cut it into shards.

    Args:
        dataset: any Ray Dataset; each modality is a column of numeric tensors of one shape.
        columns: roles of its columns.
        num_classes: C; None takes the largest label + 1.
        min_shards: shards hold about 128 MiB, but there are at least so many (if there are rows).
        on_progress: called with (shards made, all shards).

    Raises:
        DataError: no rows, no such column, an input that is not numeric or not finite, ragged shapes,
            labels missing, not integer or outside 0..C-1, ids that occur twice.
    """
    blocks = _execute(dataset, columns)
    rows = sum(block.rows for block in blocks)
    if rows == 0:
        raise DataError("the data set has no rows. Check the path, or the filter that left none")
    wanted = math.ceil(sum(block.size_bytes for block in blocks) / SHARD_BYTES)
    count = min(max(wanted, min_shards, 1), rows)
    edges = [rows * index // count for index in range(count + 1)]

    results = [
        _make_shard.remote(columns, num_classes, start, *_pieces(blocks, start, stop))
        for start, stop in itertools.pairwise(edges)
    ]
    report_refs, array_refs, id_refs = (list(refs) for refs in zip(*results, strict=True))
    for done in range(1, count + 1):
        ray.wait(report_refs, num_returns=done, fetch_local=False)
        if on_progress is not None:
            on_progress(done, count)
    reports: list[_Report] = ray.get(report_refs)

    raise_first_problem([problem for report in reports for problem in report.problems])
    features = _common_features(reports)
    shards = Shards(
        columns=columns,
        parts=tuple(Shard(start, report.rows, report.node) for start, report in zip(edges[:-1], reports, strict=True)),
        features=features,
        num_classes=num_classes or max(report.largest_label for report in reports) + 1,
        fingerprint=_fingerprint(rows, features, reports),
        store=ObjectStore(array_refs),
    )
    if columns.id is not None:
        _refuse_duplicates(shards, columns.id, ray.get(_equal_hashes.remote(*id_refs)))
    return shards


def build_split(
    split: str,
    dataset: ray.data.Dataset,
    columns: Columns,
    *,
    train: Shards | None = None,
    num_classes: int | None = None,
    min_shards: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Shards:
    """`build_shards` for one split of a data set, with the split's name in errors.

    Args:
        split: `train`, `validation` or `test`.
        dataset: its rows.
        columns: roles of the training data's columns; ids and extras are of use there alone.
        train: the training rows, which the rows of another split must be like.
        num_classes: C; None takes that of `train`, or the largest label + 1.
        min_shards: see `build_shards`.
        on_progress: see `build_shards`.

    Raises:
        DataError: see `build_shards`; or shape or dtype of a modality differ from the training rows'.
    """
    if train is not None:
        columns = Columns(modalities=columns.modalities, label=columns.label)
        num_classes = train.num_classes
    try:
        shards = build_shards(dataset, columns, num_classes=num_classes, min_shards=min_shards, on_progress=on_progress)
    except DataError as error:
        raise DataError(f"{split} data: {error}") from None
    features = {} if train is None else train.features
    for name in columns.modalities:
        here, there = shards.features[name], features.get(name, shards.features[name])
        if here != there:
            raise DataError(
                f"{split} data: modality {name!r} has {here.dtype} {here.shape} and the training data {there.dtype} "
                f"{there.shape}; all splits need one shape and dtype"
            )
    return shards


# ---- execution --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    ref: Any
    first_row: int
    rows: int
    size_bytes: int


def _execute(dataset: ray.data.Dataset, columns: Columns) -> list[_Block]:
    """Run the data set and return its blocks in order."""
    schema = dataset.schema()
    if schema is None:
        raise DataError("the data set has no rows and no columns. Check the path, or the filter that left none")
    for name in columns.all:
        if name not in schema.names:
            raise DataError(f"the data set has no column {name!r}; {nearest(name, schema.names)}")
    dataset = dataset.select_columns(list(columns.all))
    dataset.context.execution_options.preserve_order = True  # row ids are positions
    blocks: list[_Block] = []
    first_row = 0
    # The only use of Ray Data's developer API: references to blocks without moving them.
    for bundle in dataset.materialize().iter_internal_ref_bundles():
        for entry in bundle.blocks:
            blocks.append(_Block(entry.ref, first_row, entry.metadata.num_rows, entry.metadata.size_bytes or 0))
            first_row += entry.metadata.num_rows
    return blocks


def _pieces(blocks: list[_Block], start: int, stop: int) -> list[Any]:
    """What of which block makes rows [start, stop): slices first, then as many block references."""
    parts = [block for block in blocks if block.first_row < stop and block.first_row + block.rows > start]
    slices = [
        (max(start, block.first_row) - block.first_row, min(stop, block.first_row + block.rows) - block.first_row)
        for block in parts
    ]
    return [slices, *(block.ref for block in parts)]


@ray.remote(num_returns=3)
def _make_shard(
    columns: Columns, num_classes: int | None, first_row: int, slices: list[tuple[int, int]], *blocks: Any
) -> tuple[_Report, Arrays, np.ndarray]:
    """One shard: its report, its arrays, and a hash of each row's id."""
    accessors = [
        BlockAccessor.for_block(BlockAccessor.for_block(block).slice(start, stop))
        for (start, stop), block in zip(slices, blocks, strict=True)
    ]
    node = ray.get_runtime_context().get_node_id()
    try:
        arrays = {name: _column(accessors, name) for name in columns.all}
    except DataError as error:
        # Reported, not raised: the driver names the first shard's problem, whichever task ends first.
        return _Report(0, node, {}, {}, -1, [Problem(str(error), 0, [])]), {}, np.empty(0, np.uint64)
    problems: list[Problem] = []
    for name in columns.modalities:
        problems += check_input(arrays[name], name, first_row)
    label = arrays[columns.label]
    problems += check_labels(label, columns.label, first_row, num_classes)
    if not problems:
        arrays[columns.label] = label = label.astype(np.int64)

    hashes = {name: row_hashes(values, name) for name, values in arrays.items()}
    report = _Report(
        rows=len(label),
        node=node,
        features={name: Feature(arrays[name].shape[1:], str(arrays[name].dtype)) for name in columns.inputs},
        digests={name: rows_digest(values, first_row) for name, values in hashes.items()},
        largest_label=int(label.max()) if label.dtype.kind in "iu" else -1,
        problems=problems,
    )
    return report, arrays, hashes.get(columns.id or "", np.empty(0, np.uint64))


def _column(accessors: list[BlockAccessor], name: str) -> np.ndarray:
    """One column of a shard from its blocks.

    Raises:
        DataError: rows of more than one shape.
    """
    pieces = [_to_numpy(accessor.to_numpy(name), name) for accessor in accessors]
    shapes = {piece.shape[1:] for piece in pieces}
    if len(shapes) > 1:
        raise DataError(f"all rows of column {name!r} need one shape; received {sorted(shapes)}")
    return np.concatenate(pieces)


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
    return values  # nulls and mixtures: the checks below name them


def _common_features(reports: list[_Report]) -> dict[str, Feature]:
    """The shards' one schema.

    Raises:
        DataError: shards differ.
    """
    first = reports[0].features
    for report in reports[1:]:
        for name, feature in report.features.items():
            if feature != first[name]:
                raise DataError(
                    f"all rows of column {name!r} need one shape and dtype; received {first[name].dtype} "
                    f"{first[name].shape} and {feature.dtype} {feature.shape}"
                )
    return first


def _fingerprint(rows: int, features: dict[str, Feature], reports: list[_Report]) -> str:
    content = {
        "rows": rows,
        "schema": {name: [list(feature.shape), feature.dtype] for name, feature in features.items()},
        "columns": {name: add_digests([report.digests[name] for report in reports]) for name in reports[0].digests},
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


@ray.remote
def _equal_hashes(*id_hashes: np.ndarray) -> np.ndarray:
    """Row ids whose id hash occurs more than once, ascending; 8 bytes a row in one process."""
    hashes = np.concatenate(id_hashes)
    order = np.argsort(hashes, kind="stable")
    same = hashes[order[1:]] == hashes[order[:-1]]
    return np.unique(np.concatenate([order[1:][same], order[:-1][same]]))


def _refuse_duplicates(shards: Shards, name: str, suspects: np.ndarray) -> None:
    """Compare the ids themselves where their hashes are equal.

    Raises:
        DataError: an id occurs twice; names the first and its rows.
    """
    seen: dict[str, int] = {}
    for row, value in zip(suspects, shards.gather(suspects, (name,))[name] if len(suspects) else [], strict=True):
        text = str(value)
        if text in seen:
            raise DataError(
                f"ids must be unique: column {name!r} holds {text!r} in rows {seen[text]} and {int(row)} "
                f"({len(suspects)} rows share an id). Remove the copies, or leave `id` out"
            )
        seen[text] = int(row)
