"""What new scores cost an epoch of training: BSS-L with each engine against uniform epochs of as many batches.

    python benchmarks/engines.py [--rows 8192] [--epochs 7] [--repeats 3] [--workers 2]

Whole epochs of the default loop's parts (LateFusion for the rows of AV-Digits, batches of 64, AdamW; planning, scoring,
checkpoint and report included), in real runs of `BalancedTrainer` that take turns. The first two epochs of a run
(burn-in, first scores) are not counted. Of the others: mean over epochs of the medians over runs; and ratios.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train.torch
import torch

import bss_ray
from bss_ray.data.build import build_shards
from bss_ray.data.shards import Shards
from bss_ray.models import LateFusion
from bss_ray.runtime.messages import EpochFinished, Message
from bss_ray.schedule import Scheduler

SHAPES = {"audio": (1, 32, 32), "image": (1, 8, 8)}
CLASSES, WARM_UP = 10, 2

LEARNING = bss_ray.Learning(temperature=0.25)
CASES: dict[str, tuple[Scheduler, bss_ray.Scoring]] = {
    "uniform": (bss_ray.Uniform(), bss_ray.Scoring(engine="workers")),
    "online": (LEARNING, bss_ray.Scoring(engine="online")),
    "workers": (LEARNING, bss_ray.Scoring(engine="workers")),
    "workers, every 5th epoch": (
        bss_ray.Learning(temperature=0.25, update_interval=5),
        bss_ray.Scoring(engine="workers"),
    ),
    "actors": (LEARNING, bss_ray.Scoring(engine="actors")),
    "actors, overlapped": (LEARNING, bss_ray.Scoring(engine="actors", overlap=True)),
}
GOALS = {"online": 1.05, "workers": 1.40, "workers, every 5th epoch": 1.10}


def make_shards(rows: int) -> Shards:
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        name: pa.FixedShapeTensorArray.from_numpy_ndarray(rng.standard_normal((rows, *shape), dtype=np.float32))
        for name, shape in SHAPES.items()
    }
    table = pa.table({**columns, "label": rng.integers(0, CLASSES, rows)})
    dataset = ray.data.from_arrow(table, override_num_blocks=8)
    return build_shards(dataset, bss_ray.Columns(modalities=tuple(SHAPES)), num_classes=CLASSES, min_shards=8)


def loop(epochs: int) -> None:
    """The parts of the default loop, with a clock."""
    sampler = bss_ray.get_sampler()
    torch.manual_seed(0)
    model = ray.train.torch.prepare_model(LateFusion(SHAPES, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    started = time.perf_counter()
    for _epoch in sampler.epochs(epochs):
        model.train()
        for batch in sampler.batches():
            outputs = model(batch)
            sampler.observe(batch, outputs)
            loss = sampler.loss(batch, outputs).mean() * sampler.loss_scale
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        sampler.report({"started": started}, model=model, optimizer=optimizer)
        started = time.perf_counter()


def run(shards: Shards, case: str, epochs: int, workers: int) -> list[float]:
    """Seconds of each epoch after the warm-up, from the end of the one before to its own."""
    scheduler, scoring = CASES[case]
    starts: list[float] = []

    def on_message(message: Message) -> None:
        if isinstance(message, EpochFinished):
            starts.append(message.row["started"])

    with tempfile.TemporaryDirectory() as folder:
        bss_ray.BalancedTrainer(
            loop,
            dataset=shards,
            scheduler=scheduler,
            scoring=scoring,
            batch_size=64,
            train_loop_config=epochs + 1,  # an epoch's start is the end of the one before
            scaling_config=ray.train.ScalingConfig(num_workers=workers),
            run_config=ray.train.RunConfig(name="run", storage_path=folder),
            on_message=on_message,
        ).fit()
    return np.diff(starts)[WARM_UP:].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--epochs", type=int, default=7, help="of a run, with two to warm up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="ranks, each with one thread")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}, "
        f"ray {ray.__version__}; {options.rows:,} rows, batches of 64 over {options.workers} ranks"
    )
    shards = make_shards(options.rows)
    cases = list(dict.fromkeys(["uniform", *options.cases]))
    seconds: dict[str, list[list[float]]] = {case: [] for case in cases}
    for _ in range(options.repeats):
        for case in cases:
            seconds[case].append(run(shards, case, options.epochs, options.workers))
    costs = {case: epoch_cost(seconds[case]) for case in cases}
    for case, cost in costs.items():
        goal = f" (goal: at most {GOALS[case]})" if case in GOALS else ""
        print(f"{case:<26} {cost:>7.3f} s an epoch, {cost / costs['uniform']:.3f} of uniform{goal}")


def epoch_cost(runs: list[list[float]]) -> float:
    """Mean over epochs of the medians over runs: epochs with and without an update count as often as they come."""
    return float(np.mean([statistics.median(epoch) for epoch in zip(*runs, strict=True)]))


if __name__ == "__main__":
    main()
