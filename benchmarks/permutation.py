"""Weighted permutation against `torch.multinomial`, in the same run.

    python benchmarks/permutation.py [--rows 10000000] [--repeats 5]

Prints medians and ratios; the first repeat of each is not counted.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from bss_ray import weighted_permutation


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of `work`, after one call that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="at most 2^24, where torch stops")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}")
    weights = np.random.default_rng(0).random(options.rows) + 0.01
    tensor = torch.from_numpy(weights)
    for share in (1.0, 0.1):
        size = round(share * options.rows)
        ours = median_seconds(lambda size=size: weighted_permutation(weights, seed=0, size=size), options.repeats)
        peer = median_seconds(lambda size=size: torch.multinomial(tensor, size), options.repeats)
        print(
            f"first {size:>12,} of {options.rows:,} rows: weighted_permutation {ours:.3f} s, "
            f"torch.multinomial {peer:.3f} s, {peer / ours:.2f}x as fast"
        )


if __name__ == "__main__":
    main()
