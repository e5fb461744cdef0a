"""Initial scores, from an earlier run or `bss-ray score`, and weights of a pre-trained model."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import ray.train
import torch
import yaml

from bss_ray.data.shards import Shards
from bss_ray.errors import CheckpointError, ConfigError, DataError, first_ids, first_line, nearest
from bss_ray.sample.state import ScoreBlock
from bss_ray.storage import StoragePath
from bss_ray.train.checkpoint import MANIFEST, SavedCheckpoint

_MEASURES = ("similarity", "information")


class ScoresFile:
    """A Parquet file or folder of scores as `SavedScores`, of which each holder reads the part that overlaps its rows.

    Rows are matched by the data's id column if the file has it too, otherwise by `row_id`. A row whose score is null
    counts as not scored yet. The columns `similarity` and `information` are read too; without them rows have no
    measures until they are measured again.

    Args:
        path: Parquet file or folder, or a URI, that all nodes can read.
        shards: The training rows.

    Raises:
        DataError: The file or a column does not exist, or the number of rows differs from the data.
    """

    def __init__(self, path: str, shards: Shards) -> None:
        self._path = StoragePath.of(path)
        self._shards = shards
        dataset = self._open()
        names = dataset.schema.names
        own_id = shards.columns.id
        self._key: str = own_id if own_id is not None and own_id in names else "row_id"
        for name in (self._key, "score"):
            if name not in names:
                raise DataError(
                    f"initial scores need the columns `score` and `row_id` (or the data's id column): {path} has no "
                    f"{name!r}; {nearest(name, names)}"
                )
        self._columns = [self._key, "score", *(name for name in _MEASURES if name in names)]
        rows = dataset.count_rows()
        if rows != shards.rows:
            raise DataError(
                f"initial scores must be of the training rows, one each: {path} has {rows} rows, the data "
                f"{shards.rows}. Score this data with `bss-ray score`"
            )

    def scores(self, start: int, stop: int) -> list[ScoreBlock]:
        """Scores of rows [start, stop).

        Raises:
            DataError: A row has no score or several, a score is no number in [-1, 1], or ids have another type.
        """
        if self._key == "row_id":
            wanted = pa.array(np.arange(start, stop))
            keep = (pc.field("row_id") >= start) & (pc.field("row_id") < stop)
        else:
            wanted = pa.array(self._shards.gather(np.arange(start, stop), (self._key,))[self._key])
            keep = None
        table = self._open().to_table(columns=self._columns, filter=keep).combine_chunks()
        keys = self._as_ids(table[self._key], wanted.type)
        self._refuse_twice(keys)
        places = pc.index_in(wanted, value_set=keys)
        if places.null_count:
            missing = first_ids(np.asarray(places.is_null()), start)
            raise DataError(f"initial scores: {self._path} has none for {missing}, matched by {self._key!r}")
        return [self._part(start, table.take(places))]

    def _as_ids(self, keys: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
        """The keys of the file in the data's type."""
        try:
            return keys.cast(kind).combine_chunks()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"initial scores: column {self._key!r} of {self._path} holds {keys.type}, that of the data {kind}. "
                "Write ids of one kind"
            ) from error

    def _part(self, start: int, table: pa.Table) -> ScoreBlock:
        part = ScoreBlock.empty(start, len(table))
        for values in (part.similarity, part.information):
            values[:] = np.nan  # not in the file: NaN, which a normalisation over all rows does not count
        for name in self._columns[1:]:
            try:
                getattr(part, name)[:] = table[name].to_numpy().astype(np.float32)
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"initial scores: column {name!r} of {self._path} must hold numbers; it holds {table[name].type}"
                ) from error
        unscored = np.isnan(part.score)
        bad = ~unscored & ~(np.abs(part.score) <= 1)
        if bad.any():
            raise DataError(
                f"balance scores lie in [-1, 1]: {self._path} holds others in {first_ids(bad, start)}. Normalise them"
            )
        for values in (part.score, part.similarity, part.information):
            values[unscored] = 0
        part.last_measured[~unscored] = 1
        return part

    def _refuse_twice(self, keys: pa.Array) -> None:
        if len(pc.unique(keys)) == len(keys):
            return
        counts = pc.value_counts(keys)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        values = "1 value" if len(twice) == 1 else f"{len(twice)} values"
        raise DataError(
            f"initial scores: {self._path} holds {values} of {self._key!r} more than once, first "
            f"{twice[0]['values'].as_py()!r}"
        )

    def _open(self) -> pa.dataset.Dataset:
        try:
            return pa.dataset.dataset(self._path.path, filesystem=self._path.system, format="parquet")
        except FileNotFoundError:
            raise DataError(f"initial scores: no such file or folder: {self._path}") from None
        except (OSError, ValueError) as error:
            raise DataError(f"initial scores cannot be read from {self._path}: {error}") from error


# Keys of the state dict in `.pt` files that contain more.
_INNER = ("model", "state_dict", "model_state_dict")

_DEMO = "demo"


@dataclass(frozen=True)
class Weights:
    """Weights and their origin.

    Attributes:
        state: A state dict, on the CPU.
        source: Origin of the weights, for people.
        settings: Settings of the run that made the weights (its `config.yaml`, and the number of classes), as far as
            they are known.
    """

    state: Mapping[str, object]
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


def _bytes(value: object) -> bytes:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return repr(value).encode()


def read_weights(checkpoint: str | None, storage_path: str = "runs") -> Weights:
    """Weights from a file, a checkpoint or a run.

    Args:
        checkpoint: Path or URI of a `.pt` file with a state dict; of a checkpoint folder of a run; or of the folder of
            a run: the epoch that the run has chosen, or its last checkpoint. None takes the run `demo`.
        storage_path: Folder of all runs.

    Raises:
        CheckpointError: The file is missing, damaged, or no state dict.
        StorageError: The file system does not answer, or refuses access.
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


def _read_file(path: StoragePath) -> Mapping[str, object]:
    """A state dict, read without executing any code from the file."""
    try:
        content = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a state dict ({first_line(error)}). Save one with "
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
    """The checkpoint of the epoch that a run has chosen; the last checkpoint if there is none yet or it was removed."""
    found = {path: _position(path) for path in run.glob("checkpoint_*") if (path / MANIFEST).exists()}
    if not found:
        raise CheckpointError(f"the run {run} has no checkpoint yet. Let it train for an epoch, or name another")
    epoch = _chosen_epoch(run)
    for path, position in found.items():
        if position == (epoch + 1, 0):
            return path
    return max(found, key=lambda path: (found[path], path.name))


def _position(path: StoragePath) -> tuple[int, int]:
    """Next epoch and next global batch of a checkpoint."""
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
        raise ConfigError(f"{path} is damaged ({first_line(error)}). Restore it, or name a .pt file") from error
