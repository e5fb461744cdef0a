"""A study of many short trials against as many separate runs: wall time of whole commands.

    python benchmarks/tune_study.py [--trials 12] [--epochs 4] [--repeats 3] [--one-worker]

* study: one `bss-ray tune` on AV-Digits without pruning and without the comparison at the end. Its trials share one
  Ray, the data and burn-ins, and two run at a time on two cores.
* separate runs: one `bss-ray train` after another, each with the settings that a trial of the study had, the same
  epochs and the default number of workers (with --one-worker also with --num_workers 1).

Start of Python and of Ray, reading the data and writing the report are in both, once for the study and once for each
run. A run also tests its chosen epoch and writes its scores, which a trial does not. Each repeat has its own random
settings. Prints the seconds of each repeat, medians, and the median of the ratios (goal: at most 0.35 with 12 trials on
two cores).
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import ray
import torch
import yaml

from bss_ray.train.settings import overlay, training_config
from bss_ray.tune.record import load_study

GOAL = 0.35
STUDY = "study"
SEPARATE, ONE_WORKER = "separate runs", "separate runs, 1 worker"


def bss_ray(*arguments: str) -> float:
    """Wall seconds of a command, from before its Python starts."""
    # A cluster that happens to be named in the environment is not this machine.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "bss_ray.cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"bss-ray {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return time.perf_counter() - started


def run_study(folder: Path, options: argparse.Namespace, seed: int) -> tuple[float, list[str]]:
    """Seconds of a study, and all settings of each of its trials as YAML for `bss-ray train --config`."""
    seconds = bss_ray(
        "tune",
        *("--name", STUDY, "--storage_path", str(folder), "--seed", str(seed)),
        *("--space", options.space, "--trials", str(options.trials), "--train.loop.epochs", str(options.epochs)),
        *("--pruning.enabled", "false", "--compare_seeds", "0"),
    )
    base: dict[str, Any] = yaml.safe_load((folder / STUDY / "config.yaml").read_text())["train"]
    trials = load_study(None, STUDY, folder / STUDY).trials
    whole = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if len(whole) != options.trials:
        raise SystemExit(f"only {len(whole)} of {options.trials} trials ran to their end")
    return seconds, [training_config(overlay(base, trial.user_attrs["settings"]))[1] for trial in whole]


def run_separately(folder: Path, settings: Sequence[str], kind: str) -> float:
    """Seconds of one `bss-ray train` after another."""
    workers = ("--num_workers", "1") if kind == ONE_WORKER else ()
    seconds = 0.0
    for number, text in enumerate(settings):
        name = f"{'one-worker' if workers else 'default'}-{number}"
        (folder / f"{name}.yaml").write_text(text)
        seconds += bss_ray(
            "train",
            *("--config", str(folder / f"{name}.yaml"), "--name", name, "--storage_path", str(folder), *workers),
        )
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, help="number of trials of a study, and of separate runs")
    parser.add_argument("--epochs", type=int, default=4, help="of each trial and run")
    parser.add_argument("--space", default="learning")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one-worker", action="store_true", help="also separate runs with --num_workers 1")
    options = parser.parse_args()

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"torch {torch.__version__}, ray {ray.__version__}, optuna {optuna.__version__}; {options.trials} trials of "
        f"{options.epochs} epochs",
        flush=True,
    )
    kinds = [SEPARATE, ONE_WORKER] if options.one_worker else [SEPARATE]
    seconds: dict[str, list[float]] = {kind: [] for kind in (STUDY, *kinds)}
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as place:
            spent, settings = run_study(Path(place), options, seed=repeat)
            seconds[STUDY].append(spent)
            print(f"repeat {repeat}: {STUDY} {spent:.1f} s", end="", flush=True)
            for kind in kinds:
                seconds[kind].append(run_separately(Path(place), settings, kind))
                print(f"; {kind} {seconds[kind][-1]:.1f} s, ratio {spent / seconds[kind][-1]:.3f}", end="", flush=True)
            print()

    study = seconds[STUDY]
    print(
        f"medians: {STUDY} {statistics.median(study):.1f} s, {statistics.median(study) / options.trials:.1f} s a trial"
    )
    for kind in kinds:
        ratios = [ours / theirs for ours, theirs in zip(study, seconds[kind], strict=True)]
        middle = statistics.median(seconds[kind])
        goal = f" (goal: at most {GOAL})" if kind == SEPARATE else ""
        print(f"{kind}: {middle:.1f} s, {middle / options.trials:.1f} s each; ", end="")
        print(f"the study takes {statistics.median(ratios):.3f} of them{goal}")


if __name__ == "__main__":
    main()
