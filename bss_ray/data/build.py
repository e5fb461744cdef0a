"""From a Ray Dataset to shards: execute it once, check every row, cut it into runs of rows.

For the object store all blocks are there before the first shard is made. For any other store they stream: a shard
is written as soon as its blocks are there, and then they are let go.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.data.block import BlockAccessor

from bss_ray.data.checks import check_input, check_labels
from bss_ray.data.columns import Columns
from bss_ray.data.digest import add_digests, row_hashes, rows_digest
from bss_ray.data.disk import DiskWriter
from bss_ray.data.manifest import FORMAT, digest
from bss_ray.data.shards import Feature, Shard, Shards
from bss_ray.data.store import ObjectWriter, StoreConfig, Writer
from bss_ray.errors import BssRayError, DataError, Problem, nearest, raise_first_problem

# Large enough that a shard's overhead (a few hundred microseconds to open) is nothing, small enough
# that shards spread evenly over nodes and scorers.
SHARD_BYTES = 128 << 20

# Blocks and the shards made of them are in the object store at the same time, and Ray needs some of it too.
_MEMORY_SHARE = 0.4

_STOP_S = 60.0

OnProgress = Callable[[int, int], None]
OnNotice = Callable[[str], None]


@dataclass(frozen=True)
class _Report:
    """What a shard's task found out about its rows."""

    rows: int
    node: str
    features: dict[str, Feature]
    digests: dict[str, int]
    largest_label: int
    problems: list[Problem] = field(default_factory=list)
    failure: BssRayError | None = None


def build_shards(
    dataset: ray.data.Dataset,
    columns: Columns,
    *,
    num_classes: int | None = None,
    min_shards: int = 1,
    store: StoreConfig | None = None,
    source_key: str | None = None,
    memory_bytes: float | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> Shards:
    """Execute a Ray Dataset once, check every row, and cut it into shards.

    Args:
        dataset: any Ray Dataset; each modality is a column of numeric tensors of one shape.
        columns: roles of its columns.
        num_classes: C; None takes the largest label + 1.
        min_shards: shards hold about 128 MiB, but there are at least so many (if there are rows).
        store: where the rows go; default `StoreConfig()`.
        source_key: names the content of the data set's source (see `bss_ray.data.sources.files_key`): what an
            earlier run has stored of it is used again, and the data set is not executed.
        memory_bytes: up to so many bytes of rows stay in memory with the store `auto`; None takes 40 % of the
            object stores.
        on_progress: called with (shards made, shards begun).
        on_notice: called with what the user should read, e.g. that the rows go to disk.

    Raises:
        DataError: no rows, no such column, an input that is not numeric or not finite, ragged shapes,
            labels missing, not integer or outside 0..C-1, ids that occur twice.
        StorageError: the store cannot be written.
    """
    config, tell = store or StoreConfig(), on_notice or (lambda _text: None)
    writer = _writer(config)
    key = source_key and digest([FORMAT, source_key, dataclasses.asdict(columns), num_classes])
    if key is not None:
        found = _find(writer, key, min_shards, tell)
        if found is not None:
            return found

    blocks = _execute(dataset, columns)
    memory = _MEMORY_SHARE * _memory() if memory_bytes is None else memory_bytes
    # A stream is held back until there is enough of it for the shards that are wanted.
    limit = {"object": math.inf, "auto": memory}.get(config.kind, min(min_shards * SHARD_BYTES, memory))
    held, complete = _take_until(blocks, limit)
    if complete and not held:
        raise DataError("the data set has no rows. Check the path, or the filter that left none")
    if config.kind == "auto" and complete:
        writer = ObjectWriter()
    elif config.kind == "auto":
        tell(_spill_notice(memory, config.folder))
    wanted = max(min_shards, math.ceil(sum(block.size_bytes for block in held) / SHARD_BYTES))
    spans = _cut_evenly(list(held), wanted) if complete else _cut(chain(_drain(held), blocks))

    tasks = _Tasks()
    try:
        tasks.run(writer, spans, columns, num_classes, on_progress)
        return writer.finish(_check(tasks, writer, columns, num_classes), key)
    except BaseException:
        blocks.close()  # Ray Data stops, too
        tasks.settle()  # a task that still writes would bring back what is removed now
        writer.discard()
        raise


def build_split(
    split: str,
    dataset: ray.data.Dataset,
    columns: Columns,
    *,
    train: Shards | None = None,
    num_classes: int | None = None,
    min_shards: int = 1,
    store: StoreConfig | None = None,
    source_key: str | None = None,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> Shards:
    """`build_shards` for one split of a data set, with the split's name in errors.

    Args:
        split: `train`, `validation` or `test`.
        dataset: its rows.
        columns: roles of the training data's columns; ids and extras are of use there alone.
        train: the training rows, which the rows of another split must be like.
        num_classes: C; None takes that of `train`, or the largest label + 1.
        min_shards: see `build_shards`.
        store: see `build_shards`.
        source_key: see `build_shards`.
        on_progress: see `build_shards`.
        on_notice: see `build_shards`.

    Raises:
        StorageError: see `build_shards`.
        DataError: see `build_shards`; or shape or dtype of a modality differ from the training rows'.
    """
    if train is not None:
        columns = Columns(modalities=columns.modalities, label=columns.label)
        num_classes = train.num_classes
    try:
        shards = build_shards(
            dataset,
            columns,
            num_classes=num_classes,
            min_shards=min_shards,
            store=store,
            source_key=source_key,
            on_progress=on_progress,
            on_notice=on_notice,
        )
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


# ---- where to ----------------------------------------------------------------------------------


def _writer(config: StoreConfig) -> Writer:
    """What fills the store; for `auto` the one on disk, which may know the data set already."""
    if config.kind == "object":
        return ObjectWriter()
    if config.kind == "lance":
        from bss_ray.data.lance import LanceWriter

        return LanceWriter(str(config.folder))
    # A relative folder means one beside the driver; "~" is each node's own.
    folder = config.folder if config.folder is None or config.folder.startswith("~") else os.path.abspath(config.folder)
    return DiskWriter(folder, config.max_gib)


def _find(writer: Writer, key: str, min_shards: int, tell: OnNotice) -> Shards | None:
    """What an earlier run has stored, if it is whole and there are shards enough."""
    found, notices = writer.find(key)
    for notice in notices:
        tell(notice)
    return found if found is not None and len(found.parts) >= min(min_shards, found.rows) else None


def _memory() -> float:
    """Bytes of all object stores."""
    return float(ray.cluster_resources().get("object_store_memory", 0))


def _spill_notice(limit: float, folder: str | None) -> str:
    return (
        f"the rows need more than {limit / 2**30:.2g} GiB of the object stores' {_memory() / 2**30:.2g} GiB: they go "
        f"to files on the nodes' disks, under {folder or 'BSS_RAY_CACHE or ~/.cache/bss_ray'}. Choose with "
        "--store.kind (object, disk, lance) and --store.folder"
    )


# ---- execution --------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Rows of a block: `rows` from its row `offset` on are rows `first_row` and following of the data set."""

    ref: Any
    first_row: int
    rows: int
    offset: int
    size_bytes: int


class _Span(NamedTuple):
    """Rows [start, stop) of the data set, and blocks that hold them."""

    start: int
    stop: int
    blocks: list[_Block]


def _execute(dataset: ray.data.Dataset, columns: Columns) -> Generator[_Block, None, None]:
    """Run the data set and yield its blocks in order, as they are made."""
    schema = dataset.schema()
    if schema is None:
        raise DataError("the data set has no rows and no columns. Check the path, or the filter that left none")
    for name in columns.all:
        if name not in schema.names:
            raise DataError(f"the data set has no column {name!r}; {nearest(name, schema.names)}")
    dataset = dataset.select_columns(list(columns.all))
    dataset.context.execution_options.preserve_order = True  # row ids are positions
    first_row = 0
    # The only use of Ray Data's developer API: references to blocks without moving them.
    for bundle in dataset.iter_internal_ref_bundles():
        for entry, cut in zip(bundle.blocks, bundle.slices, strict=True):
            all_rows, size = entry.metadata.num_rows, entry.metadata.size_bytes or 0
            offset, rows = (0, all_rows) if cut is None else (cut.start_offset, cut.num_rows)
            if rows:
                yield _Block(entry.ref, first_row, rows, offset, size * rows // all_rows)
                first_row += rows


def _take_until(blocks: Iterator[_Block], limit: float) -> tuple[deque[_Block], bool]:
    """Blocks of up to `limit` bytes and the one that goes beyond it; whether they are all there are."""
    held: deque[_Block] = deque()
    size = 0
    for block in blocks:
        held.append(block)
        size += block.size_bytes
        if size > limit:
            return held, False
    return held, True


def _drain(held: deque[_Block]) -> Iterator[_Block]:
    """The blocks, let go one by one: a block lives as long as a reference to it does."""
    while held:
        yield held.popleft()


def _cut(blocks: Iterable[_Block]) -> Iterator[_Span]:
    """Spans of about SHARD_BYTES, as the blocks come; a larger block makes several."""
    group: list[_Block] = []
    size = 0
    for block in blocks:
        group.append(block)
        size += block.size_bytes
        if size >= SHARD_BYTES:
            yield from _cut_evenly(group, round(size / SHARD_BYTES))
            group, size = [], 0
    if group:
        yield from _cut_evenly(group, 1)


def _cut_evenly(blocks: list[_Block], count: int) -> Iterator[_Span]:
    """So many spans of the blocks' rows, to within one row; fewer where there are fewer rows."""
    first, rows = blocks[0].first_row, sum(block.rows for block in blocks)
    count = min(count, rows)
    for index in range(count):
        start, stop = first + rows * index // count, first + rows * (index + 1) // count
        parts = [block for block in blocks if block.first_row < stop and block.first_row + block.rows > start]
        yield _Span(start, stop, parts)


def _slices(span: _Span) -> list[tuple[int, int]]:
    """Which rows of each of its blocks belong to a span."""
    return [
        (
            block.offset + max(span.start, block.first_row) - block.first_row,
            block.offset + min(span.stop, block.first_row + block.rows) - block.first_row,
        )
        for block in span.blocks
    ]


# ---- tasks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tasks:
    """References to what the shards' tasks return, in the order of the shards."""

    starts: list[int] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    ids: list[Any] = field(default_factory=list)

    def run(
        self,
        writer: Writer,
        spans: Iterator[_Span],
        columns: Columns,
        num_classes: int | None,
        on_progress: OnProgress | None,
    ) -> None:
        """Make all shards; returns when they are made.

        Raises:
            BssRayError: one cannot be kept.
        """
        # No CPU for tasks that take from a stream: Ray Data may hold all of them until it gets rid of its blocks.
        task = _make_shard.options(num_cpus=0 if writer.streams else 1)
        at_once = max(2, int(ray.cluster_resources().get("CPU", 0)) // 2) if writer.streams else math.inf
        pending: list[Any] = []

        def wait() -> None:
            done, pending[:] = ray.wait(pending, num_returns=1, fetch_local=False)
            failure = ray.get(done[0]).failure
            if failure is not None:
                raise failure
            if on_progress is not None:
                on_progress(len(self.reports) - len(pending), len(self.reports))

        for index, span in enumerate(spans):
            refs = task.remote(
                writer, columns, num_classes, index, span.start, _slices(span), *(block.ref for block in span.blocks)
            )
            self.starts.append(span.start)
            for target, ref in zip((self.reports, self.kept, self.ids), refs, strict=True):
                target.append(ref)
            pending.append(refs[0])
            if len(pending) >= at_once:
                wait()
        while pending:
            wait()

    def settle(self) -> None:
        """Wait for tasks that still run."""
        if self.reports:
            ray.wait(self.reports, num_returns=len(self.reports), timeout=_STOP_S, fetch_local=False)


def _check(tasks: _Tasks, writer: Writer, columns: Columns, num_classes: int | None) -> Shards:
    """Shards of the tasks' results, if all rows are sound.

    Raises:
        DataError: some are not.
    """
    reports: list[_Report] = ray.get(tasks.reports)
    raise_first_problem([problem for report in reports for problem in report.problems], DataError)
    features, rows = _common_features(reports), sum(report.rows for report in reports)
    shards = Shards(
        columns=columns,
        parts=tuple(
            Shard(start, report.rows, report.node if writer.on_nodes else "")
            for start, report in zip(tasks.starts, reports, strict=True)
        ),
        features=features,
        num_classes=num_classes or max(report.largest_label for report in reports) + 1,
        fingerprint=_fingerprint(rows, features, reports),
        store=writer.draft(tasks.kept),
    )
    if columns.id is not None:
        _refuse_duplicates(shards, columns.id, ray.get(_equal_hashes.remote(*tasks.ids)))
    return shards


@ray.remote(num_returns=3)
def _make_shard(
    writer: Writer,
    columns: Columns,
    num_classes: int | None,
    index: int,
    first_row: int,
    slices: list[tuple[int, int]],
    *blocks: Any,
) -> tuple[_Report, Any, np.ndarray]:
    """One shard: its report, what its writer has to say, and a hash of each row's id."""
    accessors = [
        BlockAccessor.for_block(BlockAccessor.for_block(block).slice(start, stop))
        for (start, stop), block in zip(slices, blocks, strict=True)
    ]
    node = ray.get_runtime_context().get_node_id()
    try:
        arrays = {name: _column(accessors, name) for name in columns.all}
    except DataError as error:
        # Reported, not raised: the driver names the first shard's problem, whichever task ends first.
        return _Report(0, node, {}, {}, -1, [Problem(str(error), 0, [])]), None, np.empty(0, np.uint64)
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
    kept = None
    if not problems:
        try:
            kept = writer.put(index, arrays)
        except BssRayError as error:
            report = dataclasses.replace(report, failure=error)
    return report, kept, hashes.get(columns.id or "", np.empty(0, np.uint64))


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
