"""The Ray actor around `Scorer`, and the job it is given. A thin shell, no decisions."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import ray

from bss_ray.data.shards import Shards
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.snapshot import ModelSnapshot
from bss_ray.runtime.logs import RunLogger
from bss_ray.runtime.memory import keep_freed_memory
from bss_ray.runtime.messages import Message
from bss_ray.runtime.profiling import SCORING, recorded
from bss_ray.runtime.wait import set_wait_limit, wait_for
from bss_ray.sample.holder_actors import ActorHolders, Named
from bss_ray.sample.state import MeasureBatch
from bss_ray.scoring.config import BadRows, Scoring
from bss_ray.scoring.pool import ShardReport
from bss_ray.scoring.scorer import Scorer


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


class ScorerActor(Named):
    """A `Scorer` that measures shards and delivers what it found to the holders."""

    def __init__(
        self, label: str, measurer: Measurer, scoring: Scoring, holders: ActorHolders, wait_limit_s: float
    ) -> None:
        set_wait_limit(wait_limit_s)
        keep_freed_memory()
        self._log = RunLogger(role="scorer")
        device = "cuda" if scoring.gpus_per_scorer > 0 else "cpu"
        self._scorer = Scorer(measurer, label, forward=scoring, device=device)
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
        delivery = MeasureBatch.of(found.rows, found.similarity, found.information).sound()
        self._holders.deliver(delivery, epoch=job.epoch, version=job.version, attempt=job.attempt)
        self._log.at(epoch=job.epoch, version=job.version).info("measured shard %d: %d rows", shard, len(found.rows))
        return ShardReport(len(found.rows), found.problems, found.notices)

    def _post(self, message: Message) -> None:
        """Put a message on the run's board."""
        ray.get_actor(self._holders.prefix + "coordinator").board.remote("post", message)

    def _take(self, ref: Any) -> ScoringJob:
        if self._job is None or ref != self._ref:
            job: ScoringJob = wait_for(ref, "a scoring job")
            snapshot: ModelSnapshot = wait_for(job.model, "the model to score with")
            self._scorer.load(snapshot)
            self._ref, self._job = ref, job
        return self._job
