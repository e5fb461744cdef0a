"""The Ray actor around `Coordinator`: who does its work when, and nothing of what is decided."""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import ray

from bss_ray.errors import BssRayError
from bss_ray.runtime.event_log import EventLog
from bss_ray.runtime.logs import RunLogger
from bss_ray.runtime.run_metrics import RunMetrics
from bss_ray.runtime.wait import DEFAULT_LIMIT_S, WaitError, set_wait_limit
from bss_ray.sample.coordinator import Coordinator, Publication, Review
from bss_ray.sample.holder_actors import Named, SavedScores, StartedHolders
from bss_ray.sample.plan import Plan
from bss_ray.sample.state import LostStateError
from bss_ray.scoring.actor import ScoringJob
from bss_ray.scoring.pool import ScorerPool, ScoringFailedError

# In which the error of a wait in vain reaches those who asked.
_LAST_WORDS_S = 2.0

# Score version, epoch, index of the window.
_WindowKey = tuple[int, int, int]


class _Measured(NamedTuple):
    """All shards, by the scorers."""

    sound: int
    notices: tuple[str, ...]
    seconds: float


class CoordinatorActor(Named):
    """A `Coordinator` over holder actors, the scorers' pool, and the run's message board.

    One thread does all of the coordinator's work, in the order it is asked for, so that the next window
    is made while the ranks consume the one at hand. Another leads the scorers, whether the ranks wait for them
    or not. The board has a thread of its own, so that the driver can look while scores are being made.

    Where it has waited in vain for another process its own one ends, see `_leave_if_in_vain`.
    """

    def __init__(
        self,
        holders: StartedHolders,
        pool: ScorerPool | None,
        settings: dict[str, Any],
        *,
        run: str = "run",
        wait_limit_s: float = DEFAULT_LIMIT_S,
    ) -> None:
        set_wait_limit(wait_limit_s)
        self._holders = holders
        self._pool = pool
        self._coordinator = Coordinator(self._holders, **settings)
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="bss-ray-planner")
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="bss-ray-scoring")
        self._running: Future[_Measured] | None = None
        self._windows: collections.OrderedDict[_WindowKey, Future[Any]] = collections.OrderedDict()
        self._board = EventLog(RunMetrics(run).take)
        self._log = RunLogger(role="coordinator", run=run)

    def reset(self) -> str:
        """`Coordinator.reset`; returns the new attempt."""
        return self._begin("reset")

    def load(self, saved: SavedScores, version: int) -> str:
        """`Coordinator.load`; returns the new attempt."""
        return self._begin("load", saved, version)

    def _begin(self, method: str, *args: Any) -> str:
        # A version that is published again after a restart need not have the same scores to the bit.
        self._forget_windows()
        self._running = None  # what an earlier attempt has begun: its deliveries are refused
        self._do(method, *args)
        attempt = self._coordinator.attempt
        self._log.at(version=self._coordinator.version).info("%s: attempt %s of the ranks", method, attempt)
        return attempt

    def start_scoring(self, job: ScoringJob) -> None:
        """Have all rows measured, beside whatever else is done; `finish_scoring` publishes."""
        self._running = self._scoring.submit(self._measure_all, job)
        self._running.add_done_callback(_leave_if_in_vain)

    def _measure_all(self, job: ScoringJob) -> _Measured:
        assert self._pool is not None, "only engine=actors has scorers"
        started = time.perf_counter()
        try:
            sound, notices = self._pool.run(job, [part.node for part in job.shards.parts])
            return _Measured(sound, tuple(notices), time.perf_counter() - started)
        except ScoringFailedError:
            self._do("forget")  # some rows may have been measured, and a version is whole or not there
            raise

    def finish_scoring(self, version: int) -> Publication:
        """Publish what `start_scoring` has begun, or what a checkpoint has brought of it, as `version`."""
        if self._running is None:
            return self.publish(version, None)
        running, self._running = self._running, None
        try:
            measured = running.result()
        except ScoringFailedError as error:
            return Publication(self._coordinator.version, failure=str(error))
        return self.publish(version, measured.sound)._replace(notices=measured.notices, seconds=measured.seconds)

    def publish(self, version: int, expected: int | None) -> Publication:
        """`Coordinator.publish`."""
        self._forget_windows()
        publication: Publication = self._submit(self._coordinator.publish, version, expected=expected).result()
        outcome = publication.failure or f"{publication.measured} rows measured"
        self._log.at(version=publication.version).info("publish %d: %s", version, outcome)
        return publication

    def plan(self, epoch: int, version: int, batch: int = 0) -> Plan:
        """The plan of `epoch`, drawn from score version `version`, for ranks that start at global batch `batch`."""
        self._check_version(version)
        plan: Plan = self._do("plan", epoch)
        self._log.at(epoch=epoch, version=version).info("planned %d rows, asked for from batch %d", plan.rows, batch)
        if batch < plan.batches:
            self._window((version, epoch, plan.window_of(plan.span(batch)[0])))
        return plan

    def window(self, epoch: int, index: int, version: int) -> Any:
        """Reference to a window: one object for all ranks, one copy a node."""
        self._check_version(version)
        ref = self._window((version, epoch, index)).result()
        plan: Plan = self._do("plan", epoch)
        if index + 1 < len(plan.window_ends):
            self._window((version, epoch, index + 1))
        elif self._running is None:  # else there will be other scores
            self._submit(self._coordinator.plan_ahead, epoch)
        return [ref]

    def review(self, epoch: int, version: int) -> Review:
        """`Coordinator.review` of an epoch that was drawn from score version `version`."""
        self._check_version(version)
        return Review(*self._do("review", epoch))

    def parts(self, version: int, rank: int = 0, ranks: int = 1) -> list[Any]:
        """References to the `list[PartState]` of `version` of holders `rank`, `rank + ranks`, ...: those a rank writes.

        The scores do not pass through here. Measures that are being made are part of the state: it waits for them.
        """
        self._check_version(version)
        if self._running is not None:
            with contextlib.suppress(ScoringFailedError, BssRayError):  # `finish_scoring` says so
                self._running.result()
        return self._holders.start("state", version, of=slice(rank, None, ranks))

    def _do(self, method: str, *args: Any) -> Any:
        return self._submit(getattr(self._coordinator, method), *args).result()

    def _submit(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Have the planner's thread do it, after whatever it was asked for before."""
        done = self._planner.submit(work, *args, **kwargs)
        done.add_done_callback(_leave_if_in_vain)
        return done

    def _window(self, key: _WindowKey) -> Future[Any]:
        """A window that is made, or will be as soon as what was asked for before it is done."""
        if key not in self._windows:
            self._windows[key] = self._submit(self._put_window, *key[1:])
            # A rank may still want the one that another has just left; and one is made ahead.
            while len(self._windows) > 3:
                self._windows.popitem(last=False)
        return self._windows[key]

    def _put_window(self, epoch: int, index: int) -> Any:
        return ray.put(self._coordinator.window(epoch, index))

    def _forget_windows(self) -> None:
        for window in self._windows.values():
            window.cancel()
        self._windows.clear()

    def _check_version(self, version: int) -> None:
        if self._coordinator.version != version:
            raise LostStateError(
                f"the coordinator stands at score version {self._coordinator.version}, not {version}: it was restarted"
            )

    @ray.method(concurrency_group="board")
    def board(self, method: str, *args: Any) -> Any:
        """A method of the run's `EventLog`."""
        return getattr(self._board, method)(*args)


def _leave_if_in_vain(work: Future[Any]) -> None:
    """End this process where it has waited for another one in vain; Ray starts it again, and the ranks fill it.

    What does not come may be there all the same. After an outage of the network the raylet that has a result may wait
    for an answer that is lost, and until that wait is over, seven minutes by Ray's defaults, it tells the owner of no
    other result either; so none of them is fetched, in whatever attempt. Another process is another owner.

    A coordinator in the process that trains (`local.py`) waits for no other, so this never ends that one.
    """
    if not work.cancelled() and isinstance(work.exception(), WaitError):
        threading.Timer(_LAST_WORDS_S, os._exit, [1]).start()
