"""Checkpoints of a run as its ranks write and restore them: each rank its share."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray.train
from torch import nn

from bss_ray.measure.snapshot import unwrap_model
from bss_ray.sample.score_files import ScoreFile, write_scores
from bss_ray.sample.state import PartState
from bss_ray.train.checkpoint import Manifest, Position, SavedCheckpoint, write_manifest, write_states
from bss_ray.train.context import SamplerContext, Stateful
from bss_ray.train.observed import Sums
from bss_ray.train.ranks import Ranks
from bss_ray.wait import wait_for


class Beginning(NamedTuple):
    """Where an attempt of the ranks begins.

    Attributes:
        attempt: its name.
        position: epoch, next global batch, score version.
        saved: the checkpoint that it goes on from.
        manifest: of the checkpoint.
    """

    attempt: str
    position: Position
    saved: SavedCheckpoint | None = None
    manifest: Manifest | None = None


class Saver:
    """Saves and restores one rank's share of a run. All ranks make the same calls.

    Args:
        context: of the run.
        ranks: all of them.
    """

    def __init__(self, context: SamplerContext, ranks: Ranks) -> None:
        self._context, self._ranks = context, ranks

    def restore(self) -> Beginning:
        """Put all holders where the checkpoint stands (or at the start).

        Raises:
            CheckpointError: of other data or another seed, or damaged.
        """
        checkpoint, initial = self._context.session.checkpoint(), self._context.initial_scores
        saved = None if checkpoint is None else SavedCheckpoint(checkpoint)
        manifest = None
        if saved is not None:
            manifest = saved.manifest_for(fingerprint=self._context.train.fingerprint, seed=self._context.seed)
        position = Position() if initial is None else Position(version=1)
        position = position if manifest is None else manifest.position
        attempt = self._begin(saved or initial, position.version) if self._ranks.rank == 0 else ""
        # No rank may plan before the holders stand where the checkpoint stands.
        return Beginning(self._ranks.from_first(attempt), position, saved, manifest)

    def _begin(self, scores: Any, version: int) -> str:
        coordinator = self._context.coordinator
        begun = coordinator.reset.remote() if scores is None else coordinator.load.remote(scores, version)
        attempt: str = wait_for(begun, "the holders to stand where the checkpoint stands")
        return attempt

    def save(
        self,
        row: Mapping[str, Any],
        position: Position,
        history: list[dict[str, Any]],
        observed: Sums,
        model: nn.Module,
        stateful: Mapping[str, Stateful],
    ) -> None:
        """Write this rank's share of a checkpoint and report it.

        Args:
            row: metrics to report.
            position: to go on from.
            history: metrics of all epochs so far.
            observed: sums over the unfinished epoch, of all ranks.
            model: wrapped by DDP or not.
            stateful: optimiser and the like, by name.
        """
        with tempfile.TemporaryDirectory(prefix="bss_ray-") as name:
            folder = Path(name)
            self._ranks.barrier()  # all have handed over what belongs to the state
            everyones = self._ranks.gather(self._write_scores(folder, position.version))
            if self._ranks.rank == 0:
                states = {"model": unwrap_model(model), **stateful}
                digests = write_states(folder, {name: part.state_dict() for name, part in states.items()})
                manifest = Manifest(
                    fingerprint=self._context.train.fingerprint,
                    seed=self._context.seed,
                    rows=self._context.train.rows,
                    num_classes=self._context.train.num_classes,
                    position=position,
                    history=history,
                    observed=list(observed),
                    digests=digests,
                    scores=[file for own in everyones for file in own],
                )
                write_manifest(folder, manifest)
            # A rank without a file of its own reports without one, and still takes part in the barrier.
            checkpoint = ray.train.Checkpoint.from_directory(folder) if any(folder.iterdir()) else None
            self._context.session.report(row, checkpoint)

    def _write_scores(self, folder: Path, version: int) -> list[ScoreFile]:
        """This rank's share of the score files: those of every so manieth holder."""
        rank, ranks = self._ranks.rank, self._ranks.count
        written: list[ScoreFile] = []
        for index, held in enumerate(self._parts(version, rank, ranks)):
            holder = rank + index * ranks
            parts = wait_for(held, f"the scores of holder {holder}")
            written += write_scores(folder, holder, version, parts)
        return written

    def scores(self, version: int) -> list[PartState]:
        """Scores of all rows."""
        return [part for parts in wait_for(self._parts(version), "the scores of all holders") for part in parts]

    def _parts(self, version: int, rank: int = 0, ranks: int = 1) -> Sequence[Any]:
        """References to the scores of holders, see `CoordinatorActor.parts`."""
        parts: Sequence[Any] = wait_for(
            self._context.coordinator.parts.remote(version, rank, ranks), f"the holders' scores of version {version}"
        )
        return parts
