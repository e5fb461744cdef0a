"""The loader against three peers, in the same run: the same rows in the same order, whole epochs.

    python benchmarks/loader.py [--rows 100000] [--batch-size 256] [--shards 16] [--repeats 7]

Rows are two (512,) float32 columns, a label and a row id. Repeats of the peers are interleaved, so that a busy
machine is busy for all of them; the first of each is not counted. Prints medians and ratios.

The peers:

- torch's DataLoader over Subset(order), without workers;
- Ray Data: random_shuffle of a materialised data set, then iter_torch_batches;
- index_select of each batch on contiguous tensors: the limit of copying.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import ray
import ray.data
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

import bss_ray
from bss_ray.data.build import build_shards
from bss_ray.data.shards import Shards
from bss_ray.load.loader import Loader
from bss_ray.sample.plan import Order, Plan

Tensors = dict[str, torch.Tensor]
Epoch = Callable[[], Iterator[Tensors]]
WIDTH, COLUMNS = 512, ("a", "b")


def ours(shards: Shards, order: np.ndarray, batch_size: int) -> Epoch:
    """The loader of one rank."""
    node = ray.get_runtime_context().get_node_id()
    loader = Loader(shards, rank=0, rank_nodes=[node], device=torch.device("cpu"))
    plan = Plan(0, 0, len(order), batch_size, "keep", (len(order),))

    def epoch() -> Iterator[Tensors]:
        for batch in loader.batches(plan, Order(plan, lambda _: order)):
            yield batch.tensors

    return epoch


def data_loader(tensors: Tensors, order: np.ndarray, batch_size: int) -> Epoch:
    """torch's DataLoader over a subset, in this process."""
    names = list(tensors)
    loader = DataLoader(Subset(TensorDataset(*tensors.values()), order.tolist()), batch_size=batch_size)

    def epoch() -> Iterator[Tensors]:
        for batch in loader:
            yield dict(zip(names, batch, strict=True))

    return epoch


def ray_data(dataset: ray.data.Dataset, batch_size: int) -> Epoch:
    """Ray Data: a materialised dataset, shuffled again for each epoch."""
    materialised = dataset.materialize()

    def epoch() -> Iterator[Tensors]:
        yield from materialised.random_shuffle().iter_torch_batches(batch_size=batch_size)

    return epoch


def index_select(tensors: Tensors, order: np.ndarray, batch_size: int) -> Epoch:
    """One copy of each row, out of tensors that hold all of them."""
    row_ids = torch.from_numpy(order)

    def epoch() -> Iterator[Tensors]:
        for ids in row_ids.split(batch_size):
            yield {name: values.index_select(0, ids) for name, values in tensors.items()}

    return epoch


def make_rows(ids: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Random columns for the rows of a block."""
    row_id = ids["id"]
    rng = np.random.default_rng(int(row_id[0]))
    columns = {name: rng.random((len(row_id), WIDTH), np.float32) for name in COLUMNS}
    return {**columns, "label": rng.integers(0, 10, len(row_id)), "row_id": row_id}


def seconds(epoch: Epoch, rows: int, batch_bytes: int) -> float:
    """Wall time of an epoch; checks that it brought every row and all bytes."""
    found = size = 0
    started = time.perf_counter()
    for batch in epoch():
        found += len(batch["row_id"])
        size += sum(values.nbytes for values in batch.values())
    elapsed = time.perf_counter() - started
    if (found, size) != (rows, rows * batch_bytes):
        raise SystemExit(f"an epoch of {rows} rows brought {found} rows and {size} bytes")
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.range(options.rows, override_num_blocks=options.shards).map_batches(make_rows, batch_size=None)
    dataset = dataset.materialize()
    shards = build_shards(dataset, bss_ray.Columns(modalities=COLUMNS), min_shards=options.shards)
    whole = shards.gather(np.arange(options.rows))
    tensors = {name: torch.from_numpy(values) for name, values in whole.items()}
    tensors["row_id"] = torch.arange(options.rows)
    order = bss_ray.weighted_permutation(np.ones(options.rows), seed=0)

    epochs = {
        "bss_ray loader": ours(shards, order, options.batch_size),
        "torch DataLoader": data_loader(tensors, order, options.batch_size),
        "Ray Data": ray_data(dataset, options.batch_size),
        "index_select": index_select(tensors, order, options.batch_size),
    }
    row_bytes = sum(feature.row_bytes for feature in shards.features.values()) + 8
    taken: dict[str, list[float]] = {name: [] for name in epochs}
    for repeat in range(options.repeats + 1):
        for name, epoch in epochs.items():
            elapsed = seconds(epoch, options.rows, row_bytes)
            if repeat > 0:
                taken[name].append(elapsed)

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"torch {torch.__version__}, ray {ray.__version__}, numpy {np.__version__}"
    )
    print(
        f"{options.rows:,} rows of {row_bytes:,} bytes in {len(shards.parts)} shards, batches of {options.batch_size}; "
        f"{options.repeats} repeats"
    )
    our_median = statistics.median(taken["bss_ray loader"])
    for name, values in taken.items():
        median = statistics.median(values)
        print(
            f"{name:>18}: {options.rows / median:>11,.0f} rows/s (median; {options.rows / max(values):,.0f} to "
            f"{options.rows / min(values):,.0f}); the loader is {median / our_median:.2f}x as fast"
        )


if __name__ == "__main__":
    main()
