"""Windows of an order in real actors: made ahead, shared by all ranks, void with new scores."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import ray
from bss_ray.sample.start import start_coordinator, start_holders

from bss_ray import Learning, Scoring
from bss_ray.data.shards import Shards
from bss_ray.runtime.wait import DEFAULT_LIMIT_S, WaitError, set_wait_limit
from bss_ray.sample.state import LostStateError, ScoreBlock
from tests.runs import ROWS, make_shards
from tests.support import local_coordinator, order_of, saved

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

SCHEDULER = Learning(temperature=0.5, update_interval=3)
SCORE = np.random.default_rng(0).uniform(-1, 1, ROWS).astype(np.float32)


@dataclass
class Saved:
    """Scores that every actor can read."""

    parts: list[ScoreBlock]

    def scores(self, start: int, stop: int) -> list[ScoreBlock]:
        return [part for part in self.parts if part.first_row < stop and part.stop_row > start]


@pytest.fixture(scope="module")
def shards(ray_session: None) -> Shards:
    return make_shards(4)


@pytest.fixture(scope="module")
def actors(shards: Shards) -> Iterator[Any]:
    scoring = Scoring(num_holders=3)
    holders, handles = start_holders(shards, scoring)
    settings = {"rows": shards.rows, "scheduler": SCHEDULER, "scoring": scoring, "seed": 3, "batch_size": 1}
    actor = start_coordinator(holders, **settings, tail="keep", window_rows=40)
    yield actor
    for each in (actor, *handles):
        ray.kill(each)


@pytest.fixture
def coordinator(actors: Any) -> Any:
    """It has score version 1, and nothing is planned."""
    ray.get(actors.load.remote(Saved(saved(SCORE, 2)), 1))
    return actors


def made(coordinator: Any) -> set[tuple[int, int, int]]:
    """(version, epoch, index) of the windows that are made."""
    return set(
        ray.get(coordinator.__ray_call__.remote(lambda self: [key for key, w in self._windows.items() if w.done()]))
    )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing came of it within 30 s"
        time.sleep(0.02)


def test_next_window_is_made_before_it_is_asked_for(coordinator: Any) -> None:
    plan = ray.get(coordinator.plan.remote(1, 1))
    assert len(plan.window_ends) > 4
    until(lambda: made(coordinator) == {(1, 1, 0)})  # by the plan alone
    ray.get(coordinator.window.remote(1, 0, 1))
    until(lambda: made(coordinator) == {(1, 1, 0), (1, 1, 1)})
    for index in range(1, 4):
        ray.get(coordinator.window.remote(1, index, 1))
    # Of all that were made at most three are held: left behind, at hand, ahead.
    until(lambda: made(coordinator) == {(1, 1, 2), (1, 1, 3), (1, 1, 4)})


def test_ranks_in_the_middle_of_an_epoch_start_with_their_window(coordinator: Any) -> None:
    plan = ray.get(coordinator.plan.remote(1, 1, 100))
    until(lambda: made(coordinator) == {(1, 1, plan.window_of(100))})


def test_same_order_as_in_one_process_and_one_object_for_all(coordinator: Any) -> None:
    expected, plan = order_of(local_coordinator(SCORE, SCHEDULER, window_rows=40), 1)
    first = [ray.get(coordinator.window.remote(1, index, 1))[0] for index in range(len(plan.window_ends))]
    assert np.concatenate(ray.get(first)).tolist() == expected.tolist()
    again = ray.get(coordinator.window.remote(1, len(first) - 1, 1))[0]
    assert again == first[-1]  # not a second copy
    assert not ray.get(again).flags.writeable  # a view into the object store


def test_next_epoch_is_planned_ahead_unless_new_scores_come_first(coordinator: Any) -> None:
    def planned() -> list[int]:
        return list(ray.get(coordinator.__ray_call__.remote(lambda self: list(self._coordinator._plans))))

    last = len(ray.get(coordinator.plan.remote(1, 1)).window_ends) - 1
    ray.get(coordinator.window.remote(1, last, 1))
    until(lambda: planned() == [1, 2])
    # After epoch 3 (the third since burn-in) new scores are due: epoch 4 cannot be planned yet.
    last = len(ray.get(coordinator.plan.remote(3, 1)).window_ends) - 1
    ray.get(coordinator.window.remote(3, last, 1))
    ray.get(coordinator.review.remote(3, 1))  # done after whatever was planned ahead
    assert planned() == [2, 3]


def test_new_scores_void_windows_and_old_versions_are_refused(coordinator: Any) -> None:
    before = ray.get(ray.get(coordinator.window.remote(1, 0, 1))[0]).tolist()
    ray.get(coordinator.load.remote(Saved(saved(-SCORE, 5)), 2))
    assert ray.get(ray.get(coordinator.window.remote(1, 0, 2))[0]).tolist() != before
    for call in (coordinator.plan, coordinator.review):
        with pytest.raises(LostStateError, match="stands at score version 2, not 1"):
            ray.get(call.remote(1, 1))
    with pytest.raises(LostStateError):
        ray.get(coordinator.window.remote(1, 0, 1))


def test_a_coordinator_that_has_waited_in_vain_starts_again(shards: Shards) -> None:
    holders, handles = start_holders(shards, Scoring(num_holders=2))
    settings = {"rows": shards.rows, "scheduler": SCHEDULER, "scoring": Scoring(), "seed": 3, "batch_size": 1}
    ray.get([handle.call.remote("forget") for handle in handles])  # they are there
    set_wait_limit(10)
    coordinator = start_coordinator(holders, **settings, tail="keep")
    set_wait_limit(DEFAULT_LIMIT_S)
    process = [ray.get(actor.__ray_call__.remote(lambda _self: os.getpid())) for actor in (coordinator, handles[1])]
    ray.get(coordinator.load.remote(Saved(saved(SCORE, 2)), 1))
    os.kill(process[1], signal.SIGSTOP)
    with pytest.raises(WaitError, match="waited 10 s for the holders' moments"):
        ray.get(coordinator.plan.remote(1, 1))
    os.kill(process[1], signal.SIGCONT)

    def started_again() -> bool:
        try:
            return bool(ray.get(coordinator.__ray_call__.remote(lambda _self: os.getpid())) != process[0])
        except ray.exceptions.RayActorError:
            return False

    until(started_again)
    ray.get(coordinator.load.remote(Saved(saved(SCORE, 2)), 1))
    assert ray.get(coordinator.plan.remote(1, 1)).rows > 0
    for each in (coordinator, *handles):
        ray.kill(each)
