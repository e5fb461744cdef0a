"""Ray Train's trainer, as a run needs it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray.train
import ray.train.torch
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.callback import RayTrainCallback

from bss_ray.train.elastic import PlannedScaling
from bss_ray.train.packing import Group


class RankTrainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]  # Ray ships no types
    """Elastic ranks that leave room for the run's other processes, no detached actor, and a limit to every wait.

    Args:
        groups: all processes of the run; the last are the ranks.
        wait_limit_s: longest time that processes wait for each other.
        **settings: of `TorchTrainer`.
    """

    def __init__(self, *args: Any, groups: Sequence[Group], wait_limit_s: float, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._groups, self._wait_limit_s = groups, wait_limit_s

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        # In its place: `lost_controller.py`, which says why.
        made = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **settings: Any) -> ray.train.Result:
        # A selector for each rank makes several kinds of ranks, of which Ray starts the first ones.
        if self.scaling_config.elasticity_enabled and not isinstance(self.scaling_config.label_selector, list):
            settings["scaling_policy"] = PlannedScaling(self.scaling_config, self._groups)
        with _limited_waits(self._wait_limit_s):
            return super()._initialize_and_run_controller(**settings)


@contextlib.contextmanager
def _limited_waits(limit_s: float) -> Iterator[None]:
    """Ray Train's own waits end as this project's do, unless the user has set a limit.

    Ranks wait in its barriers without one. Its controller asks every rank how it is, and where the network was out at
    that moment the answer may never come: it gives a rank up after ten minutes.
    """
    limits = {
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": limit_s,
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": min(limit_s, 600.0),
    }
    ours = {name: str(limit) for name, limit in limits.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
