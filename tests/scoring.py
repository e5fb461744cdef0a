"""What tests of scoring share: rows, a model that writes down which of them it sees, and scores worked out again."""

import itertools
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch import nn

from bss_ray.data.columns import Columns

# Actors do not know this module: send what it defines along with the model.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

CLASSES = 3
COLUMNS = Columns(modalities=("a", "b"), id="name", extra=("flag",))


class Recorder(nn.Module):
    """Linear heads. Each process appends the row ids of its batches to a file of its own.

    Args:
        num_classes: of the heads.
        log: folder of those files.
        pause: seconds that a batch takes.
        kill_at: kill -9 of the process that sees this row.
        kills: so often.
    """

    def __init__(self, num_classes: int, log: str = "", pause: float = 0.0, kill_at: int = -1, kills: int = 1) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(4, num_classes) for name in ("a", "b")})
        self.log, self.pause, self.kill_at, self.kills = log, pause, kill_at, kills

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = batch["row_id"].tolist() if "row_id" in batch else [-1]  # test rows have no ids
        if self.log and rows != [-1]:
            self._record(rows)
        logits = {name: self._logits(name, batch[name].float()) for name in self.heads}
        return {**logits, "fused": logits["a"] + logits["b"]}

    def _logits(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Logits of a head; not finite for huge inputs, which are finite themselves."""
        logits: torch.Tensor = self.heads[name](values)
        return logits.masked_fill(values.abs().amax(1, keepdim=True) > 1e30, torch.nan)

    def _record(self, rows: list[int]) -> None:
        time.sleep(self.pause)
        if self.kill_at in rows and len(kills_in(Path(self.log))) < self.kills:
            Path(self.log, f"killed-{uuid.uuid4().hex}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if not hasattr(self, "_name"):
            self._name = f"{os.getpid()}-{uuid.uuid4().hex}.log"
        with Path(self.log, self._name).open("a") as file:
            file.write("".join(f"{row}\n" for row in rows))


def kills_in(log: Path) -> list[Path]:
    """A file for each process that a model has killed."""
    return sorted(log.glob("killed-*"))


def forwarded(log: Path, leave_out: set[Path] = frozenset()) -> list[int]:  # type: ignore[assignment]
    """All rows that models have seen, as often as they have."""
    files = sorted(set(log.glob("*.log")) - leave_out)
    return [int(row) for path in files for row in path.read_text().split()]


def make_recorder(seed: int = 0, **settings: Any) -> Recorder:
    torch.manual_seed(seed)
    return Recorder(CLASSES, **settings)


def make_columns(rows: int, seed: int = 0) -> dict[str, Any]:
    """Two views of a class, each with noise; ids are text."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, rows)
    views = {name: (rng.normal(size=(rows, 4)) + np.eye(4)[label]).astype(np.float32) for name in ("a", "b")}
    return {**views, "label": label, "name": [f"row {row}" for row in range(rows)], "flag": rng.random(rows) < 0.3}


def make_table(columns: dict[str, Any], missing: dict[str, np.ndarray] | None = None) -> pa.Table:
    """An Arrow table with lists for vectors, null where a row lacks a modality."""

    def encode(name: str, values: Any) -> pa.Array:
        gone = (missing or {}).get(name)
        if name not in ("a", "b"):
            return pa.array(values)
        rows = [None if gone is not None and gone[row] else value.tolist() for row, value in enumerate(values)]
        return pa.array(rows, pa.list_(pa.float32()))

    return pa.table({name: encode(name, values) for name, values in columns.items()})


def write_folder(folder: Path, table: pa.Table, cuts: list[int], row_group: int) -> None:
    """Parquet files of the rows between cuts, beside what Ray Data passes over."""
    folder.mkdir(parents=True)
    edges = [0, *cuts, len(table)]
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        pq.write_table(table.slice(start, stop - start), folder / f"{number}.parquet", row_group_size=row_group)
    (folder / "_SUCCESS").write_text("")


def score_options(folder: Path) -> dict[str, Any]:
    """Options of `bss-ray score` for rows and weights in `folder`."""
    return {
        "data": folder / "rows",
        "checkpoint": folder / "w.pt",
        "storage_path": folder / "runs",
        "columns.modalities": "[a, b]",
        "columns.id": "name",
        "columns.extra": "[flag]",
        "model.class_path": "tests.scoring.Recorder",
    }


def reference(model: Recorder, columns: dict[str, Any], missing: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Similarity, information, losses and score, written out from the formulas in float64."""
    weights = {
        name: (head.weight.detach().double().numpy(), head.bias.detach().double().numpy())
        for name, head in model.heads.items()
    }
    rows = np.arange(len(columns["label"]))
    there = {name: ~(missing or {}).get(name, np.zeros(len(rows), bool)) for name in ("a", "b")}
    logits = {
        name: np.where(there[name][:, None], columns[name], 0) @ weight.T + bias
        for name, (weight, bias) in weights.items()
    }
    logits["fused"] = logits["a"] + logits["b"]
    powers = {name: np.exp(z - z.max(1, keepdims=True)) for name, z in logits.items()}
    chances = {name: power / power.sum(1, keepdims=True) for name, power in powers.items()}
    loss = {name: -np.log(chance[rows, columns["label"]]) for name, chance in chances.items()}
    a, b = chances["a"], chances["b"]
    similarity = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    similarity[~(there["a"] & there["b"])] = np.nan
    count = there["a"].astype(int) + there["b"]
    unimodal = (loss["a"] * there["a"] + loss["b"] * there["b"]) * 2 / np.maximum(count, 1)
    information = 0.1 * loss["fused"] + 0.9 * unimodal
    score = _norm(similarity) - _norm(information)
    score[count < 2] = 0.5 - _norm(information)[count < 2]
    losses = {f"loss_{name}": np.where(there[name], loss[name], np.nan) for name in ("a", "b")}
    return {"similarity": similarity, "information": information, **losses, "score": score}


def _norm(values: np.ndarray) -> np.ndarray:
    low, high = np.nanmin(values), np.nanmax(values)
    return (values - low) / (high - low)
