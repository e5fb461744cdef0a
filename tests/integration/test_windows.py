"""The coordinator as an actor: a window is one object for all ranks, and a wait in vain ends its process.

Everything else about windows is tested without Ray, in `tests/local/test_windows.py`.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle

from bss_ray import Learning
from bss_ray.runtime.wait import DEFAULT_LIMIT_S, WaitError, set_wait_limit
from bss_ray.sample.actors import ActorHolders, InStore, RayCoordinator, start_coordinator, start_holders
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.state import LostStateError
from tests.runs import ROWS, make_shards
from tests.support import SavedParts, local_coordinator, order_of, saved

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

SCHEDULER = Learning(temperature=0.5)
SCORE = np.random.default_rng(0).uniform(-1, 1, ROWS).astype(np.float32)
SAVED = SavedParts(saved(SCORE, 2))


@dataclass
class Actors:
    """Two holders and a coordinator."""

    holders: ActorHolders
    coordinator: RayCoordinator
    handles: list[ActorHandle]

    def processes(self) -> list[int]:
        """Process ids: the coordinator's, and the holders'."""
        ids: list[int] = ray.get([handle.__ray_call__.remote(lambda _self: os.getpid()) for handle in self.handles])
        return ids


@pytest.fixture
def actors() -> Iterator[Actors]:
    """The coordinator gives up after 10 s, and stands at score version 1."""
    holders, handles = start_holders(make_shards(4), count=2)
    holders.map(Holder.forget)  # they are there
    make = functools.partial(Coordinator, rows=ROWS, scheduler=SCHEDULER, seed=3, batch_size=1, window_rows=40)
    set_wait_limit(10)
    coordinator, handle = start_coordinator(holders, make)
    set_wait_limit(DEFAULT_LIMIT_S)
    coordinator.load(SAVED, 1)
    yield Actors(holders, coordinator, [handle, *handles])
    for each in (handle, *handles):
        ray.kill(each)


def test_one_object_for_all_ranks_and_a_new_process_after_a_wait_in_vain(actors: Actors) -> None:
    coordinator = actors.coordinator
    expected, plan = order_of(local_coordinator(SCORE, SCHEDULER, window_rows=40), 1)
    coordinator.plan(1, 1)
    windows = [coordinator.window(1, index, 1) for index in range(len(plan.window_ends))]
    assert np.concatenate([window.get("a window") for window in windows]).tolist() == expected.tolist()
    assert isinstance(windows[-1], InStore)
    assert coordinator.window(1, len(windows) - 1, 1) == windows[-1]  # not a second copy
    assert not windows[-1].get("a window").flags.writeable  # a view into the object store
    with pytest.raises(LostStateError, match="stands at score version 1, not 2"):
        coordinator.plan(1, 2)

    own, _, other = actors.processes()
    os.kill(other, signal.SIGSTOP)
    with pytest.raises(WaitError, match="waited 10 s for the holders' moments"):
        coordinator.plan(5, 1)
    os.kill(other, signal.SIGCONT)

    def started_again() -> bool:
        try:
            return actors.processes()[0] != own
        except ray.exceptions.RayActorError:
            return False

    until(started_again)
    coordinator.load(SAVED, 1)
    assert coordinator.plan(5, 1).rows > 0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing came of it within 30 s"
        time.sleep(0.02)
