"""Weighted permutation against its peers, in the same run.

    python benchmarks/permutation.py [--repeats 5] [--large 100000000] [--numpy]

* 10^7 rows, all of them and the first tenth: against `torch.multinomial(replacement=False)`, repeat by repeat.
* 10^8 rows: torch refuses more than 2^24; NumPy's `Generator.choice` takes minutes, so it is measured only
  with `--numpy`. Memory is the peak of a process of its own, less what it held before the call.

Prints medians; the first repeat of each is not counted.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bss_ray import weighted_permutation


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def medians(works: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median wall time of each, measured in turns: a noisy neighbour hits all of them alike."""
    rounds = [[seconds(work) for work in works] for _ in range(repeats + 1)][1:]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def make_weights(rows: int) -> np.ndarray:
    return np.random.default_rng(0).random(rows) + 0.01


def against_torch(rows: int, repeats: int) -> None:
    """All rows and a tenth of them."""
    weights = make_weights(rows)
    tensor = torch.from_numpy(weights)
    for size in (rows, rows // 10):
        ours, peer = medians(
            [
                lambda size=size: weighted_permutation(weights, seed=0, size=size),
                lambda size=size: torch.multinomial(tensor, size),
            ],
            repeats,
        )
        print(
            f"first {size:>11,} of {rows:,} rows: weighted_permutation {ours:.3f} s, torch.multinomial {peer:.3f} s: "
            f"{peer / ours:.2f}x as fast"
        )


def large(rows: int, repeats: int, result: "multiprocessing.Queue[tuple[float, float]]") -> None:
    """Time and memory of one large permutation, in a fresh process."""
    weights = make_weights(rows)
    weighted_permutation(weights[: rows // 100], seed=0)
    before = _status_bytes("VmRSS")
    runs = []
    for _ in range(repeats):
        started = time.perf_counter()
        order = weighted_permutation(weights, seed=0)
        runs.append(time.perf_counter() - started)
        assert len(order) == rows
        own = order.nbytes
        del order
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result.put((statistics.median(runs), (peak - before - own) / 1e9))


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the comparison with torch, at most 2^24")
    parser.add_argument("--large", type=int, default=100_000_000, help="rows of the large permutation; 0 for none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--numpy", action="store_true", help="measure NumPy's choice at the large size, once")
    options = parser.parse_args()

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"torch {torch.__version__}, numpy {np.__version__}"
    )
    against_torch(options.rows, options.repeats)
    if not options.large:
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=large, args=(options.large, max(1, options.repeats // 2), queue))
    process.start()
    ours, gigabytes = queue.get()
    process.join()
    print(f"all of {options.large:,} rows: weighted_permutation {ours:.2f} s, {gigabytes:.2f} GB more than in and out")
    try:
        torch.multinomial(torch.ones(options.large), 1)
    except RuntimeError as error:
        print(f"torch.multinomial: {error}")
    if options.numpy:
        p = make_weights(options.large)
        p /= p.sum()
        peer = seconds(lambda: np.random.default_rng(0).choice(options.large, options.large, replace=False, p=p))
        print(f"numpy.random.Generator.choice {peer:.0f} s: {peer / ours:.0f}x as fast")


if __name__ == "__main__":
    main()
