"""The three engines from the view of a rank: which process measures the rows, and when.

    actors    scorer actors forward all rows; the ranks wait, or train on (`overlap`)
    workers   the ranks forward the rows of their own nodes
    online    the outputs of training are the measures

All of them deliver measures to the holders, and the coordinator publishes them as a version.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bss_ray.data.shards import Shards
from bss_ray.errors import ConfigError, ModelOutputError, Problem, ScoringError, raise_first_problem
from bss_ray.load.loader import FILLER, Loader
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.observation import Observation
from bss_ray.measure.snapshot import pack_model, unwrap_model
from bss_ray.runtime.profiling import Profiler
from bss_ray.runtime.ranks import RankGroup
from bss_ray.sample.client import CoordinatorClient, Here, Holders, Publication, ScoringFailedError, ScoringJob
from bss_ray.sample.state import LostStateError, MeasureBatch
from bss_ray.schedule.schedulers import Scheduler
from bss_ray.scoring.config import Scoring
from bss_ray.scoring.pool import kept_rows_notice
from bss_ray.scoring.scorer import RowMeasures, Scorer, bad_row_problems, not_finite

# Step of measures made after an epoch, which is later than all steps of training in the epoch.
_AFTER_ALL_STEPS = int(np.iinfo(np.int32).max)


@dataclass(frozen=True, kw_only=True)
class EngineContext:
    """Everything that engines work with.

    Attributes:
        coordinator: Coordinator, which publishes scores.
        holders: Holders, which take measures.
        attempt: Attempt of the ranks, see `Coordinator.attempt`.
        shards: The training rows.
        loader: Loader of this rank.
        scheduler: Scheduler, which says when scores are due.
        measurer: How rows are measured.
        scoring: How and where rows are scored.
        ranks: This rank among all ranks.
        device: Device of this rank.
        profiler: Profiler of this rank.
    """

    coordinator: CoordinatorClient
    holders: Holders
    attempt: str
    shards: Shards
    loader: Loader
    scheduler: Scheduler
    measurer: Measurer
    scoring: Scoring
    ranks: RankGroup
    device: torch.device
    profiler: Profiler


class Engine(abc.ABC):
    """The part of one rank in scoring. All ranks make the same calls."""

    def __init__(self, context: EngineContext) -> None:
        self._context = context

    def observe(  # noqa: B027 - most engines need none
        self, step: int, row_ids: Tensor, rows: Observation, similarity: Tensor
    ) -> None:
        """Observe a training step.

        Args:
            step: Global batch, from 1.
            row_ids: (b,) int64; `FILLER` for filler rows.
            rows: Observation of the batch.
            similarity: (b,) similarities of the batch's rows.
        """

    def hand_over(self, epoch: int, version: int) -> None:  # noqa: B027 - likewise
        """Deliver all observations so far, so that a checkpoint contains them; `version` is the current version."""

    @abc.abstractmethod
    def update(self, epoch: int, version: int, model: nn.Module) -> Publication | None:
        """Make new scores after `epoch`; all ranks get the same answer.

        Args:
            epoch: Epoch that has ended; -1 before the first epoch.
            version: Current version.
            model: Model of this rank, as trained so far.

        Returns:
            The publication, or its failure; None if no scores are due.
        """

    def go_on(self, epoch: int, version: int, model: nn.Module) -> None:  # noqa: B027 - likewise
        """Start scoring during `epoch`, before its first batch; `version` is the current version."""


class ActorsEngine(Engine):
    """Scorer actors measure all rows with rank 0's model."""

    def update(self, epoch: int, version: int, model: nn.Module) -> Publication | None:
        context = self._context
        overlapped = self._in_flight(epoch, version)
        # The run waits for the first scores, because nothing can be drawn without them.
        at_once = context.scheduler.scores_due_after(epoch) and (version == 0 or not context.scoring.overlap)
        if not overlapped and not at_once:
            return None
        publication = None
        if context.ranks.rank == 0:
            if at_once and not overlapped:
                self._start(epoch, version, model)
            publication = context.coordinator.finish_scoring(version + 1)
        return context.ranks.from_first(publication)

    def go_on(self, epoch: int, version: int, model: nn.Module) -> None:
        if self._context.ranks.rank == 0 and self._in_flight(epoch, version):
            self._start(epoch - 1, version, model)

    def _in_flight(self, epoch: int, version: int) -> bool:
        """Whether the model after the previous epoch is scored during `epoch`.

        This follows from the position only, so a resumed run knows it.
        """
        scheduler = self._context.scheduler
        return (
            self._context.scoring.overlap
            and version > 0
            and epoch > scheduler.burn_in
            and scheduler.scores_due_after(epoch - 1)
        )

    def _start(self, epoch: int, version: int, model: nn.Module) -> None:
        context = self._context
        job = ScoringJob(
            model=Here(pack_model(model)),
            shards=context.shards,
            epoch=epoch,
            version=version + 1,
            attempt=context.attempt,
            # The last shard: a scorer that gets it has most likely measured a shard before.
            profiled=len(context.shards.parts) - 1 if context.profiler.takes_scoring() else -1,
        )
        context.coordinator.start_scoring(Here(job), [part.node for part in context.shards.parts])


class DeliveringEngine(Engine):
    """Base of engines in which ranks deliver measures themselves."""

    def _deliver(self, epoch: int, version: int, found: RowMeasures, step: np.ndarray | int = 0) -> None:
        delivery = MeasureBatch.of(found.rows, found.similarity, found.information, step).sound()
        context = self._context
        context.holders.deliver(delivery, epoch=epoch, version=version, attempt=context.attempt)

    def _publish(self, version: int, found: RowMeasures, *, whole: bool) -> Publication:
        """Publish the measures that all ranks have delivered.

        Args:
            version: The new version.
            found: Measures that this rank has made.
            whole: Whether measures of all sound rows must have arrived.

        Raises:
            ModelOutputError: Outputs are not finite, and the settings make this an error.
        """
        context = self._context
        reports: list[_RankReport] = context.ranks.gather(
            _RankReport(len(found.rows), found.problems, tuple(found.notices))
        )
        problems = sorted((p for report in reports for p in report.problems), key=lambda p: p.first_ids[0])
        if context.scoring.bad_rows == "error":
            raise_first_problem(problems, ModelOutputError)
        publication = None
        if context.ranks.rank == 0:
            sound = sum(report.rows for report in reports) - sum(problem.count for problem in problems)
            published = context.coordinator.publish(version, sound if whole else None)
            publication = published._replace(notices=_notices(reports, problems))
        return context.ranks.from_first(publication)  # type: ignore[return-value]  # rank 0's is none


class _RankReport(NamedTuple):
    rows: int
    problems: list[Problem]
    notices: tuple[str, ...]


def _notices(reports: list[_RankReport], problems: list[Problem]) -> tuple[str, ...]:
    kept = [kept_rows_notice(problems)] if problems else []
    return tuple(dict.fromkeys([*(notice for report in reports for notice in report.notices), *kept]))


class WorkersEngine(DeliveringEngine):
    """The ranks measure the rows of their own nodes with the model that they train."""

    _scorer: Scorer | None = None

    def update(self, epoch: int, version: int, model: nn.Module) -> Publication | None:
        if not self._context.scheduler.scores_due_after(epoch):
            return None
        return self.sweep(epoch, version, model)

    def sweep(self, epoch: int, version: int, model: nn.Module) -> Publication:
        """Measure all rows and publish."""
        context = self._context
        # A loop may pass another model, such as an averaged copy, at times.
        if self._scorer is None or self._scorer.model is not unwrap_model(model):
            self._scorer = Scorer(
                context.measurer,
                context.shards.columns.label,
                forward=context.scoring,
                device=context.device,
                model=model,
            )
        started = time.perf_counter()
        with context.profiler.scoring():
            found = self._scorer.measure_batches(context.loader.rows(context.scoring.batch_size))
        self._deliver(epoch, version + 1, found, _AFTER_ALL_STEPS)
        return self._publish(version + 1, found, whole=True)._replace(seconds=time.perf_counter() - started)


class OnlineEngine(DeliveringEngine):
    """The outputs of training are the measures; rows that were not seen keep their score."""

    def __init__(self, context: EngineContext) -> None:
        super().__init__(context)
        if context.measurer.needs_model:
            raise ConfigError(
                f"scoring.engine=online measures the outputs of training, and information="
                f"{context.measurer.information!r} needs the model itself. Use engine=workers or actors"
            )
        self._sweeper = WorkersEngine(context)
        self._seen: list[tuple[Tensor, ...]] = []  # on the device until the end of the epoch
        self._observed = _nothing()

    def observe(self, step: int, row_ids: Tensor, rows: Observation, similarity: Tensor) -> None:
        information = self._context.measurer.information_of(rows)
        unpaired = torch.zeros_like(row_ids, dtype=torch.bool) if rows.unpaired is None else rows.unpaired
        self._seen.append((row_ids, similarity, information, unpaired, torch.full_like(row_ids, step)))

    def hand_over(self, epoch: int, version: int) -> None:
        if not self._seen:
            return
        rows, similarity, information, unpaired, step = (
            torch.cat(column).cpu().numpy() for column in zip(*self._seen, strict=True)
        )
        self._seen = []
        own = rows != FILLER
        rows, similarity, information, unpaired = rows[own], similarity[own], information[own], unpaired[own]
        bad = not_finite(similarity, information, unpaired)
        information[bad] = np.nan
        found = RowMeasures(rows, similarity, information, problems=bad_row_problems(rows, bad))
        self._deliver(epoch, version + 1, found, step[own].astype(np.int32))
        self._observed.problems.extend(found.problems)

    def update(self, epoch: int, version: int, model: nn.Module) -> Publication | None:
        self.hand_over(epoch, version)
        context = self._context
        if not context.scheduler.scores_due_after(epoch):
            return None
        every = context.scoring.sweep_every
        observed, self._observed = self._observed, _nothing()
        if epoch < 0 or (every and (version + 1) % every == 0):
            return self._sweeper.sweep(epoch, version, model)
        publication = self._publish(version + 1, observed, whole=False)
        if publication.failure:
            raise ConfigError(
                "scoring.engine=online measures what sampler.observe(batch, outputs) is given, and up to epoch "
                f"{epoch} that was nothing. Call it in the loop, or use another engine"
            )
        return publication


def _nothing() -> RowMeasures:
    return RowMeasures(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.float32))


_ENGINES: dict[str, type[Engine]] = {"actors": ActorsEngine, "workers": WorkersEngine, "online": OnlineEngine}


def make_engine(context: EngineContext) -> Engine:
    """The engine of the settings."""
    return _ENGINES[context.scoring.engine](context)


class ScoreUpdates:
    """Requests new scores from the engine; a run can do without them for a while.

    Args:
        engine: Engine that makes the updates.
        allowed_failures: Number of failures in a row that are allowed.
        notice: Function that tells the user something.

    Attributes:
        rows_per_second: Speed of the scoring pass of the last update; None if there was no pass.
    """

    def __init__(self, engine: Engine, allowed_failures: int, notice: Callable[[str], None]) -> None:
        self._engine = engine
        self._allowed = allowed_failures
        self._notice = notice
        self._failures = 0
        self.rows_per_second: float | None = None

    def after(self, epoch: int, version: int, model: nn.Module) -> int:
        """The current score version after `epoch`, before which it was `version`.

        Raises:
            ScoringError: Updates have failed too often in a row.
            ScoringFailedError: This update has failed, and there are no earlier scores.
            LostStateError: The coordinator was restarted.
        """
        self.rows_per_second = None
        publication = self._engine.update(epoch, version, model)
        if publication is None:
            return version
        for text in publication.notices:
            self._notice(text)
        if publication.failure:
            self._go_on_without(epoch, version, publication)
            return version
        if publication.version != version + 1:
            raise LostStateError(
                f"the coordinator stands at score version {publication.version}, not {version + 1}: it was restarted"
            )
        self._failures = 0
        if publication.seconds > 0:
            self.rows_per_second = publication.measured / publication.seconds
        return publication.version

    def _go_on_without(self, epoch: int, version: int, publication: Publication) -> None:
        self._failures += 1
        if version == 0:
            raise ScoringFailedError(f"there are no first scores: {publication.failure}")
        if self._failures > self._allowed:
            raise ScoringError(
                f"scores could not be updated {self._failures} times in a row, and scoring.max_failed_updates="
                f"{self._allowed}: {publication.failure}. Check the scorers' resources and logs; the same command "
                "resumes from the last checkpoint"
            )
        self._notice(
            f"Warning: no new scores after epoch {epoch}: {publication.failure}. The run continues with score version "
            f"{version} (failure {self._failures} of {self._allowed} in a row)"
        )
