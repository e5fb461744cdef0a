"""`score_dataset`: from a Ray Dataset to a Ray Dataset of scores."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import ray
import ray.data
from torch import nn

from bss_ray.data.blocks import blocks_of, check_columns
from bss_ray.data.columns import Columns
from bss_ray.measure.forward import Forward
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.normalise import Normalise
from bss_ray.measure.score import Accumulation, Unpaired
from bss_ray.measure.snapshot import pack_model
from bss_ray.score.collect import REPORT, Collector, with_report
from bss_ray.score.measuring import (
    Measured,
    Measuring,
    Norms,
    RowMeasurer,
    prepare_actor,
    snapshot_of,
    with_row_ids,
    with_scores,
)
from bss_ray.score.pool import PoolConfig, settings_of
from bss_ray.score.read_tasks import read_rows
from bss_ray.scoring.config import BadRows


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
    Accumulation(normalise=normalise, unpaired=unpaired)  # checks them
    measuring = Measuring(
        columns=columns,
        measurer=measurer or Measurer(),
        forward=Forward(batch_size=batch_size, precision=precision, channels_last=channels_last, compile=compile),
        bad_rows=bad_rows,
        num_classes=num_classes,
    )
    pool = PoolConfig(min_actors=actors[0], max_actors=actors[1], cpus=num_cpus, gpus=num_gpus)
    check_columns(dataset.schema(), columns)
    room = pool.on_cluster()
    snapshot = ray.put(pack_model(model))  # kept alive until all rows are measured
    measured = dataset.select_columns(list(columns.all)).map_batches(
        _MeasureBlock,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(snapshot, measuring),
        **room.options,
    )
    collector = Collector(bad_rows, normalise, unpaired)
    with settings_of(measured):  # row ids are positions
        for block in blocks_of(measured):
            assert block.offset == 0, "only limit() and split() cut blocks"
            collector.add(block.ref, block.first_row)
        collector.finish()
    norms = ray.put(collector.norms)
    return ray.data.from_arrow_refs([_score.remote(*block, norms, unpaired) for block in collector.blocks])


class _MeasureBlock:
    """The actor."""

    def __init__(self, snapshot: Any, measuring: Measuring) -> None:
        self._measuring = measuring
        self._measurer = RowMeasurer(snapshot_of(snapshot), measuring, prepare_actor())

    def __call__(self, block: pa.Table) -> pa.Table:
        """Measures of the rows of a block, and a report whose row ids count from the block's first row."""
        if len(block) == 0:
            return pa.table({})
        rows = read_rows([block], self._measuring.columns, 0, {}, finite=self._measuring.bad_rows == "error")
        if rows.problems:
            found = Measured(None, rows.problems, sound_data=False)
        else:
            found = self._measurer.measure(rows.arrays, 0)
        return with_report(found, len(block))


@ray.remote(name="bss_ray.score_block")
def _score(table: pa.Table, first_row: int, norms: Norms, unpaired: Unpaired) -> pa.Table:
    """The scores of a block."""
    return with_scores(with_row_ids(table.drop_columns([REPORT]), first_row), norms, unpaired)
