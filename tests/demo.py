"""The demo in small, as several tests run it: by a command, as a job, killed and resumed."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from tests.commands import epochs_of, run_here

EPOCHS = 4
# Small batches: an epoch takes some seconds, so that a run can be stopped in the middle of one. One rank: starting
# several takes twice as long, and what several do is tested elsewhere. Actors score wherever it runs; `auto` would have
# the ranks do so where they leave no CPUs.
SETTINGS = {
    "loop.epochs": EPOCHS,
    "loop.checkpoint_every": 40,
    "batch_size": 16,
    "num_workers": 1,
    "scoring.engine": "actors",
}


def demo(storage: Path, *more: str) -> list[str]:
    """Words of the command, its run in the folder `demo` of `storage`."""
    return ["train", "--storage_path", str(storage), *(f"--{name}={value}" for name, value in SETTINGS.items()), *more]


@dataclass(frozen=True)
class Done:
    """A run to its end: its folder, and what it has printed."""

    folder: Path
    out: str


@functools.cache
def undisturbed() -> Done:
    """How the run ends if nothing happens to it; on the Ray that this process is connected with."""
    storage = Path(os.environ["TMPDIR"]) / "undisturbed"
    return Done(storage / "demo", run_here(*demo(storage)))


def figures(run: Path) -> list[dict[str, str]]:
    """Of each epoch, but for what depends on the clock, or on which rows lie on which node."""
    return [{name: value for name, value in row.items() if "moved" not in name} for row in epochs_of(run)]
