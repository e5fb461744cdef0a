"""All rows through the scorers: which shard goes to whom, and what happens when one is lost."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray

from bss_ray.errors import ModelOutputError, Problem, first_line, raise_first_problem
from bss_ray.runtime.wait import wait_limit, wait_timeout_error

# A shard that so many scorers have died of is not given to another.
_MAX_DEATHS = 3

_POLL_S = 1.0

# A scorer may start on a node that is itself still starting.
_START_TIMEOUT_S = 600.0


class ScoringFailedError(RuntimeError):
    """The rows could not be scored, because scorers were lost and did not come back.

    No error of the user's, and none of the run's: it can go on with the scores it has.
    """


class ShardReport(NamedTuple):
    """What a scorer says of a shard that it has measured; the measures themselves went to the holders.

    Attributes:
        rows: rows of the shard.
        problems: rows whose outputs are not finite.
        notices: what the user should read.
    """

    rows: int
    problems: list[Problem]
    notices: list[str]


@dataclass
class ShardQueue:
    """Which shards are still to be measured; no Ray.

    Args:
        homes: node of each shard; empty where all nodes read it alike.
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
        """A shard for a scorer on `node`: one that lies there, if there is any; None if none is left."""
        if not self.waiting:
            return None
        near = (place for place, shard in enumerate(self.waiting) if self.homes[shard] == node)
        return self.waiting.pop(next(near, 0))

    def put_back(self, shard: int, why: str) -> None:
        """The scorer was lost while it measured this shard.

        Raises:
            ScoringFailedError: so were others before.
        """
        self.deaths[shard] += 1
        if self.deaths[shard] >= _MAX_DEATHS:
            raise ScoringFailedError(f"{_MAX_DEATHS} scorers were lost while they measured shard {shard}: {why}")
        self.waiting.insert(0, shard)


class ScorerPool:
    """Scorer actors that share the shards out among them as they get done.

    A scorer that is lost is not waited for while others are there; Ray restarts it meanwhile.

    Args:
        scorers: the actors' names.
        restart_timeout_s: seconds to wait for a lost one to come back.
        find: from a name to its handle; ValueError if Ray does not restart it any more.
    """

    def __init__(
        self, scorers: Sequence[str], restart_timeout_s: float, find: Callable[[str], Any] = ray.get_actor
    ) -> None:
        self._scorers, self._find = scorers, find
        self._timeout_s = restart_timeout_s

    def run(self, job: Any, homes: Sequence[str]) -> tuple[int, list[str]]:
        """Have all shards measured.

        Args:
            job: a `ScoringJob`, for all of them.
            homes: node of each shard.

        Returns:
            How many rows have sound measures, and what the user should read.

        Raises:
            ScoringFailedError: scorers were lost and did not come back.
            ModelOutputError: outputs are not finite, and that is an error.
        """
        run = _Run(ShardQueue(homes), self._scorers, job, self._timeout_s, self._find)
        run.loop()
        problems = sorted((p for report in run.reports for p in report.problems), key=lambda p: p.first_ids[0])
        if job.bad_rows == "error":
            raise_first_problem(problems, ModelOutputError)
        notices = [*run.notices, *(notice for report in run.reports for notice in report.notices)]
        bad = sum(problem.count for problem in problems)
        if bad:
            notices.append(kept_rows_notice(problems))
        return sum(report.rows for report in run.reports) - bad, list(dict.fromkeys(notices))


def kept_rows_notice(problems: Sequence[Problem]) -> str:
    """What to say of rows that keep their score."""
    ids = [row for problem in problems for row in problem.first_ids][:5]
    count = sum(problem.count for problem in problems)
    return (
        f"Warning: the model's outputs are NaN or infinite for {count} rows (first row ids "
        f"{', '.join(map(str, ids))}): they keep their score, as bad_rows=keep says"
    )


class _Run:
    """One pass over all shards. A scorer is present, with or without a shard, or absent: starting, or lost."""

    def __init__(
        self, queue: ShardQueue, scorers: Sequence[str], job: Any, timeout_s: float, find: Callable[[str], Any]
    ) -> None:
        self._queue, self._find = queue, find
        self._actors: dict[str, Any] = {}
        self._job = ray.put(job)
        self._timeout_s = timeout_s
        self._nodes: dict[str, str] = {}  # of those present
        self._measuring: dict[Any, tuple[str, int, float]] = {}  # scorer, shard, since when
        now = time.monotonic()
        self._absent = {name: _Absence(now + max(timeout_s, _START_TIMEOUT_S), "it did not start") for name in scorers}
        self._asked: dict[Any, str] = {}
        self.reports: list[ShardReport] = []
        self.notices: list[str] = []

    def loop(self) -> None:
        """Until all shards are done.

        Raises:
            ScoringFailedError: no scorer is present, and none is waited for any longer.
        """
        while not self._queue.finished:
            self._ask_absent()
            self._check_waits()
            ready, _ = ray.wait([*self._measuring, *self._asked], num_returns=1, timeout=_POLL_S)
            for ref in ready:
                if ref in self._asked:
                    self._answered(self._asked.pop(ref), ref)
                else:
                    self._measured(*self._measuring.pop(ref)[:2], ref)

    def _check_waits(self) -> None:
        """A scorer that is cut off or stuck is not waited for without end.

        Raises:
            WaitError: one has measured a single shard for longer than the limit.
        """
        for name, shard, started in self._measuring.values():
            if time.monotonic() - started > wait_limit():
                raise wait_timeout_error(f"{_role(name)} to measure shard {shard}")

    def _ask_absent(self) -> None:
        """Ask for absent scorers, once at a time; give up those that are awaited for too long."""
        now = time.monotonic()
        asked = set(self._asked.values())
        for name, absence in list(self._absent.items()):
            if name in asked or now < absence.next_question:
                continue
            absence.next_question = now + _POLL_S
            try:
                self._actors[name] = self._find(name)
            except ValueError:  # Ray does not restart it any more
                absence.deadline = now
            else:
                self._asked[self._actors[name].node.remote()] = name
        for name in [name for name, absence in self._absent.items() if now >= absence.deadline]:
            self.notices.append(f"Warning: {_role(name)} is lost: {self._absent.pop(name).why}")
        if not self._nodes and not self._absent:
            raise ScoringFailedError(f"no scorer is left. {' '.join(self.notices)}")

    def _answered(self, name: str, ref: Any) -> None:
        try:
            node: str = ray.get(ref)
        except ray.exceptions.RayActorError as error:
            if name in self._absent:
                self._absent[name].why = first_line(error)
        else:
            self._absent.pop(name, None)
            self._nodes[name] = node
            self._next(name)

    def _measured(self, name: str, shard: int, ref: Any) -> None:
        try:
            self.reports.append(ray.get(ref))
        except ray.exceptions.RayTaskError:
            raise  # the scorer is there: what it ran has failed, also when that was a call of a lost holder
        except ray.exceptions.RayActorError as error:
            why = first_line(error)
            del self._nodes[name]
            self._absent[name] = _Absence(time.monotonic() + self._timeout_s, why)
            self._queue.put_back(shard, why)
            busy = {other for other, *_ in self._measuring.values()}
            for idle in self._nodes.keys() - busy:  # it had nothing left to do
                self._next(idle)
        else:
            self._queue.done += 1
            self._next(name)

    def _next(self, name: str) -> None:
        shard = self._queue.take(self._nodes[name])
        if shard is not None:
            ref = self._actors[name].measure.options(name=f"scorer.measure shard {shard}").remote([self._job], shard)
            self._measuring[ref] = (name, shard, time.monotonic())


@dataclass
class _Absence:
    """A scorer that does not answer.

    Attributes:
        deadline: until when it is waited for, by the monotonic clock.
        why: it is absent.
        next_question: when to ask for it again.
    """

    deadline: float
    why: str
    next_question: float = 0.0


def _role(name: str) -> str:
    """`scorer-0` of an actor's name."""
    return "-".join(name.rsplit("-", 2)[-2:])
