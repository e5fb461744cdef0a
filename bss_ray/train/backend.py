"""What a rank is given to work with, and the backend that keeps its checkpoints and takes its reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray.train

from bss_ray.data.shards import Shards
from bss_ray.measure.measurer import Measurer
from bss_ray.runtime.ranks import RankGroup
from bss_ray.runtime.wait import DEFAULT_LIMIT_S
from bss_ray.sample.holder_actors import SavedScores, StartedHolders
from bss_ray.sample.state import ScoreBlock
from bss_ray.schedule.schedulers import Scheduler
from bss_ray.scoring.config import Scoring


class TrainBackend(Protocol):
    """What a rank needs of whoever runs it and keeps its checkpoints."""

    def ranks(self) -> RankGroup:
        """The calling rank among all."""
        ...

    def checkpoint(self) -> ray.train.Checkpoint | None:
        """The checkpoint to go on from."""
        ...

    def report(self, row: Mapping[str, Any], checkpoint: ray.train.Checkpoint | None) -> None:
        """Keep a row of metrics, and a checkpoint whose folder is gone afterwards."""
        ...

    def scored_first(self, scores: Callable[[], list[ScoreBlock]]) -> None:
        """Keep the scores of the untrained model, for other runs that begin with them."""
        ...

    def preempted(self) -> bool:
        """Whether a node of the ranks is about to be taken away; all ranks ask, and have the same answer."""
        ...


class RayTrainBackend:
    """Ray Train keeps them; with `num_workers=0` it keeps none.

    Args:
        start: checkpoint, of another run of the same data and seed, to begin with where there is none of this run.
    """

    def __init__(self, start: ray.train.Checkpoint | None = None) -> None:
        self._start = start

    def ranks(self) -> RankGroup:
        return RankGroup.here()

    def checkpoint(self) -> ray.train.Checkpoint | None:
        return ray.train.get_checkpoint() or self._start

    def report(self, row: Mapping[str, Any], checkpoint: ray.train.Checkpoint | None) -> None:
        ray.train.report(dict(row), checkpoint=checkpoint)

    def scored_first(self, scores: Callable[[], list[ScoreBlock]]) -> None:
        """They are in the first checkpoint."""

    def preempted(self) -> bool:
        return ray.train.get_preemption_info() is not None


class Stateful(Protocol):
    """Anything with a state that belongs into a checkpoint: optimiser, schedule, scaler, ..."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class SamplerContext:
    """What the trainer sends to every rank."""

    coordinator: Any
    holders: StartedHolders
    train: Shards
    validation: Shards | None
    scheduler: Scheduler
    measurer: Measurer
    scoring: Scoring
    seed: int
    wait_limit_s: float = DEFAULT_LIMIT_S
    run: str = "run"
    profile: bool = False
    initial_scores: SavedScores | None = None
    session: TrainBackend = field(default_factory=RayTrainBackend)
