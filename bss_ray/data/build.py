"""From a Ray Dataset to shards: execute it once, check every row, cut it into consecutive rows.

For the object store all blocks exist before the first shard is made. For any other store they stream: a shard
is written as soon as its blocks exist, and then the blocks are released. `blocks` has the execution and the cuts,
`tasks` makes one shard.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import chain

import numpy as np
import pyarrow as pa
import ray

from bss_ray.data.blocks import Rows, cut_as_they_come, cut_evenly, drain, execute, take_until
from bss_ray.data.columns import Columns
from bss_ray.data.disk import DiskWriter
from bss_ray.data.manifest import FORMAT, fingerprint, json_digest
from bss_ray.data.shards import Feature, ObjectWriter, Shard, Shards, Writer
from bss_ray.data.store import StoreConfig
from bss_ray.data.tasks import OnProgress, Report, Tasks
from bss_ray.errors import DataError, raise_first_problem
from bss_ray.names import presence_column
from bss_ray.runtime.ray_internals import is_alone
from bss_ray.runtime.wait import wait_for
from bss_ray.storage import absolute

# Large enough that a shard's overhead (a few hundred microseconds to open) is negligible, small enough
# that shards spread evenly over nodes and scorers.
SHARD_BYTES = 128 << 20

# Blocks and the shards made of them are in the object store at the same time, and Ray needs a part of it too.
_MEMORY_SHARE = 0.4

OnNotice = Callable[[str], None]


def build_shards(
    dataset: Rows,
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
        dataset: Any Ray Dataset, or an Arrow table. Each modality is a column of numeric tensors of one shape. Where it
            is null, the row lacks the modality: its input is zeros, and `has_<modality>` among the features says so.
        columns: Roles of the dataset's columns.
        num_classes: Number of values a head returns: classes C, or the D numbers of a regression. None takes the number
            that the labels have, and for a multiclass task the largest label + 1.
        min_shards: Smallest number of shards, if there are rows. A shard holds at most about 128 MiB.
        store: Store that keeps the rows; default `StoreConfig()`.
        source_key: Name of the content of the dataset's source (see `bss_ray.data.sources.files_key`). If an earlier
            run has stored the same source, its rows are used again, and the dataset is not executed.
        memory_bytes: Most bytes of rows that stay in memory with the store `auto`; None takes 40 % of the object
            stores.
        on_progress: Function that is called with (shards made, shards begun).
        on_notice: Function that is called with messages to the user, e.g. that the rows go to disk.

    Raises:
        DataError: There are no rows, a column is missing, an input is not numeric or not finite, shapes differ, a row
            has no modality, no row has a certain modality, labels are missing or not of the task's kind, or an id
            occurs twice.
        StorageError: The store cannot be written.
    """
    config, tell = store or StoreConfig(), on_notice or (lambda _text: None)
    writer = _writer(config)
    key = source_key and json_digest([FORMAT, source_key, dataclasses.asdict(columns), num_classes])
    if key is not None:
        found = _find(writer, key, min_shards, tell)
        if found is not None:
            return found

    blocks = execute(dataset, columns)
    memory = _MEMORY_SHARE * _memory() if memory_bytes is None else memory_bytes
    # A stream is held back until it has enough blocks for `min_shards`.
    limit = {"object": math.inf, "auto": memory}.get(config.kind, min(min_shards * SHARD_BYTES, memory))
    held, complete = take_until(blocks, limit)
    if complete and not held:
        raise DataError("the dataset has no rows. Check the path, or the filter that left none")
    if config.kind == "auto" and complete:
        writer = ObjectWriter()
    elif config.kind == "auto":
        tell(_spill_notice(memory, config.folder))
    wanted = max(min_shards, math.ceil(sum(block.size_bytes for block in held) / SHARD_BYTES))
    cuts = cut_evenly(list(held), wanted) if complete else cut_as_they_come(chain(drain(held), blocks), SHARD_BYTES)

    tasks = Tasks(
        writer=writer,
        columns=columns,
        num_classes=num_classes,
        on_progress=on_progress,
        # On a cluster tasks spread the shards over the nodes, and make again what one of them takes along.
        here=isinstance(dataset, pa.Table) and is_alone(),
    )
    try:
        tasks.run(cuts)
        return writer.finish(_check(tasks), key)
    except BaseException:
        blocks.close()  # closing also stops Ray Data
        tasks.settle()  # a task that still writes would create again what is removed now
        writer.discard()
        raise


def build_split(
    split: str,
    dataset: Rows,
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
    """`build_shards` for one split of a dataset, with the split's name in errors.

    Args:
        split: Name of the split: `train`, `validation` or `test`.
        dataset: Rows of the split.
        columns: Roles of the training data's columns; ids and extras are used for the training rows only.
        train: Training rows, whose shapes and labels the rows of another split must match.
        num_classes: Number of values a head returns; None takes that of `train`, else see `build_shards`.
        min_shards: See `build_shards`.
        store: See `build_shards`.
        source_key: See `build_shards`.
        on_progress: See `build_shards`.
        on_notice: See `build_shards`.

    Raises:
        StorageError: See `build_shards`.
        DataError: See `build_shards`; or shape or dtype of a modality differ from those of the training rows.
    """
    if train is not None:
        columns = dataclasses.replace(columns, id=None, extra=())
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
    """The writer of the store; for `auto` that of the disk store, which may have the dataset already."""
    if config.kind == "object":
        return ObjectWriter()
    if config.kind == "lance":
        from bss_ray.data.lance import LanceWriter

        return LanceWriter(absolute(str(config.folder)))
    # A relative folder is relative to the driver's folder; "~" is each node's own.
    folder = config.folder if config.folder is None or config.folder.startswith("~") else absolute(config.folder)
    return DiskWriter(folder, config.max_gib)


def _find(writer: Writer, key: str, min_shards: int, tell: OnNotice) -> Shards | None:
    """The shards that an earlier run has stored, if all of them exist and there are enough of them."""
    found, notices = writer.find(key)
    for notice in notices:
        tell(notice)
    return found if found is not None and len(found.parts) >= min(min_shards, found.rows) else None


def _memory() -> float:
    """Size of all object stores in bytes."""
    return float(ray.cluster_resources().get("object_store_memory", 0))


def _spill_notice(limit: float, folder: str | None) -> str:
    return (
        f"the rows need more than {limit / 2**30:.2g} GiB of the object stores' {_memory() / 2**30:.2g} GiB: they go "
        f"to files on the nodes' disks, under {folder or 'BSS_RAY_CACHE or ~/.cache/bss_ray'}. Choose with "
        "--store.kind (object, disk, lance) and --store.folder"
    )


# ---- what came of it ---------------------------------------------------------------------------


def _check(tasks: Tasks) -> Shards:
    """The shards from the tasks' results, if no row breaks a rule.

    Raises:
        DataError: Some rows break a rule.
    """
    reports: list[Report] = wait_for(tasks.reports, "the reports on the shards")
    raise_first_problem([problem for report in reports for problem in report.problems], DataError)
    columns, features = tasks.columns, _common_features(reports)
    lacking = frozenset[str]().union(*(report.lacking for report in reports))
    complete = {presence_column(name) for name in columns.modalities if name not in lacking}
    features |= {presence_column(name): Feature((), "bool") for name in columns.modalities if name in lacking}
    shards = Shards(
        columns=columns,
        parts=tuple(
            Shard(start, report.rows, report.node if tasks.writer.on_nodes else "")
            for start, report in zip(tasks.starts, reports, strict=True)
        ),
        features=features,
        num_classes=tasks.num_classes or max(report.outputs for report in reports),
        fingerprint=fingerprint(
            features, sum(report.rows for report in reports), [report.digests for report in reports], leave_out=complete
        ),
        store=tasks.writer.draft(tasks.kept),
    )
    if columns.id is not None:
        _refuse_duplicates(shards, columns.id, wait_for(_equal_hashes.remote(*tasks.ids), "the ids to be compared"))
    return shards


def _common_features(reports: list[Report]) -> dict[str, Feature]:
    """The common schema of all shards.

    Raises:
        DataError: The schemas of shards differ.
    """
    first = reports[0].features
    for report in reports[1:]:
        for name, feature in report.features.items():
            if feature != first[name]:
                raise DataError(
                    f"all rows of column {name!r} need one shape and dtype; received {first[name].dtype} "
                    f"{first[name].shape} and {feature.dtype} {feature.shape}"
                )
    return dict(first)


@ray.remote(name="bss_ray.check_ids")
def _equal_hashes(*id_hashes: np.ndarray) -> np.ndarray:
    """Row ids whose id hash occurs more than once, ascending; 8 bytes a row in one process."""
    hashes = np.concatenate(id_hashes)
    order = np.argsort(hashes, kind="stable")
    same = hashes[order[1:]] == hashes[order[:-1]]
    return np.unique(np.concatenate([order[1:][same], order[:-1][same]]))


def _refuse_duplicates(shards: Shards, name: str, suspects: np.ndarray) -> None:
    """Compare the ids themselves where their hashes are equal.

    Raises:
        DataError: An id occurs twice; the error names the first such id and its rows.
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
