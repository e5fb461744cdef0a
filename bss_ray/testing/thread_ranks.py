"""Ranks that are threads of this process, of which one works at a time."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from bss_ray.runtime.ranks import RankGroup

T = TypeVar("T")


class RankLostError(RuntimeError):
    """A rank of the run is lost, so others cannot meet it. It stands for the errors of torch.distributed."""


class Killed(BaseException):
    """Ends a thread that stands for a process, as kill -9 ends the process. No `except Exception` may catch it."""


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Global random numbers of Python and torch go on after this block as they would have before it."""
    python = random.getstate()
    there = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if there else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)


class Meeting:
    """A meeting point of ranks that are threads, which also says which of them works.

    One rank works at a time, until it waits for others: global random numbers of Python and torch are then each rank's
    own, as they are in processes, and a run takes the same course each time.

    Args:
        count: Number of ranks.
        timeout_s: Seconds after which a rank that waits for others takes them for lost.
        choose: Picks the rank that works next, of those that could. By default the lowest.
    """

    def __init__(self, count: int, timeout_s: float = 60.0, choose: Callable[[Sequence[int]], int] = min) -> None:
        self.count = count
        self._timeout_s, self._choose = timeout_s, choose
        self._changed = threading.Condition()
        self._waiting: set[int] = set()  # they are at the meeting
        self._ready: set[int] = set()  # they could work
        self._working: int | None = None
        self._ended: set[int] = set()
        self._parted: set[int] = set()  # ready, since their meeting will never be complete
        # By rank, of this exchange and the last: that may still be read by some, but not the one before it.
        self._said: tuple[dict[int, bytes], dict[int, bytes]] = ({}, {})
        self._exchanges = [0] * count

    @contextlib.contextmanager
    def turn(self, rank: int) -> Iterator[None]:
        """Work as a rank in this block. It begins when all ranks are there; after its end nobody can meet the rank."""
        self.wait(rank)
        try:
            yield
        finally:
            with self._changed:
                self._ended.add(rank)
                self._part()
                self._next(rank)

    def wait(self, rank: int) -> None:
        """Wait for all ranks.

        Raises:
            RankLostError: a rank is lost, or has ended.
        """
        with own_randomness(), self._changed:
            self._waiting.add(rank)
            if len(self._waiting) == self.count:
                self._ready |= self._waiting
                self._waiting.clear()
            elif self._ended:
                self._part()
            self._give_way(rank)
            if rank in self._parted:
                self._parted.discard(rank)
                raise RankLostError(f"rank {min(self._ended, default='?')} is lost")

    def pause(self, rank: int) -> None:
        """Let another rank work first, if `choose` says so."""
        with own_randomness(), self._changed:
            self._ready.add(rank)
            self._give_way(rank)

    def exchange(self, rank: int, own: T) -> list[T]:
        """The objects of all ranks, on every rank, as copies like between processes.

        Raises:
            RankLostError: a rank is lost, or has ended.
        """
        said = self._said[self._exchanges[rank] % 2]
        self._exchanges[rank] += 1
        said[rank] = pickle.dumps(own)
        self.wait(rank)
        return [pickle.loads(said[other]) for other in range(self.count)]

    def _give_way(self, rank: int) -> None:
        """Have another rank work, and wait for the own turn."""
        self._next(rank)
        if not self._changed.wait_for(lambda: self._working == rank, self._timeout_s):
            self._waiting.discard(rank)
            self._ready.discard(rank)
            raise RankLostError(f"waited {self._timeout_s:g} s for the other ranks")

    def _next(self, rank: int) -> None:
        """The rank that works next, if the calling one did."""
        if self._working in (rank, None):
            self._working = self._choose(sorted(self._ready)) if self._ready else None
            self._ready.discard(-1 if self._working is None else self._working)
            self._changed.notify_all()

    def _part(self) -> None:
        """Those who wait do so in vain."""
        self._parted |= self._waiting
        self._ready |= self._waiting
        self._waiting.clear()


class ThreadRanks(RankGroup):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, meeting.count)
        self._meeting = meeting

    def gather(self, own: T) -> list[T]:
        return self._meeting.exchange(self.rank, own)

    def add(self, values: Tensor) -> None:
        parts = self._meeting.exchange(self.rank, values.detach().cpu())
        values.copy_(torch.stack(parts).sum(dim=0))

    def broadcast(self, values: Tensor) -> None:
        values.copy_(self._meeting.exchange(self.rank, values.detach().cpu())[0])

    def barrier(self) -> None:
        self._meeting.wait(self.rank)

    def average_gradients(self, model: nn.Module) -> nn.Module:
        """Start with rank 0's weights, and average each gradient over the ranks once it is computed, as DDP does."""

        def average(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.add(parameter.grad)
            parameter.grad.div_(self.count)

        with torch.no_grad():
            for tensor in itertools.chain(model.parameters(), model.buffers()):
                self.broadcast(tensor)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
        return model


# ---- actors -----------------------------------------------------------------------------------
