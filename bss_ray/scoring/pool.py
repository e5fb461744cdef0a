"""A pass of all rows through scorers: which scorer gets which shard, its work, and the report at the end."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from bss_ray.errors import NAMED_IDS, ModelOutputError, Problem, raise_first_problem
from bss_ray.measure.score import BadRows
from bss_ray.runtime.messages import Message
from bss_ray.runtime.profiling import SCORING, recorded
from bss_ray.runtime.wait import wait_limit, wait_timeout_error
from bss_ray.sample.client import ActorLostError, Holders, ScoringFailedError, ScoringJob, Shared
from bss_ray.sample.state import MeasureBatch
from bss_ray.scoring.scorer import Scorer

T_co = TypeVar("T_co", covariant=True)

_POLL_S = 1.0

# Seconds for a scorer to start, perhaps on a node that is itself still starting.
_START_TIMEOUT_S = 600.0

# A shard that has killed this number of scorers is not given to another.
_MAX_DEATHS = 3


class ShardReport(NamedTuple):
    """A scorer's report on a measured shard; the measures themselves were sent to the holders.

    Attributes:
        rows: Number of rows of the shard.
        problems: Problem of the rows whose outputs are not finite.
        notices: Messages to the user.
    """

    rows: int
    problems: list[Problem]
    notices: list[str]


@dataclass
class ShardQueue:
    """The shards that must still be measured; without Ray.

    Args:
        homes: Node of each shard; empty if all nodes read it equally well.
    """

    homes: Sequence[str]
    waiting: list[int] = field(init=False)
    deaths: collections.Counter[int] = field(default_factory=collections.Counter)
    done: int = 0

    def __post_init__(self) -> None:
        self.waiting = list(range(len(self.homes)))

    @property
    def finished(self) -> bool:
        """Whether all shards are done."""
        return self.done == len(self.homes)

    def take(self, node: str) -> int | None:
        """A shard for a scorer on `node`, preferably a shard of that node; None if no shard is left."""
        if not self.waiting:
            return None
        near = (place for place, shard in enumerate(self.waiting) if self.homes[shard] == node)
        return self.waiting.pop(next(near, 0))

    def put_back(self, shard: int, why: str) -> None:
        """Return a shard whose scorer was lost while it measured the shard.

        Raises:
            ScoringFailedError: Too many scorers were lost with this shard.
        """
        self.deaths[shard] += 1
        if self.deaths[shard] >= _MAX_DEATHS:
            raise ScoringFailedError(f"{_MAX_DEATHS} scorers were lost while they measured shard {shard}: {why}")
        self.waiting.insert(0, shard)


def measure_shard(
    scorer: Scorer, job: ScoringJob, shard: int, holders: Holders, post: Callable[[Message], object]
) -> ShardReport:
    """Measure one shard of a job with a scorer that has the job's model, and deliver the measures to the holders.

    Args:
        scorer: Measures the rows.
        job: The job.
        shard: Index of the shard.
        holders: Take the measures.
        post: Puts the profile, if the job wants one of this shard, into the run's event log.
    """
    arrays, shards = job.shards.read(shard), job.shards
    columns = {name: arrays[name] for name in shards.features}
    with recorded(SCORING, post) if shard == job.profiled else contextlib.nullcontext():
        found = scorer.measure(columns, shards.parts[shard].first_row)
    batch = MeasureBatch.of(found.rows, found.similarity, found.information).sound()
    holders.deliver(batch, epoch=job.epoch, version=job.version, attempt=job.attempt)
    return ShardReport(len(found.rows), found.problems, found.notices)


class Answer(Protocol[T_co]):
    """The future answer of a scorer, e.g. a `concurrent.futures.Future`."""

    def result(self) -> T_co:
        """The answer, which must have arrived.

        Raises:
            ActorLostError: The scorer is lost.
        """
        ...


class Scorers(Protocol):
    """The scorers of a pool by name: in Ray's actors, or in threads of this process."""

    def node(self, name: str) -> Answer[str] | None:
        """Id of a scorer's node, as soon as it has started; None if it does not come back any more."""
        ...

    def measure(self, name: str, job: Shared[ScoringJob], shard: int) -> Answer[ShardReport]:
        """Let a scorer measure a shard of the job and deliver the measures to the holders."""
        ...

    def wait(self, answers: Sequence[Answer[object]], timeout_s: float) -> Sequence[Answer[Any]]:
        """Answers that have arrived; waits for one answer."""
        ...


class ScorerPool:
    """A `ScoringPool` of scorers, each of which gets the next shard when it is free.

    The pool does not wait for a lost scorer while there are others; Ray restarts it meanwhile.

    Args:
        names: Names of the scorers.
        restart_timeout_s: Seconds to wait for a lost scorer to come back.
        scorers: The scorers themselves.
        bad_rows: What is done with rows whose outputs are not finite.
    """

    def __init__(
        self, names: Sequence[str], restart_timeout_s: float, scorers: Scorers, bad_rows: BadRows = "error"
    ) -> None:
        self._names, self._timeout_s = tuple(names), restart_timeout_s
        self._scorers, self._bad_rows = scorers, bad_rows

    def run(self, job: Shared[ScoringJob], homes: Sequence[str]) -> tuple[int, list[str]]:
        """See `ScoringPool.run`.

        Raises:
            ScoringFailedError: Scorers were lost and did not come back.
            ModelOutputError: outputs are not finite, and that is an error.
        """
        run = _Run(ShardQueue(homes), self._names, job, self._timeout_s, self._scorers)
        try:
            run.loop()
        except ScoringFailedError:
            run.drain()
            raise
        return summary(run.reports, self._bad_rows, run.notices)


class _Run:
    """One pass over all shards. A scorer is either present, with or without a shard, or absent: starting or lost."""

    def __init__(
        self, queue: ShardQueue, names: Sequence[str], job: Shared[ScoringJob], timeout_s: float, scorers: Scorers
    ) -> None:
        self._queue, self._scorers, self._timeout_s, self._job = queue, scorers, timeout_s, job
        self._nodes: dict[str, str] = {}  # nodes of the present scorers
        self._measuring: dict[Answer[ShardReport], tuple[str, int, float]] = {}  # scorer, shard, start time
        now = time.monotonic()
        self._absent = {name: _Absence(now + max(timeout_s, _START_TIMEOUT_S), "it did not start") for name in names}
        self._asked: dict[Answer[str], str] = {}
        self.reports: list[ShardReport] = []
        self.notices: list[str] = []

    def loop(self) -> None:
        """Run until all shards are done.

        Raises:
            ScoringFailedError: No scorer is present, and the waits for all absent scorers are over.
        """
        while not self._queue.finished:
            self._ask_absent()
            self._check_waits()
            for answer in self._scorers.wait([*self._measuring, *self._asked], _POLL_S):
                if (name := self._asked.pop(answer, None)) is not None:
                    self._answered(name, answer)
                else:
                    self._measured(*self._measuring.pop(answer)[:2], answer)

    def drain(self) -> None:
        """Wait for the scorers that still measure: nothing of a pass that has failed may be delivered after its end."""
        while self._measuring:
            self._check_waits()
            for answer in self._scorers.wait(list(self._measuring), _POLL_S):
                del self._measuring[answer]

    def _check_waits(self) -> None:
        """Limit the wait for a scorer that is cut off or stuck.

        Raises:
            WaitError: A scorer has measured a single shard for longer than the limit.
        """
        for name, shard, started in self._measuring.values():
            if time.monotonic() - started > wait_limit():
                raise wait_timeout_error(f"{_role(name)} to measure shard {shard}")

    def _ask_absent(self) -> None:
        """Check for absent scorers, with one call at a time; abandon those that are absent for too long."""
        now = time.monotonic()
        asked = set(self._asked.values())
        for name, absence in list(self._absent.items()):
            if name in asked or now < absence.next_question:
                continue
            absence.next_question = now + _POLL_S
            answer = self._scorers.node(name)
            if answer is None:  # Ray does not restart it any more
                absence.deadline = now
            else:
                self._asked[answer] = name
        for name in [name for name, absence in self._absent.items() if now >= absence.deadline]:
            self.notices.append(f"Warning: {_role(name)} is lost: {self._absent.pop(name).why}")
        if not self._nodes and not self._absent:
            raise ScoringFailedError(f"no scorer is left. {' '.join(self.notices)}")

    def _answered(self, name: str, answer: Answer[str]) -> None:
        try:
            node = answer.result()
        except ActorLostError as error:
            if name in self._absent:
                self._absent[name].why = str(error)
        else:
            self._absent.pop(name, None)
            self._nodes[name] = node
            self._next(name)

    def _measured(self, name: str, shard: int, answer: Answer[ShardReport]) -> None:
        try:
            self.reports.append(answer.result())
        except ActorLostError as error:
            del self._nodes[name]
            self._absent[name] = _Absence(time.monotonic() + self._timeout_s, str(error))
            self._queue.put_back(shard, str(error))
            busy = {other for other, *_ in self._measuring.values()}
            for idle in self._nodes.keys() - busy:  # it had no shard
                self._next(idle)
        else:
            self._queue.done += 1
            self._next(name)

    def _next(self, name: str) -> None:
        shard = self._queue.take(self._nodes[name])
        if shard is not None:
            self._measuring[self._scorers.measure(name, self._job, shard)] = (name, shard, time.monotonic())


@dataclass
class _Absence:
    """A scorer that does not answer.

    Attributes:
        deadline: Time until which the run waits for it, by the monotonic clock.
        why: Reason of the absence.
        next_question: Time of the next check for it.
    """

    deadline: float
    why: str
    next_question: float = 0.0


def _role(name: str) -> str:
    """`scorer-0` of an actor's name."""
    return "-".join(name.rsplit("-", 2)[-2:])


def summary(reports: Sequence[ShardReport], bad_rows: BadRows, notices: Sequence[str] = ()) -> tuple[int, list[str]]:
    """Number of rows with finite measures, and messages to the user, of a pass over all shards.

    Args:
        reports: Reports on all shards.
        bad_rows: What is done with rows whose outputs are not finite.
        notices: What else the user should read, to begin with.

    Raises:
        ModelOutputError: outputs are not finite, and that is an error.
    """
    problems = sorted((p for report in reports for p in report.problems), key=lambda p: p.first_ids[0])
    if bad_rows == "error":
        raise_first_problem(problems, ModelOutputError)
    texts = [*notices, *(notice for report in reports for notice in report.notices)]
    bad = sum(problem.count for problem in problems)
    if bad:
        texts.append(kept_rows_notice(problems))
    return sum(report.rows for report in reports) - bad, list(dict.fromkeys(texts))


def kept_rows_notice(problems: Sequence[Problem], outcome: str = "they keep their score") -> str:
    """What to say of rows whose outputs are not finite, and what becomes of them."""
    ids = sorted(row for problem in problems for row in problem.first_ids)[:NAMED_IDS]
    count = sum(problem.count for problem in problems)
    return (
        f"Warning: the model's outputs are NaN or infinite for {count} {'row' if count == 1 else 'rows'} (first row "
        f"ids {', '.join(map(str, ids))}): {outcome}, as bad_rows=keep says"
    )
