"""The Ray back end of the seam: actors around `Holder` and `CoordinatorService`, their clients, and how they start.

A thin shell without decisions of its own. It does not import torch: a run may have many holders, and each would take a
second longer to start and 120 MB more.
"""

from __future__ import annotations

import itertools
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

import numpy as np
import ray
from ray.actor import ActorHandle

from bss_ray.runtime.event_log import EventLog, EventLogClient, UnavailableError
from bss_ray.runtime.logs import Named
from bss_ray.runtime.messages import Message
from bss_ray.runtime.ray_internals import near_node
from bss_ray.runtime.run_metrics import RunMetrics
from bss_ray.runtime.wait import DEFAULT_LIMIT_S, WaitError, set_wait_limit, wait_for, wait_limit
from bss_ray.sample.client import EVERY, Holders, ScoringJob, ScoringPool, Shared
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.service import CoordinatorService, CoordinatorStub
from bss_ray.sample.state import MeasureBatch

if TYPE_CHECKING:  # these modules need torch
    from bss_ray.data.shards import Shards

P = ParamSpec("P")
T = TypeVar("T")

# An answer of the event log takes a millisecond. If none comes within this time, the call is repeated.
_ANSWER_S = 30.0

# Seconds for the error of a timed-out wait to reach the callers.
_LAST_WORDS_S = 2.0


@dataclass(frozen=True)
class InStore(Generic[T]):
    """A shared value in Ray's object store."""

    reference: ray.ObjectRef

    @staticmethod
    def put(value: T) -> InStore[T]:
        """The value as one object for all processes, with one copy per node."""
        return InStore(ray.put(value))

    def get(self, what: str) -> T:
        value: T = wait_for(self.reference, what)
        return value


# ---- holders ----------------------------------------------------------------------------------


class HolderActor(Named):
    """A `Holder` of rows of the run."""

    def __init__(self, spans: list[tuple[int, int]], wait_limit_s: float = DEFAULT_LIMIT_S) -> None:
        set_wait_limit(wait_limit_s)
        self._holder = Holder(spans)

    def call(self, method: Callable[Concatenate[Holder, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A method of the holder."""
        return method(self._holder, *args, **kwargs)


class ActorHolders:
    """`Holders` that are actors and work at the same time. It is sent to all processes that deliver measures.

    Args:
        names: Names of the actors, in the order of their rows. Names, since Ray cannot promise to restart an actor
            whose constructor was given references.
        first_rows: Row id of the first row of each holder.
    """

    def __init__(self, names: Sequence[str], first_rows: Sequence[int]) -> None:
        self.names = tuple(names)
        self._first_rows = tuple(first_rows)

    def __reduce__(self) -> tuple[object, ...]:
        return ActorHolders, (self.names, self._first_rows)

    @property
    def prefix(self) -> str:
        """Prefix of the names of all actors of the run."""
        return self.names[0].removesuffix("holder-0")

    @cached_property
    def _actors(self) -> list[ActorHandle]:
        return [ray.get_actor(name) for name in self.names]

    def start(
        self, of: slice, method: Callable[Concatenate[Holder, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Sequence[InStore[T]]:
        called = range(len(self.names))[of]
        return [InStore(self._call(index, method, *args, **kwargs)) for index in called]

    def map(self, method: Callable[Concatenate[Holder, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        called = [result.reference for result in self.start(EVERY, method, *args, **kwargs)]
        results: list[T] = wait_for(called, f"the holders' {method.__name__}")
        return results

    def deliver(self, batch: MeasureBatch, *, epoch: int = 0, attempt: str = "", version: int | None = None) -> None:
        """Send measures to the holders of their rows; returns when the holders have them.

        Raises:
            ray.exceptions.RayActorError: A holder is lost.
        """
        edges = itertools.pairwise([*self._first_rows, np.iinfo(np.int64).max])
        parts = [(index, batch.within(*edge)) for index, edge in enumerate(edges)]
        sent = [
            self._call(index, Holder.receive, part, epoch=epoch, attempt=attempt, version=version)
            for index, part in parts
            if len(part.rows)
        ]
        wait_for(sent, "the holders to take measures")

    def _call(
        self, index: int, method: Callable[Concatenate[Holder, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> ray.ObjectRef:
        call = self._actors[index].call.options(name=f"holder.{method.__name__}")
        return call.remote(method, *args, **kwargs)


def start_holders(
    shards: Shards, *, count: int, cpus: float = 0.0, nodes: Sequence[str] = (), run: str = "run"
) -> tuple[ActorHolders, list[ActorHandle]]:
    """Start holder actors; each gets consecutive shards, so that its rows are consecutive.

    Args:
        shards: All rows.
        count: Number of holders; at most one per shard.
        cpus: Logical CPUs of each.
        nodes: Node that each of them goes to first, see `near`.
        run: Name of the run, for people. All actors of one start are `bss_ray-<run>-<8 hex digits>-<role>`.

    Returns:
        The `Holders`, and the actors' handles, which keep them alive.
    """
    count = min(count, len(shards.parts))
    edges = [len(shards.parts) * index // count for index in range(count + 1)]
    # A holder restarts empty, and the next attempt of the ranks fills it from the checkpoint. A call over a broken
    # connection is sent once more: it has the same effect twice, or finds another version than it needs.
    actor = ray.remote(num_cpus=cpus, max_restarts=-1, max_task_retries=1)(HolderActor)
    spans = [(part.first_row, part.rows) for part in shards.parts]
    start = uuid.uuid4().hex[:8]
    names = [f"bss_ray-{run}-{start}-holder-{index}" for index in range(count)]
    handles = [
        actor.options(name=name, **near(nodes, index)).remote(spans[begin:stop], wait_limit())
        for index, (name, (begin, stop)) in enumerate(zip(names, itertools.pairwise(edges), strict=True))
    ]
    return ActorHolders(names, [spans[edge][0] for edge in edges[:-1]]), handles


def near(nodes: Sequence[str], index: int) -> dict[str, Any]:
    """Ray's options of an actor that starts on its node if the node exists and has room, and otherwise elsewhere."""
    node = nodes[index] if nodes else ""
    if not node:
        return {}
    # A byte, because Ray starts an actor without any resource request on any node, whatever its strategy says.
    return {"scheduling_strategy": near_node(node), "memory": 1}


# ---- the coordinator --------------------------------------------------------------------------


class CoordinatorActor(Named):
    """A `CoordinatorService` and the run's event log.

    The event log has its own thread, so that the driver can read it while scores are being made. If the service has
    waited in vain for another process, its own process ends, see `_exit_if_timed_out`.
    """

    def __init__(
        self,
        holders: Holders,
        make: Callable[[Holders], Coordinator],
        pool: ScoringPool | None,
        *,
        run: str = "run",
        wait_limit_s: float = DEFAULT_LIMIT_S,
    ) -> None:
        set_wait_limit(wait_limit_s)
        self._events = EventLog(RunMetrics(run).take)
        self._service = CoordinatorService(
            holders, make, pool, events=self._events, run=run, share=InStore.put, on_done=_exit_if_timed_out
        )

    def call(self, method: Callable[Concatenate[CoordinatorService, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A method of the service."""
        return method(self._service, *args, **kwargs)

    @ray.method(concurrency_group="events")
    def call_events(self, method: Callable[Concatenate[EventLog, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A method of the event log."""
        return method(self._events, *args, **kwargs)


def _exit_if_timed_out(work: Future[object]) -> None:
    """End this process if it has waited for another process in vain; Ray restarts it, and the ranks fill it.

    The result may exist all the same. After an outage of the network the raylet that has it may wait for a lost
    answer, and until this wait is over, after seven minutes by Ray's defaults, it announces no other result to the
    owner either. So no result is fetched, in any attempt, until another process is the owner.
    """
    if not work.cancelled() and isinstance(work.exception(), WaitError):
        threading.Timer(_LAST_WORDS_S, os._exit, [1]).start()


class RayCoordinator(CoordinatorStub):
    """The `CoordinatorClient` of a coordinator actor."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor
        self.events: EventLogClient = RayEventLog(actor)

    def start_scoring(self, job: Shared[ScoringJob], homes: Sequence[str]) -> None:
        asked = job.get("the job")
        model = InStore.put(asked.model.get("the model"))
        super().start_scoring(InStore.put(replace(asked, model=model)), homes)

    def call(
        self,
        what: str,
        method: Callable[Concatenate[CoordinatorService, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        call = self._actor.call.options(name=f"coordinator.{method.__name__}")
        result: T = wait_for(call.remote(method, *args, **kwargs), what)
        return result


class RayEventLog:
    """The `EventLogClient` of a coordinator actor."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    def post(self, message: Message, *, wait: bool = False) -> None:
        if wait:
            self._ask(wait_limit(), EventLog.post, message)
        else:
            self._actor.call_events.remote(EventLog.post, message)

    def read(self, log: str, start: int) -> tuple[str, list[Message]]:
        return self._ask(_ANSWER_S, EventLog.read, log, start)

    def beat(self) -> None:
        self._ask(_ANSWER_S, EventLog.beat)

    def silence(self) -> float:
        return self._ask(_ANSWER_S, EventLog.silence)

    def request_stop(self) -> None:
        self._ask(_ANSWER_S, EventLog.request_stop)

    def stop_requested(self) -> bool:
        return self._ask(wait_limit(), EventLog.stop_requested)

    def _ask(
        self, timeout_s: float, method: Callable[Concatenate[EventLog, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        call = self._actor.call_events.options(name=f"events.{method.__name__}")
        try:
            answer: T = ray.get(call.remote(method, *args, **kwargs), timeout=timeout_s)
        except ray.exceptions.RayError as error:  # a timeout is an OSError, too
            raise UnavailableError(f"the coordinator does not answer: {error}") from error
        return answer


def start_coordinator(
    holders: ActorHolders, make: Callable[[Holders], Coordinator], pool: ScoringPool | None = None, *, run: str = "run"
) -> tuple[RayCoordinator, ActorHandle]:
    """Start the coordinator actor of the run of these holders.

    Args:
        holders: Holders of all rows.
        make: Makes the `Coordinator` over them.
        pool: Scorers of `engine=actors`.
        run: Name of the run, which metrics are tagged with.

    Returns:
        The coordinator's client, and the actor's handle, which keeps it alive.
    """
    actor = ray.remote(concurrency_groups={"events": 1})(CoordinatorActor)
    handle = actor.options(name=holders.prefix + "coordinator", num_cpus=0, max_restarts=-1).remote(
        holders, make, pool, run=run, wait_limit_s=wait_limit()
    )
    return RayCoordinator(handle), handle
