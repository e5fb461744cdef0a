"""Scorers that are lost before and while they measure: rows are scored once, or a run keeps its scores and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bss_ray
from bss_ray.errors import ScoringError
from bss_ray.measure.snapshot import pack_model
from bss_ray.runtime.messages import EpochFinished, Message, Notice
from bss_ray.sample.client import CoordinatorClient, Here, Publication, ScoringJob
from bss_ray.testing import LocalCluster
from tests.local.runs import here, make_shards
from tests.runs import BATCH, ROWS, TwoHeads, measured_by_hand
from tests.support import state_of

SHARDS = make_shards(6)
SCORING = bss_ray.Scoring(engine="actors", num_scorers=2, num_holders=2, batch_size=16, restart_timeout_s=20)
SHARD = 3  # the one that they die of


class Deaths:
    """Kills the scorer that is to measure `SHARD`, or that measures it, N times in all."""

    def __init__(self, deaths: int, *, measuring: bool) -> None:
        self.deaths, self.measuring, self.found = deaths, measuring, 0
        self.scorer = ""

    def __call__(self, role: str, method: str, shard: int | None) -> None:
        if method == "measure":
            self.scorer = role if shard == SHARD else self.scorer
        due = method == ("receive" if self.measuring else "measure") and self.found < self.deaths
        if due and self.scorer and (self.measuring or (role, shard) == (self.scorer, SHARD)):
            self.found += 1
            self.cluster.kill(self.scorer)
            self.scorer = ""

    cluster: LocalCluster


def in_cluster(folder: Path, deaths: Deaths, loop: Callable[[CoordinatorClient, str], None]) -> None:
    """Call `loop` with the coordinator and the attempt, as a rank does."""

    def run() -> None:
        context = bss_ray.get_sampler()._context
        loop(context.coordinator, context.coordinator.reset())

    deaths.cluster = LocalCluster(SHARDS, folder, scoring=SCORING, batch_size=BATCH, on_call=deaths)
    deaths.cluster.run(run)


def model() -> TwoHeads:
    torch.manual_seed(0)
    return TwoHeads(0.0)


def start(coordinator: CoordinatorClient, attempt: str, version: int) -> None:
    job = ScoringJob(Here(pack_model(model())), SHARDS, version - 1, version, attempt)
    coordinator.start_scoring(Here(job), [""] * 6)


def score(coordinator: CoordinatorClient, attempt: str, version: int) -> Publication:
    start(coordinator, attempt, version)
    return coordinator.finish_scoring(version)


@pytest.mark.parametrize("measuring", [False, True])
@pytest.mark.parametrize("deaths", [1, 2])
def test_killed_while_scoring(deaths: int, measuring: bool, tmp_path: Path) -> None:
    """By one kill, and by the scorer that takes over as well."""
    fault = Deaths(deaths, measuring=measuring)

    def loop(coordinator: CoordinatorClient, attempt: str) -> None:
        publication = score(coordinator, attempt, 1)
        assert fault.found == deaths
        assert (publication.version, publication.measured, publication.failure) == (1, ROWS, "")
        state = state_of(coordinator, 1)
        np.testing.assert_allclose(state.score, bss_ray.balance_scores(*measured_by_hand(model())), atol=5e-6)
        assert set(state.last_measured.tolist()) == {1}
        assert score(coordinator, attempt, 2).version == 2  # the scorers are back

    in_cluster(tmp_path, fault, loop)


def test_rows_that_kill_every_scorer_fail_the_update_and_leave_the_version(tmp_path: Path) -> None:
    fault = Deaths(0, measuring=False)

    def loop(coordinator: CoordinatorClient, attempt: str) -> None:
        assert score(coordinator, attempt, 1).version == 1
        before = state_of(coordinator, 1)
        fault.deaths = 99
        start(coordinator, attempt, 2)
        # A checkpoint meanwhile waits for the measures, and has none of an update that fails.
        held = [part for shared in coordinator.states(1) for part in shared.get("scores")]
        assert [part.pending for part in held] == [None, None]
        publication = coordinator.finish_scoring(2)
        assert publication.version == 1
        assert "3 scorers were lost while they measured shard 3" in publication.failure
        state = state_of(coordinator, 1)
        assert state.score.tolist() == before.score.tolist()
        assert set(state.last_measured.tolist()) == {1}
        # Nothing of the failed update is left: a publication finds no measures.
        assert "no rows have been measured" in coordinator.publish(2, None).failure
        fault.deaths = 0
        assert score(coordinator, attempt, 2).version == 2

    in_cluster(tmp_path, fault, loop)


def test_one_that_does_not_come_back_is_done_without(tmp_path: Path) -> None:
    def loop(coordinator: CoordinatorClient, attempt: str) -> None:
        here().kill("scorer-0", back=False)
        publication = score(coordinator, attempt, 1)
        assert (publication.version, publication.measured) == (1, ROWS)
        assert any("scorer-0 is lost" in notice for notice in publication.notices)

    in_cluster(tmp_path, Deaths(0, measuring=False), loop)


def test_a_lost_holder_is_no_lost_scorer(tmp_path: Path) -> None:
    """The ranks start again; no update is given up."""

    def loop(coordinator: CoordinatorClient, attempt: str) -> None:
        here().kill("holder-0")
        with pytest.raises(RuntimeError, match="is there, but holder-0 is lost"):
            score(coordinator, attempt, 1)

    in_cluster(tmp_path, Deaths(0, measuring=False), loop)


def train_loop(after: int) -> None:
    """Uniform steps; all scorers are lost for good after epoch `after`."""
    sampler = bss_ray.get_sampler()
    torch.manual_seed(0)
    own = TwoHeads(0.0)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    for epoch in sampler.epochs(9):
        for batch in sampler.batches():
            outputs = own(batch)
            sampler.observe(batch, outputs)
            optimizer.zero_grad()
            sampler.loss(batch, outputs).mean().backward()
            optimizer.step()
        if epoch == after:
            for index in range(2):
                here().kill(f"scorer-{index}", back=False)
        sampler.report({}, model=own, optimizer=optimizer)


def test_a_run_continues_with_the_last_whole_version_and_fails_after_a_while(tmp_path: Path) -> None:
    messages: list[Message] = []
    scoring = bss_ray.Scoring(engine="actors", num_scorers=2, restart_timeout_s=1, max_failed_updates=2)
    settings: dict[str, Any] = {"scheduler": bss_ray.Learning(temperature=0.3), "batch_size": BATCH}
    cluster = LocalCluster(SHARDS, tmp_path, scoring=scoring, on_message=messages.append, max_failures=5, **settings)
    with pytest.raises(ScoringError, match=r"3 times in a row, and scoring.max_failed_updates=2: no scorer is left"):
        cluster.run(train_loop, 1)
    rows = [message.row for message in messages if isinstance(message, EpochFinished)]
    assert [row["score_version"] for row in rows] == [0, 1, 1]
    texts = [message.text for message in messages if isinstance(message, Notice)]
    assert sum("score version 1 (failure" in text for text in texts) == 2
