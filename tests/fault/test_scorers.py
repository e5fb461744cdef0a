"""Scorers killed with -9 while they measure: rows are scored once, by those that take over and those that come back.

What else can happen to scorers is tested without Ray, in `tests/local/test_scorers.py`.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch import Tensor, nn

import bss_ray
from bss_ray.measure.snapshot import pack_model
from bss_ray.sample.actors import start_coordinator, start_holders
from bss_ray.sample.client import CoordinatorClient, Here, Publication, ScoringJob
from bss_ray.sample.coordinator import Coordinator
from bss_ray.scoring.actors import RayScorers, scorer_names, start_scorers
from bss_ray.scoring.pool import ScorerPool
from tests.runs import BATCH, ROWS, TwoHeads, make_shards, measured_by_hand
from tests.support import state_of

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("ray_session")]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

SCORING = bss_ray.Scoring(engine="actors", num_scorers=2, num_holders=2, batch_size=16, restart_timeout_s=90)


class Deadly(TwoHeads):
    """Kills the process that scores row 100 with it, N times in all."""

    def __init__(self, folder: Path, deaths: int) -> None:
        super().__init__(0.0)
        self.folder, self.deaths = folder, deaths

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.training and 100 in batch["row_id"].tolist():
            markers = list(self.folder.glob("death-*"))
            if len(markers) < self.deaths:
                (self.folder / f"death-{len(markers)}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch)


def deadly(folder: Path, deaths: int) -> Deadly:
    torch.manual_seed(0)
    return Deadly(folder, deaths)


@pytest.fixture
def coordinator() -> Iterator[CoordinatorClient]:
    """A coordinator of two holders and two scorers."""
    shards = make_shards(6)
    holders, handles = start_holders(shards, count=2)
    handles += start_scorers(shards, bss_ray.Measurer(), SCORING, holders)
    pool = ScorerPool(scorer_names(holders, SCORING), SCORING.restart_timeout_s, RayScorers())
    make = functools.partial(Coordinator, rows=ROWS, scheduler=bss_ray.Learning(), batch_size=BATCH)
    client, handle = start_coordinator(holders, make, pool)
    yield client
    for each in (handle, *handles):
        ray.kill(each)


def test_killed_while_scoring(coordinator: CoordinatorClient, tmp_path: Path) -> None:
    """The first scorer, and the one that takes over as well."""
    shards, attempt = make_shards(6), coordinator.reset()
    homes = [part.node for part in shards.parts]

    def score(model: nn.Module, version: int) -> Publication:
        job = ScoringJob(Here(pack_model(model)), shards, version - 1, version, attempt)
        coordinator.start_scoring(Here(job), homes)
        return coordinator.finish_scoring(version)

    publication = score(deadly(tmp_path, deaths=2), 1)
    assert len(list(tmp_path.glob("death-*"))) == 2
    assert (publication.version, publication.measured, publication.failure) == (1, ROWS, "")
    state = state_of(coordinator, 1)
    by_hand = bss_ray.balance_scores(*measured_by_hand(deadly(tmp_path, 0)))
    np.testing.assert_allclose(state.score, by_hand, atol=5e-6)
    assert set(state.last_measured.tolist()) == {1}
    assert score(deadly(tmp_path, 0), 2).version == 2  # the scorers are back
