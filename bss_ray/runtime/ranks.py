"""What the ranks of a run say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import ray.train
import ray.train.collective
import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class RankGroup:
    """This rank among all ranks. All of them make the same calls.

    Attributes:
        rank: of this process.
        count: of all.
    """

    rank: int
    count: int

    @staticmethod
    def here() -> RankGroup:
        """Of the Ray Train worker that calls."""
        context = ray.train.get_context()
        return RankGroup(context.get_world_rank(), context.get_world_size())

    def gather(self, own: T) -> list[T]:
        """A small object of every rank, on every rank."""
        everyones = [own] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(everyones, own)
        return everyones

    def from_first(self, own: T) -> T:
        """Rank 0's object, on every rank."""
        return self.gather(own)[0]

    def sum(self, values: Tensor) -> list[float]:
        """Sums of (k,) numbers over all ranks."""
        total = values.clone()
        if self.count > 1:
            torch.distributed.all_reduce(total)
        return [float(value) for value in total]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.count > 1:
            ray.train.collective.barrier()
