"""A checkpoint: model, optimiser and everything else with a state, and the sampler's whole state.

    manifest.json      format, fingerprint of the data, seed, position, history, digests of all files
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
import pickle
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
_SCORES = "scores-"

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
        digests: BLAKE2 of each file.
        format: version of this layout.
    """

    fingerprint: str
    seed: int
    rows: int
    position: Position
    history: list[dict[str, Any]]
    observed: list[float]
    digests: dict[str, str]
    format: int = FORMAT


def score_file(index: int) -> str:
    """File name of one holder's scores."""
    return f"{_SCORES}{index:05d}.npz"


def write_scores(folder: Path, index: int, parts: list[PartState]) -> dict[str, str]:
    """Write one holder's scores as plain arrays, no pickles; returns the file's digest."""
    path = folder / score_file(index)
    np.savez(
        path,
        first_row=np.array([part.first_row for part in parts], dtype=np.int64),
        rows=np.array([len(part.score) for part in parts], dtype=np.int64),
        score=np.concatenate([part.score for part in parts]),
        similarity=np.concatenate([part.similarity for part in parts]),
        information=np.concatenate([part.information for part in parts]),
    )
    return {path.name: _digest(path.read_bytes())}


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
    content = asdict(manifest)
    (folder / MANIFEST).write_text(json.dumps({**content, "digest": _digest(_canonical(content))}, indent=1))


class SavedCheckpoint:
    """Reads a checkpoint wherever Ray Train stored it.

    Args:
        checkpoint: from `ray.train.get_checkpoint()` or a `Result`.
    """

    def __init__(self, checkpoint: ray.train.Checkpoint) -> None:
        self._path: str = checkpoint.path
        self._filesystem: pyarrow.fs.FileSystem = checkpoint.filesystem
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
            self._manifest = Manifest(**{**fields, "position": Position(**fields["position"])})
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
        return [
            part
            for file in sorted(name for name in self.manifest().digests if name.startswith(_SCORES))
            for part in self._score_parts(file)
            if part.first_row < stop and part.first_row + len(part.score) > start
        ]

    def _score_parts(self, file: str) -> list[PartState]:
        try:
            with np.load(io.BytesIO(self._read(file)), allow_pickle=False) as saved:
                arrays = {name: saved[name] for name in saved.files}
            edges = np.cumsum(arrays["rows"])[:-1]
            columns = (np.split(arrays[name], edges) for name in ("score", "similarity", "information"))
            firsts = arrays["first_row"].tolist()
            return [PartState(first, *values) for first, *values in zip(firsts, *columns, strict=True)]
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:  # written by another program
            raise self._damaged(file, error) from error

    def _read(self, file: str, *, check: bool = True) -> bytes:
        """Content of a file, if it has the digest that the manifest names."""
        path = f"{self._path}/{file}"
        try:
            with self._filesystem.open_input_stream(path) as stream:
                content: bytes = stream.read()
        except OSError as error:
            raise self._damaged(file, error) from error
        if check:
            digest, expected = _digest(content), self.manifest().digests.get(file)
            if digest != expected:
                raise self._damaged(file, f"its digest is {digest}, the manifest says {expected}")
        return content

    def _damaged(self, file: str, why: object) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self._path} is damaged: {file} cannot be used ({why}). Restore the file from a copy, or "
            "start a new run under another name; nothing was changed"
        )


def _canonical(manifest: dict[str, Any]) -> bytes:
    # Through JSON and back: a tuple is written as a list, and NaN has one spelling.
    return json.dumps(json.loads(json.dumps(manifest)), sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
