"""The cluster itself: what users rely on when they run their own loops in it."""

from __future__ import annotations

import random
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import bss_ray
from bss_ray.errors import ConfigError, ModelOutputError
from bss_ray.runtime.messages import Message, Notice
from bss_ray.testing import KillRank, LocalCluster, RankLostError
from bss_ray.testing.thread_ranks import Meeting, ThreadRanks
from bss_ray.train.supervise import StopPoll
from tests.local.runs import BATCH, At, assert_same, here, local_run, make_shards
from tests.runs import TwoHeads


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 30
    while left := [thread for thread in set(threading.enumerate()) - before if thread.is_alive()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def loop(epochs: int = 1) -> None:
    sampler = bss_ray.get_sampler()
    model = sampler.prepare(TwoHeads(0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler.restore(model=model, optimizer=optimizer)
    for _ in sampler.epochs(epochs):
        for batch in sampler.batches():
            sampler.observe(batch, model(batch))
        sampler.report({}, model=model, optimizer=optimizer)


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
    section = text[text.index("## A cluster in the process") :]
    code = section.split("```python\n")[1].split("```")[0]
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(90, 6)).astype(np.float32) for name in ("audio", "image")}

    class MyModel(TwoHeads):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(0.1)

        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            logits = {name: self.heads[own](batch[name]) for name, own in (("audio", "a"), ("image", "b"))}
            return {**logits, "fused": logits["audio"] + logits["image"]}

    own = {"arrays": {**arrays, "label": np.arange(90) % 3}, "MyModel": MyModel, "tmp_path": tmp_path}
    exec(code, {"bss_ray": bss_ray, "torch": torch, **own})
    assert len(list((tmp_path / "killed").glob("checkpoint_*"))) == 3


# ---- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"ranks": 0}, {"ranks": []}, {"ranks": [2, 0]}, {"max_failures": -1}])
def test_settings_out_of_range(settings: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ranks must be >= 1 and max_failures >= 0"):
        LocalCluster(make_shards(), tmp_path, **settings)  # type: ignore[arg-type]


def test_actors_that_are_not_there(tmp_path: Path) -> None:
    cluster = LocalCluster(make_shards(), tmp_path, batch_size=BATCH)
    with pytest.raises(ValueError, match=r"no such actor can be lost: coordinator; there are \[\]"):
        cluster.kill("coordinator")

    def kills() -> None:
        for role in ("holder-9", "scorer-0", "trainer"):
            with pytest.raises(ValueError, match=f"{role}; there are .*coordinator.*holder-0"):
                here().kill(role)
        with pytest.raises(ValueError, match="holder-0"):
            here().kill("holder-0", back=False)
        loop()

    assert cluster.run(kills).attempts == 1


# ---- resumes, stops, preemption ---------------------------------------------------------------


def test_another_cluster_in_the_same_folder_resumes(tmp_path: Path) -> None:
    whole = local_run(tmp_path / "whole", audit={"epochs": 3})
    for epochs in (1, 2, 3):
        ended = local_run(tmp_path / "parts", audit={"epochs": epochs})
    assert ended.outcome.resumed
    assert_same(ended.outcome, whole.outcome)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"audit", "run"}
    assert all(path.name.startswith("checkpoint_") for path in (tmp_path / "parts" / "run").iterdir())


def test_other_numbers_of_ranks(tmp_path: Path) -> None:
    """Each attempt has its own; global batches are those of one rank."""
    one = local_run(tmp_path / "one", audit={"dropout": 0.0})
    faults = At(KillRank(), 0, 4, done=[])
    several = local_run(tmp_path / "several", ranks=(3, 2), failures=1, audit={"fault": faults, "dropout": 0.0})
    assert several.attempts == 2
    worlds = {path.stem.rpartition("-")[2] for path in (tmp_path / "several" / "audit").glob("*-of-*")}
    assert worlds == {"3", "2"}
    trained: dict[tuple[int, int], set[int]] = {}
    for path in (tmp_path / "several" / "audit").glob("*-of-*"):
        epoch, number = map(int, path.stem.split("-")[:2])
        trained.setdefault((epoch, number), set()).update(np.load(path).tolist())
    assert {at: sorted(rows - {-1}) for at, rows in trained.items()} == one.outcome.batches


def test_a_stop_from_another_thread_and_before_the_run(tmp_path: Path) -> None:
    cluster = LocalCluster(make_shards(), tmp_path, batch_size=BATCH)
    cluster.stop()
    result = cluster.run(loop, 5)
    assert (result.stopped, result.reports) == (True, [])
    timer = threading.Timer(0.3, cluster.stop)
    timer.start()
    assert cluster.run(loop, 100_000).stopped
    timer.join()


def test_preemption_saves_and_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(StopPoll.__init__.__kwdefaults__, "every_s", 0.0)  # the question before every batch
    undisturbed = local_run(tmp_path / "undisturbed", ranks=2, audit={"checkpoint_every": None})
    notices: list[str] = []

    class Taken:
        """Notice after batch 1, loss after batch 4."""

        def reached(self, epoch: int, batch: int, *, rank: int, ranks: int) -> None:
            if not bss_ray.get_sampler().resumed and epoch == 0 and rank == 0:
                if batch == 1:
                    here().preempt()
                if batch == 4:
                    KillRank()()

    ended = local_run(
        tmp_path / "taken",
        ranks=2,
        failures=0,
        audit={"fault": Taken(), "checkpoint_every": None},
        on_message=lambda message: notices.append(message.text if isinstance(message, Notice) else ""),
    )
    assert ended.attempts == 2
    assert any("taken away" in text and "epoch 0, batch 2" in text for text in notices)
    assert_same(ended.outcome, undisturbed.outcome)


def test_ctrl_c_stops_with_a_checkpoint(tmp_path: Path) -> None:
    cluster = LocalCluster(make_shards(), tmp_path, batch_size=BATCH)
    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    result = cluster.run(loop, 100_000)
    timer.join()
    assert result.stopped
    assert result.checkpoint is not None


# ---- errors -----------------------------------------------------------------------------------


def fails_for(rank: int, error: BaseException, log: list[int]) -> object:
    def failing() -> None:
        sampler = bss_ray.get_sampler()
        log.append(sampler.rank)
        for _ in sampler.epochs(1):
            for _ in sampler.batches():
                if sampler.rank == rank:
                    raise error
                sampler._ranks.barrier()

    return failing


def test_an_error_of_the_user_is_raised_at_once(tmp_path: Path) -> None:
    begun: list[int] = []
    error = ModelOutputError("the model is wrong")
    with pytest.raises(ModelOutputError, match="the model is wrong") as caught:
        LocalCluster(make_shards(), tmp_path, ranks=3, max_failures=9).run(fails_for(1, error, begun))  # type: ignore[arg-type]
    assert caught.value is error
    assert "in failing" in "".join(traceback.format_tb(error.__traceback__)), "the user's own line"
    assert sorted(begun) == [0, 1, 2]


def test_other_errors_are_retried(tmp_path: Path) -> None:
    begun: list[int] = []
    with pytest.raises(ZeroDivisionError, match="of rank 1"):
        LocalCluster(make_shards(), tmp_path, ranks=2, max_failures=3).run(
            fails_for(1, ZeroDivisionError("of rank 1"), begun)  # type: ignore[arg-type]
        )
    assert sorted(begun) == [0] * 4 + [1] * 4


def test_a_killed_rank_is_said(tmp_path: Path) -> None:
    with pytest.raises(RankLostError, match="rank 0 was killed"):
        LocalCluster(make_shards(), tmp_path).run(KillRank())


def test_an_error_of_the_listener_ends_the_run(tmp_path: Path) -> None:
    def listen(message: Message) -> None:
        raise ZeroDivisionError("of the listener")

    with pytest.raises(ZeroDivisionError, match="of the listener"):
        LocalCluster(make_shards(), tmp_path, batch_size=BATCH, on_message=listen).run(loop, 100_000)


def test_a_stuck_rank_is_given_up(tmp_path: Path) -> None:
    released = threading.Event()

    def stuck() -> None:
        sampler = bss_ray.get_sampler()
        if sampler.rank == 1:
            released.wait(60)
        sampler._ranks.barrier()

    threading.Timer(1.5, released.set).start()
    with pytest.raises(RankLostError, match=r"waited 0.5 s for the other ranks|rank . is lost"):
        LocalCluster(make_shards(), tmp_path, ranks=2, timeout_s=0.5).run(stuck)


# ---- ranks as threads -------------------------------------------------------------------------


def test_random_numbers_are_each_ranks_own() -> None:
    def drawn(choose: object) -> list[list[float]]:
        meeting = Meeting(3, choose=choose)  # type: ignore[arg-type]
        found: list[list[float]] = [[], [], []]

        def work(rank: int) -> None:
            with meeting.turn(rank):
                torch.manual_seed(rank)
                random.seed(rank)
                for _ in range(20):
                    ThreadRanks(rank, meeting).gather(rank)
                    found[rank] += [random.random(), float(torch.rand(()))]

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found

    first = drawn(min)
    assert all(drawn(random.Random(seed).choice) == first for seed in range(3))
    torch.manual_seed(1)
    assert first[1][1::2] == [float(torch.rand(())) for _ in range(20)]


# ---- schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["workers", "online", "overlapped"])
def test_any_schedule_of_ranks_and_slow_actors_change_nothing(engine: str, tmp_path: Path) -> None:
    """Ranks go on in a random order at each meeting and before each call, and calls of actors take random times."""
    undisturbed = local_run(tmp_path / "undisturbed", ranks=3, engine=engine)
    for seed in range(5):
        delays = random.Random(seed)
        ended = local_run(
            tmp_path / str(seed),
            ranks=3,
            engine=engine,
            schedule=seed,
            on_call=lambda *_, delays=delays: time.sleep(delays.random() * 0.002),
            window_rows=50,
        )
        assert ended.attempts == 1
        assert_same(ended.outcome, undisturbed.outcome)
