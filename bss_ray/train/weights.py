"""Weights that were made elsewhere, and what is known of the run that made them."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray.train
import torch
import yaml

from bss_ray.errors import CheckpointError, ConfigError
from bss_ray.storage import StoragePath
from bss_ray.train.checkpoint import MANIFEST, SavedCheckpoint

# Where a `.pt` file that holds more than a state dict may keep it.
_INNER = ("model", "state_dict", "model_state_dict")

_DEMO = "demo"


@dataclass(frozen=True)
class Weights:
    """Weights from somewhere.

    Attributes:
        state: a state dict, on the CPU.
        source: where they are from, for people.
        settings: of the run that made them (its `config.yaml`, and the number of classes), as far as they are known.
    """

    state: Mapping[str, Any]
    source: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """BLAKE2 of names, shapes and content."""
        total = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.state.items()):
            content = _bytes(value)
            total.update(json.dumps([name, str(getattr(value, "dtype", "")), len(content)]).encode())
            total.update(content)
        return total.hexdigest()


def _bytes(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return repr(value).encode()


def read_weights(checkpoint: str | None, storage_path: str = "runs") -> Weights:
    """Weights of a file, a checkpoint or a run.

    Args:
        checkpoint: path or URI of a `.pt` file with a state dict; of a checkpoint folder of a run; or of the folder of
            a run: the epoch that it has chosen, or its last checkpoint. None: the run `demo`.
        storage_path: folder of all runs.

    Raises:
        CheckpointError: it is missing, damaged, or something else.
        StorageError: its file system does not answer, or refuses.
    """
    if checkpoint is None:
        path = StoragePath.of(storage_path) / _DEMO
        if not (path / "config.yaml").exists():
            raise CheckpointError(
                f"name the weights to score with: --checkpoint with a .pt file, a checkpoint folder or a run folder. "
                f"Without it those of {path} are taken, which is not there: `bss-ray train` makes it"
            )
    else:
        path = StoragePath.of(checkpoint)
    if path.is_file():
        return Weights(_read_file(path), str(path))
    if (path / MANIFEST).exists():
        return _of_checkpoint(path, path.parent)
    if (path / "config.yaml").exists():
        return _of_checkpoint(_choose(path), path)
    raise CheckpointError(
        f"--checkpoint {path} is {'no checkpoint' if path.exists() else 'not there'}: it takes a .pt file with a state "
        f"dict, a checkpoint folder (with {MANIFEST}), or the folder of a run of `bss-ray train`"
    )


def _read_file(path: StoragePath) -> Mapping[str, Any]:
    """A state dict, read without executing any code from the file."""
    try:
        content = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a state dict ({_first_line(error)}). Save one with "
            "torch.save(model.state_dict(), path)"
        ) from error
    for name in _INNER:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path} holds no state dict but {type(content).__name__}. Save one with torch.save(model.state_dict(), "
            "path)"
        )
    return content


def _of_checkpoint(path: StoragePath, run: StoragePath) -> Weights:
    """Weights of a checkpoint of a run, whose digests are checked."""
    saved = _saved(path)
    settings = _settings(run / "config.yaml") if (run / "config.yaml").exists() else {}
    return Weights(saved.state("model"), str(path), {**settings, "num_classes": saved.manifest().num_classes})


def _saved(path: StoragePath) -> SavedCheckpoint:
    return SavedCheckpoint(ray.train.Checkpoint(path.path, path.system))


def _choose(run: StoragePath) -> StoragePath:
    """The checkpoint of the epoch that a run has chosen; while it has not, or that is gone, the last one."""
    found = {path: _position(path) for path in run.glob("checkpoint_*") if (path / MANIFEST).exists()}
    if not found:
        raise CheckpointError(f"the run {run} has no checkpoint yet. Let it train for an epoch, or name another")
    epoch = _chosen_epoch(run)
    for path, position in found.items():
        if position == (epoch + 1, 0):
            return path
    return max(found, key=lambda path: (found[path], path.name))


def _position(path: StoragePath) -> tuple[int, int]:
    """Next epoch and global batch of a checkpoint."""
    position = _saved(path).manifest().position
    return position.epoch, position.batch


def _chosen_epoch(run: StoragePath) -> int:
    try:
        return int(json.loads((run / "result.json").read_text())["chosen_epoch"])
    except FileNotFoundError:
        return -2
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{run / 'result.json'} is damaged ({error}). Name a checkpoint folder of the run"
        ) from error


def _settings(path: StoragePath) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({_first_line(error)}). Restore it, or name a .pt file") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
