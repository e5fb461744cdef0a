"""One rank's batches of an epoch: its rows of every global batch, gathered and put on its device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from bss_ray.data.shards import Shards
from bss_ray.measure.forward import to_tensors
from bss_ray.sample.plan import Order, Plan, share_out

# Row id of a filler row: it belongs to no one and its loss counts nothing.
FILLER = -1


class RankBatch(NamedTuple):
    """One rank's part of a global batch.

    Attributes:
        number: of the global batch in the epoch, from 0.
        tensors: `{column: (b, ...)}` on the rank's device, with `row_id` (b,) int64.
        loss_scale: multiply the mean loss of the part by it; averaged over the ranks, as DDP averages
            gradients, this is the mean over the global batch, whatever the parts' sizes.
    """

    number: int
    tensors: dict[str, torch.Tensor]
    loss_scale: float


class Loader:
    """Reads one rank's rows of every global batch of a plan.

    Args:
        shards: the rows.
        rank: this rank.
        rank_nodes: node id of every rank.
        device: where batches go.
    """

    def __init__(self, shards: Shards, *, rank: int, rank_nodes: list[str], device: torch.device) -> None:
        self._shards = shards
        self._rank = rank
        self._device = device
        nodes = {node: index for index, node in enumerate(dict.fromkeys(rank_nodes))}
        self._rank_homes = np.array([nodes[node] for node in rank_nodes])
        # Shards on nodes without a rank have no home: their rows are surplus from the start.
        self._shard_homes = np.array([nodes.get(part.node, -1) for part in shards.parts])

    def batches(self, plan: Plan, order: Order, start: int = 0) -> Iterator[RankBatch]:
        """The rank's parts of global batches `start`, `start + 1`, ... of the plan."""
        for index in range(start, plan.batches):
            global_ids = order.take(*plan.span(index))
            ids = global_ids[self._owners(global_ids) == self._rank]
            scale = len(ids) * len(self._rank_homes) / len(global_ids)
            filled = len(ids) == 0
            if filled:
                # A tail of fewer rows than ranks. The rank must still take part in the backward pass.
                ids = global_ids[:1]
            tensors = self.gather(ids)
            if filled:
                tensors["row_id"].fill_(FILLER)
            yield RankBatch(index, tensors, scale)

    def rows(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """The rank's share of all rows in batches, each row on one rank, in any order (evaluation)."""
        ranks = len(self._rank_homes)
        mine = np.arange(self._rank, self._shards.rows, ranks)
        for start in range(0, len(mine), batch_size):
            yield self.gather(mine[start : start + batch_size])

    def gather(self, row_ids: np.ndarray) -> dict[str, torch.Tensor]:
        """Rows as tensors on the rank's device; row ids stay int64, never part of a float tensor."""
        columns = self._shards.gather(row_ids)
        columns["row_id"] = row_ids.astype(np.int64, copy=True)
        return to_tensors(columns, self._device)

    def _owners(self, row_ids: np.ndarray) -> np.ndarray:
        return share_out(self._shard_homes[self._shards.locate(row_ids)], self._rank_homes)
