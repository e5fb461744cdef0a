"""The context of a rank and the backend that runs it: without Ray, so that ranks can also be threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs
import torch
from torch import nn

from bss_ray.data.shards import Shards
from bss_ray.measure.measurer import Measurer
from bss_ray.runtime.messages import PlacementMap
from bss_ray.runtime.ranks import RankGroup
from bss_ray.runtime.wait import DEFAULT_LIMIT_S
from bss_ray.sample.client import CoordinatorClient, Holders
from bss_ray.sample.state import SavedScores, ScoreBlock
from bss_ray.schedule.schedulers import Scheduler
from bss_ray.scoring.config import Scoring


class StoredFolder(Protocol):
    """A folder of a checkpoint on any file system, such as a `ray.train.Checkpoint`."""

    @property
    def path(self) -> str: ...

    @property
    def filesystem(self) -> pyarrow.fs.FileSystem: ...


class TrainBackend(Protocol):
    """The interface of a rank to the system that runs it and keeps its checkpoints."""

    def ranks(self) -> RankGroup:
        """The calling rank among all ranks."""
        ...

    def device(self) -> torch.device:
        """Device of the calling rank."""
        ...

    def node(self) -> str:
        """Id of the node that the calling rank runs on."""
        ...

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on the calling rank's device, wrapped so that gradients are averaged over the ranks."""
        ...

    def checkpoint(self) -> StoredFolder | None:
        """The checkpoint to resume from."""
        ...

    def report(self, row: Mapping[str, Any], folder: Path | None) -> None:
        """Keep a row of metrics, and a copy of a folder with this rank's files of a checkpoint."""
        ...

    def scored_first(self, scores: Callable[[], list[ScoreBlock]]) -> None:
        """Keep the scores of the untrained model for other runs that start with them."""
        ...

    def preempted(self) -> bool:
        """Whether a node of the ranks will be taken away soon; all ranks ask, and get the same answer."""
        ...

    def process_map(self, prefix: str, rank_nodes: Sequence[str]) -> PlacementMap | None:
        """Where the processes of the run are; None if there is only the calling process.

        Args:
            prefix: Prefix of the names of the run's actors.
            rank_nodes: Id of the node of each rank.
        """
        ...


class Stateful(Protocol):
    """Any object with a state that belongs to a checkpoint: optimiser, schedule, scaler, ..."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class SamplerContext:
    """What the trainer sends to every rank.

    Attributes:
        coordinator: Publishes scores and plans epochs.
        holders: Take measures.
        prefix: Prefix of the names of the run's actors.
        backend: Runs the ranks.
        train: The training rows.
        validation: The validation rows, if there are any.
        scheduler: From scores to weights and sizes.
        measurer: How rows are measured.
        scoring: How and where rows are scored, with the engine settled.
        seed: Seed of the order of rows.
        wait_limit_s: Longest time, in seconds, that one process waits for another.
        run: Name of the run.
        profile: Whether a training step and a scoring pass are recorded.
        initial_scores: Scores that the first epoch is drawn from.
    """

    coordinator: CoordinatorClient
    holders: Holders
    prefix: str
    backend: TrainBackend
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
