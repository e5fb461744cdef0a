"""Runs of `tests.runs.audited_loop` in a `LocalCluster`: no Ray, and a kill or a stop wherever a test wants it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bss_ray
from bss_ray.data.arrays import shards_of_arrays
from bss_ray.data.shards import Shards
from bss_ray.testing import LocalCluster
from bss_ray.testing.cluster import current_cluster
from tests.runs import COLUMNS, SEED, Audit, Outcome, audited_loop, batches_of, make_columns

torch.set_num_threads(1)  # ranks are threads themselves

EPOCHS, BATCH = 2, 32  # 7 batches, and 6 of the 9 in 10 rows that the second epoch draws

# Each engine with the settings whose state is the hardest to bring back: measures of the unfinished epoch are on the
# ranks and the holders, or scores are being made beside it.
ENGINES = {
    "workers": bss_ray.Scoring(engine="workers", momentum=0.5),
    "online": bss_ray.Scoring(engine="online", momentum=0.5, sweep_every=2),
    "actors": bss_ray.Scoring(engine="actors", momentum=0.5),
    "overlapped": bss_ray.Scoring(engine="actors", overlap=True, momentum=0.5),
}


def make_shards(num_shards: int = 4, rows: int | None = None) -> Shards:
    columns = make_columns() if rows is None else make_columns(rows)
    return shards_of_arrays(columns, COLUMNS, nodes=[""] * num_shards)


@dataclass(frozen=True)
class At:
    """Does something on rank 0 or the last rank, once, after a batch of a run; a `Fault` without a file."""

    action: Callable[[], object]
    epoch: int
    batch: int
    rank: int = 0
    done: list[bool] | None = None

    def reached(self, epoch: int, batch: int, *, rank: int, ranks: int) -> None:
        assert self.done is not None
        if (epoch, batch) == (self.epoch, self.batch) and rank == self.rank % ranks and not self.done:
            self.done.append(True)
            self.action()

    def happened(self) -> bool:
        return bool(self.done)


def here() -> LocalCluster:
    """The cluster of the calling rank."""
    cluster = current_cluster()
    assert cluster is not None
    return cluster


@dataclass(frozen=True)
class Ended:
    """A run's end.

    Attributes:
        outcome: As of a run with Ray.
        attempts: Number of times that the ranks were started.
        stopped: Whether it was told to stop.
    """

    outcome: Outcome
    attempts: int
    stopped: bool


def local_run(
    folder: Path,
    *,
    shards: Shards | None = None,
    ranks: int | Sequence[int] = 1,
    engine: str | bss_ray.Scoring = "workers",
    failures: int = 0,
    audit: dict[str, Any] | None = None,
    **settings: Any,
) -> Ended:
    """Run the audited loop to its end; a second call with the same folder resumes the run."""
    (folder / "audit").mkdir(parents=True, exist_ok=True)
    settings = {
        "scheduler": bss_ray.Learning(temperature=0.3, fraction=0.9, update_interval=1),
        "batch_size": BATCH,
        "seed": SEED,
        **settings,
    }
    cluster = LocalCluster(
        shards or make_shards(),
        folder / "run",
        ranks=ranks,
        scoring=ENGINES[engine] if isinstance(engine, str) else engine,
        max_failures=failures,
        **settings,
    )
    own = Audit(folder / "audit", **{"epochs": EPOCHS, "checkpoint_every": 3, **(audit or {})})
    result = cluster.run(audited_loop, own)
    outcome = Outcome(dict(result.metrics), batches_of(folder / "audit"), (folder / "audit" / "resumed").exists())
    return Ended(outcome, result.attempts, result.stopped)


def assert_same(outcome: Outcome, undisturbed: Outcome) -> None:
    """The same metrics, to the bit, and the same global batches."""
    assert outcome.figures == undisturbed.figures
    assert outcome.batches == undisturbed.batches
