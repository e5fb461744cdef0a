"""A checkpoint: model, optimiser and everything else with a state, and the sampler's whole state.

    manifest.json      format, fingerprint of the data, seed, position, history, digests of the files
    model.pt           state dict
    <name>.pt          state dict of whatever else was handed over (optimizer, lr_schedule, ...)
    scores-00000.npz   scores and measures of one holder's rows, as many files as holders

Each rank writes its share of the score files, rank 0 the rest; Ray Train joins them in one folder and
counts a checkpoint only when all ranks have delivered theirs.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import ray.train
import torch

from bss_ray.errors import CheckpointError
from bss_ray.sample.scorer import PartState

FORMAT = 1
MANIFEST = "manifest.json"

_REMEDY = "Choose another run name, or go back to the data and settings that the run was started with"


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
        position: where training goes on.
        history: metrics of all finished epochs, in order.
        observed: sums of the unfinished epoch's measures over all ranks: rows, similarity, information.
        score_parts: number of score files.
        digests: BLAKE2 of each file that rank 0 wrote.
        format: version of this layout.
    """

    fingerprint: str
    seed: int
    rows: int
    position: Position
    history: list[dict[str, Any]]
    observed: list[float]
    score_parts: int
    digests: dict[str, str]
    format: int = FORMAT


def score_file(index: int) -> str:
    """File name of one holder's scores."""
    return f"scores-{index:05d}.npz"


def write_scores(folder: Path, index: int, parts: list[PartState]) -> None:
    """Write one holder's scores: plain arrays, no pickles; the zip's CRCs guard the content."""
    np.savez(
        folder / score_file(index),
        first_row=np.array([part.first_row for part in parts], dtype=np.int64),
        rows=np.array([len(part.score) for part in parts], dtype=np.int64),
        score=np.concatenate([part.score for part in parts]),
        similarity=np.concatenate([part.similarity for part in parts]),
        information=np.concatenate([part.information for part in parts]),
    )


def write_states(folder: Path, states: dict[str, Any]) -> dict[str, str]:
    """Write state dicts as `<name>.pt`; returns the files' digests."""
    digests = {}
    for name, state in states.items():
        path = folder / f"{name}.pt"
        torch.save(state, path)
        digests[path.name] = _digest(path.read_bytes())
    return digests


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, after everything that it speaks of."""
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1))


class SavedCheckpoint:
    """Reads a checkpoint wherever Ray Train stored it.

    Args:
        checkpoint: from `ray.train.get_checkpoint()` or a `Result`.
    """

    def __init__(self, checkpoint: ray.train.Checkpoint) -> None:
        self._path: str = checkpoint.path
        self._filesystem: pyarrow.fs.FileSystem = checkpoint.filesystem

    def manifest(self) -> Manifest:
        """The manifest.

        Raises:
            CheckpointError: missing, damaged, or of another format version.
        """
        try:
            fields = json.loads(self._read(MANIFEST))
            if fields["format"] != FORMAT:
                raise CheckpointError(
                    f"checkpoint {self._path} has format {fields['format']}; this version of bss_ray reads format "
                    f"{FORMAT}. Use the version that wrote it, or start a new run"
                )
            return Manifest(**{**fields, "position": Position(**fields["position"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
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
        content = self._read(file)
        expected = self.manifest().digests.get(file)
        if _digest(content) != expected:
            raise self._damaged(file, f"its digest is {_digest(content)}, the manifest says {expected}")
        return torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)

    def scores(self, start: int, stop: int) -> list[PartState]:
        """Saved scores that overlap rows [start, stop), whoever held them.

        Raises:
            CheckpointError: a score file is missing or damaged.
        """
        found = []
        for index in range(self.manifest().score_parts):
            found += [
                part
                for part in self._score_parts(score_file(index))
                if part.first_row < stop and part.first_row + len(part.score) > start
            ]
        return found

    def _score_parts(self, file: str) -> list[PartState]:
        try:
            with np.load(io.BytesIO(self._read(file)), allow_pickle=False) as saved:
                arrays = {name: saved[name] for name in saved.files}
            edges = np.cumsum(arrays["rows"])[:-1]
            columns = (np.split(arrays[name], edges) for name in ("score", "similarity", "information"))
            firsts = arrays["first_row"].tolist()
            return [PartState(first, *values) for first, *values in zip(firsts, *columns, strict=True)]
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise self._damaged(file, error) from error

    def _read(self, file: str) -> bytes:
        path = f"{self._path}/{file}"
        try:
            with self._filesystem.open_input_stream(path) as stream:
                content: bytes = stream.read()
                return content
        except OSError as error:
            raise self._damaged(file, error) from error

    def _damaged(self, file: str, why: object) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self._path} is damaged: {file} cannot be used ({why}). Remove this checkpoint's folder "
            "to go on from an older one, or start a new run"
        )


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
