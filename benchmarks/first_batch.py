"""Time from a new score version to the first batch on a rank: plan, first window, first gather, in real Ray actors.

    python benchmarks/first_batch.py [--rows 1000000] [--holders 2] [--repeats 9]

Prints the median, and where the time goes. The first repeat is not counted.
"""

import argparse
import functools
import itertools
import os
import platform
import statistics
import time
from dataclasses import dataclass

import numpy as np
import ray
import torch

from bss_ray import Columns, Learning
from bss_ray.data.shards import Feature, Shard, Shards
from bss_ray.data.store import ObjectStore
from bss_ray.load.loader import Loader
from bss_ray.sample.actors import start_coordinator, start_holders
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.plan import Order
from bss_ray.sample.state import ScoreBlock


@dataclass
class RandomScores:
    """Saved scores of any rows."""

    seed: int

    def scores(self, start: int, stop: int) -> list[ScoreBlock]:
        state = ScoreBlock.empty(start, stop - start)
        state.score[:] = np.random.default_rng([self.seed, start]).uniform(-1, 1, stop - start)
        return [state]


def make_shards(rows: int, count: int) -> Shards:
    """Rows of two small modalities."""
    features = {"audio": Feature((16,), "float32"), "image": Feature((16,), "float32"), "label": Feature((), "int64")}
    edges = [rows * index // count for index in range(count + 1)]
    node = ray.get_runtime_context().get_node_id()
    parts = [Shard(start, stop - start, node) for start, stop in itertools.pairwise(edges)]
    refs = [
        ray.put({name: np.ones((part.rows, *feature.shape), feature.dtype) for name, feature in features.items()})
        for part in parts
    ]
    columns = Columns(modalities=("audio", "image"))
    return Shards(columns, tuple(parts), features, 10, "benchmark", ObjectStore(refs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--holders", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; ray {ray.__version__}")
    shards = make_shards(options.rows, 16)
    holders, _handles = start_holders(shards, count=options.holders)
    scheduler = Learning(temperature=0.25)
    make = functools.partial(Coordinator, rows=shards.rows, scheduler=scheduler, batch_size=options.batch_size)
    coordinator, _handle = start_coordinator(holders, make)
    loader = Loader(shards, rank=0, rank_nodes=[shards.parts[0].node], device=torch.device("cpu"))
    stages: list[list[float]] = []
    for version in range(1, options.repeats + 2):
        coordinator.load(RandomScores(version), version)
        times = [time.perf_counter()]
        plan = coordinator.plan(1, version)
        times.append(time.perf_counter())
        window = coordinator.window(1, 0, version).get("the first window")
        times.append(time.perf_counter())
        batches = loader.batches(plan, Order(plan, lambda _index, window=window: window))
        first = next(batches)
        times.append(time.perf_counter())
        batches.close()
        assert len(first.tensors["row_id"]) == options.batch_size
        stages.append([*np.diff(times), times[-1] - times[0]])
    plan_s, window_s, gather_s, total_s = (statistics.median(column) for column in zip(*stages[1:], strict=True))
    print(
        f"{options.rows:,} rows, {options.holders} holders: first batch after {total_s:.3f} s "
        f"(plan {plan_s:.3f}, first window {window_s:.3f}, gather {gather_s:.3f})"
    )


if __name__ == "__main__":
    main()
