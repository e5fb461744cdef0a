"""A cluster in this process: a run of any train loop with ranks as threads, in which everything can be killed.

    cluster = LocalCluster(shards, folder, ranks=3, scheduler=Learning(temperature=0.3), seed=7)
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
import random
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import pyarrow.fs
import torch
from torch import nn

from bss_ray.data.shards import Shards
from bss_ray.errors import ConfigError
from bss_ray.measure.measurer import Measurer
from bss_ray.runtime.event_log import EventLog, EventLogClient, UnavailableError
from bss_ray.runtime.messages import Message, OnMessage, PlacementMap
from bss_ray.runtime.ranks import OneRank, RankGroup
from bss_ray.runtime.wait import wait_limit
from bss_ray.sample.client import ActorLostError, LocalHolders, ScoringJob, Shared
from bss_ray.sample.coordinator import Coordinator, check_batch_size
from bss_ray.sample.holder import WINDOW_ROWS, Holder
from bss_ray.sample.plan import Tail
from bss_ray.sample.service import CoordinatorService, CoordinatorStub
from bss_ray.sample.state import SavedScores, ScoreBlock
from bss_ray.schedule.schedulers import Learning, Scheduler
from bss_ray.scoring.config import Scoring
from bss_ray.scoring.pool import Answer, ScorerPool, ShardReport, measure_shard
from bss_ray.scoring.scorer import Scorer
from bss_ray.testing.thread_ranks import Killed, Meeting, RankLostError, ThreadRanks, own_randomness
from bss_ray.train.backend import SamplerContext
from bss_ray.train.sampler import run_rank
from bss_ray.train.supervise import EventReader, supervise

P = ParamSpec("P")
T = TypeVar("T")


# ---- actors -----------------------------------------------------------------------------------


class _Process:
    """A process that threads stand for: the ranks of one attempt, a coordinator, or the driver.

    Attributes:
        killed: Whether it is; then it reaches nobody.
    """

    def __init__(self) -> None:
        self.killed = False

    def check(self) -> None:
        if self.killed:
            raise Killed


class _Holders(LocalHolders):
    """The holders of a cluster, as one of its processes sees them."""

    def __init__(self, cluster: LocalCluster, caller: _Process, holders: Sequence[Holder]) -> None:
        super().__init__(holders)
        self._cluster, self._caller = cluster, caller

    def call(self, index: int, method: Callable[Concatenate[Holder, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        role = f"holder-{index}"
        self._cluster.before_call(self._caller, role, method.__name__)
        with self._cluster.lock:
            self._cluster.check_call(self._caller, role)
            return super().call(index, method, *args, **kwargs)


class _Service(NamedTuple):
    """One life of the coordinator.

    Attributes:
        service: The coordinator at work.
        process: It runs in.
        turn: As an actor it answers one call at a time.
    """

    service: CoordinatorService
    process: _Process
    turn: threading.Lock


class _Coordinator(CoordinatorStub):
    """The current coordinator of a cluster, as one of the cluster's processes sees it."""

    def __init__(self, cluster: LocalCluster, caller: _Process) -> None:
        self._cluster, self._caller = cluster, caller
        self.events: EventLogClient = _Events(cluster, caller)

    def call(
        self,
        what: str,
        method: Callable[Concatenate[CoordinatorService, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        self._cluster.before_call(self._caller, "coordinator", method.__name__)
        self._cluster.check_call(self._caller, "coordinator")
        life = self._cluster.coordinator
        try:
            with life.turn:
                return method(life.service, *args, **kwargs)
        finally:
            if life.process.killed:  # while it worked
                raise ActorLostError("coordinator is lost")


class _Events:
    """The event log of a cluster's current coordinator."""

    def __init__(self, cluster: LocalCluster, caller: _Process) -> None:
        self._cluster, self._caller = cluster, caller

    def _log(self) -> EventLog:
        try:
            self._cluster.check_call(self._caller, "coordinator")
        except (ActorLostError, Killed) as error:
            raise UnavailableError("the coordinator is lost") from error
        return self._cluster.coordinator.service.events

    def post(self, message: Message, *, wait: bool = False) -> None:
        self._log().post(message)

    def read(self, log: str, start: int) -> tuple[str, list[Message]]:
        return self._log().read(log, start)

    def beat(self) -> None:
        self._log().beat()

    def silence(self) -> float:
        return self._log().silence()

    def request_stop(self) -> None:
        self._cluster.stop()

    def stop_requested(self) -> bool:
        return self._log().stop_requested()


class _Scorers:
    """The scorers of a cluster, as one of its coordinators sees them. Each scorer works in a thread of its own."""

    def __init__(self, cluster: LocalCluster, caller: _Process) -> None:
        self._cluster, self._caller = cluster, caller

    def node(self, name: str) -> Answer[str] | None:
        cluster = self._cluster
        return None if name in cluster.gone else cluster.scorers[name].threads.submit(lambda: cluster.nodes[0])

    def measure(self, name: str, job: Shared[ScoringJob], shard: int) -> Answer[ShardReport]:
        self._caller.check()
        return self._cluster.scorers[name].threads.submit(self._measure, name, job, shard)

    def _measure(self, name: str, job: Shared[ScoringJob], shard: int) -> ShardReport:
        cluster, own = self._cluster, _Process()
        cluster.before_call(own, name, "measure", shard)
        cluster.check_call(own, name)
        try:
            report = cluster.scorers[name].measure(cluster, own, job, shard)
        except ActorLostError as error:
            raise RuntimeError(f"{name} is there, but {error}") from error
        cluster.check_call(own, name)  # it was killed while it measured
        return report

    def wait(self, answers: Sequence[Answer[object]], timeout_s: float) -> Sequence[Answer[Any]]:
        futures = [answer for answer in answers if isinstance(answer, Future)]
        return list(wait(futures, timeout_s, return_when=FIRST_COMPLETED).done)


class _Scorer:
    """One scorer: its thread, and the model that it has loaded."""

    def __init__(self, name: str) -> None:
        self.threads = ThreadPoolExecutor(1, f"bss-ray-{name}")
        self._loaded: tuple[Scorer, Shared[ScoringJob]] | None = None

    def measure(self, cluster: LocalCluster, own: _Process, shared: Shared[ScoringJob], shard: int) -> ShardReport:
        job = shared.get("the job")
        if self._loaded is None or self._loaded[1] is not shared:
            scorer = Scorer(cluster.measurer, job.shards.columns.label, forward=cluster.scoring, device=cluster.device)
            scorer.load(job.model.get("the model"))
            self._loaded = scorer, shared
        coordinator, holders = cluster.clients(own)
        return measure_shard(self._loaded[0], job, shard, holders, coordinator.events.post)

    def forget(self) -> None:
        """It comes back without its model."""
        self._loaded = None


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

    def __init__(self, cluster: LocalCluster, process: _Process, ranks: RankGroup) -> None:
        self._cluster, self._process, self._ranks = cluster, process, ranks

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
        self._process.check()
        if folder is not None:
            shutil.copytree(folder, self._cluster.incoming, dirs_exist_ok=True)
        self._ranks.barrier()
        if self._ranks.rank == 0:
            self._process.check()
            self._cluster.keep(row)
        self._ranks.barrier()

    def scored_first(self, scores: Callable[[], list[ScoreBlock]]) -> None:
        """Does nothing: the first checkpoint has the scores."""

    def preempted(self) -> bool:
        return self._ranks.from_first(self._cluster.preempting.is_set())

    def process_map(self, prefix: str, rank_nodes: Sequence[str]) -> PlacementMap | None:
        return None


# ---- the cluster ------------------------------------------------------------------------------


class _Place(NamedTuple):
    """What a thread that is a rank belongs to."""

    cluster: LocalCluster
    process: _Process
    meeting: Meeting
    rank: int


_of_thread = threading.local()


def current_cluster() -> LocalCluster | None:
    """The cluster that the calling thread is a rank of."""
    place: _Place | None = getattr(_of_thread, "place", None)
    return None if place is None else place.cluster


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
        max_failures: Number of times that the ranks may start again after an error. A loss of ranks after `preempt` is
            none.
        initial_scores: Scores that the first epoch is drawn from; there is no burn-in then.
        nodes: Ids of the nodes that the ranks are on, in turn.
        device: Device of all ranks.
        window_rows: Rows of a window of the order.
        on_message: Called with each message of the run, in the thread of `run`.
        on_call: Called before each call of an actor, in the calling thread, with the actor's role (`coordinator`,
            `holder-0`, ..., `scorer-0`, ...), the name of its method, and the index of the shard that a scorer is to
            measure or None. A test may wait there, or kill.
        schedule: Seed of a schedule of the ranks: at each meeting, and before each call of an actor, one of those that
            could work next is chosen at random. None: the first in the order of ranks works until it waits.
        timeout_s: Seconds after which a rank that waits for others takes them for lost.

    Raises:
        ConfigError: A setting is out of its range.
    """

    def __init__(
        self,
        train: Shards,
        folder: str | Path,
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
        on_call: Callable[[str, str, int | None], object] = lambda *_: None,
        schedule: int | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self._ranks = [ranks] if isinstance(ranks, int) else list(ranks)
        if not self._ranks or min(self._ranks) < 1 or max_failures < 0:
            raise ConfigError(f"ranks must be >= 1 and max_failures >= 0; received {ranks} and {max_failures}")
        check_batch_size(batch_size, train.rows)
        scoring = scoring or Scoring()
        self.scoring = replace(scoring, engine="workers") if scoring.engine == "auto" else scoring
        scheduler = scheduler or Learning()
        self._scheduler = scheduler if initial_scores is None else replace(scheduler, burn_in=0)
        self.measurer = (measurer or Measurer()).for_task(train.columns.task)
        self._train, self._validation, self._seed = train, validation, seed
        self._max_failures, self._initial_scores = max_failures, initial_scores
        self.nodes, self.device, self._timeout_s = tuple(nodes), torch.device(device), timeout_s
        self._on_message, self._on_call = on_message, on_call
        self._random = None if schedule is None else random.Random(schedule)
        self._make = functools.partial(
            Coordinator,
            rows=train.rows,
            scheduler=self._scheduler,
            seed=seed,
            batch_size=batch_size,
            tail=tail,
            accumulation=self.scoring,
            window_rows=window_rows,
        )
        count = min(self.scoring.num_holders, len(train.parts))
        spans = [(part.first_row, part.rows) for part in train.parts]
        edges = [len(spans) * index // count for index in range(count + 1)]
        self._spans = [spans[start:stop] for start, stop in itertools.pairwise(edges)]
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.incoming = self.folder / "incoming"
        self.lock = threading.RLock()
        self.preempting = threading.Event()
        self._stopping = False
        self.reports: list[dict[str, Any]] = []
        self._lost: set[str] = set()  # a call of them fails
        self.gone: set[str] = set()  # they do not come back
        self._holders: list[Holder] = []
        self._services: list[_Service] = []
        self.scorers: dict[str, _Scorer] = {}
        self._attempt = _Process()
        self._threads: list[threading.Thread] = []

    def run(self, train_loop: Callable[..., object], config: object = None) -> LocalResult:
        """Run the loop on all ranks to the end, from the last checkpoint if there is one.

        The first Ctrl-C in the main thread does what `stop` does, the second ends the run at once.

        Args:
            train_loop: Function of no or one argument.
            config: Its argument.

        Raises:
            BssRayError: a user's error that a rank has met.
            RankLostError: ranks were killed, more often than `max_failures`.
            Exception: any other error of a rank, once `max_failures` are used up; the first of them.
        """
        self.reports = []
        with own_randomness(), self._actors():
            reader = EventReader(_Events(self, _Process()), self._on_message)
            attempts, _ = supervise(functools.partial(self._attempts, reader, train_loop, config), reader)
            stopped = self._stopping
        folders = self.checkpoints()
        return LocalResult(
            metrics=self.reports[-1] if self.reports else {},
            reports=self.reports,
            checkpoint=LocalFolder(str(folders[-1])) if folders else None,
            attempts=attempts,
            stopped=stopped,
        )

    def kill(self, role: str, *, noticed: bool = True, back: bool = True) -> None:
        """Kill an actor of the run, which comes back at once and empty.

        Args:
            role: `coordinator`, `holder-0`, ... or `scorer-0`, ...
            noticed: Whether calls fail first, as they do while an actor restarts: those of the coordinator or a holder
                until the ranks start again, and the next one of a scorer. Else the empty actor answers.
            back: Whether it comes back. Only a scorer may be lost for good.

        Raises:
            ValueError: there is no such actor.
        """
        with self.lock:
            roles = ["coordinator", *(f"holder-{index}" for index in range(len(self._holders))), *self.scorers]
            if not self._services or role not in roles or not (back or role in self.scorers):
                raise ValueError(f"no such actor can be lost: {role}; there are {roles if self._services else []}")
            if noticed:
                self._lost.add(role)
            if role == "coordinator":
                self._start_coordinator()
            elif role in self.scorers:
                self.scorers[role].forget()
                self.gone |= set() if back else {role}
            else:
                index = int(role.removeprefix("holder-"))
                self._holders[index] = Holder(self._spans[index])

    def stop(self) -> None:
        """Tell the ranks to save a checkpoint and end, as Ctrl-C does."""
        with self.lock:
            self._stopping = True
            if self._services:
                self.coordinator.service.events.request_stop()

    def preempt(self) -> None:
        """Tell the ranks that a node will be taken away soon, until they are started again."""
        self.preempting.set()

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, the oldest first."""
        return sorted(self.folder.glob("checkpoint_*"))

    # ---- for the ranks and actors -------------------------------------------------------------

    @property
    def coordinator(self) -> _Service:
        """The coordinator as it is now."""
        return self._services[-1]

    def clients(self, caller: _Process) -> tuple[_Coordinator, _Holders]:
        """Coordinator and holders, as a process sees them."""
        return _Coordinator(self, caller), _Holders(self, caller, self._holders)

    def before_call(self, caller: _Process, role: str, method: str, shard: int | None = None) -> None:
        """Whatever may happen before an actor is called; no lock is held."""
        place: _Place | None = getattr(_of_thread, "place", None)
        if self._random is not None and place is not None and place.process is caller:
            place.meeting.pause(place.rank)
        self._on_call(role, method, shard)

    def check_call(self, caller: _Process, role: str) -> None:
        """A process that was killed calls nobody, and an actor that is lost does not answer."""
        caller.check()
        with self.lock:
            if role in self._lost or role in self.gone:
                self._lost -= self.scorers.keys() & {role}
                raise ActorLostError(f"{role} is lost")

    def keep(self, row: Mapping[str, Any]) -> None:
        """Keep a report of all ranks, and the checkpoint that they have saved with it."""
        if self.incoming.exists():
            last = [int(folder.name.removeprefix("checkpoint_")) for folder in self.checkpoints()[-1:]]
            self.incoming.rename(self.folder / f"checkpoint_{sum(last) + len(last):06d}")
        self.reports.append(dict(row))

    # ---- internals ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _actors(self) -> Iterator[None]:
        self._holders = [Holder(spans) for spans in self._spans]
        names = [f"scorer-{index}" for index in range(self.scoring.num_scorers)]
        self.scorers = {name: _Scorer(name) for name in names if self.scoring.engine == "actors"}
        self._lost, self.gone = set(), set()
        self._start_coordinator()
        try:
            yield
        finally:
            with self.lock:
                services, self._services = self._services, []
            self._attempt.killed = True
            for thread in self._threads:
                thread.join(self._timeout_s)
            for service in services:
                service.process.killed = True
                service.service.close()
            for scorer in self.scorers.values():
                scorer.threads.shutdown(wait=True, cancel_futures=True)
            shutil.rmtree(self.incoming, ignore_errors=True)
            self._stopping = False

    def _start_coordinator(self) -> None:
        process = _Process()
        pool = ScorerPool(
            list(self.scorers), self.scoring.restart_timeout_s, _Scorers(self, process), self.scoring.bad_rows
        )
        service = CoordinatorService(_Holders(self, process, self._holders), self._make, pool)
        if self._stopping:
            service.events.request_stop()
        if self._services:
            self.coordinator.process.killed = True
        self._services.append(_Service(service, process, threading.Lock()))

    def _attempts(self, reader: EventReader, train_loop: Callable[..., object], config: object) -> int:
        """Start the ranks until they have ended without an error; how often that was."""
        failures = 0
        for attempt in itertools.count():
            errors = self._run_ranks(self._ranks[min(attempt, len(self._ranks) - 1)], train_loop, config)
            fatal = reader.fatal_error()
            if fatal is not None:
                raise fatal
            if not errors:
                return attempt + 1
            failures += not self.preempting.is_set()
            self.preempting.clear()
            if failures > self._max_failures or not self._services:
                raise errors[0]
        raise AssertionError("unreachable")

    def _run_ranks(self, count: int, train_loop: Callable[..., object], config: object) -> list[BaseException]:
        """Start the ranks once; returns the errors that they ended with, in order of time."""
        shutil.rmtree(self.incoming, ignore_errors=True)
        with self.lock:
            self._lost.clear()
        process = self._attempt = _Process()
        meeting = Meeting(count, self._timeout_s, min if self._random is None else self._random.choice)
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            _of_thread.place = _Place(self, process, meeting, rank)
            ranks = OneRank() if count == 1 else ThreadRanks(rank, meeting)
            with meeting.turn(rank):
                try:
                    run_rank(self._context(process, ranks), train_loop, config, is_thread=True)
                except Killed:
                    errors.append(RankLostError(f"rank {rank} was killed"))
                except BaseException as error:
                    errors.append(error)

        self._threads = [
            threading.Thread(target=work, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(count)
        ]
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            while thread.is_alive() and not process.killed:
                thread.join(1.0)
        process.killed = True  # one that is stuck reaches nobody any more
        return errors

    def _context(self, process: _Process, ranks: RankGroup) -> SamplerContext:
        coordinator, holders = self.clients(process)
        return SamplerContext(
            coordinator=coordinator,
            holders=holders,
            prefix=f"bss_ray-{uuid.uuid4().hex[:8]}-",
            backend=_Backend(self, process, ranks),
            train=self._train,
            validation=self._validation,
            scheduler=self._scheduler,
            measurer=self.measurer,
            scoring=self.scoring,
            seed=self._seed,
            wait_limit_s=wait_limit(),
            initial_scores=self._initial_scores,
        )
