"""The second pass of a job, in tasks over the pieces: norms over all rows, then scores and a summary of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from bss_ray.data.columns import Columns
from bss_ray.errors import CheckpointError, DataError, ModelOutputError, Problem, find_problem, raise_first_problem
from bss_ray.measure.normalise import Bounds, Normalise
from bss_ray.measure.score import Unpaired
from bss_ray.sample.scoring import BadRows
from bss_ray.score.measuring import BAD_OUTPUTS, INFORMATION
from bss_ray.score.pieces import Piece, find_pieces, group_pieces, read_piece
from bss_ray.score.pool import get
from bss_ray.score.scores import Norms, check_pairs, column, with_scores
from bss_ray.score.summary import Summary
from bss_ray.storage import StoragePath

# Rows of a file of scores, at least.
_PART_ROWS = 1 << 20


@dataclass(frozen=True)
class SecondPass:
    """What all tasks of the pass are told.

    Attributes:
        measures: folder of the pieces.
        columns: roles of the columns.
        normalise: kind of normalisation.
        unpaired: what rows with fewer than two modalities count as.
        bad_rows: whether rows without measures are an error.
    """

    measures: StoragePath
    columns: Columns
    normalise: Normalise
    unpaired: Unpaired
    bad_rows: BadRows


class _Look(NamedTuple):
    """What there is in a group of pieces."""

    norms: Norms
    unpaired: list[Problem]
    bad: list[Problem]


def score_rows(task: SecondPass, path: StoragePath) -> dict[str, Any]:
    """Write the scores of all measured rows, a folder of Parquet files, replacing an older one.

    Returns:
        What there is to say of them (`Summary.to_json`), and the bounds of the measures.

    Raises:
        CheckpointError: a piece is damaged.
        DataError: rows have fewer than two modalities, and that is an error.
        ModelOutputError: pieces of an earlier command hold bad rows, and that is an error now.
    """
    groups = group_pieces(find_pieces(task.measures), _PART_ROWS)
    if not groups:
        raise CheckpointError(f"{task.measures} holds no measures. Give the same command again")
    looking = [_look.remote(task, group) for group in groups]
    looks: list[_Look] = [get(look, "a look at the next measures") for look in looking]
    raise_first_problem([problem for look in looks for problem in look.unpaired], DataError)
    if task.bad_rows == "error":
        raise_first_problem([problem for look in looks for problem in look.bad], ModelOutputError)
    norms = Norms.union([look.norms for look in looks])
    shared = ray.put(norms)
    with path.replaced() as folder:
        writing = [_write_part.remote(task, group, shared, folder, index) for index, group in enumerate(groups)]
        parts = [get(part, "the next part of the scores") for part in writing]
    return {"bounds": _bounds(norms), **Summary.union(parts).to_json()}


@ray.remote(name="bss_ray.look_at_measures")
def _look(task: SecondPass, group: Sequence[Piece]) -> _Look:
    """Norms of some pieces, and rows that may be an error."""
    norms, unpaired, bad = [], list[Problem](), list[Problem]()
    for piece in group:
        table = read_piece(task.measures, piece)
        norms.append(Norms.of(table, task.normalise))
        unpaired += check_pairs(table, piece.first_row, task.unpaired)
        bad += find_problem(BAD_OUTPUTS, np.isnan(column(table, INFORMATION)), piece.first_row)
    return _Look(Norms.union(norms), unpaired, bad)


@ray.remote(name="bss_ray.write_scores")
def _write_part(task: SecondPass, group: Sequence[Piece], norms: Norms, folder: StoragePath, index: int) -> Summary:
    """Scores of some pieces: a file, and what there is to say of them."""
    table = pa.concat_tables([read_piece(task.measures, piece) for piece in group], promote_options="permissive")
    table = with_scores(table, norms, task.unpaired)
    (folder / f"part-{index:05d}.parquet").write(lambda stream: pq.write_table(table, stream))
    return Summary.of(table, task.columns)


def _bounds(norms: Norms) -> dict[str, Any] | None:
    """Smallest and largest measure, where they are the normalisation."""
    if not isinstance(norms.similarity, Bounds) or not isinstance(norms.information, Bounds):
        return None
    both = {"similarity": norms.similarity, "information": norms.information}
    return {name: [norm.low, norm.high] for name, norm in both.items() if norm.low <= norm.high}
