"""One epoch of a billion rows, planned by several holders and one coordinator: time, memory, messages.

    python benchmarks/scale.py [--rows 1000000000] [--holders 8] [--fraction 1.0]

The holders and the coordinator are the classes that Ray's actors wrap, in one process and one after the
other, so seconds of a holder are the total's share. Every row id is accounted for: the sums of ids and of
their squares over the epoch (modulo 2^64) must be those of all rows (with fraction 1).

Prints the figures that docs/scale.md starts from.
"""

import argparse
import itertools
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bss_ray import Learning
from bss_ray.sample.client import LocalHolders
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.state import ScoreBlock


class MeasuredHolders(LocalHolders):
    """Holders that count their seconds and the bytes of their answers, method by method."""

    def __init__(self, holders: list[Holder]) -> None:
        super().__init__(holders)
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def map(self, method: str, *args: Any) -> list[Any]:
        started = time.perf_counter()
        results = super().map(method, *args)
        self.seconds[method] = self.seconds.get(method, 0.0) + time.perf_counter() - started
        self.bytes[method] = self.bytes.get(method, 0) + _array_bytes(results)
        self.calls[method] = self.calls.get(method, 0) + 1
        return results


def _array_bytes(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(map(_array_bytes, value)) if isinstance(value, (list, tuple)) else 0


class RandomHolder(Holder):
    """A holder whose saved scores are random; every byte of its state is touched. Counts the passes over its keys."""

    passes = 0

    def _prepare(self, *args: Any) -> Any:
        self.passes += 1
        return super()._prepare(*args)

    def load(self, parts: Any, version: int, attempt: str = "") -> int:
        run = self._runs[0]
        state = ScoreBlock.empty(run.first_row, len(run.score))
        rng = np.random.default_rng(state.first_row)
        for values in (state.score, state.similarity, state.information):
            for first in range(0, len(values), 1 << 22):
                part = values[first : first + (1 << 22)]
                part[:] = 2 * rng.random(len(part), dtype=np.float32) - 1
        return super().load([state], version, attempt)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=1e9)
    parser.add_argument("--holders", type=int, default=8)
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the rows that the epoch presents")
    parser.add_argument("--temperature", type=float, default=0.25)
    options = parser.parse_args()
    rows = int(options.rows)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"numpy {np.__version__}"
    )

    before = resident_bytes()
    edges = itertools.pairwise(rows * index // options.holders for index in range(options.holders + 1))
    holders = [RandomHolder([(start, stop - start)]) for start, stop in edges]
    holders = MeasuredHolders(list(holders))
    scheduler = Learning(temperature=options.temperature, fraction=options.fraction)
    coordinator = Coordinator(holders, rows=rows, scheduler=scheduler, batch_size=4096)
    coordinator.load(None, 1)
    state = sum(values.nbytes for holder in holders for part in holder.state(1) for values in part.arrays.values())
    print(
        f"{rows:,} rows over {options.holders} holders: {state / 1e9:.2f} GB of state, {state / rows:.1f} bytes a row; "
        f"the process holds {(resident_bytes() - before) / 1e9:.2f} GB more than before"
    )

    started = time.perf_counter()
    plan = coordinator.plan(1)
    planned = time.perf_counter() - started
    print(f"plan: {planned:.1f} s for {len(plan.window_ends)} windows; {holders.calls['key_counts']} histogram passes")
    ids, squares, seconds, peak = 0, 0, [], 0
    for index in range(len(plan.window_ends)):
        since = time.perf_counter()
        window = coordinator.window(1, index)
        seconds.append(time.perf_counter() - since)
        peak = max(peak, resident_bytes())
        unsigned = window.view(np.uint64)
        ids += int(unsigned.sum(dtype=np.uint64))
        squares += int((unsigned * unsigned).sum(dtype=np.uint64))
    del window
    if options.fraction == 1:
        wanted = (rows * (rows - 1) // 2, rows * (rows - 1) * (2 * rows - 1) // 6)
        assert (ids % 2**64, squares % 2**64) == tuple(number % 2**64 for number in wanted), "rows are missing"
        print("every row id came exactly once, by the sums of ids and of their squares")
    total = time.perf_counter() - started
    print(
        f"first window after {planned + seconds[0]:.1f} s; windows: median {np.median(seconds):.2f} s, longest "
        f"{max(seconds):.1f} s; all {plan.size:,} rows {total:.1f} s, {plan.size / total / 1e6:.2f} M rows/s"
    )
    beside = sum(seconds) - holders.seconds["window"] - holders.seconds["mark_drawn"]
    print(
        f"passes over the keys for windows: {sum(each.passes for each in holders) / options.holders:.1f} a holder; "
        f"the coordinator's own work {beside / len(seconds):.2f} s a window"
    )
    print(
        f"memory: {(peak - before) / 1e9:.2f} GB between windows, "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB at the highest"
    )
    for method, spent in holders.seconds.items():
        count, size = holders.calls[method], holders.bytes[method]
        print(
            f"  {method:<12} {count:>4} calls, {spent / options.holders:>8.2f} s a holder, "
            f"{size / options.holders / 1e6:>10.1f} MB of answers a holder"
        )


if __name__ == "__main__":
    main()
