"""`score_dataset`: from a Ray Dataset to a Ray Dataset of scores."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from typing import NamedTuple

import pyarrow as pa
import ray
import ray.data
from torch import nn

from bss_ray.data.blocks import blocks_of, check_columns
from bss_ray.data.columns import Columns
from bss_ray.errors import DataError, Problem
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.normalise import Normalise
from bss_ray.measure.score import BadRows, ScoreRule, Unpaired
from bss_ray.measure.snapshot import pack_model
from bss_ray.runtime.wait import wait_for
from bss_ray.score.measuring import (
    Look,
    Measured,
    Measuring,
    Norms,
    RowMeasurer,
    kept_notice,
    prepare_actor,
    snapshot_of,
    with_row_ids,
    with_scores,
)
from bss_ray.score.pool import PoolConfig, settings_of
from bss_ray.score.read_tasks import read_rows
from bss_ray.scoring.config import ScoringPass

# Column of an actor's report on a block, in the block's first row: an actor does not know the ids of its rows, and
# the driver does not see what an actor returns.
REPORT = "__report"

# Most blocks that one task reads.
_GROUP = 64


def score_dataset(
    dataset: ray.data.Dataset,
    model: nn.Module,
    *,
    columns: Columns,
    measurer: Measurer | None = None,
    normalise: Normalise = "minmax",
    unpaired: Unpaired = "neutral",
    bad_rows: BadRows = "error",
    num_classes: int | None = None,
    batch_size: int = 256,
    precision: str = "fp32",
    channels_last: bool = False,
    compile: bool = False,
    actors: tuple[int, int | None] = (1, None),
    num_cpus: float | None = None,
    num_gpus: float | None = None,
) -> ray.data.Dataset:
    """Score all rows of a Ray Dataset with a model, in a pool of actors.

    In the first pass actors forward the rows, unaugmented and in eval mode. In the second pass both measures are
    normalised exactly over all rows, and the scores are computed. For the same weights they equal the scores of a
    training run over the same rows, up to rounding. The first pass runs inside the call; only its measures are kept,
    some tens of bytes a row.

        scores = bss_ray.score_dataset(rows, model, columns=bss_ray.Columns(modalities=("audio", "image")))
        scores.write_parquet("scores")

    Args:
        dataset: Rows to score; a modality may be null (see `Columns`).
        model: Model that maps a batch to `{modality: logits (B, C), ..., "fused": logits (B, C)}`.
        columns: Roles of the dataset's columns.
        measurer: How the balance of a row is measured; default `Measurer()`.
        normalise: Normalisation over all rows of the dataset: `minmax` or `rank`.
        unpaired: How rows with fewer than two modalities count: as `neutral`, as `lowest`, or as an `error`.
        bad_rows: Whether rows whose outputs are NaN or infinite are an `error`, or kept without measures and score
            (`keep`).
        num_classes: Number of values that a head returns; None asks the model.
        batch_size: Number of rows of a forward pass; it is halved, with a message, if the batch does not fit into
            memory.
        precision: Precision of the forward pass: `fp32`, `bf16` or `fp16` (autocast).
        channels_last: Whether images and model are in the channels-last memory layout.
        compile: Whether the model runs through `torch.compile`.
        actors: Smallest and largest number of actors; None takes as many as the cluster has room for.
        num_cpus: Logical CPUs of an actor; None takes 1, or 0 if the cluster has one CPU.
        num_gpus: Share of a GPU of an actor; None takes 1 if the cluster has GPUs.

    Returns:
        A dataset in the order of the rows: `row_id` (position, int64), id, label and extra columns that hold one
        value a row, `similarity`, `information`, `loss_<modality>` and `score` (float32). Null are the similarity of a
        row with fewer than two modalities, the loss of a modality that a row lacks, and all measures of rows whose
        outputs are not finite.

    Raises:
        DataError: A column is missing, or rows break a rule of `Columns`; the error names row ids.
        ModelOutputError: Outputs of the model cannot be measured; the error names row ids.
        ResourceError: The cluster can never run the actors.
        ConfigError: A setting is unknown or out of its range.
    """
    measuring = Measuring(
        columns=columns,
        measurer=measurer or Measurer(),
        forward=ScoringPass(
            batch_size=batch_size,
            precision=precision,
            channels_last=channels_last,
            compile=compile,
            bad_rows=bad_rows,
        ),
        rule=ScoreRule(normalise=normalise, unpaired=unpaired),
        num_classes=num_classes,
    )
    pool = PoolConfig(min_actors=actors[0], max_actors=actors[1], cpus_per_actor=num_cpus, gpus_per_actor=num_gpus)
    check_columns(dataset.schema(), columns)
    size = pool.on_cluster()
    snapshot = ray.put(pack_model(model))  # kept alive until all rows are measured
    measured = dataset.select_columns(list(columns.all)).map_batches(
        _MeasureBlock,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(snapshot, measuring),
        **size.options,
    )
    collector = Collector(measuring)
    with settings_of(measured):  # row ids are positions
        for block in blocks_of(measured):
            assert block.offset == 0, "only limit() and split() cut blocks"
            collector.add(block.ref, block.first_row)
        collector.finish()
    norms = ray.put(collector.norms)
    return ray.data.from_arrow_refs([_score.remote(*block, norms, unpaired) for block in collector.blocks])


class _MeasureBlock:
    """The actor."""

    def __init__(self, snapshot: ray.ObjectRef, measuring: Measuring) -> None:
        self._measuring = measuring
        self._measurer = RowMeasurer(snapshot_of(snapshot), measuring, prepare_actor())

    def __call__(self, block: pa.Table) -> pa.Table:
        """Measures of the rows of a block, and a report whose row ids count from the block's first row."""
        if len(block) == 0:
            return pa.table({})
        rows = read_rows([block], self._measuring.columns, 0, {}, finite=self._measuring.forward.bad_rows == "error")
        found = Measured(None, rows.problems) if rows.problems else self._measurer.measure(rows.arrays, 0)
        return with_report(found, len(block))


class _Report(NamedTuple):
    """Rules for data that rows of a block break, and messages to the user. Row ids count from the block's first row."""

    problems: list[Problem]
    notices: list[str]


def with_report(found: Measured, rows: int) -> pa.Table:
    """The measures of a block, and the report on it."""
    report = None
    if found.table is None or found.notices:
        # What is wrong with outputs is told by the measures.
        report = pickle.dumps(_Report(found.problems if found.table is None else [], found.notices))
    column = pa.array([report, *[None] * (rows - 1)], pa.binary())
    return pa.table({REPORT: column}) if found.table is None else found.table.append_column(REPORT, column)


def look_at_block(look: Look, table: pa.Table, first_row: int, rule: ScoreRule) -> None:
    """Add a block to `look`; Ray Data may have joined several into one."""
    problems: list[Problem] = []
    for place, content in enumerate(table[REPORT].to_pylist()):
        if content is not None:
            report: _Report = pickle.loads(content)
            look.notices += report.notices
            problems += [
                replace(problem, first_ids=[first_row + place + row for row in problem.first_ids])
                for problem in report.problems
            ]
    look.data_problems += problems
    if not problems:
        look.add(table, first_row, rule)


class Collector:
    """Collects the blocks of the first pass, and raises for the first problem while other blocks are still measured.

    One task at a time reads the blocks that have arrived: more tasks would take CPUs from the measuring, just for
    starting processes.
    """

    def __init__(self, measuring: Measuring) -> None:
        self.blocks: list[tuple[ray.ObjectRef, int]] = []
        self._measuring = measuring
        self._begun = 0
        self._running: ray.ObjectRef | None = None
        self._norms: list[Norms] = []
        self._said: set[str] = set()
        self._kept: list[Problem] = []

    @property
    def norms(self) -> Norms:
        """Norms over all rows."""
        return Norms.union(self._norms)

    def add(self, ref: ray.ObjectRef, first_row: int) -> None:
        """Add the next block.

        Raises:
            BssRayError: Rows of an earlier block break a rule.
        """
        self.blocks.append((ref, first_row))
        self._advance(wait=False)

    def finish(self) -> None:
        """Finish after the last block.

        Raises:
            BssRayError: Rows break a rule, or there are no rows.
        """
        if not self.blocks:
            raise DataError("the dataset has no rows. Check the path, or the filter that left none")
        while self._running is not None or self._begun < len(self.blocks):
            self._advance(wait=True)
        if self._kept:
            self._say(kept_notice(self._kept))

    def _advance(self, *, wait: bool) -> None:
        if self._running is not None and (wait or ray.wait([self._running], timeout=0)[0]):
            look, self._running = wait_for(self._running, "a look at the measures"), None
            self._judge(look)
        if self._running is None and self._begun < len(self.blocks):
            group = self.blocks[self._begun : self._begun + _GROUP]
            self._begun += len(group)
            first_rows = [first_row for _, first_row in group]
            # No CPU, because Ray Data may hold all CPUs.
            look_at = _look.options(num_cpus=0)
            self._running = look_at.remote(first_rows, self._measuring.rule, *(ref for ref, _ in group))

    def _judge(self, look: Look) -> None:
        """Raise for problems that are errors, and remember the others."""
        for notice in look.notices:
            self._say(notice)
        look.check(self._measuring.forward.bad_rows)
        self._kept += look.output_problems
        self._norms += look.norms

    def _say(self, notice: str) -> None:
        """Log each notice once."""
        if notice not in self._said:
            logging.getLogger("bss_ray").warning(notice)
            self._said.add(notice)


@ray.remote(name="bss_ray.look_at_measures")
def _look(first_rows: list[int], rule: ScoreRule, *tables: pa.Table) -> Look:
    """Norms and reports of blocks."""
    look = Look()
    for first_row, table in zip(first_rows, tables, strict=True):
        look_at_block(look, table, first_row, rule)
    return look.joined()


@ray.remote(name="bss_ray.score_block")
def _score(table: pa.Table, first_row: int, norms: Norms, unpaired: Unpaired) -> pa.Table:
    """The scores of a block."""
    return with_scores(with_row_ids(table.drop_columns([REPORT]), first_row), norms, unpaired)
