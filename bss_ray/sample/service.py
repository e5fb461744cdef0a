"""The coordinator's threads and event log: when each part of its work is done, and in which thread."""

from __future__ import annotations

import abc
import collections
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np

from bss_ray.errors import BssRayError
from bss_ray.runtime.event_log import EventLog
from bss_ray.runtime.logs import RunLogger
from bss_ray.sample.client import (
    Here,
    Holders,
    Publication,
    Review,
    ScoringFailedError,
    ScoringJob,
    ScoringPool,
    Shared,
)
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.plan import Plan
from bss_ray.sample.state import LostStateError, SavedScores, ScoreBlock

P = ParamSpec("P")
T = TypeVar("T")

# Score version, epoch, index of the window.
_WindowKey = tuple[int, int, int]


class _Measured(NamedTuple):
    """Result of a scoring pass over all shards."""

    sound: int
    notices: tuple[str, ...]
    seconds: float


class CoordinatorService:
    """A `Coordinator` over holders, with the scorers' pool and the run's event log; it is a `CoordinatorClient` itself.

    One thread does all of the coordinator's work in the order of the requests, so that the next window is made while
    the ranks consume the current window. Another thread leads the scorers, whether the ranks wait for them or not.

    Args:
        holders: Hold the scores of all rows.
        make: Makes the coordinator over them.
        pool: Scorers of `engine=actors`; None where there are none.
        events: The run's event log.
        run: Name of the run, for the log.
        share: Puts a window where all ranks get it: one copy per node.
        on_done: Called with each piece of work of the threads when it has ended.
    """

    def __init__(
        self,
        holders: Holders,
        make: Callable[[Holders], Coordinator],
        pool: ScoringPool | None = None,
        *,
        events: EventLog | None = None,
        run: str = "run",
        share: Callable[[np.ndarray], Shared[np.ndarray]] = Here,
        on_done: Callable[[Future[Any]], object] | None = None,
    ) -> None:
        self._holders, self._pool, self._share, self._on_done = holders, pool, share, on_done
        self.events = events or EventLog()
        self._coordinator = make(holders)
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="bss-ray-planner")
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="bss-ray-scoring")
        self._running: Future[_Measured] | None = None
        self._windows: collections.OrderedDict[_WindowKey, Future[Shared[np.ndarray]]] = collections.OrderedDict()
        self._log = RunLogger(role="coordinator", run=run)

    def reset(self) -> str:
        """`Coordinator.reset`; returns the new attempt."""
        return self._begin("reset", self._coordinator.reset)

    def load(self, saved: SavedScores, version: int) -> str:
        """`Coordinator.load`; returns the new attempt."""
        return self._begin("load", self._coordinator.load, saved, version)

    def _begin(self, what: str, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> str:
        # A version that is published again after a restart need not have bit-identical scores.
        self._forget_windows()
        self._running = None  # started by an earlier attempt, whose deliveries are refused
        self._do(work, *args, **kwargs)
        attempt = self._coordinator.attempt
        self._log.at(version=self._coordinator.version).info("%s: attempt %s of the ranks", what, attempt)
        return attempt

    def start_scoring(self, job: Shared[ScoringJob], homes: Sequence[str]) -> None:
        """Start to measure all rows in another thread; `finish_scoring` publishes. See `ScoringPool.run`."""
        self._running = self._watched(self._scoring.submit(self._measure_all, job, homes))

    def _measure_all(self, job: Shared[ScoringJob], homes: Sequence[str]) -> _Measured:
        assert self._pool is not None, "only engine=actors has scorers"
        started = time.perf_counter()
        try:
            sound, notices = self._pool.run(job, homes)
            return _Measured(sound, tuple(notices), time.perf_counter() - started)
        except ScoringFailedError:
            self._do(self._coordinator.forget)  # some rows may have been measured, but a version needs all rows
            raise

    def finish_scoring(self, version: int) -> Publication:
        """Publish the measures that `start_scoring` has requested, or that a checkpoint has brought, as `version`."""
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
        publication = self._do(self._coordinator.publish, version, expected=expected)
        outcome = publication.failure or f"{publication.measured} rows measured"
        self._log.at(version=publication.version).info("publish %d: %s", version, outcome)
        return publication

    def plan(self, epoch: int, version: int, batch: int = 0) -> Plan:
        """The plan of `epoch`, drawn from score version `version`, for ranks that start at global batch `batch`."""
        self._check_version(version)
        plan = self._do(self._coordinator.plan, epoch)
        self._log.at(epoch=epoch, version=version).info("planned %d rows, asked for from batch %d", plan.rows, batch)
        if batch < plan.batches:
            self._window((version, epoch, plan.window_of(plan.span(batch)[0])))
        return plan

    def window(self, epoch: int, index: int, version: int) -> Shared[np.ndarray]:
        """A window, (rows,) int64 row ids: one object for all ranks, with one copy per node."""
        self._check_version(version)
        window = self._window((version, epoch, index)).result()
        plan = self._do(self._coordinator.plan, epoch)
        if index + 1 < len(plan.window_ends):
            self._window((version, epoch, index + 1))
        elif self._running is None:  # otherwise other scores will come
            self._submit(self._coordinator.plan_ahead, epoch)
        return window

    def review(self, epoch: int, version: int) -> Review:
        """`Coordinator.review` of an epoch that was drawn from score version `version`."""
        self._check_version(version)
        return self._do(self._coordinator.review, epoch)

    def states(self, version: int, rank: int = 0, ranks: int = 1) -> Sequence[Shared[list[ScoreBlock]]]:
        """State of score version `version` of holders `rank`, `rank + ranks`, ..., which a rank writes.

        The scores do not pass through this process. Measures in progress are part of the state, so it waits for them.
        """
        self._check_version(version)
        if self._running is not None:
            with contextlib.suppress(ScoringFailedError, BssRayError):  # `finish_scoring` says so
                self._running.result()
        return self._holders.start(slice(rank, None, ranks), Holder.state, version, self._coordinator.attempt)

    def close(self) -> None:
        """End the threads after their current work; for a service whose process continues."""
        for threads in (self._planner, self._scoring):
            threads.shutdown(wait=True, cancel_futures=True)

    def _do(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._submit(work, *args, **kwargs).result()

    def _submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Let the planner's thread do the work after all earlier requests."""
        return self._watched(self._planner.submit(work, *args, **kwargs))

    def _watched(self, work: Future[T]) -> Future[T]:
        if self._on_done is not None:
            work.add_done_callback(self._on_done)
        return work

    def _window(self, key: _WindowKey) -> Future[Shared[np.ndarray]]:
        """A window that is made, or will be made after all earlier requests."""
        if key not in self._windows:
            self._windows[key] = self._submit(self._make_window, *key[1:])
            # A rank may still need the window that another has just left, and one window is made ahead.
            while len(self._windows) > 3:
                self._windows.popitem(last=False)
        return self._windows[key]

    def _make_window(self, epoch: int, index: int) -> Shared[np.ndarray]:
        return self._share(self._coordinator.window(epoch, index))

    def _forget_windows(self) -> None:
        for window in self._windows.values():
            window.cancel()
        self._windows.clear()

    def _check_version(self, version: int) -> None:
        if self._coordinator.version != version:
            raise LostStateError(
                f"the coordinator stands at score version {self._coordinator.version}, not {version}: it was restarted"
            )


class CoordinatorStub(abc.ABC):
    """A `CoordinatorClient` of a service elsewhere: each method calls that of the service by `call`."""

    @abc.abstractmethod
    def call(
        self,
        what: str,
        method: Callable[Concatenate[CoordinatorService, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call a method of the service.

        Args:
            what: What is waited for, for the error of a wait that takes too long.
            method: The method.
            *args: Its arguments.
            **kwargs: Its named arguments.
        """

    def reset(self) -> str:
        return self.call("the holders to be reset", CoordinatorService.reset)

    def load(self, saved: SavedScores, version: int) -> str:
        what = "the holders to stand where the checkpoint stands"
        return self.call(what, CoordinatorService.load, saved, version)

    def start_scoring(self, job: Shared[ScoringJob], homes: Sequence[str]) -> None:
        self.call("the coordinator to start scoring", CoordinatorService.start_scoring, job, homes)

    def finish_scoring(self, version: int) -> Publication:
        what = f"the scorers to measure all rows for score version {version}"
        return self.call(what, CoordinatorService.finish_scoring, version)

    def publish(self, version: int, expected: int | None) -> Publication:
        what = f"the holders to publish score version {version}"
        return self.call(what, CoordinatorService.publish, version, expected)

    def plan(self, epoch: int, version: int, batch: int = 0) -> Plan:
        return self.call(f"the plan of epoch {epoch}", CoordinatorService.plan, epoch, version, batch)

    def window(self, epoch: int, index: int, version: int) -> Shared[np.ndarray]:
        return self.call(f"window {index} of epoch {epoch}", CoordinatorService.window, epoch, index, version)

    def review(self, epoch: int, version: int) -> Review:
        return self.call(f"the review of epoch {epoch}", CoordinatorService.review, epoch, version)

    def states(self, version: int, rank: int = 0, ranks: int = 1) -> Sequence[Shared[list[ScoreBlock]]]:
        what = f"the holders' scores of version {version}"
        return self.call(what, CoordinatorService.states, version, rank, ranks)
