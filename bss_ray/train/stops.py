"""Where in an epoch a run can be stopped, or saved before a node goes: at a global batch that all ranks agree on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from bss_ray.train.ranks import Ranks

Wish = Literal["go on", "save", "stop"]

# About so often the ranks ask each other: a broadcast of a few bytes, against the seconds of grace that a stop gives.
EVERY_S = 1.0


class Stopped(BaseException):
    """Leaves the train loop of a rank whose run is to stop. No `except Exception` of a loop may catch it."""


class Stops:
    """Asks about once a second whether the run is to stop, on all ranks before the same batch.

    When that is, no rank's own clock can say. Rank 0 measures how long a step takes, and says with each answer after
    how many of them the next question is due.

    Args:
        ranks: all of them; each calls `wish` equally often.
        stopping: called on rank 0: is the run to stop?
        preempted: called on all ranks: is a node about to be taken away?
        every_s: seconds between questions.
    """

    def __init__(
        self, ranks: Ranks, stopping: Callable[[], bool], preempted: Callable[[], bool], *, every_s: float = EVERY_S
    ) -> None:
        self._ranks, self._stopping, self._preempted, self._every_s = ranks, stopping, preempted, every_s
        self._steps = 0  # since the last question
        self._due_after = 1
        self._asked = time.monotonic()

    def wish(self) -> Wish:
        """What is to be done before the next step."""
        if self._steps < self._due_after:
            self._steps += 1
            return "go on"
        stopping, self._due_after = self._ranks.from_first(self._answer())
        self._steps, self._asked = 1, time.monotonic()
        if stopping:
            return "stop"
        return "save" if self._preempted() else "go on"

    def _answer(self) -> tuple[bool, int]:
        """Whether to stop, and steps until the next question."""
        if self._ranks.rank != 0:
            return False, 1  # only rank 0's counts
        seconds = (time.monotonic() - self._asked) / self._steps
        return self._stopping(), max(1, round(self._every_s / max(seconds, 1e-6)))
