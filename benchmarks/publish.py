"""The coordinator's part of new scores: reduction and publication over holders, without any forward pass.

    python benchmarks/publish.py [--rows 10000000] [--holders 4] [--repeats 7] [--normalise minmax]

Real actors. The measures of all rows are delivered before the clock starts. Prints medians.
"""

import argparse
import functools
import itertools
import os
import platform
import statistics
import time

import numpy as np
import ray

from bss_ray import Columns, Learning, Scoring
from bss_ray.data.shards import Shard, Shards
from bss_ray.data.store import ObjectStore
from bss_ray.measure.normalise import NORMALISE
from bss_ray.sample.actors import start_coordinator, start_holders
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.state import MeasureBatch

# Rows of one delivery.
_PART = 1 << 19


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--holders", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--normalise", choices=NORMALISE, default="minmax")
    options = parser.parse_args()

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    edges = [options.rows * index // options.holders for index in range(options.holders + 1)]
    parts = tuple(Shard(start, stop - start, "") for start, stop in itertools.pairwise(edges))
    shards = Shards(Columns(modalities=("a", "b")), parts, {}, 2, "benchmark", ObjectStore([]))
    scoring = Scoring(num_holders=options.holders, momentum=0.5, normalise=options.normalise)
    holders, _handles = start_holders(shards, count=options.holders)
    make = functools.partial(Coordinator, rows=options.rows, scheduler=Learning(), accumulation=scoring)
    coordinator, _handle = start_coordinator(holders, make)
    attempt = coordinator.reset()
    rng = np.random.default_rng(0)
    seconds = []
    for version in range(1, options.repeats + 2):
        started = time.perf_counter()
        for start in range(0, options.rows, _PART):
            rows = np.arange(start, min(start + _PART, options.rows))
            similarity, information = (rng.random(len(rows), dtype=np.float32) for _ in range(2))
            holders.deliver(
                MeasureBatch.of(rows, similarity, information), epoch=version, version=version, attempt=attempt
            )
        delivered = time.perf_counter()
        publication = coordinator.publish(version, options.rows)
        assert (publication.version, publication.measured) == (version, options.rows)
        seconds.append((delivered - started, time.perf_counter() - delivered))
    delivery_s, publish_s = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; ray {ray.__version__}\n"
        f"{options.rows:,} rows over {options.holders} holders, {options.normalise}: published in {publish_s:.3f} s "
        f"(goal: 1 s); making and delivering the measures took {delivery_s:.2f} s"
    )


if __name__ == "__main__":
    main()
