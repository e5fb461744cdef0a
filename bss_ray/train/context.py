"""What a rank is given to work with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from bss_ray.data.shards import Shards
from bss_ray.measure.measurer import Measurer
from bss_ray.sample.holder_actors import SavedScores, StartedHolders
from bss_ray.sample.scoring import Scoring
from bss_ray.schedule.schedulers import Scheduler
from bss_ray.train.session import Session, TrainSession
from bss_ray.wait import DEFAULT_LIMIT_S


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
    session: Session = field(default_factory=TrainSession)
