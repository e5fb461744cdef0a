"""A checkpoint: model, optimiser and all other objects with a state, and the sampler's whole state.

    manifest.json            format, fingerprint of the data, seed, position, history, digests of all files
    model.pt                 state dict
    <name>.pt                state dict of each other object that was given (optimizer, lr_schedule, ...)
    scores-00000-00000.npz   scores and measures of one holder's rows, see `bss_ray.sample.score_files`

Each rank writes the files of some holders, and rank 0 also all other files. Ray Train joins them in one folder;
a checkpoint is complete only when all ranks have delivered their files.
"""

from __future__ import annotations

import io
import json
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bss_ray.errors import CheckpointError
from bss_ray.measure.snapshot import unwrap_model
from bss_ray.runtime.ranks import RankGroup
from bss_ray.sample.score_files import ScoreFile, read_scores, stream_digest, write_file, write_scores
from bss_ray.sample.state import SavedScores, ScoreBlock
from bss_ray.storage import StoragePath
from bss_ray.train.backend import SamplerContext, Stateful, StoredFolder
from bss_ray.train.observed import Sums

# 3: each row has the version in which it was last measured, and measures of the next version belong to the state.
FORMAT = 3
MANIFEST = "manifest.json"

_REMEDY = "Choose another run name, or go back to the data and settings that the run was started with"


_MEND = "Restore the file from a copy, or start a new run under another name; nothing was changed"


@dataclass(frozen=True)
class Position:
    """The position of training: three numbers. Together with the scores they are the sampler's whole state.

    Attributes:
        epoch: Epoch, from 0.
        batch: Next global batch of that epoch.
        version: Score version that the epoch is drawn from.
    """

    epoch: int = 0
    batch: int = 0
    version: int = 0


@dataclass(frozen=True)
class Manifest:
    """Description of a checkpoint.

    Attributes:
        fingerprint: Fingerprint of the training data.
        seed: Seed of the run.
        rows: Number of rows of the training data.
        num_classes: Number of values that each head returns for the training data.
        position: Position at which training resumes.
        history: Metrics of all finished epochs, in order.
        observed: Sums of the unfinished epoch's figures over all ranks, see `bss_ray.train.metrics.Sums`.
        digests: BLAKE2 of each state dict's file.
        scores: Files of the scores.
        format: Version of this layout.
    """

    fingerprint: str
    seed: int
    rows: int
    num_classes: int
    position: Position
    history: list[dict[str, Any]]
    observed: list[float]
    digests: dict[str, str]
    scores: list[ScoreFile]
    format: int = FORMAT


def write_states(folder: Path, states: dict[str, Any]) -> dict[str, str]:
    """Write state dicts as `<name>.pt`; returns the files' digests.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    return {
        f"{name}.pt": write_file(folder / f"{name}.pt", partial(torch.save, state)) for name, state in states.items()
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, after all files that it names.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    content = asdict(manifest)
    text = json.dumps({**content, "digest": _digest(_canonical(content))}, indent=1)
    write_file(folder / MANIFEST, lambda stream: stream.write(text.encode()))


class SavedCheckpoint:
    """Reads a checkpoint from any storage of Ray Train.

    Args:
        checkpoint: Checkpoint from `ray.train.get_checkpoint()` or a `Result`.

    All methods that read a file raise a StorageError if its file system does not answer, or refuses access.
    """

    def __init__(self, checkpoint: StoredFolder) -> None:
        self._path = StoragePath.of(checkpoint.path, checkpoint.filesystem)
        self._manifest: Manifest | None = None  # kept once read: other files are checked against it

    def manifest(self) -> Manifest:
        """The manifest.

        Raises:
            CheckpointError: The manifest is missing, damaged, or of another format version.
        """
        if self._manifest is not None:
            return self._manifest
        try:
            fields = json.loads(self._read(MANIFEST, check=False))
            expected = fields.pop("digest")
            if fields["format"] != FORMAT:
                raise CheckpointError(
                    f"checkpoint {self._path} has format {fields['format']}; this version of bss_ray reads format "
                    f"{FORMAT}. Use the version that wrote it, or start a new run"
                )
            if _digest(_canonical(fields)) != expected:
                raise self._damaged(MANIFEST, "its content does not have the digest that it names")
            position = Position(**fields.pop("position"))
            scores = [ScoreFile(**file) for file in fields.pop("scores")]
            self._manifest = Manifest(**fields, position=position, scores=scores)
            return self._manifest
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(MANIFEST, error) from error

    def manifest_for(self, *, fingerprint: str, seed: int) -> Manifest:
        """The manifest, if the checkpoint belongs to this data and seed.

        Raises:
            CheckpointError: It does not; the error names both values.
        """
        manifest = self.manifest()
        if manifest.fingerprint != fingerprint:
            raise CheckpointError(
                f"checkpoint {self._path} was made on other data: its fingerprint is {manifest.fingerprint}, the "
                f"data's is {fingerprint}. {_REMEDY}"
            )
        if manifest.seed != seed:
            raise CheckpointError(
                f"checkpoint {self._path} was made with another seed: {manifest.seed}, now {seed}. {_REMEDY}"
            )
        return manifest

    def state(self, name: str, *, map_location: torch.device | str = "cpu") -> Any:
        """State dict `<name>.pt`, read without executing any code from it.

        Raises:
            CheckpointError: The file is missing or damaged.
        """
        file = f"{name}.pt"
        content = io.BytesIO(self._read(file))
        try:
            return torch.load(content, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError) as error:
            raise self._damaged(file, error) from error

    def scores(self, start: int, stop: int) -> list[ScoreBlock]:
        """Saved scores that overlap rows [start, stop), whichever holders saved them.

        Raises:
            CheckpointError: A score file is missing or damaged.
        """
        manifest = self.manifest()
        try:
            return read_scores(
                manifest.scores, self._content, version=manifest.position.version, start=start, stop=stop
            )
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {self._path} is damaged: {error}. {_MEND}") from error

    def _read(self, file: str, *, check: bool = True) -> bytes:
        """Content of a file whose digest must be that of the manifest."""
        try:
            content = self._content(file)
        except FileNotFoundError as error:
            raise self._damaged(file, error) from error
        if check:
            found, expected = _digest(content), self.manifest().digests.get(file)
            if found != expected:
                raise self._damaged(file, f"its digest is {found}, the manifest says {expected}")
        return content

    def _content(self, file: str) -> bytes:
        return (self._path / file).read_bytes()

    def _damaged(self, file: str, why: object) -> CheckpointError:
        return CheckpointError(f"checkpoint {self._path} is damaged: {file} cannot be used ({why}). {_MEND}")


def _canonical(manifest: dict[str, Any]) -> bytes:
    # Through JSON and back, because a tuple is written as a list, and NaN has one spelling.
    return json.dumps(json.loads(json.dumps(manifest)), sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return stream_digest(io.BytesIO(content))


class ResumeState(NamedTuple):
    """The state with which an attempt of the ranks starts.

    Attributes:
        attempt: Name of the attempt.
        position: Epoch, next global batch, score version.
        saved: Checkpoint that the attempt resumes from.
        manifest: Manifest of the checkpoint.
    """

    attempt: str
    position: Position
    saved: SavedCheckpoint | None = None
    manifest: Manifest | None = None


class Saver:
    """Saves and restores one rank's share of a run. All ranks make the same calls.

    Args:
        context: Context of the run.
        ranks: All ranks.
    """

    def __init__(self, context: SamplerContext, ranks: RankGroup) -> None:
        self._context, self._ranks = context, ranks

    def restore(self) -> ResumeState:
        """Put all holders into the state of the checkpoint (or of the start).

        Raises:
            CheckpointError: The checkpoint has other data or another seed, or is damaged.
        """
        checkpoint, initial = self._context.backend.checkpoint(), self._context.initial_scores
        saved = None if checkpoint is None else SavedCheckpoint(checkpoint)
        manifest = None
        if saved is not None:
            manifest = saved.manifest_for(fingerprint=self._context.train.fingerprint, seed=self._context.seed)
        position = Position() if initial is None else Position(version=1)
        position = position if manifest is None else manifest.position
        attempt = self._begin(saved or initial, position.version) if self._ranks.rank == 0 else ""
        # No rank may plan before the holders have the state of the checkpoint.
        return ResumeState(self._ranks.from_first(attempt), position, saved, manifest)

    def _begin(self, scores: SavedScores | None, version: int) -> str:
        coordinator = self._context.coordinator
        return coordinator.reset() if scores is None else coordinator.load(scores, version)

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
            row: Metrics to report.
            position: Position at which training resumes.
            history: Metrics of all epochs so far.
            observed: Sums over the unfinished epoch, of all ranks.
            model: Model, wrapped by DDP or not.
            stateful: Optimiser and other objects with a state, by name.
        """
        with tempfile.TemporaryDirectory(prefix="bss_ray-") as name:
            folder = Path(name)
            self._ranks.barrier()  # all ranks have delivered their part of the state
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
            # A rank without files still takes part in the barrier.
            self._context.backend.report(row, folder if any(folder.iterdir()) else None)

    def _write_scores(self, folder: Path, version: int) -> list[ScoreFile]:
        """This rank's share of the score files: holders `rank`, `rank + ranks`, ..."""
        rank, ranks = self._ranks.rank, self._ranks.count
        written: list[ScoreFile] = []
        for index, held in enumerate(self._context.coordinator.states(version, rank, ranks)):
            holder = rank + index * ranks
            written += write_scores(folder, holder, version, held.get(f"the scores of holder {holder}"))
        return written

    def scores(self, version: int) -> list[ScoreBlock]:
        """Scores of all rows."""
        states = self._context.coordinator.states(version)
        return [block for held in states for block in held.get("the scores of all holders")]
