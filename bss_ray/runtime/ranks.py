"""Collective calls of the ranks of a run."""

from __future__ import annotations

import abc
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class RankGroup(abc.ABC):
    """This rank among all ranks. All ranks make the same calls.

    Attributes:
        rank: Number of this rank, from 0.
        count: Number of all ranks.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    @abc.abstractmethod
    def gather(self, own: T) -> list[T]:
        """A small object of each rank, in the order of ranks, on every rank."""

    @abc.abstractmethod
    def add(self, values: Tensor) -> None:
        """Replace (k,) numbers by their sums over all ranks, in place."""

    @abc.abstractmethod
    def broadcast(self, values: Tensor) -> None:
        """Replace a tensor by the one of rank 0, in place."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """Wait for all ranks."""

    def from_first(self, own: T) -> T:
        """The object of rank 0, on every rank."""
        return self.gather(own)[0]

    def sum(self, values: Tensor) -> list[float]:
        """Sums of (k,) numbers over all ranks."""
        total = values.clone()
        self.add(total)
        return [float(value) for value in total]


class OneRank(RankGroup):
    """The only rank of a run."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def gather(self, own: T) -> list[T]:
        return [own]

    def add(self, values: Tensor) -> None:
        """The numbers are the sums already."""

    def broadcast(self, values: Tensor) -> None:
        """The tensor is the one of rank 0 already."""

    def barrier(self) -> None:
        """There are no other ranks."""


class TorchRanks(RankGroup):
    """Ranks of `torch.distributed`, whose process group exists."""

    def gather(self, own: T) -> list[T]:
        everyones = [own] * self.count
        torch.distributed.all_gather_object(everyones, own)
        return everyones

    def add(self, values: Tensor) -> None:
        torch.distributed.all_reduce(values)

    def broadcast(self, values: Tensor) -> None:
        torch.distributed.broadcast(values, 0)

    def barrier(self) -> None:
        torch.distributed.barrier()
