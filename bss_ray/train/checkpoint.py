"""A checkpoint: model, optimiser and everything else with a state, and the sampler's whole state.

    manifest.json            format, fingerprint of the data, seed, position, history, digests of all files
    model.pt                 state dict
    <name>.pt                state dict of whatever else was handed over (optimizer, lr_schedule, ...)
    scores-00000-00000.npz   scores and measures of one holder's rows, see `bss_ray.sample.score_files`

Each rank writes the files of some holders, rank 0 the rest; Ray Train joins them in one folder and
counts a checkpoint only when all ranks have delivered theirs.
"""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch

from bss_ray.errors import CheckpointError
from bss_ray.sample.score_files import ScoreFile, digest, read_scores, write_file
from bss_ray.sample.state import PartState
from bss_ray.storage import StoragePath

# 3: scores know the version in which a row was last measured, and measures of the next version belong to the state.
FORMAT = 3
MANIFEST = "manifest.json"

_REMEDY = "Choose another run name, or go back to the data and settings that the run was started with"


_MEND = "Restore the file from a copy, or start a new run under another name; nothing was changed"


@dataclass(frozen=True)
class Position:
    """Where training stands: three numbers. With the scores they are the sampler's whole state.

    Attributes:
        epoch: epoch, from 0.
        batch: next global batch of that epoch.
        version: score version that the epoch is drawn from.
    """

    epoch: int = 0
    batch: int = 0
    version: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is of.

    Attributes:
        fingerprint: of the training data.
        seed: of the run.
        rows: of the training data.
        num_classes: of the training data: values that each head returns.
        position: where training goes on.
        history: metrics of all finished epochs, in order.
        observed: sums of the unfinished epoch's figures over all ranks, see `bss_ray.train.observed.Sums`.
        digests: BLAKE2 of each state dict's file.
        scores: the files of scores.
        format: version of this layout.
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
    """Write the manifest, after everything that it speaks of.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    content = asdict(manifest)
    text = json.dumps({**content, "digest": _digest(_canonical(content))}, indent=1)
    write_file(folder / MANIFEST, lambda stream: stream.write(text.encode()))


class SavedCheckpoint:
    """Reads a checkpoint wherever Ray Train stored it.

    Args:
        checkpoint: from `ray.train.get_checkpoint()` or a `Result`.

    All that reads a file raises a StorageError where its file system does not answer, or refuses.
    """

    def __init__(self, checkpoint: ray.train.Checkpoint) -> None:
        self._path = StoragePath.of(checkpoint.path, checkpoint.filesystem)
        self._manifest: Manifest | None = None  # once read and checked: every other file is checked against it

    def manifest(self) -> Manifest:
        """The manifest.

        Raises:
            CheckpointError: missing, damaged, or of another format version.
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
            CheckpointError: it does not; names both values.
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
            CheckpointError: missing or damaged.
        """
        file = f"{name}.pt"
        content = io.BytesIO(self._read(file))
        try:
            return torch.load(content, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError) as error:
            raise self._damaged(file, error) from error

    def scores(self, start: int, stop: int) -> list[PartState]:
        """Saved scores that overlap rows [start, stop), whoever held them.

        Raises:
            CheckpointError: a score file is missing or damaged.
        """
        manifest = self.manifest()
        try:
            return read_scores(
                manifest.scores, self._content, version=manifest.position.version, start=start, stop=stop
            )
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {self._path} is damaged: {error}. {_MEND}") from error

    def _read(self, file: str, *, check: bool = True) -> bytes:
        """Content of a file, if it has the digest that the manifest names."""
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
    # Through JSON and back: a tuple is written as a list, and NaN has one spelling.
    return json.dumps(json.loads(json.dumps(manifest)), sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return digest(io.BytesIO(content))
