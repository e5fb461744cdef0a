"""Scorers killed while they measure: rows are scored once, or the run goes on without new scores, and says so."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.train
import torch
from bss_ray.sample.start import scorer_names, start_coordinator, start_holders, start_scorers
from bss_ray.scoring.actor import ScoringJob
from torch import Tensor

import bss_ray
from bss_ray.data.shards import Shards
from bss_ray.errors import ScoringError
from bss_ray.measure.snapshot import pack_model
from bss_ray.runtime.messages import EpochFinished, Message, Notice
from bss_ray.sample.client import Publication
from bss_ray.scoring.scorer import Scorer
from tests.runs import BATCH, ROWS, TwoHeads, make_columns, make_shards

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("ray_session")]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

SCORING = bss_ray.Scoring(engine="actors", num_scorers=2, num_holders=2, batch_size=16, restart_timeout_s=20)


class Deadly(TwoHeads):
    """Kills the process that scores row `row` with it, so many times in all."""

    def __init__(self, folder: Path, row: int, deaths: int) -> None:
        super().__init__(0.0)
        self.folder, self.row, self.deaths = folder, row, deaths

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = batch["row_id"].tolist()
        if not self.training and self.row in rows:
            markers = list(self.folder.glob("death-*"))
            if len(markers) < self.deaths:
                (self.folder / f"death-{len(markers)}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch)


def deadly(folder: Path, row: int, deaths: int) -> Deadly:
    torch.manual_seed(0)
    return Deadly(folder, row, deaths)


@dataclass
class Actors:
    """Holders, scorers and coordinator of one run."""

    shards: Shards
    scoring: bss_ray.Scoring
    handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.holders, self.handles = start_holders(self.shards, self.scoring)
        self.handles += start_scorers(self.shards, bss_ray.Measurer(), self.scoring, self.holders)
        self.coordinator = start_coordinator(
            self.holders,
            rows=ROWS,
            scheduler=bss_ray.Learning(),
            scoring=self.scoring,
            seed=0,
            batch_size=BATCH,
            tail="keep",
        )
        self.attempt = ray.get(self.coordinator.reset.remote())

    def start(self, model: torch.nn.Module, version: int) -> None:
        job = ScoringJob(ray.put(pack_model(model)), self.shards, version - 1, version, self.attempt)
        ray.get(self.coordinator.start_scoring.remote(job))

    def score(self, model: torch.nn.Module, version: int) -> Publication:
        self.start(model, version)
        publication: Publication = ray.get(self.coordinator.finish_scoring.remote(version))
        return publication

    def state(self, version: int) -> tuple[np.ndarray, np.ndarray]:
        held = ray.get(ray.get(self.coordinator.parts.remote(version)))
        parts = sorted((part for parts in held for part in parts), key=lambda part: part.first_row)
        return np.concatenate([part.score for part in parts]), np.concatenate([part.last_measured for part in parts])

    def stop(self) -> None:
        for handle in (self.coordinator, *self.handles):
            ray.kill(handle)


@pytest.fixture(scope="module")
def shards(ray_session: None) -> Shards:
    return make_shards(6)


@pytest.fixture
def actors(shards: Shards) -> Iterator[Actors]:
    actors = Actors(shards, SCORING)
    yield actors
    actors.stop()


def by_hand(model: torch.nn.Module) -> np.ndarray:
    found = Scorer(bss_ray.Measurer(), "label", model=model).measure(make_columns())
    return bss_ray.balance_scores(found.similarity, found.information)


@pytest.mark.parametrize("deaths", [1, 2])
def test_killed_while_scoring(deaths: int, actors: Actors, tmp_path: Path) -> None:
    """By one kill, and by the scorer that takes over as well."""
    model = deadly(tmp_path, row=100, deaths=deaths)
    publication = actors.score(model, 1)
    assert len(list(tmp_path.glob("death-*"))) == deaths
    assert (publication.version, publication.measured, publication.failure) == (1, ROWS, "")
    score, measured = actors.state(1)
    np.testing.assert_allclose(score, by_hand(deadly(tmp_path, -1, 0)), atol=5e-6)
    assert set(measured.tolist()) == {1}
    # The scorers are back for the next version.
    assert actors.score(deadly(tmp_path, -1, 0), 2).version == 2


def test_rows_that_kill_every_scorer_fail_the_update_and_leave_the_version(actors: Actors, tmp_path: Path) -> None:
    assert actors.score(deadly(tmp_path, -1, 0), 1).version == 1
    before, _ = actors.state(1)
    actors.start(deadly(tmp_path, row=100, deaths=99), 2)
    # A checkpoint meanwhile waits for the measures, and has none of an update that fails.
    held = ray.get(ray.get(actors.coordinator.parts.remote(1)))
    assert [part.pending for parts in held for part in parts] == [None, None]
    publication = ray.get(actors.coordinator.finish_scoring.remote(2))
    assert publication.version == 1
    assert "3 scorers were lost while they measured shard" in publication.failure
    score, measured = actors.state(1)
    assert score.tolist() == before.tolist()
    assert set(measured.tolist()) == {1}
    # Nothing of the failed update is left: a publication finds no measures.
    assert "no rows have been measured" in ray.get(actors.coordinator.publish.remote(2, None)).failure
    assert actors.score(deadly(tmp_path, -1, 0), 2).version == 2


def test_one_that_does_not_come_back_is_done_without(actors: Actors, tmp_path: Path) -> None:
    lost, *_ = scorer_names(actors.holders, actors.scoring)
    ray.kill(ray.get_actor(lost), no_restart=True)
    publication = actors.score(deadly(tmp_path, -1, 0), 1)
    assert (publication.version, publication.measured) == (1, ROWS)
    assert any("scorer-0 is lost" in notice for notice in publication.notices)


# ---- through a whole run --------------------------------------------------------------------------


def train_loop(after: int) -> None:
    """Uniform steps; all scorers are lost for good after epoch `after`."""
    sampler = bss_ray.get_sampler()
    torch.manual_seed(0)
    model = TwoHeads(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in sampler.epochs(9):
        for batch in sampler.batches():
            outputs = model(batch)
            sampler.observe(batch, outputs)
            optimizer.zero_grad()
            sampler.loss(batch, outputs).mean().backward()
            optimizer.step()
        if epoch == after:
            for name in scorer_names(sampler._context.holders, SCORING):
                ray.kill(ray.get_actor(name), no_restart=True)
        sampler.report({}, model=model, optimizer=optimizer)


def test_a_run_goes_on_with_the_last_whole_version_and_fails_after_a_while(shards: Shards, tmp_path: Path) -> None:
    messages: list[Message] = []
    scoring = bss_ray.Scoring(engine="actors", restart_timeout_s=1, max_failed_updates=2)
    trainer = bss_ray.BalancedTrainer(
        train_loop,
        dataset=shards,
        scheduler=bss_ray.Learning(temperature=0.3),
        scoring=scoring,
        batch_size=BATCH,
        train_loop_config=1,
        scaling_config=ray.train.ScalingConfig(num_workers=0),
        run_config=ray.train.RunConfig(name="run", storage_path=str(tmp_path)),
        on_message=messages.append,
    )
    with pytest.raises(ScoringError, match=r"3 times in a row, and scoring.max_failed_updates=2: no scorer is left"):
        trainer.fit()
    rows = [message.row for message in messages if isinstance(message, EpochFinished)]
    assert [row["score_version"] for row in rows] == [0, 1, 1]
    texts = [message.text for message in messages if isinstance(message, Notice)]
    assert sum("goes on with score version 1 (failure" in text for text in texts) == 2
