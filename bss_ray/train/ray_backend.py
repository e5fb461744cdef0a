"""Ray Train as the backend of the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from torch import nn

from bss_ray.placement.cluster import process_map_message
from bss_ray.runtime.messages import PlacementMap
from bss_ray.runtime.ranks import OneRank, RankGroup, TorchRanks
from bss_ray.sample.state import ScoreBlock


class RayRanks(TorchRanks):
    """Ranks of Ray Train, which knows the limit of a wait at a barrier."""

    def barrier(self) -> None:
        ray.train.collective.barrier()


class RayTrainBackend:
    """Ray Train runs the ranks; with `num_workers=0` it keeps no checkpoints.

    Args:
        start: Checkpoint, of another run of the same data and seed, to begin with where there is none of this run.
    """

    def __init__(self, start: ray.train.Checkpoint | None = None) -> None:
        self._start = start

    def ranks(self) -> RankGroup:
        context = ray.train.get_context()
        count = context.get_world_size()
        return OneRank() if count == 1 else RayRanks(context.get_world_rank(), count)

    def device(self) -> torch.device:
        device: torch.device = ray.train.torch.get_device()
        return device

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def prepare(self, model: nn.Module) -> nn.Module:
        prepared: nn.Module = ray.train.torch.prepare_model(model)
        return prepared

    def checkpoint(self) -> ray.train.Checkpoint | None:
        return ray.train.get_checkpoint() or self._start

    def report(self, row: Mapping[str, Any], folder: Path | None) -> None:
        checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(folder)
        ray.train.report(dict(row), checkpoint=checkpoint)

    def scored_first(self, scores: Callable[[], list[ScoreBlock]]) -> None:
        """Does nothing: the first checkpoint has the scores."""

    def preempted(self) -> bool:
        return ray.train.get_preemption_info() is not None

    def process_map(self, prefix: str, rank_nodes: Sequence[str]) -> PlacementMap | None:
        here = ray.get_runtime_context()
        takes = here.get_assigned_resources() if here.get_actor_id() else {}  # a driver that trains has no actors
        return process_map_message(prefix, rank_nodes, takes)
