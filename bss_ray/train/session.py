"""Where a run's checkpoints come from and its reports go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import ray.train

from bss_ray.sample.state import PartState
from bss_ray.train.ranks import Ranks


class Session(Protocol):
    """What a rank needs of whoever runs it and keeps its checkpoints."""

    def ranks(self) -> Ranks:
        """The calling rank among all."""
        ...

    def checkpoint(self) -> ray.train.Checkpoint | None:
        """The checkpoint to go on from."""
        ...

    def report(self, row: Mapping[str, Any], checkpoint: ray.train.Checkpoint | None) -> None:
        """Keep a row of metrics, and a checkpoint whose folder is gone afterwards."""
        ...

    def scored_first(self, scores: Callable[[], list[PartState]]) -> None:
        """Keep the scores of the untrained model, for other runs that begin with them."""
        ...

    def preempted(self) -> bool:
        """Whether a node of the ranks is about to be taken away; all ranks ask, and have the same answer."""
        ...


class TrainSession:
    """Ray Train keeps them; with `num_workers=0` it keeps none.

    Args:
        start: checkpoint, of another run of the same data and seed, to begin with where there is none of this run.
    """

    def __init__(self, start: ray.train.Checkpoint | None = None) -> None:
        self._start = start

    def ranks(self) -> Ranks:
        return Ranks.here()

    def checkpoint(self) -> ray.train.Checkpoint | None:
        return ray.train.get_checkpoint() or self._start

    def report(self, row: Mapping[str, Any], checkpoint: ray.train.Checkpoint | None) -> None:
        ray.train.report(dict(row), checkpoint=checkpoint)

    def scored_first(self, scores: Callable[[], list[PartState]]) -> None:
        """They are in the first checkpoint."""

    def preempted(self) -> bool:
        return ray.train.get_preemption_info() is not None
