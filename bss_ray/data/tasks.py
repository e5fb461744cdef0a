"""The tasks that make shards: each task reads, checks and writes the rows of one shard."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import ray
from ray.data.block import Block

from bss_ray.data.blocks import Cut
from bss_ray.data.checks import check_input, check_labels, check_presence, count_outputs, store_labels
from bss_ray.data.columns import Columns
from bss_ray.data.manifest import row_hashes, rows_digest
from bss_ray.data.read import read_column, read_partial
from bss_ray.data.shards import Feature, Writer
from bss_ray.data.store import Arrays
from bss_ray.errors import BssRayError, DataError, Problem
from bss_ray.names import presence_column
from bss_ray.runtime.ray_internals import block_accessor
from bss_ray.runtime.wait import wait_for, wait_limit, wait_timeout_error

OnProgress = Callable[[int, int], None]

_STOP_S = 60.0

_NEVER_THERE = (
    "modality {!r} is null in all rows. Leave it out of columns.modalities, or look for what it is called in the source"
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the task of a shard has found out about its rows.

    Attributes:
        rows: Number of rows of the shard.
        features: Features of the modalities and the label, as far as the rows tell them.
        digests: Digest of each column.
        outputs: Number of values that the shard's labels require of a head.
        lacking: Modalities that some of the shard's rows lack.
        unknown: Modalities that all of the shard's rows lack, and whose shape the task was not told: the shard is not
            made yet.
        problems: Problems with the shard's rows.
        failure: Why rows without problems cannot be kept.
        node: Id of the node on which the task ran.
    """

    rows: int = 0
    features: dict[str, Feature] = field(default_factory=dict)
    digests: dict[str, int] = field(default_factory=dict)
    outputs: int = 0
    lacking: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    problems: list[Problem] = field(default_factory=list)
    failure: BssRayError | None = None
    node: str = ""


@dataclass(kw_only=True)
class Tasks:
    """Makes all shards of a data set.

    Attributes:
        writer: Writer that keeps the rows.
        columns: Roles of the columns.
        num_classes: See `build_shards`.
        on_progress: Function that is called with (shards made, shards begun).
        here: Whether this process makes the shards, one after the other: each task would take longer to start.
        starts: Row id of each shard's first row.
        reports: References to the reports of the tasks, in the order of the shards, like the next two.
        kept: References to the results of the writer.
        ids: References to a hash of each row's id.
    """

    writer: Writer
    columns: Columns
    num_classes: int | None
    on_progress: OnProgress | None = None
    here: bool = False
    starts: list[int] = field(default_factory=list)
    reports: list[ray.ObjectRef] = field(default_factory=list)
    kept: list[ray.ObjectRef] = field(default_factory=list)
    ids: list[ray.ObjectRef] = field(default_factory=list)
    _pending: dict[ray.ObjectRef, tuple[int, Cut]] = field(default_factory=dict)  # by the references to their reports
    _waiting: list[tuple[int, Cut]] = field(default_factory=list)
    _shapes: dict[str, Feature] = field(default_factory=dict)  # of the modalities, from the shards

    def run(self, cuts: Iterator[Cut]) -> None:
        """Make all shards; returns when they are made.

        A shard without any row of a modality does not know the modality's shape. If no earlier shard has told the shape
        either, the shard waits for the others, its blocks are held, and it is made in a second round.

        Raises:
            BssRayError: A shard cannot be kept.
        """
        for index, cut in enumerate(cuts):
            self.starts.append(cut.start)
            for references in (self.reports, self.kept, self.ids):
                references.append(None)
            self._make(index, cut)
        self._wait(0)
        waiting, self._waiting = self._waiting, []
        for index, cut in waiting:
            self._make(index, cut)
        self._wait(0)

    def settle(self) -> None:
        """Wait for the tasks that still run."""
        if self._pending:
            ray.wait(list(self._pending), num_returns=len(self._pending), timeout=_STOP_S, fetch_local=False)

    @functools.cached_property
    def _at_once(self) -> float:
        """Number of tasks that may run at a time."""
        return max(2, int(ray.cluster_resources().get("CPU", 0)) // 2) if self.writer.streams else math.inf

    def _make(self, index: int, cut: Cut) -> None:
        """Start the task of a shard as soon as another task may run."""
        self._wait(self._at_once - 1)
        call = (self.writer, self.columns, self.num_classes, self._shapes, index, cut.start, cut.slices)
        blocks = [block.ref for block in cut.blocks]
        if self.here:
            refs = [ray.put(part) for part in _make_shard(*call, *wait_for(blocks, "rows of this process"))]
        else:
            # No CPU for tasks that take from a stream: Ray Data may hold all CPUs until its blocks are taken.
            task = _task_of_shard.options(num_cpus=0 if self.writer.streams else 1)
            refs = task.remote(*call, *blocks)
        self.reports[index], self.kept[index], self.ids[index] = refs
        self._pending[refs[0]] = index, cut

    def _wait(self, most: float) -> None:
        """Wait until at most this number of tasks run.

        Raises:
            WaitError: No task ended within the limit.
        """
        while len(self._pending) > most:
            done, _ = ray.wait(list(self._pending), num_returns=1, timeout=wait_limit(), fetch_local=False)
            if not done:
                raise wait_timeout_error(f"one of {len(self._pending)} shards to be made")
            index, cut = self._pending.pop(done[0])
            report: Report = ray.get(done[0])
            if report.failure is not None:
                raise report.failure
            self._shapes = {**report.features, **self._shapes}
            if report.unknown:
                self._waiting.append((index, cut))
            if self.on_progress is not None:
                begun = len(self.reports)
                self.on_progress(begun - len(self._pending) - len(self._waiting), begun)


def _make_shard(
    writer: Writer,
    columns: Columns,
    num_classes: int | None,
    shapes: dict[str, Feature],
    index: int,
    first_row: int,
    slices: list[tuple[int, int]],
    *blocks: Block,
) -> tuple[Report, object, np.ndarray]:
    """Make one shard: returns its report, the result of its writer, and a hash of each row's id."""
    parts = [block_accessor(block).slice(start, stop) for (start, stop), block in zip(slices, blocks, strict=True)]
    try:
        report, arrays = _read_rows(parts, columns, num_classes, shapes, first_row)
    except DataError as error:
        # Reported, not raised: the driver raises the problem of the first shard, whichever task ends first.
        report, arrays = Report(problems=[Problem(str(error), 0, [])]), {}
    if report.problems:
        return report, None, np.empty(0, np.uint64)
    hashes = {name: row_hashes(values, name) for name, values in arrays.items()}
    digests = {name: rows_digest(values, first_row) for name, values in hashes.items()}
    report = dataclasses.replace(report, digests=digests, node=ray.get_runtime_context().get_node_id())
    kept = None
    try:
        kept = writer.put(index, arrays)
    except BssRayError as error:
        report = dataclasses.replace(report, failure=error)
    return report, kept, hashes.get(columns.id or "", np.empty(0, np.uint64))


_task_of_shard = ray.remote(num_returns=3, name="bss_ray.build_shard")(_make_shard)


def _read_rows(
    blocks: Sequence[Block], columns: Columns, num_classes: int | None, shapes: dict[str, Feature], first_row: int
) -> tuple[Report, Arrays]:
    """The rows of a shard and the report on them; if there are problems, some columns are missing.

    Raises:
        DataError: A column has rows of more than one shape.
    """
    inputs = {name: read_partial(blocks, name) for name in columns.modalities}
    unknown = frozenset(name for name, part in inputs.items() if part.values is None and name not in shapes)
    arrays = {name: part.filled(shapes.get(name)) for name, part in inputs.items() if name not in unknown}
    labels = read_partial(blocks, columns.label)

    problems = check_presence({name: part.present for name, part in inputs.items()}, first_row)
    for name, values in arrays.items():
        problems += check_input(values, name, first_row)
    problems += check_labels(labels.values, labels.present, columns, first_row, num_classes)
    problems += [Problem(_NEVER_THERE.format(name), 0, []) for name in sorted(unknown)]
    if not problems:
        arrays[columns.label] = store_labels(labels.filled(), columns.task)
    report = Report(
        rows=len(labels.present),
        features={name: Feature(values.shape[1:], str(values.dtype)) for name, values in arrays.items()},
        outputs=0 if problems else count_outputs(arrays[columns.label], columns.task),
        lacking=frozenset(name for name, part in inputs.items() if not part.present.all()),
        unknown=unknown,
        problems=problems,
    )
    if not problems:
        # Every shard has these columns (a byte for each row and modality), because all shards must have the same
        # columns, and a stream's shard is written before it is known whether a later shard lacks rows. A column counts
        # as a feature only if some row lacks the modality; otherwise nothing reads it.
        arrays |= {presence_column(name): part.present for name, part in inputs.items()}
        arrays |= {name: read_column(blocks, name) for name in columns.all if name not in columns.inputs}
    return report, arrays
