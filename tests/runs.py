"""A small training run with an audit: which row ids each rank received in which global batch."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from torch import nn

import bss_ray
from bss_ray.data.build import build_shards
from bss_ray.data.shards import Shards
from bss_ray.data.store import StoreConfig
from bss_ray.names import CLOCKED
from bss_ray.runtime.messages import OnMessage
from bss_ray.runtime.wait import DEFAULT_LIMIT_S
from bss_ray.scoring.scorer import Scorer
from bss_ray.testing import Fault

# The ranks do not know this module: send what it defines along with the loop.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROWS, CLASSES, BATCH, SEED = 203, 3, 16, 7  # 203 = 12 * 16 + 11: a tail that no number of ranks divides
COLUMNS = bss_ray.Columns(modalities=("a", "b"))


def make_columns(rows: int = ROWS) -> dict[str, np.ndarray]:
    """Two noisy views of a class."""
    rng = np.random.default_rng(1)
    label = rng.integers(0, CLASSES, rows)
    views = {name: rng.normal(size=(rows, 6)) + 2 * np.eye(6)[label] for name in ("a", "b")}
    return {**{name: view.astype(np.float32) for name, view in views.items()}, "label": label}


def make_dataset(columns: dict[str, np.ndarray]) -> ray.data.Dataset:
    """The columns as a Ray Dataset of several blocks."""
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(columns["label"]))]
    return ray.data.from_items(rows, override_num_blocks=5)


def make_shards(num_shards: int, store: StoreConfig | None = None) -> Shards:
    """The columns in so many shards."""
    return build_shards(make_dataset(make_columns()), COLUMNS, min_shards=num_shards, store=store)


def make_spread_shards(rows: int = ROWS, store: StoreConfig | None = None) -> Shards:
    """Six shards of so many rows, made on all nodes.

    Objects below 100 kB stay with their owner: a column that nobody reads makes these so large that they do not.
    """

    def make(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = batch["id"]
        columns = {name: values[ids] for name, values in make_columns(rows).items()}
        return {**columns, "padding": np.zeros((len(ids), 600_000 // rows + 1, 2), np.float32)}

    dataset = ray.data.range(rows, override_num_blocks=6).map_batches(make, batch_size=None)
    return build_shards(dataset, replace(COLUMNS, extra=("padding",)), min_shards=6, store=store)


class TwoHeads(nn.Module):
    """Linear heads with dropout, so that a resumed run must also continue its random numbers."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(6, CLASSES) for name in ("a", "b")})
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = {name: head(self.dropout(batch[name])) for name, head in self.heads.items()}
        return {**logits, "fused": logits["a"] + logits["b"]}


def measured_by_hand(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Similarity and information of all rows, (N,) each."""
    found = Scorer(bss_ray.Measurer(), "label", model=model).measure(make_columns())
    return found.similarity, found.information


@dataclass(frozen=True)
class Faults:
    """Several faults in one run."""

    faults: tuple[Fault, ...]

    def reached(self, epoch: int, batch: int, *, rank: int, ranks: int) -> None:
        for fault in self.faults:
            fault.reached(epoch, batch, rank=rank, ranks=ranks)

    def happened(self) -> bool:
        return all(fault.happened() for fault in self.faults)


@dataclass(frozen=True)
class Audit:
    """What the loop does besides training.

    Attributes:
        folder: where each rank writes its row ids, a file per global batch.
        epochs: of the run.
        dropout: of the model; its numbers depend on the rank.
        checkpoint_every: batches between checkpoints.
        fault: what goes wrong in the run.
    """

    folder: Path
    epochs: int = 3
    dropout: float = 0.2
    checkpoint_every: int | None = None
    fault: Fault | Faults | None = None


def audited_loop(audit: Audit) -> None:
    """Train, and write down what came."""
    sampler = bss_ray.get_sampler()
    rank, ranks = sampler.rank, sampler._ranks.count
    torch.manual_seed(0)
    model = sampler.prepare(TwoHeads(audit.dropout))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if sampler.restore(model=model, optimizer=optimizer):
        (audit.folder / "resumed").touch()
    for epoch in sampler.epochs(audit.epochs):
        for batch in sampler.batches():
            number = sampler.position.batch - 1
            torch.manual_seed(1000 * epoch + 10 * number + rank)
            outputs = model(batch)
            sampler.observe(batch, outputs)
            loss = sampler.measurer.loss(outputs, batch["label"]).mean() * sampler.loss_scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            np.save(audit.folder / f"{epoch}-{number}-{rank}-of-{ranks}.npy", batch["row_id"].numpy())
            if audit.fault is not None:
                audit.fault.reached(epoch, number, rank=rank, ranks=ranks)
            if audit.checkpoint_every and sampler.position.batch % audit.checkpoint_every == 0:
                sampler.report({}, model=model, optimizer=optimizer)
        weight = float(sum(p.detach().double().abs().sum() for p in model.parameters()))
        sampler.report({"weight": weight}, model=model, optimizer=optimizer)


def batches_of(folder: Path) -> dict[tuple[int, int], list[int]]:
    """Sorted row ids of every global batch (epoch, number) over its ranks, fillers left out."""
    found: dict[tuple[int, int], list[int]] = {}
    for path in sorted(folder.glob("*-of-*.npy")):
        epoch, number = (int(part) for part in path.stem.split("-")[:2])
        found.setdefault((epoch, number), []).extend(int(row) for row in np.load(path) if row >= 0)
    return {key: sorted(rows) for key, rows in found.items()}


@dataclass
class Outcome:
    """A run's end.

    Attributes:
        metrics: of the last report.
        batches: see `batches_of`.
        resumed: whether any attempt of it went on from a checkpoint.
    """

    metrics: dict[str, float]
    batches: dict[tuple[int, int], list[int]]
    resumed: bool

    def check_rows(self, *sizes: int, batch_size: int = BATCH) -> None:
        """Each epoch drew so many rows, each exactly once, in full batches but the last."""
        for epoch, size in enumerate(sizes):
            batches = [rows for (of, _), rows in sorted(self.batches.items()) if of == epoch]
            assert [len(rows) for rows in batches[:-1]] == [batch_size] * ((size - 1) // batch_size)
            drawn = [row for rows in batches for row in rows]
            assert len(drawn) == len(set(drawn)) == size

    @property
    def figures(self) -> dict[str, float]:
        """The last epoch's metrics, without the clock's."""
        return {name: value for name, value in self.metrics.items() if not name.startswith(CLOCKED)}


def run(
    folder: Path,
    shards: Shards,
    *,
    workers: int | tuple[int, int] = 2,
    scaling: dict[str, Any] | None = None,
    on_message: OnMessage | None = None,
    scoring: bss_ray.Scoring | None = None,
    update_interval: int = 2,
    failures: int = 0,
    placement: str = "PACK",
    batch_size: int = BATCH,
    wait_limit_s: float = DEFAULT_LIMIT_S,
    **audit: object,
) -> Outcome:
    """Run `audited_loop` to its end."""
    (folder / "audit").mkdir(parents=True, exist_ok=True)  # a second call goes on with the run
    result = bss_ray.BalancedTrainer(
        audited_loop,
        dataset=shards,
        # Every second epoch: between two updates only a check can tell that an actor lost its scores.
        scheduler=bss_ray.Learning(temperature=0.3, fraction=0.9, update_interval=update_interval),
        scoring=scoring or bss_ray.Scoring(engine="actors", momentum=0.5),
        batch_size=batch_size,
        seed=SEED,
        wait_limit_s=wait_limit_s,
        train_loop_config=Audit(folder / "audit", **audit),  # type: ignore[arg-type]
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, **{"placement_strategy": placement, **(scaling or {})}
        ),
        on_message=on_message,
        run_config=ray.train.RunConfig(
            name="run", storage_path=str(folder), failure_config=ray.train.FailureConfig(max_failures=failures)
        ),
    ).fit()
    return Outcome(dict(result.metrics), batches_of(folder / "audit"), (folder / "audit" / "resumed").exists())
