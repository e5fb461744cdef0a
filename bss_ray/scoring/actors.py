"""Scorers as Ray actors: the Ray back end of `scoring/pool.py`, a thin shell without decisions of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.actor import ActorHandle

from bss_ray.data.shards import Shards
from bss_ray.errors import first_line
from bss_ray.measure.measurer import Measurer
from bss_ray.runtime.logs import Named, RunLogger
from bss_ray.runtime.messages import Message
from bss_ray.runtime.threads import keep_freed_memory
from bss_ray.runtime.wait import set_wait_limit, wait_limit
from bss_ray.sample.actors import ActorHolders, InStore, RayEventLog, near
from bss_ray.sample.client import ActorLostError, ScoringJob, Shared
from bss_ray.scoring.config import Scoring
from bss_ray.scoring.pool import Answer, ShardReport, measure_shard
from bss_ray.scoring.scorer import Scorer

T = TypeVar("T")


class ScorerActor(Named):
    """A `Scorer` that measures shards and delivers the measures to the holders."""

    def __init__(
        self, label: str, measurer: Measurer, scoring: Scoring, holders: ActorHolders, wait_limit_s: float
    ) -> None:
        set_wait_limit(wait_limit_s)
        keep_freed_memory()
        self._log = RunLogger(role="scorer")
        device = "cuda" if scoring.gpus_per_scorer > 0 else "cpu"
        self._scorer = Scorer(measurer, label, forward=scoring, device=device)
        self._holders = holders
        self._shared: InStore[ScoringJob] | None = None
        self._job: ScoringJob

    def node(self) -> str:
        """Id of the actor's node."""
        return str(ray.get_runtime_context().get_node_id())

    def measure(self, job: InStore[ScoringJob], shard: int) -> ShardReport:
        """Measure one shard of a job, with model and rows from the object store."""
        if job != self._shared:
            self._job = job.get("a scoring job")
            self._scorer.load(self._job.model.get("the model to score with"))
            self._shared = job
        report = measure_shard(self._scorer, self._job, shard, self._holders, self._post)
        at = self._log.at(epoch=self._job.epoch, version=self._job.version)
        at.info("measured shard %d: %d rows", shard, report.rows)
        return report

    def _post(self, message: Message) -> None:
        """Put a message into the run's event log."""
        RayEventLog(ray.get_actor(self._holders.prefix + "coordinator")).post(message)


@dataclass(frozen=True)
class RayAnswer(Generic[T]):
    """The future answer of an actor."""

    reference: ray.ObjectRef

    def result(self) -> T:
        try:
            value: T = ray.get(self.reference)
        except ray.exceptions.RayTaskError:
            raise  # the scorer lives, but its call has failed, perhaps because of a lost holder
        except ray.exceptions.RayActorError as error:
            raise ActorLostError(first_line(error)) from error
        return value


class RayScorers:
    """The `Scorers` that are actors."""

    def node(self, name: str) -> RayAnswer[str] | None:
        try:
            return RayAnswer(ray.get_actor(name).node.remote())
        except ValueError:  # Ray does not restart the actor any more
            return None

    def measure(self, name: str, job: Shared[ScoringJob], shard: int) -> RayAnswer[ShardReport]:
        call = ray.get_actor(name).measure.options(name=f"scorer.measure shard {shard}")
        return RayAnswer(call.remote(job, shard))

    def wait(self, answers: Sequence[Answer[object]], timeout_s: float) -> Sequence[Answer[Any]]:
        by_reference = {answer.reference: answer for answer in answers if isinstance(answer, RayAnswer)}
        ready, _ = ray.wait(list(by_reference), num_returns=1, timeout=timeout_s)
        return [by_reference[reference] for reference in ready]


def start_scorers(
    shards: Shards,
    measurer: Measurer,
    scoring: Scoring,
    holders: ActorHolders,
    nodes: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> list[ActorHandle]:
    """Start the scorer actors of the run of these holders.

    Args:
        shards: All rows.
        measurer: How rows are measured.
        scoring: How many scorers, and what each of them takes.
        holders: Take the measures.
        nodes: Node that each of them goes to first, see `near`.
        options: Further options of Ray for each of them.

    Returns:
        The actors' handles, which keep them alive.
    """
    actor = ray.remote(num_cpus=scoring.cpus_per_scorer, num_gpus=scoring.gpus_per_scorer, max_restarts=-1)(ScorerActor)
    return [
        actor.options(name=name, **near(nodes, index), **(options or {})).remote(
            shards.columns.label, measurer, scoring, holders, wait_limit()
        )
        for index, name in enumerate(scorer_names(holders, scoring))
    ]


def scorer_names(holders: ActorHolders, scoring: Scoring) -> list[str]:
    """Names of the scorers of the run of these holders."""
    return [f"{holders.prefix}scorer-{index}" for index in range(scoring.num_scorers)]
