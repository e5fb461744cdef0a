"""The Ray actors around `Holder`, `Scorer` and `Coordinator`: thin shells, no decisions."""

from __future__ import annotations

import collections
import contextlib
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray

from bss_ray.data.shards import Shards
from bss_ray.errors import BssRayError
from bss_ray.logs import RunLogger
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.snapshot import ModelSnapshot
from bss_ray.sample.board import Board
from bss_ray.sample.coordinator import Coordinator, Holders, Publication, Review
from bss_ray.sample.gauges import Gauges
from bss_ray.sample.holder import Holder
from bss_ray.sample.memory import keep_freed_memory
from bss_ray.sample.plan import Plan
from bss_ray.sample.pool import ScorerPool, ScoringFailedError, ShardReport
from bss_ray.sample.profiling import SCORING, recorded
from bss_ray.sample.scorer import Scorer
from bss_ray.sample.scoring import BadRows, Scoring
from bss_ray.sample.state import Delivery, LostStateError, PartState
from bss_ray.wait import DEFAULT_LIMIT_S, set_wait_limit, wait_for

# Score version, epoch, index of the window.
_WindowKey = tuple[int, int, int]


EVERY = slice(None)


@dataclass(frozen=True)
class ScoringJob:
    """What scorers need to measure all rows with one model.

    The shards travel with each job and not to the actors' constructors: Ray cannot promise to restart
    an actor whose constructor was given objects of the store.

    Attributes:
        model: reference to a `ModelSnapshot`; one transfer a node.
        shards: all rows.
        epoch: after which the model is measured.
        version: that the scores are to become.
        attempt: of the ranks, see `Coordinator.attempt`.
        bad_rows: what is done with rows whose outputs are not finite.
        profiled: shard whose measuring is profiled; -1: none.
    """

    model: Any
    shards: Shards
    epoch: int
    version: int
    attempt: str
    bad_rows: BadRows = "error"
    profiled: int = -1


class SavedScores(Protocol):
    """Saved scores that every node can read, such as a checkpoint."""

    def scores(self, start: int, stop: int) -> list[PartState]:
        """Saved scores that overlap rows [start, stop)."""
        ...


class _Named:
    """An actor that Ray's logs and `ray list actors` show by its name."""

    def __repr__(self) -> str:
        return ray.get_runtime_context().get_actor_name() or type(self).__name__


class HolderActor(_Named):
    """A `Holder` of rows of the run."""

    def __init__(self, spans: list[tuple[int, int]], wait_limit_s: float = DEFAULT_LIMIT_S) -> None:
        set_wait_limit(wait_limit_s)
        self._spans = spans
        self._holder = Holder(spans)

    def load(self, saved: SavedScores, version: int, attempt: str) -> int:
        """`Holder.load`, reading only what overlaps the own rows, straight from where it is saved."""
        first, stop = self._spans[0][0], sum(self._spans[-1])
        return self._holder.load(saved.scores(first, stop), version, attempt)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Any other method of the holder."""
        return getattr(self._holder, method)(*args, **kwargs)


class StartedHolders(Holders, Protocol):
    """Holders that can also leave their results where they are."""

    def start(self, method: str, *args: Any, of: slice = EVERY) -> list[Any]:
        """References to the results of all holders, or of some."""
        ...

    def deliver(self, delivery: Delivery, *, epoch: int, version: int, attempt: str) -> None:
        """Bring measures to those who hold their rows; returns when they have them."""
        ...


class ActorHolders:
    """`Holders` that are actors; all of them work at the same time. It travels to whoever delivers measures.

    Args:
        names: of the actors, in the order of their rows. Names, since Ray cannot promise to restart an actor
            whose constructor was given references.
        first_rows: row id of the first row of each.
    """

    def __init__(self, names: Sequence[str], first_rows: Sequence[int]) -> None:
        self.names = tuple(names)
        self._first_rows = tuple(first_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorHolders, (self.names, self._first_rows)

    @property
    def prefix(self) -> str:
        """Of the names of all actors of the run."""
        return self.names[0].removesuffix("holder-0")

    @cached_property
    def _actors(self) -> list[Any]:
        return [ray.get_actor(name) for name in self.names]

    def start(self, method: str, *args: Any, of: slice = EVERY) -> list[Any]:
        """References to the results of all holders, or of some."""
        if method == "load":
            return [actor.load.remote(*args) for actor in self._actors[of]]
        return [actor.call.options(name=f"holder.{method}").remote(method, *args) for actor in self._actors[of]]

    def map(self, method: str, *args: Any) -> list[Any]:
        return list(wait_for(self.start(method, *args), f"the holders' {method}"))

    def deliver(self, delivery: Delivery, *, epoch: int, version: int, attempt: str) -> None:
        """Bring measures to those who hold their rows; returns when they have them.

        Raises:
            ray.exceptions.RayActorError: a holder is lost.
        """
        edges = itertools.pairwise([*self._first_rows, np.iinfo(np.int64).max])
        parts = [delivery.within(*edge) for edge in edges]
        call = {"epoch": epoch, "version": version, "attempt": attempt}
        sent = [
            actor.call.options(name="holder.receive").remote("receive", part, **call)
            for actor, part in zip(self._actors, parts, strict=True)
            if len(part.rows)
        ]
        wait_for(sent, "the holders to take measures")


class ScorerActor(_Named):
    """A `Scorer` that measures shards and delivers what it found to the holders."""

    def __init__(
        self, label: str, measurer: Measurer, scoring: Scoring, holders: ActorHolders, wait_limit_s: float
    ) -> None:
        set_wait_limit(wait_limit_s)
        keep_freed_memory()
        self._log = RunLogger(role="scorer")
        device = "cuda" if scoring.gpus_per_scorer > 0 else "cpu"
        self._scorer = Scorer(measurer, label, forward=scoring.forward, device=device)
        self._holders = holders
        self._ref: Any = None
        self._job: ScoringJob | None = None

    def node(self) -> str:
        """Id of the node it runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def measure(self, job_ref: list[Any], shard: int) -> ShardReport:
        """Measure one shard of a job, with model and rows from the store.

        Args:
            job_ref: reference to the `ScoringJob`, in a list so that it arrives as such: a job is taken once, and not
                with all its references once for each shard.
            shard: index of the shard.
        """
        job = self._take(job_ref[0])
        arrays, shards = job.shards.read(shard), job.shards
        columns = {name: arrays[name] for name in shards.features}
        with recorded(SCORING, self._post) if shard == job.profiled else contextlib.nullcontext():
            found = self._scorer.measure(columns, shards.parts[shard].first_row)
        delivery = Delivery.of(found.rows, found.similarity, found.information).sound()
        self._holders.deliver(delivery, epoch=job.epoch, version=job.version, attempt=job.attempt)
        self._log.at(epoch=job.epoch, version=job.version).info("measured shard %d: %d rows", shard, len(found.rows))
        return ShardReport(len(found.rows), found.problems, found.notices)

    def _post(self, message: dict[str, Any]) -> None:
        """Put a message on the run's board."""
        ray.get_actor(self._holders.prefix + "coordinator").board.remote("post", message)

    def _take(self, ref: Any) -> ScoringJob:
        if self._job is None or ref != self._ref:
            job: ScoringJob = wait_for(ref, "a scoring job")
            snapshot: ModelSnapshot = wait_for(job.model, "the model to score with")
            self._scorer.load(snapshot)
            self._ref, self._job = ref, job
        return self._job


class _Measured(NamedTuple):
    """All shards, by the scorers."""

    sound: int
    notices: tuple[str, ...]
    seconds: float


class CoordinatorActor(_Named):
    """A `Coordinator` over holder actors, the scorers' pool, and the run's message board.

    One thread does all of the coordinator's work, in the order it is asked for, so that the next window
    is made while the ranks consume the one at hand. Another leads the scorers, whether the ranks wait for them
    or not. The board has a thread of its own, so that the driver can look while scores are being made.
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
        self._board = Board(Gauges(run).take)
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
        publication: Publication = self._planner.submit(self._coordinator.publish, version, expected=expected).result()
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
            self._planner.submit(self._coordinator.plan_ahead, epoch)
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
        return self._planner.submit(getattr(self._coordinator, method), *args).result()

    def _window(self, key: _WindowKey) -> Future[Any]:
        """A window that is made, or will be as soon as what was asked for before it is done."""
        if key not in self._windows:
            self._windows[key] = self._planner.submit(self._put_window, *key[1:])
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
        """A method of the run's `Board`."""
        return getattr(self._board, method)(*args)
