"""What a rank says: to people, by way of the coordinator's board, where rank 0 speaks for all; and to its own log."""

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

# Messages about batches, at most one in so many seconds: the board is for people.
_POST_INTERVAL_S = 0.5


class Reporter:
    """Speaks for one rank.

    Args:
        context: of the run.
        rank: number of this rank, from 0.
        position: where training stands, which all messages carry.
    """

    def __init__(self, context: SamplerContext, rank: int, position: Callable[[], Position]) -> None:
        self._context, self._rank, self._position = context, rank, position
        self._logger = RunLogger(role="rank", run=context.run, rank=rank)
        self._warned: set[str] = set()
        self._posted, self._new_rows = 0.0, 0

    def post(self, message: Message) -> None:
        """Put a message on the board."""
        if self._rank == 0:
            at = self._position()
            epoch = at.epoch if message.epoch is None else message.epoch
            self._context.coordinator.events.post(replace(message, epoch=epoch, version=at.version, rank=0))

    def notice(self, text: str) -> None:
        """Something that the user should read."""
        self.post(Notice(text))

    def warn(self, warnings: Mapping[str, str]) -> None:
        """Tell the user of each kind of trouble once, not in every epoch."""
        for name, text in warnings.items():
            if name not in self._warned:
                self._warned.add(name)
                self.notice(f"Warning: {text}")

    def log(self, text: str, *args: object) -> None:
        """For whoever reads this rank's log."""
        at = self._position()
        self._logger.at(epoch=at.epoch, version=at.version).info(text, *args)

    def progress(self, plan: Plan, batch: int, *, waited_s: float, spent_s: float) -> None:
        """Now and then, and at the end of an epoch: how far it is, and the rows since the last such message.

        Args:
            plan: of the epoch.
            batch: global batch at hand.
            waited_s: seconds of the epoch that its loop waited for batches.
            spent_s: seconds of the epoch so far.
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
        """What runs where, if there is more than this process."""
        if self._rank == 0 and not isinstance(self._context.holders, LocalHolders):
            message = self._context.backend.process_map(self._context.prefix, rank_nodes)
            if message is not None:
                self.post(message)
