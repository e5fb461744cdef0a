"""Where a run's checkpoints come from and its reports go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import ray.train


class Session(Protocol):
    """What a rank needs of whoever keeps its checkpoints."""

    def checkpoint(self) -> ray.train.Checkpoint | None:
        """The checkpoint to go on from."""
        ...

    def report(self, row: Mapping[str, Any], checkpoint: ray.train.Checkpoint | None) -> None:
        """Keep a row of metrics, and a checkpoint whose folder is gone afterwards."""
        ...


class TrainSession:
    """Ray Train keeps them; with `num_workers=0` it keeps none."""

    def checkpoint(self) -> ray.train.Checkpoint | None:
        return ray.train.get_checkpoint()

    def report(self, row: Mapping[str, Any], checkpoint: ray.train.Checkpoint | None) -> None:
        ray.train.report(dict(row), checkpoint=checkpoint)
