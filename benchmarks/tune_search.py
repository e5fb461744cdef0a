"""A search finds a planted optimum: TPE against random with the same number of trials.

    python benchmarks/tune_search.py [--seeds 10] [--trials 40] [--epochs 3] [--concurrency 2] [--noise 0]

Trials run through the project's own search (`run_trials` with Ray Tune, an Optuna study in a journal, the space
`learning`), but instead of training they report a known function of their settings, epoch by epoch. It is 1 where
temperature, fraction, uniform_mix and momentum are those that the seed has planted, and falls with the mean square of
their distances (in shares of their ranges, logarithmic where the space is; a linear weight has no temperature and
counts as distance 1). The other knobs do nothing. The space's known points are left out, and no trial is pruned unless
--pruning says so.

A search's regret is 1 minus what the trial that it found best is worth, without noise. Prints it for each seed, in how
many seeds TPE's is the lower one, and the ratio of the means. Exit code 1 if TPE does not beat random in both.
"""

import argparse
import functools
import logging
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
import ray.tune

from bss_ray.runtime.messages import Message, TrialChanged
from bss_ray.tune.config import Pruning, TuneConfig
from bss_ray.tune.objective import Objective
from bss_ray.tune.record import SearchRecord, TrialSpec, open_storage
from bss_ray.tune.space import find_space
from bss_ray.tune.trials import run_trials

# Range of each knob in the space `learning`, and whether it is logarithmic.
KNOBS = {
    "scheduler.init_args.temperature": (0.05, 2.0, True),
    "scheduler.init_args.fraction": (0.3, 1.0, False),
    "scheduler.init_args.uniform_mix": (0.0, 0.5, False),
    "scoring.momentum": (0.0, 0.9, False),
}
ALGORITHMS = ("tpe", "random")


@dataclass(frozen=True)
class Planted:
    """The function whose optimum is to be found.

    Attributes:
        seed: says where the optimum is.
        noise: standard deviation of what trials report, which depends on seed, trial and epoch alone.
    """

    seed: int
    noise: float = 0.0

    def value(self, settings: dict[str, Any]) -> float:
        optimum = np.random.default_rng(self.seed).uniform(0.1, 0.9, len(KNOBS))  # in shares of the ranges
        return 1 - statistics.fmean(
            1.0 if settings[name] is None else (_share(settings[name], *limits) - place) ** 2
            for (name, limits), place in zip(KNOBS.items(), optimum, strict=True)
        )

    def curve(self, trial: int, settings: dict[str, Any], epochs: int) -> list[float]:
        """What a trial reports: a learning curve that ends at its value."""
        drawn = np.random.default_rng([self.seed, trial]).standard_normal(epochs)
        rise = (1 - 0.5 ** np.arange(1, epochs + 1)) / (1 - 0.5**epochs)
        curve: list[float] = (self.value(settings) * rise + self.noise * drawn).tolist()
        return curve


def _share(value: float, low: float, high: float, logarithmic: bool) -> float:
    """Where a value lies in its range, 0..1."""
    return math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)


def run_planted(config: dict[str, Any], *, planted: Planted, epochs: int) -> None:
    """Ray Tune's trainable, with the reports of `bss_ray.tune.trial.run_trial`."""
    spec = config["trial"]
    for epoch, value in enumerate(planted.curve(spec["number"], spec["settings"], epochs), start=1):
        outcome = {
            "values": [value],
            "seed_values": [[value]],
            "epoch": epoch - 1,
            "seconds": 0.0,
            "finished": epoch == epochs,
        }
        ray.tune.report({"epochs_done": epoch, "objective": value, "trial": outcome})


class TimedRecord(SearchRecord):
    """A record with a clock: seconds that choosing and checking the next trial took."""

    asking = 0.0

    def next_trial(self) -> TrialSpec | None:
        started = time.perf_counter()
        try:
            return super().next_trial()
        finally:
            self.asking += time.perf_counter() - started


@dataclass(frozen=True)
class Found:
    """What came of a search: its regret; seconds to the end of its first trial, of each further one, of each asking."""

    regret: float
    start: float
    each: float
    asking: float


def search(algorithm: str, planted: Planted, options: argparse.Namespace) -> Found:
    config = TuneConfig(
        trials=options.trials,
        algorithm=algorithm,  # type: ignore[arg-type]
        seed=planted.seed,
        pruning=Pruning(enabled=options.pruning, grace_epochs=1),
    )
    objective = Objective(("val_accuracy_fused",), "val_accuracy_fused", ("audio", "image"))
    space = replace(find_space(config.space, {}), known_good=[])
    ends: list[float] = []

    def on_message(message: Message) -> None:
        if isinstance(message, TrialChanged) and message.state != "running":
            ends.append(time.perf_counter())

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        record = TimedRecord(open_storage(None, folder), config, space, objective, {})
        run_trials(
            config,
            record,
            functools.partial(run_planted, planted=planted, epochs=options.epochs),
            folder,
            each={"CPU": 1.0},
            concurrent=options.concurrency,
            on_message=on_message,
        )
        failed = [trial for trial in record.finished if trial.state == optuna.trial.TrialState.FAIL]
        if failed or len(record.finished) != options.trials:
            raise SystemExit(f"{len(record.finished)} trials, {len(failed)} of them failed: {record.first_cause}")
        best = record.study.best_trial.user_attrs["settings"]
    each = (ends[-1] - ends[0]) / max(1, len(ends) - 1)
    return Found(1 - planted.value(best), ends[0] - started, each, record.asking / options.trials)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="searches with each algorithm, each with its own optimum")
    parser.add_argument("--trials", type=int, default=40, help="of a search")
    parser.add_argument("--epochs", type=int, default=3, help="reports of a trial")
    parser.add_argument("--concurrency", type=int, default=2, help="trials at a time")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of the reports")
    parser.add_argument("--pruning", action="store_true", help="stop trials early, from the first epoch on")
    options = parser.parse_args()

    quiet_tune()
    ray.init(
        address="local",
        num_cpus=options.concurrency,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"ray {ray.__version__}, optuna {optuna.__version__}; {options.trials} trials a search, "
        f"{options.concurrency} at a time",
        flush=True,
    )
    found: dict[str, list[Found]] = {algorithm: [] for algorithm in ALGORITHMS}
    for seed in range(options.seeds):
        for algorithm in ALGORITHMS:
            found[algorithm].append(search(algorithm, Planted(seed, options.noise), options))
        shown = ", ".join(
            f"{name} {1 - runs[-1].regret:.4f} (regret {runs[-1].regret:.4f})" for name, runs in found.items()
        )
        print(f"seed {seed:>3}: best found of 1: {shown}", flush=True)

    for algorithm, runs in found.items():
        start, each, asking = (
            statistics.median(getattr(one, name) for one in runs) for name in ("start", "each", "asking")
        )
        print(
            f"{algorithm:>6}: {start:.1f} s to the end of the first trial, {each:.3f} s for each further one, ", end=""
        )
        print(f"of which {asking:.3f} s to choose and check its settings")
    tpe, random = (np.array([one.regret for one in found[name]]) for name in ALGORITHMS)
    better, ratio = int((tpe < random).sum()), tpe.mean() / random.mean()
    print(f"TPE is better in {better} of {options.seeds} seeds; mean regret {tpe.mean():.4f}, ", end="")
    print(f"of random {random.mean():.4f}, ratio {ratio:.3f}")
    if better * 2 > options.seeds and tpe.mean() < random.mean():
        return 0
    print("TPE does not beat random")
    return 1


def quiet_tune() -> None:
    """What `bss-ray tune` sets: each report at once, and none of Ray Tune's own notes."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_SYNCER"] = "1"
    os.environ["TUNE_RESULT_BUFFER_LENGTH"] = "1"
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main())
