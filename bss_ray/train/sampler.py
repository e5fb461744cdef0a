"""The sampler inside a train loop: `sampler = bss_ray.get_sampler()`.

It reads like the study loop of a tuner: plan an epoch, hand out its batches, observe the outputs,
publish scores and report. All ranks make the same calls.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from torch import Tensor, nn

from bss_ray.data.shards import Shards
from bss_ray.errors import CheckpointError, ConfigError, ModelOutputError
from bss_ray.measure.criteria import FUSED, Measurer, Outputs
from bss_ray.measure.forward import pack_model, unwrap_model
from bss_ray.sample.actors import ScoringJob
from bss_ray.sample.coordinator import Review
from bss_ray.sample.loader import FILLER, Loader, Transform
from bss_ray.sample.plan import Order, Plan
from bss_ray.sample.scorer import LostStateError
from bss_ray.sample.state import ScoreFile, write_scores
from bss_ray.schedule.schedulers import Scheduler
from bss_ray.train.checkpoint import (
    Manifest,
    Position,
    SavedCheckpoint,
    write_manifest,
    write_states,
)

# Messages about batches, at most one in so many seconds: the board is for people.
_POST_INTERVAL_S = 0.5


class Stateful(Protocol):
    """Anything with a state that belongs into a checkpoint: optimiser, schedule, scaler, ..."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class SamplerContext:
    """What the trainer sends to every rank."""

    coordinator: Any
    train: Shards
    validation: Shards | None
    scheduler: Scheduler
    measurer: Measurer
    seed: int


class Sampler:
    """One rank's view of the sampler.

    Attributes:
        shards: the training rows.
        measurer: how rows are measured; its `loss` is the training loss of the method.
        device: this rank's device.
        loss_scale: of the batch at hand: multiply its *mean* loss by it. DDP averages gradients over
            ranks; so scaled they are those of the mean over the global batch.
        resumed: whether this attempt goes on from a checkpoint.
    """

    def __init__(self, context: SamplerContext) -> None:
        train = ray.train.get_context()
        self.shards = context.train
        self.measurer = context.measurer
        self.device = ray.train.torch.get_device()
        self.loss_scale = 1.0
        self._context = context
        self._rank, self._ranks = train.get_world_rank(), train.get_world_size()
        node = ray.get_runtime_context().get_node_id()
        nodes = _gather_objects(node, self._ranks)
        self._loader = Loader(context.train, rank=self._rank, rank_nodes=nodes, device=self.device, seed=context.seed)
        self._validation: Loader | None = None
        if context.validation is not None:
            self._validation = Loader(
                context.validation, rank=self._rank, rank_nodes=nodes, device=self.device, seed=context.seed
            )
        self._plan: Plan | None = None
        self._ended = False
        self._position = Position()
        self._history: list[dict[str, Any]] = []
        self._posted = 0.0
        self._warned: set[str] = set()
        self._seconds = {"scoring": 0.0, "planning": 0.0, "training": 0.0}
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # see _observed
        self._saved = self._restore_scores()
        self.resumed = self._saved is not None
        self._restored = False

    # ---- the loop -----------------------------------------------------------------------------

    def restore(self, *, model: nn.Module, **stateful: Stateful) -> bool:
        """Load model, optimiser and the like from the checkpoint, if this run goes on from one.

        Args:
            model: the module, wrapped by DDP or not.
            **stateful: the same names that were given to `report`.

        Returns:
            Whether there was a checkpoint.

        Raises:
            CheckpointError: damaged, or of another model (names the keys).
        """
        self._restored = True
        if self._saved is None:
            return False
        for name, part in {"model": unwrap_model(model), **stateful}.items():
            try:
                part.load_state_dict(self._saved.state(name, map_location=self.device))
            except CheckpointError:
                raise
            except (RuntimeError, ValueError, KeyError) as error:
                raise CheckpointError(f"the checkpoint's {name} does not fit this run's {name}: {error}") from error
        return True

    def epochs(self, n: int, *, model: nn.Module | None = None) -> Iterator[int]:
        """Epochs 0..n-1, from where the checkpoint stopped.

        Args:
            n: number of epochs of the whole run.
            model: needed only with `burn_in=0`, whose first epoch is drawn from scores of the untrained model.

        Raises:
            ConfigError: the run goes on from a checkpoint and `restore` was not called, or `burn_in=0`
                without a model.
        """
        if self.resumed and not self._restored:
            raise ConfigError(
                f"this run goes on at epoch {self._position.epoch}, batch {self._position.batch}, and its model would "
                "start anew: call sampler.restore(model=model, optimizer=optimizer, ...) before sampler.epochs(n)"
            )
        if self._position == Position() and self._context.scheduler.scores_due_after(-1):
            if model is None:
                raise ConfigError(
                    "burn_in=0 draws the first epoch from scores of the untrained model: call "
                    "sampler.epochs(n, model=model), or set burn_in >= 1"
                )
            self._publish_scores(model)
            self._barrier()
        while self._position.epoch < n:
            epoch = self._position.epoch
            self._ended = False
            yield epoch
            if self._position.epoch == epoch:
                # The loop did not report this epoch: go on all the same, without a checkpoint.
                self._position = Position(epoch + 1, 0, self._position.version)

    def batches(self, transform: Transform | None = None) -> Iterator[dict[str, Tensor]]:
        """This rank's parts of the epoch's global batches, from where the checkpoint stopped.

        They are made in the background, ahead of the loop.

        Args:
            transform: augments a batch on its device, in the background: `transform(batch, random)` returns
                the batch. `random` draws numbers that belong to rows (see `RowRandom`), so that augmented
                data, too, is the same on any number of ranks. Scores are of rows as they are stored.

        Yields:
            `{modality: (b, ...), label: (b,), "row_id": (b,) int64}` on the rank's device. With a tail
            of fewer rows than ranks some ranks receive one filler row, `row_id` -1 and `loss_scale` 0.

        Raises:
            ConfigError: the transform returned something else than a batch.
        """
        started = time.perf_counter()
        epoch = self._position.epoch
        at = self._position
        plan: Plan = ray.get(self._context.coordinator.plan.remote(epoch, at.version, at.batch))
        self._warn(plan.warnings)
        order = Order(plan, self._window)
        self._plan = plan
        self._seconds["planning"] += time.perf_counter() - started
        started = time.perf_counter()
        try:
            with contextlib.closing(self._loader.batches(plan, order, self._position.batch, transform)) as loaded:
                for batch in loaded:
                    self.loss_scale = batch.loss_scale
                    # Set before the batch is used: who saves in the loop's body has trained on it.
                    self._position = replace(self._position, batch=batch.number + 1)
                    self._post_progress(epoch, batch.number, plan.batches)
                    yield batch.tensors
        finally:
            self._ended = True
            self._seconds["training"] += time.perf_counter() - started

    @property
    def position(self) -> Position:
        """(epoch, next global batch, score version)."""
        return self._position

    @property
    def plan(self) -> Plan:
        """The plan of the epoch at hand."""
        assert self._plan is not None, "there is a plan once batches() has begun"
        return self._plan

    def observe(self, batch: Mapping[str, Tensor], outputs: Outputs) -> None:
        """Look at the outputs of a training step: running means of the measures, without a forward pass.

        Nothing leaves the device until the epoch's report.

        Raises:
            ModelOutputError: outputs that cannot be measured.
        """
        measures = self.measurer.measure(outputs, batch[self.shards.columns.label])
        if outputs[FUSED].shape[1] < self.shards.num_classes:
            raise ModelOutputError(
                f"the data has {self.shards.num_classes} classes and the model's logits only {outputs[FUSED].shape[1]}"
            )
        own = batch["row_id"] != FILLER
        parts = (own, measures.similarity[own], measures.information[own])
        self._sums += torch.stack([part.sum(dtype=torch.float64) for part in parts])

    @property
    def has_validation(self) -> bool:
        """Whether the trainer was given validation data."""
        return self._validation is not None

    def validation_batches(
        self, batch_size: int = 256, transform: Transform | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """This rank's share of the validation rows; over all ranks each row comes once.

        Args:
            batch_size: rows of a batch on this rank.
            transform: as in `batches`; its random numbers are the same in every epoch.

        Raises:
            ConfigError: the trainer was given no validation data.
        """
        if self._validation is None:
            raise ConfigError("there is no validation data: give BalancedTrainer(validation=...)")
        return self._validation.rows(batch_size, transform)

    # ---- reports ------------------------------------------------------------------------------

    def report(self, metrics: Mapping[str, Any], *, model: nn.Module, **stateful: Stateful) -> dict[str, Any]:
        """End an epoch: publish new scores if they are due, then report metrics with a checkpoint.

        Inside the loop over batches it saves a checkpoint in the middle of the epoch instead. Every
        rank calls it equally often: it is a barrier.

        Args:
            metrics: of this epoch; every rank's, rank 0's are kept.
            model: scored and saved, wrapped by DDP or not.
            **stateful: saved under their names, e.g. `optimizer=optimizer`.

        Returns:
            The metrics as reported, with the sampler's own figures.
        """
        if not self._ended:
            row = {"epoch": self._position.epoch, "batch": self._position.batch, **metrics}
            self._save(row, self._position, self._observed(), model, stateful)
            return row
        epoch, plan = self._position.epoch, self.plan
        review: Review = ray.get(self._context.coordinator.review.remote(epoch, plan.version))
        self._warn(review.warnings)
        if self._context.scheduler.scores_due_after(epoch):
            self._publish_scores(model)
        row = {"epoch": epoch, **self._figures(plan), "neglected_rows": review.neglected_rows, **metrics}
        self._history = [*self._history, row]
        following = Position(epoch + 1, 0, self._position.version)
        self._save(row, following, [0.0, 0.0, 0.0], model, stateful)
        self._position = following
        self._post({"kind": "epoch", "row": row, "history": self._history})
        return row

    def _figures(self, plan: Plan) -> dict[str, Any]:
        """The sampler's own metrics of the epoch just ended; starts the next epoch's."""
        rows, similarity, information = self._observed()
        figures: dict[str, Any] = {"rows": plan.rows, "score_version": plan.version, **plan.diagnostics}
        figures["moved_share"] = self._moved_share()
        if rows:
            figures |= {"train_similarity": similarity / rows, "train_information": information / rows}
        figures |= {f"seconds_{name}": round(seconds, 3) for name, seconds in self._seconds.items()}
        self._sums.zero_()
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return figures

    def _moved_share(self) -> float:
        """Share of the rows of this epoch, over all ranks, that came from another node than their rank's."""
        counts = torch.tensor([self._loader.moved, self._loader.read], dtype=torch.float64, device=self.device)
        if self._ranks > 1:
            torch.distributed.all_reduce(counts)
        moved, read = counts.tolist()
        return float(moved / max(read, 1))

    def _observed(self) -> list[float]:
        """Sums of the epoch's measures over all ranks: rows, similarity, information."""
        sums = self._sums.clone()
        if self._ranks > 1:
            torch.distributed.all_reduce(sums)
        return [float(value) for value in sums]

    def _publish_scores(self, model: nn.Module) -> None:
        """Score all rows with rank 0's model; the other ranks meet it again at the next barrier."""
        started = time.perf_counter()
        version = self._position.version + 1
        if self._rank == 0:
            self._post({"kind": "status", "text": "scoring"})
            job = ScoringJob(ray.put(pack_model(model)), self.shards)
            published = ray.get(self._context.coordinator.score.remote(job))
            if published != version:
                raise LostStateError(f"the coordinator published version {published}, not {version}: it was restarted")
        self._position = replace(self._position, version=version)
        self._seconds["scoring"] += time.perf_counter() - started

    def _save(
        self,
        row: dict[str, Any],
        position: Position,
        observed: list[float],
        model: nn.Module,
        stateful: dict[str, Stateful],
    ) -> None:
        """Write this rank's share of a checkpoint and report it."""
        with tempfile.TemporaryDirectory(prefix="bss_ray-") as name:
            folder = Path(name)
            holders = ray.get(self._context.coordinator.parts.remote(position.version))
            written: list[ScoreFile] = []
            for index in range(self._rank, len(holders), self._ranks):
                written += write_scores(folder, index, position.version, ray.get(holders[index]))
            everyones = _gather_objects(written, self._ranks)
            if self._rank == 0:
                states = {"model": unwrap_model(model), **stateful}
                digests = write_states(folder, {name: part.state_dict() for name, part in states.items()})
                manifest = Manifest(
                    fingerprint=self.shards.fingerprint,
                    seed=self._context.seed,
                    rows=self.shards.rows,
                    position=position,
                    history=self._history,
                    observed=observed,
                    digests=digests,
                    scores=[file for own in everyones for file in own],
                )
                write_manifest(folder, manifest)
            # A rank without a file of its own reports without one, and still takes part in the barrier.
            checkpoint = ray.train.Checkpoint.from_directory(folder) if any(folder.iterdir()) else None
            ray.train.report(row, checkpoint=checkpoint)

    # ---- internals ----------------------------------------------------------------------------

    def _restore_scores(self) -> SavedCheckpoint | None:
        """Put all holders where the checkpoint stands (or at the start), and this rank with them."""
        checkpoint = ray.train.get_checkpoint()
        saved = None if checkpoint is None else SavedCheckpoint(checkpoint)
        manifest = None
        if saved is not None:
            manifest = saved.manifest_for(fingerprint=self.shards.fingerprint, seed=self._context.seed)
        if self._rank == 0:
            coordinator = self._context.coordinator
            if manifest is None:
                ray.get(coordinator.reset.remote())
            else:
                ray.get(coordinator.load.remote(saved, manifest.position.version))
        if manifest is not None:
            self._position, self._history = manifest.position, manifest.history
            if self._rank == 0:  # sums over all ranks: one of them carries them on
                self._sums += torch.tensor(manifest.observed, dtype=torch.float64, device=self.device)
        self._barrier()  # no rank may plan before the holders stand where the checkpoint stands
        return saved

    def _window(self, index: int) -> Any:
        window = self._context.coordinator.window.remote(self.plan.epoch, index, self.plan.version)
        return ray.get(ray.get(window)[0])

    def _barrier(self) -> None:
        if self._ranks > 1:
            ray.train.collective.barrier()

    def _post_progress(self, epoch: int, batch: int, batches: int) -> None:
        now = time.monotonic()
        if self._rank == 0 and now - self._posted > _POST_INTERVAL_S:
            self._posted = now
            self._post({"kind": "batch", "epoch": epoch, "batch": batch, "batches": batches})

    def _warn(self, warnings: dict[str, str]) -> None:
        """Tell the user of each kind of trouble once, not in every epoch."""
        for name, text in warnings.items():
            if name not in self._warned:
                self._warned.add(name)
                self._post({"kind": "notice", "text": f"Warning: {text}"})

    def _post(self, message: dict[str, Any]) -> None:
        if self._rank == 0:
            self._context.coordinator.post.remote(message)


def _gather_objects(own: Any, ranks: int) -> list[Any]:
    """A small object of every rank, on every rank."""
    everyones: list[Any] = [own] * ranks
    if ranks > 1:
        torch.distributed.all_gather_object(everyones, own)
    return everyones


_current: Sampler | None = None


def set_sampler(sampler: Sampler | None) -> None:
    """Make `sampler` the one that `get_sampler` returns in this process (the trainer does)."""
    global _current
    _current = sampler


def get_sampler() -> Sampler:
    """The sampler of this rank, inside a train loop.

    Raises:
        ConfigError: not inside a train loop of `BalancedTrainer`.
    """
    if _current is None:
        raise ConfigError(
            "get_sampler() works inside the train loop of BalancedTrainer(train_loop, ...).fit(). Without Ray use "
            "bss_ray.weighted_permutation; see examples/plain_torch.py"
        )
    return _current
