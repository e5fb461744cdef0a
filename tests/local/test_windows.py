"""Windows of an order: made ahead, the same for all ranks, void with new scores."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from bss_ray import Learning
from bss_ray.sample.client import LocalHolders
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.service import CoordinatorService
from bss_ray.sample.state import LostStateError
from tests.support import SavedParts, cut, local_coordinator, order_of, saved

ROWS = 203
SCHEDULER = Learning(temperature=0.5, update_interval=3)
SCORE = np.random.default_rng(0).uniform(-1, 1, ROWS).astype(np.float32)


@pytest.fixture
def coordinator() -> Iterator[CoordinatorService]:
    """It has score version 1, and nothing is planned."""
    spans = cut(ROWS, 4)
    make = functools.partial(Coordinator, rows=ROWS, scheduler=SCHEDULER, seed=3, batch_size=1, window_rows=40)
    service = CoordinatorService(LocalHolders([Holder(spans[:1]), Holder(spans[1:3]), Holder(spans[3:])]), make)
    service.load(SavedParts(saved(SCORE, 2)), 1)
    yield service
    service.close()


def made(coordinator: CoordinatorService) -> set[tuple[int, int, int]]:
    """(version, epoch, index) of the windows that are made."""
    return {key for key, window in list(coordinator._windows.items()) if window.done()}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing came of it within 30 s"
        time.sleep(0.002)


def test_next_window_is_made_before_it_is_asked_for(coordinator: CoordinatorService) -> None:
    plan = coordinator.plan(1, 1)
    assert len(plan.window_ends) > 4
    until(lambda: made(coordinator) == {(1, 1, 0)})  # by the plan alone
    coordinator.window(1, 0, 1)
    until(lambda: made(coordinator) == {(1, 1, 0), (1, 1, 1)})
    for index in range(1, 4):
        coordinator.window(1, index, 1)
    # Of all that were made at most three are held: left behind, at hand, ahead.
    until(lambda: made(coordinator) == {(1, 1, 2), (1, 1, 3), (1, 1, 4)})


def test_ranks_in_the_middle_of_an_epoch_start_with_their_window(coordinator: CoordinatorService) -> None:
    plan = coordinator.plan(1, 1, 100)
    until(lambda: made(coordinator) == {(1, 1, plan.window_of(100))})


def test_same_order_as_in_one_process_and_one_object_for_all(coordinator: CoordinatorService) -> None:
    expected, plan = order_of(local_coordinator(SCORE, SCHEDULER, window_rows=40), 1)
    windows = [coordinator.window(1, index, 1) for index in range(len(plan.window_ends))]
    assert np.concatenate([window.get("a window") for window in windows]).tolist() == expected.tolist()
    assert coordinator.window(1, len(windows) - 1, 1) is windows[-1]


def test_next_epoch_is_planned_ahead_unless_new_scores_come_first(coordinator: CoordinatorService) -> None:
    def planned() -> list[int]:
        return list(coordinator._coordinator._plans)

    coordinator.window(1, len(coordinator.plan(1, 1).window_ends) - 1, 1)
    until(lambda: planned() == [1, 2])
    # After epoch 3 (the third since burn-in) new scores are due: epoch 4 cannot be planned yet.
    coordinator.window(3, len(coordinator.plan(3, 1).window_ends) - 1, 1)
    coordinator.review(3, 1)  # done after whatever was planned ahead
    assert planned() == [2, 3]


def test_new_scores_void_windows_and_old_versions_are_refused(coordinator: CoordinatorService) -> None:
    before = coordinator.window(1, 0, 1).get("a window").tolist()
    coordinator.load(SavedParts(saved(-SCORE, 5)), 2)
    assert coordinator.window(1, 0, 2).get("a window").tolist() != before
    calls: list[Callable[[], object]] = [
        lambda: coordinator.plan(1, 1),
        lambda: coordinator.review(1, 1),
        lambda: coordinator.window(1, 0, 1),
        lambda: coordinator.states(1),
    ]
    for call in calls:
        with pytest.raises(LostStateError, match="score version 2, not 1"):
            call()
