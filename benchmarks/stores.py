"""Batches of random rows from each store, in the same run: object store, files on disk, Lance.

    python benchmarks/stores.py [--rows 100000] [--batch 256] [--repeats 9]

A row has 4 kB: two (512,) float32 columns and a label. The stores hold the same rows in 16 shards, and each
repeat gathers the same batches from one store after the other. Files and Lance data are in the page cache, as
after the first epoch of a data set that fits there. Medians of the repeats, and of their ratios.
"""

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import ray.data

from bss_ray.data.build import build_shards
from bss_ray.data.columns import Columns
from bss_ray.data.shards import Shards
from bss_ray.data.store import StoreConfig

COLUMNS = Columns(modalities=("audio", "image"))
SHARDS = 16


def make_rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Random rows; their ids seed them, so that every build has the same."""
    rng = np.random.default_rng(int(batch["id"][0]))
    shape = (len(batch["id"]), 512)
    return {name: rng.random(shape, dtype=np.float32) for name in COLUMNS.modalities} | {"label": batch["id"] % 10}


def make_stores(rows: int, folder: Path, kinds: list[str]) -> dict[str, Shards]:
    """The same rows in each store, with the seconds that took."""
    stores = {}
    for kind in kinds:
        started = time.perf_counter()
        config = StoreConfig(kind=kind, folder=None if kind == "object" else str(folder / kind))  # type: ignore[arg-type]
        dataset = ray.data.range(rows, override_num_blocks=2 * SHARDS).map_batches(make_rows, batch_size=None)
        stores[kind] = build_shards(dataset, COLUMNS, min_shards=SHARDS, store=config)
        print(f"{kind:>8}: {len(stores[kind].parts)} shards in {time.perf_counter() - started:.1f} s")
    assert len({shards.fingerprint for shards in stores.values()}) == 1
    return stores


def seconds(shards: Shards, batches: list[np.ndarray]) -> float:
    """Wall time of gathering all batches."""
    started = time.perf_counter()
    for rows in batches:
        shards.gather(rows)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=200, help="of one repeat")
    parser.add_argument("--repeats", type=int, default=9, help="after one that does not count")
    parser.add_argument("--stores", nargs="+", default=["object", "disk", "lance"], metavar="KIND")
    parser.add_argument("--folder", help="where disk and Lance write; default a temporary folder")
    options = parser.parse_args()

    import lance
    import pyarrow

    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (ray, pyarrow, lance, np))
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {versions}")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        stores = make_stores(options.rows, Path(folder), options.stores)
        times: dict[str, list[float]] = {kind: [] for kind in stores}
        for repeat in range(options.repeats + 1):
            batches = [rng.integers(0, options.rows, options.batch) for _ in range(options.batches)]
            for kind, shards in stores.items():
                spent = seconds(shards, batches)
                if repeat:
                    times[kind].append(spent)
        medians = {kind: statistics.median(spent) for kind, spent in times.items()}
        for kind, median in medians.items():
            rate = options.batch * options.batches / median
            ratios = [there / here for there, here in zip(times[options.stores[0]], times[kind], strict=True)]
            print(f"{kind:>8}: {rate:>11,.0f} rows/s, {statistics.median(ratios):.2f} of {options.stores[0]}")


if __name__ == "__main__":
    main()
