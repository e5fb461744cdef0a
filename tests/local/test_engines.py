"""Actors, workers and online: the same scores for the same weights, each at its own time."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import bss_ray
from bss_ray.data.shards import Shards
from bss_ray.errors import ConfigError
from bss_ray.runtime.messages import EpochFinished, Message, Notice
from bss_ray.sample.state import ScoreBlock
from bss_ray.scoring.engines import ActorsEngine, WorkersEngine
from bss_ray.testing import LocalCluster
from bss_ray.train.initial import ScoresFile
from bss_ray.train.sampler import Sampler
from tests.local.runs import make_shards
from tests.runs import BATCH, ROWS, TwoHeads, measured_by_hand
from tests.support import state_of


@pytest.fixture(scope="module")
def shards() -> Shards:
    return make_shards(3)


def fit(
    folder: Path,
    shards: Shards,
    loop: Any,
    scoring: bss_ray.Scoring,
    *,
    workers: int = 1,
    config: Any = None,
    **settings: Any,
) -> list[Message]:
    """Run a loop; returns the run's messages."""
    messages: list[Message] = []
    settings = {"scheduler": bss_ray.Learning(temperature=0.3), **settings}
    cluster = LocalCluster(
        shards, folder, scoring=scoring, ranks=workers, batch_size=BATCH, seed=7, on_message=messages.append, **settings
    )
    cluster.run(loop, config)
    return messages


def notices(messages: list[Message]) -> list[str]:
    return [message.text for message in messages if isinstance(message, Notice)]


def new_model(seed: int = 0) -> TwoHeads:
    torch.manual_seed(seed)
    return TwoHeads(0.0)


# ---- the same scores ------------------------------------------------------------------------------


def compare_engines(folder: Path) -> None:
    """One epoch, without a step; then each engine publishes a version of the same weights."""
    sampler = bss_ray.get_sampler()
    model = sampler.prepare(new_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in sampler.epochs(1):
        for batch in sampler.batches():
            sampler.observe(batch, model(batch))
        sampler.report({}, model=model, optimizer=optimizer)
    assert isinstance(sampler._engine, ActorsEngine)
    for engine, version in ((WorkersEngine(sampler._engine._context), 1), (sampler._engine, 2)):
        publication = engine.update(0, version, model)
        assert publication is not None
        assert (publication.version, publication.measured, publication.failure) == (version + 1, ROWS, "")
        if sampler.rank == 0:
            state = state_of(sampler._context.coordinator, version + 1)
            np.savez(folder / f"{type(engine).__name__}.npz", **state.arrays)
        sampler._ranks.barrier()


def test_same_weights_same_scores(shards: Shards, tmp_path: Path) -> None:
    # A run of the engine actors, whose scorers are there; the others need nothing that it has not.
    fit(tmp_path / "run", shards, compare_engines, bss_ray.Scoring(engine="actors"), workers=2, config=tmp_path)
    similarity, information = measured_by_hand(new_model())
    by_hand = bss_ray.balance_scores(similarity, information)
    for name in ("WorkersEngine", "ActorsEngine"):
        state = np.load(tmp_path / f"{name}.npz")
        np.testing.assert_allclose(state["similarity"], similarity, atol=1e-6)
        np.testing.assert_allclose(state["information"], information, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state["score"], by_hand, atol=5e-6)


# ---- online ---------------------------------------------------------------------------------------


def online_loop(config: dict[str, Any]) -> None:
    sampler = bss_ray.get_sampler()
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=config.get("lr", 0.0))
    for epoch in sampler.epochs(config["epochs"]):
        drawn: list[int] = []
        for batch in sampler.batches():
            outputs = model(batch)
            if config.get("observe", True):
                sampler.observe(batch, outputs)
            optimizer.zero_grad()
            sampler.loss(batch, outputs).mean().backward()
            optimizer.step()
            drawn += batch["row_id"].tolist()
        sampler.report({}, model=model, optimizer=optimizer)
        config["after"](epoch, sampler, model, drawn)


def test_online_rows_that_were_not_seen_keep_score_and_age(shards: Shards, tmp_path: Path) -> None:
    states: list[ScoreBlock] = []

    def after(epoch: int, sampler: Sampler, _model: Any, drawn: list[int]) -> None:
        state = state_of(sampler._context.coordinator, sampler.position.version)
        seen = np.isin(np.arange(ROWS), drawn)
        if epoch == 0:  # burn-in: all rows, and the weights never change
            similarity, information = measured_by_hand(new_model())
            assert seen.all()
            np.testing.assert_allclose(state.similarity, similarity, atol=1e-6)
            np.testing.assert_allclose(state.score, bss_ray.balance_scores(similarity, information), atol=5e-6)
        elif sampler.position.version % 3:
            assert 0 < seen.sum() < ROWS
            assert (state.score[~seen] == states[-1].score[~seen]).all()
            assert (state.last_measured[~seen] == states[-1].last_measured[~seen]).all()
            assert set(state.last_measured[seen].tolist()) == {sampler.position.version}
        else:  # the third update is a sweep
            assert set(state.last_measured.tolist()) == {3}
        states.append(state)

    config = {"epochs": 5, "after": after}
    scheduler = bss_ray.Learning(temperature=0.3, fraction=0.5)
    scoring = bss_ray.Scoring(engine="online", sweep_every=3)
    messages = fit(tmp_path, shards, online_loop, scoring, config=config, scheduler=scheduler)
    rows = [message.row for message in messages if isinstance(message, EpochFinished)]
    assert len(states) == len(rows) == 5
    assert [row["unscored_rows"] for row in rows] == [ROWS, 0, 0, 0, 0]
    # Half of the rows are measured for version 2, all for version 3.
    assert [row["oldest_score"] for row in rows] == [0, 0, 1, 0, 1]
    assert rows[2]["score_age"] == pytest.approx(np.mean(2 - states[1].last_measured.astype(int)))


def test_online_without_observations_says_what_is_missing(shards: Shards, tmp_path: Path) -> None:
    config = {"epochs": 2, "after": lambda *_: None, "observe": False}
    with pytest.raises(ConfigError, match=r"Call it in the loop"):
        fit(tmp_path, shards, online_loop, bss_ray.Scoring(engine="online"), config=config)


# ---- overlapped -----------------------------------------------------------------------------------


def test_overlapped_scores_are_one_version_behind(shards: Shards, tmp_path: Path) -> None:
    models: list[TwoHeads] = []
    versions: list[int] = []

    def after(_epoch: int, sampler: Sampler, model: TwoHeads, _drawn: list[int]) -> None:
        copy = new_model()
        copy.load_state_dict(model.state_dict())
        models.append(copy)
        versions.append(sampler.position.version)
        # Version 1 is waited for. Version v + 1 is published after the epoch that follows the model it is of.
        lag = 0 if sampler.position.version == 1 else 1
        if sampler.position.version != (versions[-2] if len(versions) > 1 else 0):
            similarity, _ = measured_by_hand(models[-1 - lag])
            np.testing.assert_allclose(
                state_of(sampler._context.coordinator, versions[-1]).similarity, similarity, atol=1e-6
            )
            newer, _ = measured_by_hand(models[-1])
            assert lag == 0 or np.abs(newer - similarity).max() > 1e-3

    config = {"epochs": 5, "after": after, "lr": 0.1}
    fit(tmp_path, shards, online_loop, bss_ray.Scoring(engine="actors", overlap=True), config=config)
    assert versions == [1, 1, 2, 3, 4]


# ---- initial scores -------------------------------------------------------------------------------


def test_initial_scores_draw_the_first_epoch(shards: Shards, tmp_path: Path) -> None:
    score = np.random.default_rng(0).uniform(-1, 1, ROWS).astype(np.float32)
    order = np.random.default_rng(1).permutation(ROWS)
    pq.write_table(pa.table({"row_id": order, "score": score[order]}), tmp_path / "scores.parquet")
    drawn: list[int] = []

    def after(epoch: int, sampler: Sampler, _model: Any, rows: list[int]) -> None:
        drawn.extend(rows)
        assert sampler.position.version == 2
        assert sampler.plan.version == 1

    scheduler = bss_ray.Learning(temperature=0.3, fraction=0.6)  # its burn-in is left out
    fit(
        tmp_path,
        shards,
        online_loop,
        bss_ray.Scoring(engine="workers"),
        config={"epochs": 1, "after": after},
        scheduler=scheduler,
        initial_scores=ScoresFile(str(tmp_path / "scores.parquet"), shards),
    )
    size = scheduler.epoch_size(1, ROWS)
    expected = bss_ray.weighted_permutation(scheduler.weights(score), seed=7, epoch=0, size=size)
    assert drawn == expected.tolist()


def pretrained_loop(drawn: list[int]) -> None:
    """Another model scores the rows before the first epoch."""
    sampler = bss_ray.get_sampler()
    model = new_model(seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in sampler.epochs(1, model=new_model(seed=5)):
        assert sampler.position.version == 1
        for batch in sampler.batches():
            drawn += batch["row_id"].tolist()
            sampler.observe(batch, model(batch))
        sampler.report({}, model=model, optimizer=optimizer)


@pytest.mark.parametrize("engine", ["actors", "online"])
def test_a_pretrained_model_draws_the_first_epoch(engine: Any, shards: Shards, tmp_path: Path) -> None:
    drawn: list[int] = []
    scheduler = bss_ray.Learning(temperature=0.3, fraction=0.6, burn_in=0)
    scoring = bss_ray.Scoring(engine=engine)
    fit(tmp_path, shards, pretrained_loop, scoring, config=drawn, scheduler=scheduler)
    score = bss_ray.balance_scores(*measured_by_hand(new_model(seed=5)))
    size = scheduler.epoch_size(0, ROWS)
    expected = bss_ray.weighted_permutation(scheduler.weights(score), seed=7, epoch=0, size=size)
    # Rounding of the measures may exchange neighbours, and rows at the edge.
    assert len(set(drawn) ^ set(expected.tolist())) <= 4
    assert np.mean(np.array(drawn) == expected) > 0.9


# ---- bad rows -------------------------------------------------------------------------------------


class Broken(TwoHeads):
    """NaN for two rows, in scoring passes."""

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = super().forward(batch)
        if not self.training:
            bad = (batch["row_id"] == 5) | (batch["row_id"] == 150)
            outputs = {name: torch.where(bad[:, None], torch.nan, logits) for name, logits in outputs.items()}
        return outputs


def broken_loop(config: dict[str, Any]) -> None:
    sampler = bss_ray.get_sampler()
    torch.manual_seed(0)
    model = Broken(0.0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in sampler.epochs(2):
        for batch in sampler.batches():
            sampler.observe(batch, model(batch))
        sampler.report({}, model=model, optimizer=optimizer)
    state = state_of(sampler._context.coordinator, 2)
    assert np.flatnonzero(state.last_measured == 0).tolist() == [5, 150]
    assert state.score[[5, 150]].tolist() == [0, 0]
    assert np.isfinite(state.score).all()


@pytest.mark.parametrize("engine", ["workers", "actors"])
def test_rows_of_nan_keep_their_score(engine: Any, shards: Shards, tmp_path: Path) -> None:
    scoring = bss_ray.Scoring(engine=engine, bad_rows="keep")
    messages = fit(tmp_path, shards, broken_loop, scoring, config={})
    assert any("2 rows (first row ids 5, 150): they keep their score" in text for text in notices(messages))
    with pytest.raises(bss_ray.BssRayError, match="2 rows; first row ids 5, 150"):
        fit(tmp_path / "error", shards, broken_loop, bss_ray.Scoring(engine=engine), config={})
