"""Peak use of Ray's object store by a study of one trial and of several at a time: are rows there once?

    python benchmarks/tune_memory.py [--mib 300] [--trials 8] [--epochs 8]

Whole studies (`bss_ray.tune.tuner.tune`, all that `bss-ray tune` does but the start of Ray, the comparison and the
report) over random rows from Parquet files, each in a Ray of its own with one logical CPU a trial and an object store
with room for a copy for every trial. The peer is the study with one trial.

What is measured: the bytes that objects fill in the node's object store (plasma), as its raylet counts them, every
--every seconds. Objects that nobody refers to any more count until Ray has removed them, up to two seconds later.
Spilled bytes would be missing, so they must be 0. A process's own memory is not in it. Each study first puts an object
of known size, to see that the meter shows it.

Prints the peak while rows are read and shards are made, the peak while trials run, and over all, with the ratio of
several trials to one (goal: within 10 %). Exit code 1 if it is not, or if the trials did not run at the same time.
"""

import argparse
import contextlib
import logging
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray._private.state
import ray.data
import torch
import yaml
from ray._private.internal_api import get_memory_info_reply

from bss_ray.cli.tune import tune_parser
from bss_ray.runtime.messages import Message, TrialChanged
from bss_ray.train.folder import RunFolder
from bss_ray.train.run import TrainConfig
from bss_ray.train.settings import instantiate, make, resolved
from bss_ray.tune.config import TuneConfig
from bss_ray.tune.space import find_space
from bss_ray.tune.tuner import tune

MIB = 1 << 20
WIDTH, CLASSES, FILES = 2048, 10, 8  # a row: two modalities of 8 KiB
ROW_BYTES = 2 * 4 * WIDTH
VALIDATION_ROWS = 512
KNOWN_MIB = 32
READING, TRIALS = "reading", "trials"


# ---- the meter --------------------------------------------------------------------------------


@dataclass
class Meter:
    """Samples what the object store holds.

    Attributes:
        every: seconds between two samples.
        phase: what is going on; set from outside.
        peaks: most bytes seen, by phase.
        spilled: bytes that have left the store for the disk.
        samples: how often it looked.
    """

    every: float
    phase: str = READING
    peaks: dict[str, int] = field(default_factory=dict)
    spilled: int = 0
    samples: int = 0

    def look(self) -> int:
        stats = get_memory_info_reply(ray._private.state.state).store_stats
        used = int(stats.object_store_bytes_used)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), used)
        self.spilled, self.samples = int(stats.spilled_bytes_total), self.samples + 1
        return used

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(self.every):
                self.look()

        thread = threading.Thread(target=sample, name="meter", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.look()

    def check(self) -> None:
        """See that it shows an object of known size, and its end."""
        before = self.look()
        known = ray.put(np.zeros(KNOWN_MIB * MIB, np.uint8))
        shown = self.look() - before
        if abs(shown - KNOWN_MIB * MIB) > MIB:
            raise SystemExit(f"the meter does not work: it shows {shown} bytes for an object of {KNOWN_MIB} MiB")
        del known
        end = time.monotonic() + 30
        while self.look() > before:
            if time.monotonic() > end:
                raise SystemExit("the meter does not work: it still shows an object that is gone")
            time.sleep(0.1)
        self.peaks.clear()


# ---- a study ----------------------------------------------------------------------------------


@dataclass
class Watched:
    """Which trials are in training: from the report of their first epoch to their end."""

    meter: Meter
    training: set[int] = field(default_factory=set)
    most: int = 0
    failed: list[str] = field(default_factory=list)

    def on_message(self, message: Message) -> None:
        if not isinstance(message, TrialChanged):
            return
        self.meter.phase = TRIALS
        if message.state == "running":
            if message.epoch is not None:
                self.training.add(message.number)
                self.most = max(self.most, len(self.training))
            return
        self.training.discard(message.number)
        if message.state == "fail":
            self.failed.append(message.cause)


def write_rows(folder: Path, mib: int) -> int:
    """Parquet files of random rows; returns how many training rows there are."""
    rng, rows = np.random.default_rng(0), mib * MIB // ROW_BYTES
    for split, count, files in (("train", rows, FILES), ("validation", VALIDATION_ROWS, 1)):
        (folder / split).mkdir()
        for index in range(files):
            size = count * (index + 1) // files - count * index // files
            columns: dict[str, Any] = {
                name: pa.FixedShapeTensorArray.from_numpy_ndarray(rng.standard_normal((size, WIDTH), dtype=np.float32))
                for name in ("audio", "image")
            }
            table = pa.table({**columns, "label": rng.integers(0, CLASSES, size)})
            pq.write_table(table, folder / split / f"{index}.parquet", compression="none")
    return rows


def study(data: Path, folder: Path, trials: int, options: argparse.Namespace) -> tuple[Meter, Watched]:
    """Search once, with all trials at a time."""
    argv = [
        *("--train.data", str(data), "--train.columns.modalities", "[audio, image]"),
        *("--train.store.kind", "object", "--train.num_classes", str(CLASSES), "--train.batch_size", "256"),
        *("--train.loop.epochs", str(options.epochs), "--trials", str(trials), "--max_concurrent", str(trials)),
        *("--pruning.enabled", "false", "--compare_seeds", "0"),
        *("--storage_path", str(folder), "--name", f"{trials}-trials"),
    ]
    parser = tune_parser(argv)
    settings = parser.parse_args(argv)
    text, made = resolved(parser, settings), instantiate(parser, settings)
    config = make(TuneConfig, made, train=make(TrainConfig, made.train))
    space = find_space(config.space, yaml.safe_load(text)["train"])
    run_folder = RunFolder(config.storage_path, config.name)
    run_folder.claim(text)

    ray.init(
        address="local",
        num_cpus=options.trials,
        object_store_memory=(options.trials + 4) * options.mib * MIB,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        meter = Meter(options.every)
        meter.check()
        watched = Watched(meter)
        with meter.running():
            tune(config, space, run_folder, watched.on_message)
    finally:
        ray.shutdown()
    if watched.failed or meter.spilled:
        raise SystemExit(
            f"no result: {meter.spilled} bytes spilled, {len(watched.failed)} trials failed {watched.failed}"
        )
    return meter, watched


# ---- the program ------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=300, help="of training rows")
    parser.add_argument("--trials", type=int, default=8, help="of the larger study, all at a time")
    parser.add_argument(
        "--epochs", type=int, default=8, help="of a trial; enough that all of them are in training together"
    )
    parser.add_argument("--every", type=float, default=0.02, help="seconds between two looks at the store")
    options = parser.parse_args()

    quiet()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"torch {torch.__version__}, ray {ray.__version__}"
    )
    peaks: dict[int, dict[str, float]] = {}
    together = 0
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data"
        data.mkdir()
        rows = write_rows(data, options.mib)
        print(f"{rows:,} training rows of {ROW_BYTES} bytes, {rows * ROW_BYTES / MIB:.0f} MiB", flush=True)
        for trials in (1, options.trials):
            started = time.perf_counter()
            meter, watched = study(data, Path(place), trials, options)
            peaks[trials] = {phase: bytes_ / MIB for phase, bytes_ in meter.peaks.items()}
            peaks[trials]["over all"] = max(peaks[trials].values())
            together = watched.most
            shown = ", ".join(f"{phase} {peak:.1f}" for phase, peak in peaks[trials].items())
            print(
                f"{trials} trials: at most {together} in training at a time; peak MiB in the object store: {shown} "
                f"({meter.samples} samples in {time.perf_counter() - started:.0f} s)",
                flush=True,
            )
    ratios = {phase: peaks[options.trials][phase] / peaks[1][phase] for phase in (READING, TRIALS, "over all")}
    shown = ", ".join(f"{phase} {ratio:.3f}" for phase, ratio in ratios.items())
    print(f"{options.trials} trials to 1: {shown} (goal: within 10 %)")
    if together < options.trials:
        print(f"only {together} trials were in training at a time: give them more --epochs")
        return 1
    return int(any(ratio > 1.1 for ratio in ratios.values()))


def quiet() -> None:
    """What `bss-ray tune` sets: each report at once, and none of Ray's own notes."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_SYNCER"] = "1"
    os.environ["TUNE_RESULT_BUFFER_LENGTH"] = "1"
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main())
