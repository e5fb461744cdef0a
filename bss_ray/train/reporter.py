"""What a rank reports: messages to the event log, where rank 0 speaks for all ranks, and records to its own log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from bss_ray.runtime.logs import RunLogger
from bss_ray.runtime.messages import BatchProgress, Message, Notice
from bss_ray.sample.client import LocalHolders
from bss_ray.sample.plan import Plan
from bss_ray.train.backend import SamplerContext
from bss_ray.train.checkpoint import Position

# Seconds between two messages about batches: people read them.
_POST_INTERVAL_S = 0.5


class Reporter:
    """Sends the messages of one rank.

    Args:
        context: Context of the run.
        rank: Number of this rank, from 0.
        position: Function that returns the current position of training, which all messages carry.
    """

    def __init__(self, context: SamplerContext, rank: int, position: Callable[[], Position]) -> None:
        self._context, self._rank, self._position = context, rank, position
        self._logger = RunLogger(role="rank", run=context.run, rank=rank)
        self._warned: set[str] = set()
        self._posted, self._new_rows = 0.0, 0

    def post(self, message: Message) -> None:
        """Append a message to the event log, with the position of training."""
        if self._rank == 0:
            at = self._position()
            epoch = at.epoch if message.epoch is None else message.epoch
            self._context.coordinator.events.post(replace(message, epoch=epoch, version=at.version, rank=0))

    def notice(self, text: str) -> None:
        """Tell the user something."""
        self.post(Notice(text))

    def warn(self, warnings: Mapping[str, str]) -> None:
        """Report each kind of trouble once and not in every epoch."""
        for name, text in warnings.items():
            if name not in self._warned:
                self._warned.add(name)
                self.notice(f"Warning: {text}")

    def log(self, text: str, *args: object) -> None:
        """Write a line to the log of this rank."""
        at = self._position()
        self._logger.at(epoch=at.epoch, version=at.version).info(text, *args)

    def progress(self, plan: Plan, batch: int, *, waited_s: float, spent_s: float) -> None:
        """Tell, about twice a second and at the end of an epoch, how far training is, and the rows since the last time.

        Args:
            plan: Plan of the epoch.
            batch: Current global batch.
            waited_s: Seconds of the epoch that the loop of this rank waited for batches.
            spent_s: Seconds of the epoch so far.
        """
        start, stop = plan.span(batch)
        self._new_rows += stop - start
        now = time.monotonic()
        if batch + 1 < plan.batches and now - self._posted < _POST_INTERVAL_S:
            return
        stalled = round(waited_s / max(spent_s, 1e-9), 4)
        rows, self._new_rows, self._posted = self._new_rows, 0, now
        self.post(BatchProgress(batch, plan.batches, rows, stalled))

    def placement(self, rank_nodes: Sequence[str]) -> None:
        """Tell where the processes of the run are, if it has more than this one."""
        if self._rank == 0 and not isinstance(self._context.holders, LocalHolders):
            message = self._context.backend.process_map(self._context.prefix, rank_nodes)
            if message is not None:
                self.post(message)
