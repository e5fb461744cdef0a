"""BalancedTrainer: a Ray Train run whose ranks draw from one balance-aware order."""

from __future__ import annotations

import functools
import itertools
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import ray
import ray.train
import ray.train.torch
from ray.actor import ActorHandle

from bss_ray.data.build import build_split
from bss_ray.data.columns import Columns
from bss_ray.data.shards import Shards
from bss_ray.data.store import StoreConfig
from bss_ray.errors import ConfigError, first_line
from bss_ray.measure.measurer import Measurer
from bss_ray.placement.packing import ProcessGroup
from bss_ray.placement.resources import (
    HOLDERS,
    SCORERS,
    Placement,
    ResourceRequest,
    check_resources,
    in_this_process,
    scorer_options,
)
from bss_ray.runtime.messages import Message, Notice, OnMessage, ShardsProgress, Status
from bss_ray.runtime.threads import ONE_ARENA
from bss_ray.runtime.wait import DEFAULT_LIMIT_S, set_wait_limit
from bss_ray.sample.actors import start_coordinator, start_holders
from bss_ray.sample.client import CoordinatorClient, Holders, LocalHolders
from bss_ray.sample.coordinator import Coordinator, check_batch_size
from bss_ray.sample.holder import Holder
from bss_ray.sample.plan import Tail
from bss_ray.sample.service import CoordinatorService
from bss_ray.sample.state import SavedScores
from bss_ray.schedule.schedulers import Learning, Scheduler
from bss_ray.scoring.actors import RayScorers, scorer_names, start_scorers
from bss_ray.scoring.config import Scoring
from bss_ray.scoring.pool import ScorerPool
from bss_ray.storage import StoragePath, absolute
from bss_ray.storage.probe import check_storage
from bss_ray.train.backend import SamplerContext, TrainBackend
from bss_ray.train.initial import ScoresFile
from bss_ray.train.rank_trainer import fit_ranks, remove_orphaned_placement_groups
from bss_ray.train.ray_backend import RayTrainBackend
from bss_ray.train.sampler import run_rank
from bss_ray.train.supervise import EventReader, supervise, watch

Rows: TypeAlias = "ray.data.Dataset | Shards"


class BalancedTrainer:
    """Trains with `ray.train.torch.TorchTrainer`; inside the loop `bss_ray.get_sampler()` hands out batches.

    Args:
        train_loop: Function with no or one argument (`train_loop_config`), which every rank runs.
        dataset: Training rows: a Ray Dataset, or `Shards` that are shared by several runs; or a function that returns
            one of them, called when it is known that the cluster can hold the run.
        columns: Roles of the columns.
        validation: Validation rows, in the same forms as `dataset`; optional.
        scheduler: Scheduler, from scores to sampling weights; default `Learning()`.
        measurer: How balance is measured; default `Measurer()`.
        scoring: How and where rows are scored; default `Scoring()`.
        batch_size: Number of rows of a *global* batch, over all ranks.
        tail: Whether to `keep` or `drop` the last, smaller batch of an epoch.
        seed: Seed of the order of rows, in [0, 2**64).
        num_classes: Number of classes C; None takes the largest training label + 1.
        store: Where the rows of a Ray Dataset are kept; default `StoreConfig()`.
        train_loop_config: Argument of `train_loop`.
        scaling_config: Ranks and their resources; default one rank. `num_workers=0` trains in this process, without
            other processes for the sampler unless scoring requires scorers: for debugging, and for trials of a search.
        run_config: Name and storage of the run. A run with the same name and storage is resumed.
        wait_limit_s: Longest time, in seconds, that one process of the run waits for another, and that a run continues
            without a live rank; then the ranks start again from the last checkpoint, or the run ends.
        initial_scores: Parquet file or folder of scores (from `bss-ray score`, or a run's `scores.parquet`), or another
            reader of scores, that the first epoch is drawn from; there is no burn-in then.
        placement: Where ranks and scorers run, and what they leave to others; default `Placement()`. Settings at their
            default are taken from `scaling_config`.
        backend: Backend that runs the ranks and keeps their checkpoints; default Ray Train, which with `num_workers=0`
            keeps no checkpoints.
        profile: Whether to record a training step and a scoring pass; they come as messages (see
            `bss_ray.runtime.profiling`).
        on_message: Function that is called in the driver with each message of the run, for progress displays; the
            classes of messages are in `bss_ray.runtime.messages`. None logs the notices.

    Raises:
        ConfigError: A setting is out of its range.
    """

    def __init__(
        self,
        train_loop: Callable[..., Any],
        *,
        dataset: Rows | Callable[[], Rows],
        columns: Columns | None = None,
        validation: Rows | Callable[[], Rows | None] | None = None,
        scheduler: Scheduler | None = None,
        measurer: Measurer | None = None,
        scoring: Scoring | None = None,
        batch_size: int = 64,
        tail: Tail = "keep",
        seed: int = 0,
        num_classes: int | None = None,
        store: StoreConfig | None = None,
        train_loop_config: Any = None,
        scaling_config: ray.train.ScalingConfig | None = None,
        run_config: ray.train.RunConfig | None = None,
        wait_limit_s: float = DEFAULT_LIMIT_S,
        initial_scores: str | SavedScores | None = None,
        placement: Placement | None = None,
        backend: TrainBackend | None = None,
        profile: bool = False,
        on_message: OnMessage | None = None,
    ) -> None:
        if isinstance(dataset, Shards):
            columns = dataset.columns
        elif columns is None:
            raise ConfigError("name the modalities and the label: columns=Columns(modalities=(...), label=...)")
        self._train_loop = train_loop
        self._dataset, self._validation = dataset, validation
        self._columns = columns
        # Burn-in is only for runs without scores.
        self._scheduler = scheduler or Learning()
        if initial_scores is not None:
            self._scheduler = replace(self._scheduler, burn_in=0)
        self._initial_scores = initial_scores
        self._placement = placement or Placement()
        self._backend = backend or RayTrainBackend()
        self._measurer = measurer or Measurer()
        self._scoring = scoring or Scoring()
        self._batch_size, self._tail, self._seed = batch_size, tail, seed
        self._num_classes = num_classes
        self._store = store or StoreConfig()
        self._train_loop_config = train_loop_config
        self._scaling_config = self._placement.scaling(scaling_config or ray.train.ScalingConfig(num_workers=1))
        self._run_config = run_config or ray.train.RunConfig()
        if self._run_config.storage_filesystem is None:
            self._run_config = replace(self._run_config, storage_path=absolute(self._run_config.storage_path))
        if not wait_limit_s > 0:
            raise ConfigError(f"wait_limit_s must be positive; received {wait_limit_s}")
        self._wait_limit_s = wait_limit_s
        self._profile = profile
        self._on_message = on_message or _log_notice
        self.train_shards: Shards | None = None

    def fit(self) -> ray.train.Result:
        """Build the shards, start the actors, and train to the end.

        Returns:
            Ray Train's result; `metrics` are those of the last epoch.

        Raises:
            DataError: The data breaks a rule (see `build_split`).
            ResourceError: The cluster can never run the run.
            StorageError: A node cannot write to the run's storage.
            BssRayError: Any other error of settings, data or model inside the ranks.
            ray.train.TrainingFailedError: Any other error of the ranks, after all retries.
            WaitError: There was no live rank for `wait_limit_s`.
            KeyboardInterrupt: Ctrl-C in this thread, which must be the main thread, after the ranks have saved a
                checkpoint; the same call resumes the run.
        """
        set_wait_limit(self._wait_limit_s)
        request = check_resources(self._scaling_config, self._scoring, self._placement)
        if self._scaling_config.num_workers:  # otherwise Ray Train keeps nothing of this run
            check_storage(StoragePath.of(self._run_config.storage_path, self._run_config.storage_filesystem))
        train, validation = self._build_shards()
        check_batch_size(self._batch_size, train.rows)
        self.train_shards = train

        for text in request.notices:
            self._on_message(Notice(text))
        self._on_message(Status("starting holders and ranks"))
        context, actors = self._start_actors(train, validation, request)
        events = EventReader(context.coordinator.events, self._on_message)
        try:
            return self._run_ranks(context, events, request.groups)
        finally:
            for actor in actors:
                ray.kill(actor)

    def _run_ranks(
        self, context: SamplerContext, events: EventReader, groups: Sequence[ProcessGroup]
    ) -> ray.train.Result:
        """Let Ray Train run the ranks to the end; a user error in a rank is raised without wrappers."""
        fit = functools.partial(self._fit_again, functools.partial(self._fit_once, context, groups), events)
        stopping = False
        try:
            if self._scaling_config.num_workers == 0:  # the ranks are this thread
                with watch(events):
                    result = fit()
            else:
                result, stopping = supervise(fit, events)
        except ray.train.TrainingFailedError as error:
            fatal = events.fatal_error()
            if fatal is None:
                raise
            raise fatal from error
        fatal = events.fatal_error()
        if fatal is not None:
            raise fatal
        if stopping:
            raise KeyboardInterrupt
        return result

    def _fit_once(self, context: SamplerContext, groups: Sequence[ProcessGroup]) -> ray.train.Result:
        return fit_ranks(
            functools.partial(run_rank, context, self._train_loop, self._train_loop_config),
            groups=groups,
            prefix=context.prefix,
            shards=[split for split in (context.train, context.validation) if split is not None],
            wait_limit_s=self._wait_limit_s,
            scaling_config=self._scaling_config,
            run_config=_with_one_arena(self._run_config),
        )

    def _fit_again(self, fit: Callable[[], ray.train.Result], events: EventReader) -> ray.train.Result:
        """Fit again under the same name after the loss of Ray Train's controller, which Ray does not restart."""
        failures = (self._run_config.failure_config or ray.train.FailureConfig()).max_failures
        for attempt in itertools.count(1):
            try:
                return fit()
            except ray.exceptions.RayActorError as error:
                if 0 <= failures < attempt:
                    raise
                remove_orphaned_placement_groups()
                why = first_line(error)
                events.notice(f"Ray Train's controller is lost; training resumes from the last checkpoint ({why})")
        raise AssertionError("unreachable")

    def _start_actors(
        self, train: Shards, validation: Shards | None, request: ResourceRequest
    ) -> tuple[SamplerContext, list[ActorHandle]]:
        """Start the run's actors; returns the ranks' context, and the actors' handles, which keep them alive."""
        measurer, scoring = self._measurer.for_task(train.columns.task), request.scoring
        initial = self._initial_scores
        if isinstance(initial, str):
            initial = ScoresFile(initial, train)
        run = str(self._run_config.name)
        make = functools.partial(
            Coordinator,
            rows=train.rows,
            scheduler=self._scheduler,
            seed=self._seed,
            batch_size=self._batch_size,
            tail=self._tail,
            accumulation=scoring,
        )
        holders: Holders
        coordinator: CoordinatorClient
        actors: list[ActorHandle] = []
        if in_this_process(self._scaling_config, scoring):
            holders = LocalHolders([Holder([(part.first_row, part.rows) for part in train.parts])])
            coordinator = CoordinatorService(holders, make, run=run)
            prefix = f"bss_ray-{uuid.uuid4().hex[:8]}-"
        else:
            nodes = request.assign_nodes(train)
            count, cpus = scoring.num_holders, scoring.cpus_per_holder
            holders, actors = start_holders(train, count=count, cpus=cpus, nodes=nodes[HOLDERS], run=run)
            prefix, pool = holders.prefix, None
            if scoring.engine == "actors":
                options = scorer_options(self._scaling_config, scoring)
                actors += start_scorers(train, measurer, scoring, holders, nodes[SCORERS], options)
                names = scorer_names(holders, scoring)
                pool = ScorerPool(names, scoring.restart_timeout_s, RayScorers(), scoring.bad_rows)
            coordinator, handle = start_coordinator(holders, make, pool, run=run)
            actors.append(handle)
        return SamplerContext(
            coordinator=coordinator,
            holders=holders,
            prefix=prefix,
            backend=self._backend,
            train=train,
            validation=validation,
            scheduler=self._scheduler,
            measurer=measurer,
            scoring=scoring,
            seed=self._seed,
            wait_limit_s=self._wait_limit_s,
            run=run,
            profile=self._profile,
            initial_scores=initial,
        ), actors

    def _build_shards(self) -> tuple[Shards, Shards | None]:
        dataset = self._dataset() if callable(self._dataset) else self._dataset
        train = self._shards("train", dataset, None)
        validation = self._validation() if callable(self._validation) else self._validation
        return train, None if validation is None else self._shards("validation", validation, train)

    def _shards(self, split: str, rows: Rows, train: Shards | None) -> Shards:
        if isinstance(rows, Shards):
            return rows
        return build_split(
            split,
            rows,
            self._columns,
            train=train,
            num_classes=self._num_classes,
            min_shards=max(self._scoring.num_holders, self._scoring.num_scorers),
            store=self._store,
            on_notice=lambda text: self._on_message(Notice(text)),
            on_progress=lambda done, of: self._on_message(ShardsProgress(split, done, of)),
        )


def _with_one_arena(run_config: ray.train.RunConfig) -> ray.train.RunConfig:
    """Give the ranks' processes one malloc arena, unless the user has set it in their environment."""
    return run_config if run_config.worker_runtime_env else replace(run_config, worker_runtime_env=ONE_ARENA)


def _log_notice(message: Message) -> None:
    """Log messages to the user if nothing else shows messages."""
    if isinstance(message, Notice):
        logging.getLogger("bss_ray").warning(message.text)
