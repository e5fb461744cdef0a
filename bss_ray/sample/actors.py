"""The Ray actors around `Scorer` and `Coordinator`: thin shells, no decisions."""

from __future__ import annotations

import collections
import itertools
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import ray

from bss_ray.data.shards import Shards
from bss_ray.errors import ConfigError, nearest
from bss_ray.measure.criteria import Measurer
from bss_ray.measure.forward import PRECISIONS, ModelSnapshot, unpack_model
from bss_ray.measure.score import Accumulate, Bounds, check_accumulation
from bss_ray.sample.coordinator import Coordinator, Review
from bss_ray.sample.plan import Plan, Tail
from bss_ray.sample.scorer import WINDOW_ROWS, LostStateError, PartState, Scorer
from bss_ray.schedule.schedulers import Scheduler

# Score version, epoch, index of the window.
_WindowKey = tuple[int, int, int]

Engine = Literal["actors"]
ENGINES = ("actors",)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How and where rows are scored.

    Args:
        engine: `actors`: scorer actors forward their shards between epochs, while the ranks wait.
        num_scorers: holders of scores; for given scores the order of rows does not depend on it.
        momentum: mu in [0, 1) of the score's moving average; 0 is the released code.
        accumulate: `ema`, or `sum` (the mean of all updates).
        batch_size: rows of a scorer's forward pass.
        precision: `fp32`, `bf16` or `fp16` (autocast).
        cpus_per_scorer: logical CPUs of a scorer, which also works with so many threads, at least one. 0, because
            scorers work while the ranks wait; give large data sets more (docs/scale.md).
        gpus_per_scorer: share of a GPU of a scorer; leave the ranks the rest of it.

    Raises:
        ConfigError: a setting is unknown or out of its range.
    """

    engine: Engine = "actors"
    num_scorers: int = 2
    momentum: float = 0.0
    accumulate: Accumulate = "ema"
    batch_size: int = 256
    precision: str = "fp32"
    cpus_per_scorer: float = 0.0
    gpus_per_scorer: float = 0.0

    def __post_init__(self) -> None:
        check_accumulation(self.momentum, self.accumulate)
        if self.engine not in ENGINES:
            raise ConfigError(f"unknown scoring engine {self.engine!r}; {nearest(self.engine, ENGINES)}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"unknown precision {self.precision!r}; {nearest(self.precision, PRECISIONS)}")
        for name in ("num_scorers", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"scoring.{name} must be at least 1; received {getattr(self, name)}")
        for name in ("cpus_per_scorer", "gpus_per_scorer"):
            if getattr(self, name) < 0:
                raise ConfigError(f"scoring.{name} cannot be negative; received {getattr(self, name)}")


@dataclass(frozen=True)
class ScoringJob:
    """What scorers need to measure their rows.

    The shards travel with each job and not to the actors' constructors: Ray cannot promise to restart
    an actor whose constructor was given objects of the store.

    Attributes:
        model: reference to a `ModelSnapshot`; one transfer a node.
        shards: all rows.
    """

    model: Any
    shards: Shards


class SavedScores(Protocol):
    """Saved scores that every node can read, such as a checkpoint."""

    def scores(self, start: int, stop: int) -> list[PartState]:
        """Saved scores that overlap rows [start, stop)."""
        ...


class ScorerActor:
    """A `Scorer` over shards of the object store."""

    def __init__(
        self, indices: Sequence[int], spans: list[tuple[int, int]], label: str, measurer: Measurer, scoring: Scoring
    ) -> None:
        self._indices = indices
        self._spans = spans
        self._scorer = Scorer(
            spans,
            measurer=measurer,
            label=label,
            batch_size=scoring.batch_size,
            device="cuda" if scoring.gpus_per_scorer > 0 else "cpu",
            precision=scoring.precision,
        )

    def measure(self, job: ScoringJob) -> tuple[Bounds, Bounds]:
        """`Scorer.measure` with model and rows from the object store."""
        snapshot: ModelSnapshot = ray.get(job.model)
        inputs = job.shards.columns.inputs

        def read(part: int) -> dict[str, np.ndarray]:
            arrays = job.shards.read(self._indices[part])
            return {name: arrays[name] for name in inputs}

        return self._scorer.measure(unpack_model(snapshot), read)

    def load(self, saved: SavedScores, version: int) -> int:
        """`Scorer.load`, reading only what overlaps the own rows, straight from where it is saved."""
        first, stop = self._spans[0][0], sum(self._spans[-1])
        return self._scorer.load(saved.scores(first, stop), version)

    def call(self, method: str, *args: Any) -> Any:
        """Any other method of the scorer."""
        return getattr(self._scorer, method)(*args)


class ActorHolders:
    """`Holders` that are actors; all of them work at the same time."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors

    def start(self, method: str, *args: Any) -> list[Any]:
        """References to the holders' results."""
        if method in ("measure", "load"):
            return [getattr(actor, method).remote(*args) for actor in self._actors]
        return [actor.call.options(name=f"scorer.{method}").remote(method, *args) for actor in self._actors]

    def map(self, method: str, *args: Any) -> list[Any]:
        return list(ray.get(self.start(method, *args)))


class CoordinatorActor:
    """A `Coordinator` over scorer actors, and the run's message board.

    One thread does all of the coordinator's work, in the order it is asked for, so that the next window
    is made while the ranks consume the one at hand. The board has a thread of its own, so that the
    driver can look while scores are being made.
    """

    def __init__(self, scorers: Sequence[str], settings: dict[str, Any]) -> None:
        self._holders = ActorHolders([ray.get_actor(name) for name in scorers])
        self._coordinator = Coordinator(self._holders, **settings)
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="bss-ray-planner")
        self._windows: collections.OrderedDict[_WindowKey, Future[Any]] = collections.OrderedDict()
        self._messages: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def reset(self) -> None:
        self._forget_windows()
        self._do("reset")

    def load(self, saved: SavedScores, version: int) -> None:
        # A version that is published again after a restart need not have the same scores to the bit.
        self._forget_windows()
        self._do("load", saved, version)

    def score(self, job: ScoringJob) -> int:
        self._forget_windows()
        return int(self._do("score", job))

    def plan(self, epoch: int, version: int, batch: int = 0) -> Plan:
        """The plan of `epoch`, drawn from score version `version`, for ranks that start at global batch `batch`."""
        self._check_version(version)
        plan: Plan = self._do("plan", epoch)
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
        else:
            self._planner.submit(self._coordinator.plan_ahead, epoch)
        return [ref]

    def review(self, epoch: int, version: int) -> Review:
        """`Coordinator.review` of an epoch that was drawn from score version `version`."""
        self._check_version(version)
        return Review(*self._do("review", epoch))

    def parts(self, version: int) -> list[Any]:
        """References to each holder's `list[PartState]` of `version`; the scores do not pass through here."""
        self._check_version(version)
        return self._holders.start("state", version)

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
    def post(self, message: dict[str, Any]) -> None:
        """Put a message on the board."""
        with self._lock:
            self._messages.append(message)

    @ray.method(concurrency_group="board")
    def read(self, start: int) -> list[dict[str, Any]]:
        """Messages on the board from number `start` on."""
        with self._lock:
            return self._messages[start:]


def start_scorers(shards: Shards, measurer: Measurer, scoring: Scoring) -> dict[str, Any]:
    """Start scorer actors, by name; shards are dealt out in runs, so that a scorer's rows lie together."""
    count = min(scoring.num_scorers, len(shards.parts))
    edges = [len(shards.parts) * index // count for index in range(count + 1)]
    actor = ray.remote(
        num_cpus=scoring.cpus_per_scorer,
        num_gpus=scoring.gpus_per_scorer,
        max_restarts=-1,  # it comes back empty, and the next attempt of the ranks fills it from the checkpoint
    )(ScorerActor)
    spans = [(part.first_row, part.rows) for part in shards.parts]
    run = uuid.uuid4().hex[:8]
    return {
        name: actor.options(name=name).remote(
            range(start, stop), spans[start:stop], shards.columns.label, measurer, scoring
        )
        for index, (start, stop) in enumerate(itertools.pairwise(edges))
        for name in [f"bss_ray-{run}-scorer-{index}"]
    }


def start_coordinator(
    scorers: Sequence[str],
    *,
    rows: int,
    scheduler: Scheduler,
    scoring: Scoring,
    seed: int,
    batch_size: int,
    tail: Tail,
    window_rows: int = WINDOW_ROWS,
) -> Any:
    """Start the coordinator actor, over scorers of these names (it finds them again after a restart)."""
    settings = {
        "rows": rows,
        "scheduler": scheduler,
        "seed": seed,
        "batch_size": batch_size,
        "tail": tail,
        "window_rows": window_rows,
        "momentum": scoring.momentum,
        "accumulate": scoring.accumulate,
    }
    actor = ray.remote(concurrency_groups={"board": 1})(CoordinatorActor)
    name = scorers[0].replace("scorer-0", "coordinator")
    return actor.options(name=name, num_cpus=0, max_restarts=-1).remote(scorers, settings)
