"""The sampler inside a train loop: `sampler = bss_ray.get_sampler()`.

A loop plans an epoch, gets its batches, observes the outputs, publishes scores and reports. All ranks make
the same calls.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bss_ray.data.shards import Shards
from bss_ray.errors import BssRayError, CheckpointError, ConfigError, ModelOutputError
from bss_ray.load.loader import FILLER, Loader, Transform
from bss_ray.measure.observation import Outputs
from bss_ray.measure.snapshot import unwrap_model
from bss_ray.models.weights import load_weights
from bss_ray.names import FEATURES, FUSED
from bss_ray.runtime.messages import AttemptStarted, EpochFinished, FatalError, Status
from bss_ray.runtime.profiling import Profiler
from bss_ray.runtime.threads import keep_freed_memory
from bss_ray.runtime.wait import set_wait_limit, unwrap_ray_error
from bss_ray.sample.client import Review
from bss_ray.sample.plan import Order, Plan
from bss_ray.scoring.engines import Engine, EngineContext, ScoreUpdates, make_engine
from bss_ray.train.backend import SamplerContext, Stateful
from bss_ray.train.checkpoint import Position, Saver
from bss_ray.train.observed import Observed, Sums
from bss_ray.train.reporter import Reporter
from bss_ray.train.supervise import EventReader, StopAction, Stopped, StopPoll, heartbeat


class Sampler:
    """One rank's view of the sampler.

    Attributes:
        shards: The training rows.
        measurer: How rows are measured; its `loss` is the training loss of the method.
        device: Device of this rank.
        rank: Number of this rank among all ranks, from 0.
        loss_scale: Factor of the current batch: multiply its *mean* loss by it. DDP averages gradients over ranks; with
            this factor the average is the gradient of the mean over the global batch.
        resumed: Whether this attempt resumes from a checkpoint.
    """

    def __init__(self, context: SamplerContext) -> None:
        self.measurer = context.measurer
        self.loss_scale = 1.0
        self._context = context
        self._backend = context.backend
        self.device = self._backend.device()
        self._ranks = self._backend.ranks()
        self.rank = self._ranks.rank
        self._say = Reporter(context, self.rank, lambda: self._position)
        self._saver = Saver(context, self._ranks)
        self.shards = self._as_they_lie(context.train)
        nodes = self._ranks.gather(self._backend.node())
        self._loader, self._validation = self._make_loaders(nodes)
        self._plan: Plan | None = None
        self._ended = False
        self._seconds = {"scoring": 0.0, "planning": 0.0, "training": 0.0}
        self._observed = Observed(self.device)
        self._model: nn.Module | None = None
        self._profiler = Profiler(context.profile and self.rank == 0, self._say.post)
        self._epochs = 0
        begin = self._saver.restore()
        self._position, self._saved = begin.position, begin.saved
        self._history: list[dict[str, Any]] = [] if begin.manifest is None else begin.manifest.history
        if begin.manifest is not None and self.rank == 0:  # sums over all ranks, which one rank continues
            self._observed.restore(begin.manifest.observed)
        self._engine = self._make_engine(begin.attempt)
        self._updates = ScoreUpdates(self._engine, context.scoring.max_failed_updates, self._say.notice)
        self.resumed = self._saved is not None
        self._restored = False
        self._stateful: dict[str, Stateful] = {}
        self._stops = StopPoll(self._ranks, context.coordinator.events.stop_requested, self._taken_away)
        self._preempted = False
        self._say.post(AttemptStarted(self._position.batch, restarts=int(self.resumed)))
        self._say.placement(nodes)
        self._say.log("resumes from a checkpoint" if self.resumed else "begins")

    def _as_they_lie(self, shards: Shards) -> Shards:
        """Shards with their nodes in this attempt; the ranks must agree, because nodes decide which rank reads what."""
        return shards.on(self._ranks.from_first(shards.nodes() if self.rank == 0 else []))

    def _make_loaders(self, nodes: list[str]) -> tuple[Loader, Loader | None]:
        def load(shards: Shards) -> Loader:
            return Loader(
                shards,
                rank=self._ranks.rank,
                rank_nodes=nodes,
                device=self.device,
                seed=self._context.seed,
                prefix=self._context.prefix,
            )

        validation = self._context.validation
        return load(self.shards), None if validation is None else load(self._as_they_lie(validation))

    def _make_engine(self, attempt: str) -> Engine:
        context = self._context
        return make_engine(
            EngineContext(
                coordinator=context.coordinator,
                holders=context.holders,
                attempt=attempt,
                shards=self.shards,
                loader=self._loader,
                scheduler=context.scheduler,
                measurer=self.measurer,
                scoring=context.scoring,
                ranks=self._ranks,
                device=self.device,
                profiler=self._profiler,
            )
        )

    # ---- the loop -----------------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on this rank's device, wrapped among several ranks (by DDP, as `ray.train.torch.prepare_model`)."""
        return model.to(self.device) if self._ranks.count == 1 else self._backend.prepare(model)

    def restore(self, *, model: nn.Module, **stateful: Stateful) -> bool:
        """Load model, optimiser and other objects from the checkpoint if this run is resumed.

        The same objects are saved when the run is stopped in the middle of an epoch (Ctrl-C, `ray job stop`), or before
        a node is taken away.

        Args:
            model: The module, wrapped by DDP or not.
            **stateful: Objects under the same names that are given to `report`.

        Returns:
            Whether there was a checkpoint.

        Raises:
            CheckpointError: The checkpoint is damaged, or of another model (the error names the keys).
        """
        self._restored = True
        self._model, self._stateful = model, stateful
        if self._saved is None:
            return False
        load_weights(unwrap_model(model), self._saved.state("model", map_location=self.device), "the last checkpoint")
        for name, part in stateful.items():
            try:
                # Optimisers move their moments to their parameters' device, and keep counts of steps where they come
                # from: on a GPU each count would be waited for in every step.
                where = "cpu" if isinstance(part, torch.optim.Optimizer) else self.device
                part.load_state_dict(self._saved.state(name, map_location=where))
            except CheckpointError:
                raise
            except (RuntimeError, ValueError, KeyError) as error:
                raise CheckpointError(f"the checkpoint's {name} does not fit this run's {name}: {error}") from error
        return True

    def epochs(self, n: int, *, model: nn.Module | None = None) -> Iterator[int]:
        """Epochs 0..n-1, from the epoch of the checkpoint on.

        Args:
            n: Number of epochs of the whole run.
            model: Untrained model; needed only with `burn_in=0`, whose first epoch is drawn from this model's scores.

        Raises:
            ConfigError: The run is resumed and `restore` was not called, or `burn_in=0` without a model.
        """
        if self.resumed and not self._restored:
            raise ConfigError(
                f"this run resumes at epoch {self._position.epoch}, batch {self._position.batch}, and its model would "
                "start untrained: call sampler.restore(model=model, optimizer=optimizer, ...) before sampler.epochs(n)"
            )
        if self._model is None:  # `restore` has the trained model; this model may be another one for the first scores
            self._model = model
        if self._position == Position() and self._context.scheduler.scores_due_after(-1):
            if model is None:
                raise ConfigError(
                    "burn_in=0 draws the first epoch from scores of the untrained model: call "
                    "sampler.epochs(n, model=model), or set burn_in >= 1"
                )
            self._update_scores(-1, model)
            self._backend.scored_first(lambda: self._saver.scores(self._position.version))
        self._epochs = n
        while self._position.epoch < n:
            epoch = self._position.epoch
            self._ended = False
            if self._position.batch == 0 and self._model is not None:
                self._engine.go_on(epoch, self._position.version, self._model)
            yield epoch
            if self._position.epoch == epoch:
                # The loop did not report this epoch; continue without a checkpoint.
                self._position = Position(epoch + 1, 0, self._position.version)

    def batches(self, transform: Transform | None = None, *, step_batches: int = 1) -> Iterator[dict[str, Tensor]]:
        """This rank's parts of the epoch's global batches, from the batch of the checkpoint on.

        They are made in the background, ahead of the loop. A run that is told to stop saves the objects given to
        `restore` and leaves the loop here.

        Args:
            transform: Function that augments a batch on its device, in the background: `transform(batch, random)`
                returns the batch. `random` draws numbers that belong to rows (see `RowRandom`), so that augmented data,
                too, is the same on any number of ranks. Scoring passes measure rows as they are stored.
            step_batches: Number of batches of one optimiser step, if gradients are accumulated: a run that is told to
                stop ends after a whole step.

        Yields:
            `{modality: (b, ...), label: (b,), "row_id": (b,) int64}` on the rank's device. With a tail
            of fewer rows than ranks some ranks receive one filler row, `row_id` -1 and `loss_scale` 0.

        Raises:
            ConfigError: The transform returned something else than a batch.
        """
        started = time.perf_counter()
        epoch = self._position.epoch
        at = self._position
        plan = self._context.coordinator.plan(epoch, at.version, at.batch)
        self._say.warn(plan.warnings)
        order = Order(plan, self._window)
        profiled = not self._context.scheduler.is_burn_in(epoch) or epoch + 1 == self._epochs
        self._plan = plan
        self._seconds["planning"] += time.perf_counter() - started
        self._say.log("%d global batches of %d rows, from batch %d", plan.batches, plan.rows, at.batch)
        started = time.perf_counter()
        try:
            with contextlib.closing(self._loader.batches(plan, order, self._position.batch, transform)) as loaded:
                for batch in loaded:
                    if batch.number % step_batches == 0:
                        self._follow(self._stops.next_action())
                    self.loss_scale = batch.loss_scale
                    # Set before the batch is used, because a loop that saves in its body has trained on it.
                    self._position = replace(self._position, batch=batch.number + 1)
                    self._say.progress(
                        plan, batch.number, waited_s=self._loader.waited, spent_s=time.perf_counter() - started
                    )
                    with self._profiler.step(batch.number, plan.batches, due=profiled):
                        yield batch.tensors
            self._share_buffers()
        finally:
            self._ended = True
            self._seconds["training"] += time.perf_counter() - started

    def _share_buffers(self) -> None:
        """Copy rank 0's running statistics to all ranks, as DDP does before a step: all measure the saved model."""
        if self._model is not None and self._ranks.count > 1:
            for buffer in unwrap_model(self._model).buffers():
                self._ranks.broadcast(buffer)

    @property
    def position(self) -> Position:
        """(epoch, next global batch, score version)."""
        return self._position

    @property
    def plan(self) -> Plan:
        """The plan of the current epoch."""
        assert self._plan is not None, "there is a plan once batches() has begun"
        return self._plan

    def loss(self, batch: Mapping[str, Tensor], outputs: Outputs) -> Tensor:
        """The method's loss of each row of a batch over the modalities that the row has: (b,) with gradients."""
        single = {name: values.float() for name, values in outputs.items() if name != FEATURES}
        return self.measurer.loss(single, batch[self.shards.columns.label], batch=batch)

    def observe(self, batch: Mapping[str, Tensor], outputs: Outputs) -> None:
        """Observe the outputs of a training step: running means, and with the engine `online` the measures.

        Nothing leaves the device until the epoch's report.

        Raises:
            ModelOutputError: The outputs cannot be measured.
        """
        with torch.no_grad():
            rows = self.measurer.observe(outputs, batch[self.shards.columns.label], batch=batch)
            self._check_width(outputs[FUSED].shape[1])
            similarity = self.measurer.similarity_of(rows)
            self._engine.observe(self._position.batch, batch["row_id"], rows, similarity)
            self._observed.add(rows, similarity, own=batch["row_id"] != FILLER)

    def _check_width(self, width: int) -> None:
        """Check the number of logits: at least that of the labels for classes, otherwise exactly."""
        needed, task = self.shards.num_classes, self.shards.columns.task
        if task == "multiclass" and width < needed:
            raise ModelOutputError(f"the data has {needed} classes and the model's logits only {width}")
        if task != "multiclass" and width != needed:
            raise ModelOutputError(
                f"for {task} labels of {needed} values a head must return as many; this model's return {width}"
            )

    @property
    def has_validation(self) -> bool:
        """Whether the trainer was given validation data."""
        return self._validation is not None

    def validation_batches(
        self, batch_size: int = 256, transform: Transform | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """This rank's share of the validation rows; over all ranks each row occurs once.

        Args:
            batch_size: Number of rows of a batch on this rank.
            transform: As in `batches`; its random numbers are the same in every epoch.

        Raises:
            ConfigError: The trainer was given no validation data.
        """
        if self._validation is None:
            raise ConfigError("there is no validation data: give BalancedTrainer(validation=...)")
        return self._validation.rows(batch_size, transform)

    # ---- reports ------------------------------------------------------------------------------

    def report(self, metrics: Mapping[str, Any], *, model: nn.Module, **stateful: Stateful) -> dict[str, Any]:
        """End an epoch: publish new scores if they are due, then report metrics with a checkpoint.

        Inside the loop over batches it saves a checkpoint in the middle of the epoch instead. Every rank must call it
        equally often, because it is a barrier.

        Args:
            metrics: Metrics of this epoch; every rank gives some, and those of rank 0 are kept.
            model: Model to score and save, wrapped by DDP or not.
            **stateful: Objects to save under their names, e.g. `optimizer=optimizer`.

        Returns:
            The reported metrics, with the sampler's own figures.
        """
        if not self._ended:
            return self._save_unfinished(metrics, model, stateful)
        epoch, plan = self._position.epoch, self.plan
        # Rank 0 asks for all ranks: a later call might find that rank 0 has already published new scores.
        asks = self.rank == 0
        review = self._ranks.from_first(self._context.coordinator.review(epoch, plan.version) if asks else None)
        assert review is not None, "rank 0 has asked"
        self._say.warn(review.warnings)
        self._model = model
        self._update_scores(epoch, model)
        row = {"epoch": epoch, **self._figures(plan), **self._score_figures(review)}
        if self._updates.rows_per_second is not None:
            row["scoring_rows_per_second"] = round(self._updates.rows_per_second, 1)
        row |= metrics
        self._history = [*self._history, row]
        following = Position(epoch + 1, 0, self._position.version)
        self._save(row, following, Sums(), model, stateful)
        self._position = following
        self._say.post(EpochFinished(row, self._history, epoch=epoch))
        return row

    def _save_unfinished(
        self, metrics: Mapping[str, Any], model: nn.Module, stateful: dict[str, Stateful]
    ) -> dict[str, Any]:
        """A checkpoint in the middle of an epoch."""
        row = {"epoch": self._position.epoch, "batch": self._position.batch, **metrics}
        self._engine.hand_over(self._position.epoch, self._position.version)
        self._save(row, self._position, self._observed.over(self._ranks), model, stateful)
        return row

    def _figures(self, plan: Plan) -> dict[str, Any]:
        """The sampler's own metrics of the epoch just ended; starts the next epoch's."""
        figures: dict[str, Any] = {"rows": plan.rows, "score_version": plan.version, **plan.diagnostics}
        figures |= self._loader_figures()
        figures |= self._observed.over(self._ranks).means()
        figures |= {f"seconds_{name}": round(seconds, 3) for name, seconds in self._seconds.items()}
        self._observed.reset()
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return figures

    def _score_figures(self, review: Review) -> dict[str, Any]:
        """Ages, in versions, of the scores that the epoch was drawn from, and numbers of rows left out."""
        ages = review.ages
        return {
            "neglected_rows": review.neglected_rows,
            "score_age": ages.total / max(ages.scored, 1),
            "oldest_score": ages.oldest,
            "unscored_rows": self.shards.rows - ages.scored,
        }

    def _loader_figures(self) -> dict[str, Any]:
        """Over all ranks: rows of the epoch that came from another node, and the share of time waited for batches."""
        loader = self._loader
        own = [loader.moved, loader.read, loader.waited, self._seconds["training"]]
        moved, read, waited, training = self._ranks.sum(torch.tensor(own, dtype=torch.float64, device=self.device))
        return {
            "moved_share": moved / max(read, 1),
            "moved_rows": int(moved),
            "loader_stall_share": round(waited / max(training, 1e-9), 4),
        }

    def _update_scores(self, epoch: int, model: nn.Module) -> None:
        """New scores after `epoch` if they are due; see `ScoreUpdates.after` for errors."""
        started = time.perf_counter()
        if self._context.scheduler.scores_due_after(epoch):
            self._say.post(Status("scoring"))
        version = self._updates.after(epoch, self._position.version, model)
        self._position = replace(self._position, version=version)
        self._seconds["scoring"] += time.perf_counter() - started

    def _save(
        self,
        row: dict[str, Any],
        position: Position,
        observed: Sums,
        model: nn.Module,
        stateful: dict[str, Stateful],
    ) -> None:
        self._saver.save(row, position, self._history, observed, model, stateful)
        self._say.log("saved a checkpoint for epoch %d, batch %d", position.epoch, position.batch)

    # ---- internals ----------------------------------------------------------------------------

    def _window(self, index: int) -> np.ndarray:
        window = self._context.coordinator.window(self.plan.epoch, index, self.plan.version)
        return window.get(f"window {index} of epoch {self.plan.epoch}")

    def _taken_away(self) -> bool:
        """Whether a node will be taken away, and nothing was saved for this yet."""
        return not self._preempted and self._backend.preempted()

    def _follow(self, action: StopAction) -> None:
        """Save once before a node is taken away, or before the run stops.

        Raises:
            Stopped: The run stops.
        """
        if action == "continue":
            return
        self._preempted = True
        if self._restored and self._model is not None:
            self._save_unfinished({}, self._model, self._stateful)
            saved = f"saved at epoch {self._position.epoch}, batch {self._position.batch}"
        else:
            saved = "nothing saved: the train loop does not call sampler.restore(model=..., optimizer=...)"
        self._say.notice(f"{'the run is to stop' if action == 'stop' else 'a node is about to be taken away'}: {saved}")
        if action == "stop":
            raise Stopped


_current: Sampler | None = None
_of_thread = threading.local()  # the sampler of a rank that is a thread


def set_sampler(sampler: Sampler | None, *, of_thread: bool = False) -> None:
    """Make `sampler` the one that `get_sampler` returns in this process, or in this thread."""
    global _current
    if of_thread:
        _of_thread.sampler = sampler
    else:
        _current = sampler


def get_sampler() -> Sampler:
    """The sampler of this rank, inside a train loop.

    Raises:
        ConfigError: The call is not inside a train loop of `BalancedTrainer`.
    """
    current: Sampler | None = getattr(_of_thread, "sampler", None) or _current
    if current is None:
        raise ConfigError(
            "get_sampler() works inside the train loop of BalancedTrainer(train_loop, ...).fit(). Without Ray use "
            "bss_ray.weighted_permutation; see examples/plain_torch.py"
        )
    return current


def run_rank(
    context: SamplerContext, train_loop: Callable[..., object], config: object, *, is_thread: bool = False
) -> object:
    """Run the user's loop on a rank, with a sampler.

    Args:
        context: What the rank is given to work with.
        train_loop: The user's loop, a function of no or one argument.
        config: Its argument.
        is_thread: Whether other ranks are threads of the same process.
    """
    set_wait_limit(context.wait_limit_s)
    events = EventReader(context.coordinator.events, lambda _: None)
    if events.fatal_error() is not None or events.stop_requested():
        return None  # no further attempt: it would fail again, and the trainer raises the error; or the run must stop
    keep_freed_memory()
    try:
        with heartbeat(context.coordinator.events):
            set_sampler(Sampler(context), of_thread=is_thread)
            return train_loop(config) if inspect.signature(train_loop).parameters else train_loop()
    except Stopped:
        return None
    except BssRayError as error:
        context.coordinator.events.post(FatalError(unwrap_ray_error(error)), wait=True)
        raise
    finally:
        set_sampler(None, of_thread=is_thread)
