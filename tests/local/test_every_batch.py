"""A kill or a stop at every batch of a run: it ends as the undisturbed run does, to the bit.

The undisturbed run itself is compared with Ray in `tests/integration/test_engines.py`. What only real processes can
show is in `tests/fault`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bss_ray.testing import KillActor, KillController, KillRank
from bss_ray.train.supervise import StopPoll
from tests.local.runs import BATCH, ENGINES, At, Ended, assert_same, here, local_run
from tests.runs import ROWS

DRAWN = round(0.9 * ROWS)
# Every batch of epoch 0 and 1: (epoch, batch).
BATCHES = [(0, batch) for batch in range(-(-ROWS // BATCH))] + [(1, batch) for batch in range(-(-DRAWN // BATCH))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Ended]:
    @functools.cache
    def run(engine: str, ranks: int) -> Ended:
        ended = local_run(tmp_path_factory.mktemp("undisturbed"), engine=engine, ranks=ranks)
        assert ended.attempts == 1
        ended.outcome.check_rows(ROWS, DRAWN, batch_size=BATCH)
        return ended

    return run


def quietly(role: str) -> None:
    """An actor that nobody notices to be gone: it answers, and is empty."""
    here().kill(role, noticed=False)


KILLS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "rank": (KillRank(), tuple(ENGINES)),
    "controller": (KillController(), ("overlapped",)),
    "coordinator": (KillActor("coordinator"), tuple(ENGINES)),
    "coordinator, unnoticed": (functools.partial(quietly, "coordinator"), ("online", "overlapped")),
    "holder": (KillActor("holder-0"), tuple(ENGINES)),
    "holder, unnoticed": (functools.partial(quietly, "holder-1"), ("online", "overlapped")),
    "scorer": (KillActor("scorer-0"), ("actors", "overlapped")),
    "scorer, unnoticed": (functools.partial(quietly, "scorer-1"), ("actors", "overlapped")),
}
CASES = [(name, engine) for name, (_, engines) in KILLS.items() for engine in engines]


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_a_kill_at_every_batch(name: str, engine: str, undisturbed: Any, tmp_path: Path) -> None:
    """With one rank at each batch; with two ranks, whose runs take longer, at every fifth, each of them in turn."""
    action = KILLS[name][0]
    for index, (epoch, batch) in enumerate(BATCHES):
        for ranks in (1, 2) if index % 5 == len(name) % 5 else (1,):
            fault = At(action, epoch, batch, rank=-(index % 2), done=[])
            folder = tmp_path / f"{epoch}-{batch}-{ranks}"
            ended = local_run(folder, engine=engine, ranks=ranks, failures=2, audit={"fault": fault})
            assert fault.happened()
            if name in ("rank", "controller"):
                assert ended.attempts == 2
            assert_same(ended.outcome, undisturbed(engine, ranks).outcome)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_at_every_batch(engine: str, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(StopPoll.__init__.__kwdefaults__, "every_s", 0.0)  # the question before every batch
    for epoch, batch in BATCHES:
        folder = tmp_path / f"{epoch}-{batch}"
        stop = At(lambda: here().stop(), epoch, batch, done=[])
        first = local_run(folder, engine=engine, audit={"fault": stop, "checkpoint_every": None})
        assert first.stopped
        assert max(first.outcome.batches) == (epoch, batch), "nothing is trained after it"
        if (epoch, batch) == BATCHES[-1]:  # the run had ended anyway
            assert_same(first.outcome, undisturbed(engine, 1).outcome)
            continue
        second = local_run(folder, engine=engine, audit={"checkpoint_every": None})
        assert not second.stopped
        assert second.outcome.resumed
        assert_same(second.outcome, undisturbed(engine, 1).outcome)
