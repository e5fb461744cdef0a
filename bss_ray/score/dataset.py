"""`score_dataset`: a Ray Dataset in, one with scores out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
import ray.data
from torch import nn

from bss_ray.data.columns import Columns
from bss_ray.errors import DataError, ModelOutputError, Problem, nearest, raise_first_problem
from bss_ray.measure.forward import Forward
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.normalise import Normalise
from bss_ray.measure.score import Accumulation, Unpaired
from bss_ray.measure.snapshot import pack_model
from bss_ray.sample.scoring import BadRows
from bss_ray.score.measuring import Measured, Measuring, RowMeasurer, actor_device, kept_notice, snapshot_of
from bss_ray.score.pool import Pool, settings_of, users_error
from bss_ray.score.rows import read_rows
from bss_ray.score.scores import Norms, check_pairs, with_row_ids, with_scores

# What an actor has to say of a block; in the block's first row, since an actor does not know which rows it has, and
# the driver does not see what an actor returns.
_REPORT = "__report"


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

    Two passes: actors forward the rows, unaugmented and in eval mode; then both measures are normalised over all rows,
    exactly, and the scores made. For the same weights they are those of a training run over the same rows, up to float
    rounding. The first pass runs when this is called; only its measures are kept, some tens of bytes a row.

        scores = bss_ray.score_dataset(rows, model, columns=bss_ray.Columns(modalities=("audio", "image")))
        scores.write_parquet("scores")

    Args:
        dataset: rows; a modality may be null (see `Columns`).
        model: maps a batch to `{modality: logits (B, C), ..., "fused": logits (B, C)}`.
        columns: roles of the data set's columns.
        measurer: how the balance of a row is measured; default `Measurer()`.
        normalise: `minmax` or `rank`, over all rows of the data set.
        unpaired: rows with fewer than two modalities count as `neutral`, as `lowest`, or are an `error`.
        bad_rows: rows whose outputs are NaN or infinite are an `error`, or kept without measures and score (`keep`).
        num_classes: values that a head returns; None asks the model.
        batch_size: rows of a forward pass; halved, with a message, where they do not fit into memory.
        precision: `fp32`, `bf16` or `fp16` (autocast).
        channels_last: memory layout of images and model.
        compile: run the model through `torch.compile`.
        actors: least and most actors; None takes as many as the cluster has room for.
        num_cpus: logical CPUs of an actor; None takes 1, or 0 where the cluster has one CPU.
        num_gpus: share of a GPU of an actor; None takes 1 where the cluster has GPUs.

    Returns:
        A data set in the order of the rows: `row_id` (position, int64), id, label and extra columns that hold one value
        a row, `similarity`, `information`, `loss_<modality>` and `score` (float32). Null: a similarity without two
        modalities, the loss of a modality that is not there, and all measures of rows whose outputs are not finite.

    Raises:
        DataError: a column is missing, or rows break a rule of `Columns`; names row ids.
        ModelOutputError: what the model returns cannot be measured; names row ids.
        ResourceError: the cluster can never run the actors.
        ConfigError: a setting is unknown or out of its range.
    """
    Accumulation(normalise=normalise, unpaired=unpaired)  # checks them
    measuring = Measuring(
        columns=columns,
        measurer=measurer or Measurer(),
        forward=Forward(batch_size=batch_size, precision=precision, channels_last=channels_last, compile=compile),
        bad_rows=bad_rows,
        num_classes=num_classes,
    )
    pool = Pool(min_actors=actors[0], max_actors=actors[1], cpus=num_cpus, gpus=num_gpus)
    _check_columns(dataset, columns)
    room = pool.on_cluster()
    snapshot = ray.put(pack_model(model))  # alive until all rows are measured
    measured = dataset.select_columns(list(columns.all)).map_batches(
        _MeasureBlock,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(snapshot, measuring),
        **room.options,
    )
    with settings_of(measured):  # row ids are positions
        blocks = _collect(measured, measuring, normalise, unpaired)
    return ray.data.from_arrow_refs(blocks.score(unpaired))


class _MeasureBlock:
    """The actor."""

    def __init__(self, snapshot: Any, measuring: Measuring) -> None:
        self._measuring = measuring
        self._measurer = RowMeasurer(snapshot_of(snapshot), measuring, actor_device())

    def __call__(self, block: pa.Table) -> pa.Table:
        """Measures of a block's rows, and a report: row ids in it count from the block's first row."""
        if len(block) == 0:
            return pa.table({})
        rows = read_rows([block], self._measuring.columns, 0, {}, finite=self._measuring.bad_rows == "error")
        if rows.problems:
            found = Measured(None, rows.problems, sound_data=False)
        else:
            found = self._measurer.measure(rows.arrays, 0)
        report = pa.array([_to_report(found), *[None] * (len(block) - 1)], pa.string())
        return pa.table({_REPORT: report}) if found.table is None else found.table.append_column(_REPORT, report)


def _to_report(found: Measured) -> str | None:
    """What is to be said, as text; None where there is nothing."""
    if not found.problems and not found.notices:
        return None
    problems = [[problem.rule, problem.count, problem.first_ids] for problem in found.problems]
    return json.dumps({"problems": problems, "sound_data": found.sound_data, "notices": found.notices})


@dataclass
class _Look:
    """What the driver knows of a block."""

    norms: Norms | None
    data_problems: list[Problem] = field(default_factory=list)
    output_problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


@dataclass
class _Blocks:
    """Blocks of measures.

    Attributes:
        refs: to the blocks.
        first_rows: row id of each block's first row.
        looks: references to what is in them.
    """

    refs: list[Any] = field(default_factory=list)
    first_rows: list[int] = field(default_factory=list)
    looks: list[Any] = field(default_factory=list)

    def score(self, unpaired: Unpaired) -> list[Any]:
        """References to tables of scores."""
        norms = ray.put(Norms.union([look.norms for look in ray.get(self.looks)]))
        return [
            _score.remote(ref, first_row, norms, unpaired)
            for ref, first_row in zip(self.refs, self.first_rows, strict=True)
        ]


def _collect(measured: ray.data.Dataset, measuring: Measuring, normalise: Normalise, unpaired: Unpaired) -> _Blocks:
    """Run the first pass; the first block with a problem ends it.

    Raises:
        BssRayError: rows break a rule.
    """
    blocks, seen, kept = _Blocks(), 0, _Kept()
    try:
        for ref, first_row in _execute(measured):
            blocks.refs.append(ref)
            blocks.first_rows.append(first_row)
            # No CPU: Ray Data may hold all of them.
            blocks.looks.append(_look.options(num_cpus=0).remote(ref, first_row, normalise, unpaired))
            while seen < len(blocks.looks) and ray.wait([blocks.looks[seen]], timeout=0)[0]:
                _judge(ray.get(blocks.looks[seen]), measuring, kept)
                seen += 1
    except ray.exceptions.RayError as error:
        raise users_error(error) or error from None
    for look in ray.get(blocks.looks[seen:]):
        _judge(look, measuring, kept)
    if not blocks.refs:
        raise DataError("the data set has no rows. Check the path, or the filter that left none")
    kept.tell()
    return blocks


def _execute(measured: ray.data.Dataset) -> Iterator[tuple[Any, int]]:
    """References to the blocks in the order of their rows, as they are made, and the row id of each one's first."""
    first_row = 0
    # Ray Data's developer API, as in `bss_ray.data.blocks`: references without moving the blocks.
    for bundle in measured.iter_internal_ref_bundles():
        assert all(cut is None for cut in bundle.slices), "only limit() and split() cut blocks"
        for entry in bundle.blocks:
            if entry.metadata.num_rows:
                yield entry.ref, first_row
                first_row += entry.metadata.num_rows


@dataclass
class _Kept:
    """Rows without measures, and what has been said already."""

    count: int = 0
    ids: list[int] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def say(self, notice: str) -> None:
        """Once."""
        if notice not in self.said:
            logging.getLogger("bss_ray").warning(notice)
            self.said.add(notice)

    def tell(self) -> None:
        """How many rows there are."""
        if self.count:
            self.say(kept_notice(self.count, self.ids))


def _judge(look: _Look, measuring: Measuring, kept: _Kept) -> None:
    """Raise for what is an error, and remember what is not."""
    for notice in look.notices:
        kept.say(notice)
    raise_first_problem(look.data_problems, DataError)
    if measuring.bad_rows == "error":
        raise_first_problem(look.output_problems, ModelOutputError)
    for problem in look.output_problems:
        kept.count += problem.count
        kept.ids += problem.first_ids[: 5 - len(kept.ids)]


@ray.remote
def _look(table: pa.Table, first_row: int, normalise: Normalise, unpaired: Unpaired) -> _Look:
    """Norms and reports of a block."""
    look = _Look(None)
    for place, text in enumerate(table[_REPORT].to_pylist()):
        if text is None:
            continue
        said = json.loads(text)
        problems = [
            Problem(rule, count, [first_row + place + row for row in ids]) for rule, count, ids in said["problems"]
        ]
        (look.output_problems if said["sound_data"] else look.data_problems).extend(problems)
        look.notices += said["notices"]
    if not look.data_problems:
        look.data_problems += check_pairs(table, first_row, unpaired)
        look.norms = Norms.of(table, normalise)
    return look


@ray.remote
def _score(table: pa.Table, first_row: int, norms: Norms, unpaired: Unpaired) -> pa.Table:
    """A block of scores."""
    return with_scores(with_row_ids(table.drop_columns([_REPORT]), first_row), norms, unpaired)


def _check_columns(dataset: ray.data.Dataset, columns: Columns) -> None:
    schema = dataset.schema()
    if schema is None:
        raise DataError("the data set has no rows and no columns. Check the path, or the filter that left none")
    for name in columns.all:
        if name not in schema.names:
            raise DataError(f"the data set has no column {name!r}; {nearest(name, schema.names)}")
