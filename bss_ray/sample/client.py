"""The typed interface of a run's holders and coordinator for ranks, scorers and the driver, with two back ends.

    in the process   `LocalHolders` and `CoordinatorService`: plain calls
    Ray              `ActorHolders` and `RayCoordinator` (`sample/actors.py`): the same calls to objects in actors

Methods are passed themselves and not as strings (`holders.map(Holder.moments, draw)`), so mypy follows a score from
the measurer to the permutation. This module imports neither Ray nor torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Concatenate, Generic, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np

from bss_ray.runtime.event_log import EventLogClient
from bss_ray.sample.holder import Holder
from bss_ray.sample.plan import Plan
from bss_ray.sample.state import Ages, MeasureBatch, SavedScores, ScoreBlock

if TYPE_CHECKING:  # these modules need torch, which holders and the coordinator do without
    from bss_ray.data.shards import Shards
    from bss_ray.measure.snapshot import ModelSnapshot

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

EVERY = slice(None)


class Shared(Protocol[T_co]):
    """A value that stays in this process or in Ray's object store until it is fetched."""

    def get(self, what: str) -> T_co:
        """The value.

        Args:
            what: Names it in the error of a wait that takes too long.
        """
        ...


@dataclass(frozen=True)
class Here(Generic[T]):
    """A shared value of this process."""

    value: T

    def get(self, _what: str) -> T:
        return self.value


class Review(NamedTuple):
    """The report on an epoch that was presented.

    Attributes:
        neglected_rows: Number of rows that were drawn neither in the epoch nor in the `NEGLECT_EPOCHS` - 1 before it.
        ages: Ages of the scores that the epoch was drawn from.
        warnings: What the user should know, in plain words, by the kind of trouble.
    """

    neglected_rows: int
    ages: Ages
    warnings: dict[str, str]


class Publication(NamedTuple):
    """The result of publishing measures.

    Attributes:
        version: Score version in force now.
        measured: Number of rows that were measured for it.
        refused: Number of publications and deliveries that were refused so far, because they were stale or came twice.
        failure: Why there is no new version; empty if there is one.
        notices: Sentences that the user should read.
        seconds: Duration of the scoring pass; 0 where there was none.
    """

    version: int
    measured: int = 0
    refused: int = 0
    failure: str = ""
    notices: tuple[str, ...] = ()
    seconds: float = 0.0


class Holders(Protocol):
    """All holders of scores, called together. Results come in the holders' order."""

    def start(
        self, of: slice, method: Callable[Concatenate[Holder, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Sequence[Shared[T]]:
        """Call a method of some holders without fetching the results."""
        ...

    def map(self, method: Callable[Concatenate[Holder, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """Results of a method of every holder."""
        ...

    def deliver(self, batch: MeasureBatch, *, epoch: int = 0, attempt: str = "", version: int | None = None) -> None:
        """Send measures to the holders of their rows (see `Holder.receive`); returns when the holders have them."""
        ...


class LocalHolders:
    """Holders in this process.

    A coordinator plans ahead in its own thread while ranks deliver measures, so calls take turns.
    """

    def __init__(self, holders: Sequence[Holder]) -> None:
        self._holders = holders
        self._turn = threading.RLock()

    def __reduce__(self) -> tuple[type[LocalHolders], tuple[Sequence[Holder]]]:
        return LocalHolders, (self._holders,)

    def start(
        self, of: slice, method: Callable[Concatenate[Holder, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Sequence[Shared[T]]:
        return [Here(self.call(index, method, *args, **kwargs)) for index in range(len(self._holders))[of]]

    def map(self, method: Callable[Concatenate[Holder, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        return [self.call(index, method, *args, **kwargs) for index in range(len(self._holders))]

    def call(self, index: int, method: Callable[Concatenate[Holder, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of one holder."""
        with self._turn:
            return method(self._holders[index], *args, **kwargs)

    def deliver(self, batch: MeasureBatch, *, epoch: int = 0, attempt: str = "", version: int | None = None) -> None:
        self.map(Holder.receive, batch, epoch=epoch, attempt=attempt, version=version)


class ActorLostError(RuntimeError):
    """The process of a holder, a scorer or the coordinator is lost; it may be restarting."""


class ScoringFailedError(RuntimeError):
    """Rows could not be scored because scorers were lost and did not come back.

    This is neither an error of the user nor of the run, which can continue with the scores that it has.
    """


@dataclass(frozen=True)
class ScoringJob:
    """What scorers need to measure all rows with one model.

    The shards are sent with each job and not to the actors' constructors, because Ray cannot promise to restart an
    actor whose constructor was given objects of the object store.

    Attributes:
        model: The model to score with; one transfer per node.
        shards: All rows.
        epoch: Epoch after which the model is measured.
        version: Version that the scores are to become.
        attempt: Attempt of the ranks, see `Coordinator.attempt`.
        profiled: Index of the shard whose measuring is profiled; -1 for none.
    """

    model: Shared[ModelSnapshot]
    shards: Shards
    epoch: int
    version: int
    attempt: str
    profiled: int = -1


class ScoringPool(Protocol):
    """Scorers that measure all rows of a job and deliver the measures to the holders."""

    def run(self, job: Shared[ScoringJob], homes: Sequence[str]) -> tuple[int, list[str]]:
        """Have all shards measured.

        Args:
            job: The job, which nobody but the scorers needs to get.
            homes: Id of the node of each shard; empty where all nodes read the shard alike.

        Returns:
            Number of rows with finite measures, and messages to the user.

        Raises:
            ScoringFailedError: Scorers were lost and did not come back.
        """
        ...


class CoordinatorClient(Protocol):
    """The coordinator of a run for ranks and the driver; `CoordinatorService` describes the methods."""

    @property
    def events(self) -> EventLogClient: ...

    def reset(self) -> str: ...

    def load(self, saved: SavedScores, version: int) -> str: ...

    def start_scoring(self, job: Shared[ScoringJob], homes: Sequence[str]) -> None: ...

    def finish_scoring(self, version: int) -> Publication: ...

    def publish(self, version: int, expected: int | None) -> Publication: ...

    def plan(self, epoch: int, version: int, batch: int = 0) -> Plan: ...

    def window(self, epoch: int, index: int, version: int) -> Shared[np.ndarray]: ...

    def review(self, epoch: int, version: int) -> Review: ...

    def states(self, version: int, rank: int = 0, ranks: int = 1) -> Sequence[Shared[list[ScoreBlock]]]: ...
