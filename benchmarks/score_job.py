"""Rows a second of `score_dataset` against a bare forward loop over the same rows and model.

    python benchmarks/score_job.py [--rows 8192] [--batch-size 256] [--repeats 5]

Model: the project's LateFusion for the rows of AV-Digits (audio 1x32x32, image 1x8x8, width 64, 10 classes).

* bare loop: eval and inference mode over batches of resident tensors, nothing else; with one torch thread, as an actor
  with one CPU has, and with all.
* score_dataset: one actor with one CPU, over a data set that Ray Data holds in memory; both passes. It is measured for
  `rows` and for five times as many: the difference has no start of processes in it.

Prints medians and their ratio.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import ray
import ray.data
import torch
from torch import nn

import bss_ray
from bss_ray.measure.forward import evaluating
from bss_ray.models import LateFusion
from bss_ray.runtime.threads import keep_freed_memory

SHAPES = {"audio": (1, 32, 32), "image": (1, 8, 8)}
CLASSES = 10
COLUMNS = bss_ray.Columns(modalities=("audio", "image"))
LARGER = 5
BLOCK_ROWS = 4096  # 18 MB


def make_rows(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    columns = {name: rng.standard_normal((rows, *shape), dtype=np.float32) for name, shape in SHAPES.items()}
    return {**columns, "label": rng.integers(0, CLASSES, rows)}


def make_dataset(columns: dict[str, np.ndarray]) -> ray.data.Dataset:
    rows = len(columns["label"])
    blocks = [
        {name: values[start : start + BLOCK_ROWS] for name, values in columns.items()}
        for start in range(0, rows, BLOCK_ROWS)
    ]
    numbers = ray.data.range(len(blocks), override_num_blocks=len(blocks))
    references = [ray.put(block) for block in blocks]
    return numbers.map_batches(lambda batch: ray.get(references[int(batch["id"][0])]), batch_size=None).materialize()


def bare_loop(model: nn.Module, columns: dict[str, np.ndarray], batch_size: int) -> None:
    tensors = {name: torch.from_numpy(values) for name, values in columns.items()}
    with evaluating(model):
        for start in range(0, len(columns["label"]), batch_size):
            model({name: values[start : start + batch_size] for name, values in tensors.items()})


def score(model: nn.Module, dataset: ray.data.Dataset, batch_size: int) -> None:
    scores = bss_ray.score_dataset(
        dataset, model, columns=COLUMNS, batch_size=batch_size, num_classes=CLASSES, actors=(1, 1), num_cpus=1
    )
    references = scores.to_arrow_refs()
    ray.wait(references, num_returns=len(references), fetch_local=False)


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    keep_freed_memory()
    torch.manual_seed(0)
    model = LateFusion(SHAPES, CLASSES)
    few, many = make_rows(args.rows), make_rows(LARGER * args.rows)
    few_dataset, many_dataset = make_dataset(few), make_dataset(many)
    threads = torch.get_num_threads()

    def bare(count: int) -> float:
        torch.set_num_threads(count)
        return seconds(lambda: bare_loop(model, few, args.batch_size)) / args.rows

    bare(threads)  # warm: the first pass asks the system for memory
    score(model, few_dataset, args.batch_size)
    ones, alls, jobs, starts = [], [], [], []
    for _ in range(args.repeats):
        ones.append(bare(1))
        alls.append(bare(threads))
        short = seconds(lambda: score(model, few_dataset, args.batch_size))
        long = seconds(lambda: score(model, many_dataset, args.batch_size))
        jobs.append((long - short) / ((LARGER - 1) * args.rows))
        starts.append(short - jobs[-1] * args.rows)

    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
    )
    print(f"ray {ray.__version__}; {args.rows} and {LARGER * args.rows} rows, batches of {args.batch_size}, ", end="")
    print(f"medians of {args.repeats}")
    one, every, job = (statistics.median(values) for values in (ones, alls, jobs))
    for name, each in (
        ("bare loop, 1 thread", one),
        (f"bare loop, {threads} threads", every),
        ("score_dataset, 1 actor", job),
    ):
        print(f"{name:26s} {1 / each:9,.0f} rows/s   {one / each:5.2f} of the bare loop with 1 thread")
    print(f"start of a call, its actor included: {statistics.median(starts):.1f} s")


if __name__ == "__main__":
    main()
