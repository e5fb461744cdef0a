"""The scores file of a run: a folder of Parquet files, one a shard, for people and for later runs."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torchmetrics.functional.classification import binary_auroc

from bss_ray.data.shards import Shards
from bss_ray.storage import StoragePath
from bss_ray.train.checkpoint import SavedCheckpoint
from bss_ray.wait import wait_for


def write_scores(path: StoragePath, saved: SavedCheckpoint, shards: Shards) -> None:
    """Write a checkpoint's scores as a folder of Parquet files, one a shard, replacing an older one."""
    with path.replaced() as folder:
        written = [_write_part.remote(folder, saved, shards, index) for index in range(len(shards.parts))]
        wait_for(written, "the scores of the run to be written")


@ray.remote(name="bss_ray.write_scores")
def _write_part(folder: StoragePath, saved: SavedCheckpoint, shards: Shards, index: int) -> None:
    part, columns = shards.parts[index], shards.columns
    names = {"similarity": np.float32, "information": np.float32, "score": np.float32}
    table = {"row_id": np.arange(part.first_row, part.first_row + part.rows)}
    table |= {name: np.full(part.rows, np.nan, kind) for name, kind in names.items()}
    for scores in saved.scores(part.first_row, part.first_row + part.rows):
        start = max(part.first_row, scores.first_row)
        stop = min(part.first_row + part.rows, scores.first_row + len(scores.score))
        for name in names:
            values = getattr(scores, name)[start - scores.first_row : stop - scores.first_row]
            table[name][start - part.first_row : stop - part.first_row] = values
    arrays = shards.read(index)
    kept = (columns.label, *(() if columns.id is None else (columns.id,)), *columns.extra)
    table |= {name: arrays[name] for name in kept if arrays[name].ndim == 1}
    (folder / f"part-{index:05d}.parquet").write(lambda stream: pq.write_table(pa.table(table), stream))


def roc_areas(path: StoragePath, columns: tuple[str, ...]) -> dict[str, float]:
    """Area under the ROC curve of -score against each truth column (boolean) of a scores file."""
    table = path.read_table()
    areas = {}
    for name in columns:
        if name in table.column_names and pa.types.is_boolean(table.schema.field(name).type):
            truth = torch.from_numpy(table[name].to_numpy().astype(np.int64))
            score = torch.from_numpy(table["score"].to_numpy())
            # Mapped into [0, 1]: torchmetrics takes anything else for logits and squashes it.
            areas[name] = float(binary_auroc((1 - score) / 2, truth))
    return areas
