"""A cluster in this process: a run of any train loop with ranks as threads, in which everything can be killed.

    cluster = LocalCluster(shards, ranks=3, scheduler=Learning(temperature=0.3), seed=7, folder=tmp_path)
    result = cluster.run(train_loop)

It runs the real sampler, engines, loader, coordinator and holders, and replaces only Ray: ranks are threads, actors are
objects that can be killed and come back empty, and ranks start again from the last complete checkpoint, as often as
`max_failures` allows. It needs torch, NumPy and PyArrow, and starts in milliseconds, so a test can afford a kill at
every batch of a run. Faults of `bss_ray.testing` (`KillRank`, `KillActor`) work in it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyarrow.fs
import torch
from torch import Tensor, nn

from bss_ray.data.shards import Shards
from bss_ray.measure.measurer import Measurer
from bss_ray.runtime.event_log import EventLog, EventLogClient, UnavailableError
from bss_ray.runtime.messages import Message, OnMessage, PlacementMap
from bss_ray.runtime.ranks import OneRank, RankGroup
from bss_ray.runtime.wait import wait_limit
from bss_ray.sample.client import (
    ActorLostError,
    CoordinatorClient,
    Here,
    Holders,
    ScoringJob,
    Shared,
)
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import WINDOW_ROWS, Holder
from bss_ray.sample.plan import Tail
from bss_ray.sample.service import CoordinatorService, CoordinatorStub
from bss_ray.sample.state import MeasureBatch, SavedScores, ScoreBlock
from bss_ray.schedule.schedulers import Learning, Scheduler
from bss_ray.scoring.config import Scoring
from bss_ray.scoring.pool import Answer, ScorerPool, ShardReport, measure_shard
from bss_ray.scoring.scorer import Scorer
from bss_ray.train.backend import SamplerContext
from bss_ray.train.sampler import run_rank
from bss_ray.train.supervise import EventReader, watch

P = ParamSpec("P")
T = TypeVar("T")

# Cluster to which the calling thread belongs, and its rank.
_of_thread = threading.local()


class RankLostError(RuntimeError):
    """A rank of the run is lost, so others cannot meet it. It stands for the errors of torch.distributed."""


class RankKilledError(BaseException):
    """Ends a rank that is a thread, as kill -9 ends a process."""


def current_cluster() -> LocalCluster | None:
    """The cluster that the calling thread is a rank of."""
    cluster: LocalCluster | None = getattr(_of_thread, "cluster", None)
    return cluster


# ---- ranks ------------------------------------------------------------------------------------


class Meeting:
    """A meeting point of ranks that are threads.

    One rank works at a time (`turn`), and another when it waits: between two meetings torch's global random numbers
    then belong to one rank, as in processes.

    Args:
        count: Number of ranks.
        timeout_s: Seconds after which a rank that waits for others takes them for lost.
    """

    def __init__(self, count: int, timeout_s: float = 60.0) -> None:
        self.count = count
        self._timeout_s = timeout_s
        self._barrier = threading.Barrier(count)
        self._said: dict[int, bytes] = {}
        self._turn = threading.Lock()
        self._has_turn = threading.local()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Work as a rank; the others wait."""
        with self._turn:
            self._has_turn.value = True
            try:
                yield
            finally:
                self._has_turn.value = False

    def exchange(self, rank: int, own: T) -> list[T]:
        """The objects of all ranks, on every rank, as copies like between processes.

        Raises:
            RankLostError: a rank is lost.
        """
        self._said[rank] = pickle.dumps(own)
        self.wait()
        everyones = [pickle.loads(self._said[other]) for other in range(self.count)]
        self.wait()
        return everyones

    def wait(self) -> None:
        """Wait for all ranks.

        Raises:
            RankLostError: a rank is lost.
        """
        turn = getattr(self._has_turn, "value", False)
        if turn:
            self._turn.release()
        try:
            self._barrier.wait(self._timeout_s)
        except threading.BrokenBarrierError:
            raise RankLostError("another rank is lost") from None
        finally:
            if turn:
                self._turn.acquire()

    def leave(self) -> None:
        """Mark a rank as lost, so that no other rank waits for it."""
        self._barrier.abort()


class ThreadRanks(RankGroup):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, meeting.count)
        self._meeting = meeting

    def gather(self, own: T) -> list[T]:
        return self._meeting.exchange(self.rank, own)

    def add(self, values: Tensor) -> None:
        parts = self._meeting.exchange(self.rank, values.detach().cpu())
        values.copy_(torch.stack(parts).sum(dim=0))

    def broadcast(self, values: Tensor) -> None:
        values.copy_(self._meeting.exchange(self.rank, values.detach().cpu())[0])

    def barrier(self) -> None:
        self._meeting.wait()

    def average_gradients(self, model: nn.Module) -> nn.Module:
        """Start with rank 0's weights, and average each gradient over the ranks once it is computed, as DDP does."""

        def average(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.add(parameter.grad)
            parameter.grad.div_(self.count)

        with torch.no_grad():
            for tensor in itertools.chain(model.parameters(), model.buffers()):
                self.broadcast(tensor)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
        return model


# ---- actors -----------------------------------------------------------------------------------


class _Holders:
    """The holders of a cluster for its ranks and scorers, and for one of its coordinators."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self.fenced = False  # a killed coordinator makes no calls any more

    def start(
        self, of: slice, method: Callable[Concatenate[Holder, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Sequence[Shared[T]]:
        called = range(len(self._cluster.spans))[of]
        return [Here(self._cluster.call_holder(index, self, method, *args, **kwargs)) for index in called]

    def map(self, method: Callable[Concatenate[Holder, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        called = range(len(self._cluster.spans))
        return [self._cluster.call_holder(index, self, method, *args, **kwargs) for index in called]

    def deliver(self, batch: MeasureBatch, *, epoch: int = 0, attempt: str = "", version: int | None = None) -> None:
        self.map(Holder.receive, batch, epoch=epoch, attempt=attempt, version=version)


class _Coordinator(CoordinatorStub):
    """The current coordinator of a cluster."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self.events: EventLogClient = _Events(cluster)

    def call(
        self,
        what: str,
        method: Callable[Concatenate[CoordinatorService, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        self._cluster.check_there("coordinator")
        return method(self._cluster.service, *args, **kwargs)


class _Events:
    """The event log of a cluster's current coordinator."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster

    def _log(self) -> EventLog:
        if "coordinator" in self._cluster.missed:
            raise UnavailableError("the coordinator is lost")
        return self._cluster.service.events

    def post(self, message: Message, *, wait: bool = False) -> None:
        self._log().post(message)

    def read(self, log: str, start: int) -> tuple[str, list[Message]]:
        return self._log().read(log, start)

    def beat(self) -> None:
        self._log().beat()

    def silence(self) -> float:
        return self._log().silence()

    def request_stop(self) -> None:
        self._log().request_stop()

    def stop_requested(self) -> bool:
        return self._log().stop_requested()


class _Scorers:
    """The scorers of a cluster, each in its own thread."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._threads = ThreadPoolExecutor(cluster.scoring.num_scorers, thread_name_prefix="bss-ray-scorer")
        self._made: dict[str, tuple[Scorer, Shared[ScoringJob] | None]] = {}

    def node(self, name: str) -> Answer[str] | None:
        return self._threads.submit(lambda: self._cluster.nodes[0])

    def measure(self, name: str, job: Shared[ScoringJob], shard: int) -> Answer[ShardReport]:
        return self._threads.submit(self._measure, name, job, shard)

    def _measure(self, name: str, shared: Shared[ScoringJob], shard: int) -> ShardReport:
        cluster = self._cluster
        cluster.on_shard(name, shard)
        cluster.check_there(name)
        job = shared.get("the job")
        scorer, loaded = self._made.get(name, (None, None))
        if scorer is None:
            scorer = Scorer(cluster.measurer, job.shards.columns.label, forward=cluster.scoring, device=cluster.device)
        if loaded is not shared:
            scorer.load(job.model.get("the model"))
            self._made[name] = scorer, shared
        return measure_shard(scorer, job, shard, cluster.holders, cluster.coordinator.events.post)

    def wait(self, answers: Sequence[Answer[object]], timeout_s: float) -> Sequence[Answer[Any]]:
        futures = [answer for answer in answers if isinstance(answer, Future)]
        return list(wait(futures, timeout_s, return_when=FIRST_COMPLETED).done)

    def forget(self, name: str) -> None:
        """A scorer comes back without its model."""
        self._made.pop(name, None)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)


# ---- the backend ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalFolder:
    """A checkpoint in a folder of this machine; a `StoredFolder`.

    Attributes:
        path: The folder.
        filesystem: The local one.
    """

    path: str
    filesystem: pyarrow.fs.FileSystem = field(default_factory=pyarrow.fs.LocalFileSystem)


class _Backend:
    """The backend of one rank of a cluster, in place of Ray Train."""

    def __init__(self, cluster: LocalCluster, ranks: RankGroup) -> None:
        self._cluster, self._ranks = cluster, ranks

    def ranks(self) -> RankGroup:
        return self._ranks

    def device(self) -> torch.device:
        return self._cluster.device

    def node(self) -> str:
        return self._cluster.nodes[self._ranks.rank % len(self._cluster.nodes)]

    def prepare(self, model: nn.Module) -> nn.Module:
        model = model.to(self._cluster.device)
        return self._ranks.average_gradients(model) if isinstance(self._ranks, ThreadRanks) else model

    def checkpoint(self) -> LocalFolder | None:
        folders = self._cluster.checkpoints()
        return LocalFolder(str(folders[-1])) if folders else None

    def report(self, row: Mapping[str, Any], folder: Path | None) -> None:
        """Report; a checkpoint is complete when all ranks have delivered their files, as in Ray Train."""
        incoming = self._cluster.folder / "incoming"
        if folder is not None:
            shutil.copytree(folder, incoming, dirs_exist_ok=True)
        self._ranks.barrier()
        if self._ranks.rank == 0:
            if incoming.exists():
                incoming.rename(self._cluster.next_checkpoint())
            self._cluster.reports.append(dict(row))
        self._ranks.barrier()

    def scored_first(self, scores: Callable[[], list[ScoreBlock]]) -> None:
        """Does nothing: the first checkpoint has the scores."""

    def preempted(self) -> bool:
        return self._ranks.from_first(self._cluster.preempting.is_set())

    def process_map(self, prefix: str, rank_nodes: Sequence[str]) -> PlacementMap | None:
        return None


# ---- the cluster ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalResult:
    """The end of a run in a `LocalCluster`.

    Attributes:
        metrics: Metrics of the last report.
        reports: Metrics of all reports of this call, also of those in the middle of an epoch.
        checkpoint: The last checkpoint; None where none was saved.
        attempts: Number of times that the ranks were started.
        stopped: Whether the run was told to stop.
    """

    metrics: Mapping[str, Any]
    reports: Sequence[Mapping[str, Any]]
    checkpoint: LocalFolder | None
    attempts: int
    stopped: bool


class LocalCluster:
    """A run in this process in which everything can be killed; see the module.

    Args:
        train: Training rows, in any store that this process reads without Ray.
        folder: Folder for checkpoints. A run resumes from the last that is there.
        ranks: Number of ranks; a sequence gives it for each attempt, and its last for all later ones.
        validation: Validation rows; optional.
        scheduler: From scores to sampling weights; default `Learning()`.
        measurer: How balance is measured; default `Measurer()`.
        scoring: How rows are scored; `auto` is `workers`. Scorers of `actors` are threads.
        batch_size: Rows of a global batch, over all ranks.
        tail: `keep` or `drop` the last, smaller batch of an epoch.
        seed: Seed of the order of rows.
        max_failures: Number of times that the ranks may start again after an error.
        initial_scores: Scores that the first epoch is drawn from; the scheduler's burn-in must be 0 then.
        nodes: Ids of the nodes that the ranks are on, in turn.
        device: Device of all ranks.
        window_rows: Rows of a window of the order.
        on_message: Called with each message of the run.
        timeout_s: Seconds after which a rank that waits for others takes them for lost.

    Attributes:
        on_shard: Called with a scorer's name and a shard before the scorer measures it; a test may kill it there.
    """

    def __init__(
        self,
        train: Shards,
        folder: Path,
        *,
        ranks: int | Sequence[int] = 1,
        validation: Shards | None = None,
        scheduler: Scheduler | None = None,
        measurer: Measurer | None = None,
        scoring: Scoring | None = None,
        batch_size: int = 64,
        tail: Tail = "keep",
        seed: int = 0,
        max_failures: int = 0,
        initial_scores: SavedScores | None = None,
        nodes: Sequence[str] = ("node",),
        device: torch.device | str = "cpu",
        window_rows: int = WINDOW_ROWS,
        on_message: OnMessage = lambda _: None,
        timeout_s: float = 60.0,
    ) -> None:
        scoring = scoring or Scoring()
        if scoring.engine == "auto":
            scoring = replace(scoring, engine="workers")
        self._train, self._validation, self.folder = train, validation, folder
        self._ranks = [ranks] if isinstance(ranks, int) else list(ranks)
        self._scheduler, self.scoring = scheduler or Learning(), scoring
        self.measurer = (measurer or Measurer()).for_task(train.columns.task)
        self._seed, self._max_failures, self._initial_scores = seed, max_failures, initial_scores
        self.nodes, self.device, self._timeout_s = tuple(nodes), torch.device(device), timeout_s
        self._on_message = on_message
        self._make = functools.partial(
            Coordinator,
            rows=train.rows,
            scheduler=self._scheduler,
            seed=seed,
            batch_size=batch_size,
            tail=tail,
            accumulation=scoring,
            window_rows=window_rows,
        )
        count = min(scoring.num_holders, len(train.parts))
        spans = [(part.first_row, part.rows) for part in train.parts]
        edges = [len(spans) * index // count for index in range(count + 1)]
        self.spans = [spans[start:stop] for start, stop in itertools.pairwise(edges)]
        self.on_shard: Callable[[str, int], None] = lambda _scorer, _shard: None
        self._lock = threading.RLock()
        self.missed: set[str] = set()
        self.preempting = threading.Event()
        self.reports: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, train_loop: Callable[..., object], config: object = None) -> LocalResult:
        """Run the loop on all ranks to the end, from the last checkpoint if there is one.

        Args:
            train_loop: Function of no or one argument.
            config: Its argument.

        Raises:
            BssRayError: a user's error that a rank has met.
            Exception: any other error of a rank, once `max_failures` are used up; the first of them.
        """
        self.reports = []
        with self._actors() as coordinator:
            reader = EventReader(coordinator.events, self._on_message)
            with watch(reader):
                for attempt in itertools.count():
                    count = self._ranks[min(attempt, len(self._ranks) - 1)]
                    errors = self._attempt(count, train_loop, config)
                    fatal = reader.fatal_error()
                    if fatal is not None:
                        raise fatal
                    if not errors:
                        break
                    if attempt >= self._max_failures:
                        raise errors[0]
            stopped = reader.stop_requested()
        folders = self.checkpoints()
        return LocalResult(
            metrics=self.reports[-1] if self.reports else {},
            reports=self.reports,
            checkpoint=LocalFolder(str(folders[-1])) if folders else None,
            attempts=attempt + 1,
            stopped=stopped,
        )

    def kill(self, role: str, *, noticed: bool = True) -> None:
        """Kill an actor, which comes back at once and empty.

        Args:
            role: `coordinator`, `holder-0`, ... or `scorer-0`, ...
            noticed: Whether the next call of it fails, as a call fails that an actor was lost under; else it is
                answered by the empty actor.
        """
        with self._lock:
            if noticed:
                self.missed.add(role)
            kind, _, number = role.partition("-")
            if kind == "coordinator":
                self._start_coordinator()
            elif kind == "holder":
                self._holders[int(number)] = Holder(self.spans[int(number)])
            else:
                self._scorers.forget(role)

    def stop(self) -> None:
        """Tell the ranks to save a checkpoint and end, as Ctrl-C does."""
        self.coordinator.events.request_stop()

    def preempt(self) -> None:
        """Tell the ranks that a node will be taken away soon."""
        self.preempting.set()

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, the oldest first."""
        return sorted(self.folder.glob("checkpoint_*"))

    def next_checkpoint(self) -> Path:
        return self.folder / f"checkpoint_{len(self.checkpoints()):06d}"

    # ---- internals ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _actors(self) -> Iterator[CoordinatorClient]:
        self._holders = [Holder(spans) for spans in self.spans]
        self._scorers = _Scorers(self)
        self.coordinator = _Coordinator(self)
        self.holders: Holders = _Holders(self)
        self._services: list[tuple[CoordinatorService, _Holders]] = []
        self._start_coordinator()
        try:
            yield self.coordinator
        finally:
            for service, _ in self._services:
                service.close()
            self._scorers.close()

    def _start_coordinator(self) -> None:
        if self._services:
            self._services[-1][1].fenced = True
        names = [f"scorer-{index}" for index in range(self.scoring.num_scorers)]
        pool = ScorerPool(names, self.scoring.restart_timeout_s, self._scorers, self.scoring.bad_rows)
        holders = _Holders(self)
        self.service = CoordinatorService(holders, self._make, pool)
        self._services.append((self.service, holders))

    def call_holder(
        self,
        index: int,
        caller: _Holders,
        method: Callable[Concatenate[Holder, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        with self._lock:
            if caller.fenced:
                raise ActorLostError("this coordinator was killed")
            self.check_there(f"holder-{index}")
            return method(self._holders[index], *args, **kwargs)

    def check_there(self, role: str) -> None:
        """Let the first call after a kill fail."""
        with self._lock:
            if role in self.missed:
                self.missed.discard(role)
                raise ActorLostError(f"{role} is lost")

    def _attempt(self, count: int, train_loop: Callable[..., object], config: object) -> list[BaseException]:
        """Start the ranks once; returns the errors that they ended with, in order of time."""
        shutil.rmtree(self.folder / "incoming", ignore_errors=True)
        meeting = Meeting(count, self._timeout_s)
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            _of_thread.cluster = self
            ranks = OneRank() if count == 1 else ThreadRanks(rank, meeting)
            try:
                with meeting.turn():
                    run_rank(self._context(_Backend(self, ranks)), train_loop, config, is_thread=True)
            except BaseException as error:
                errors.append(error)
                meeting.leave()

        threads = [threading.Thread(target=work, args=(rank,), name=f"rank-{rank}") for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors

    def _context(self, backend: _Backend) -> SamplerContext:
        return SamplerContext(
            coordinator=self.coordinator,
            holders=self.holders,
            prefix=f"bss_ray-{uuid.uuid4().hex[:8]}-",
            backend=backend,
            train=self._train,
            validation=self._validation,
            scheduler=self._scheduler,
            measurer=self.measurer,
            scoring=self.scoring,
            seed=self._seed,
            wait_limit_s=wait_limit(),
            initial_scores=self._initial_scores,
        )
