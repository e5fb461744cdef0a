"""`bss-ray tune`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from jsonargparse import ArgumentParser

from bss_ray.cli import STOPPED, start_ray
from bss_ray.errors import BssRayError, MissingDependencyError
from bss_ray.runtime.logs import CommandConfig
from bss_ray.train.settings import (
    Parser,
    add_training_arguments,
    instantiate,
    make,
    named_scheduler,
    resolved,
    with_types,
)

if TYPE_CHECKING:
    from bss_ray.report.console import Result, Shown
    from bss_ray.tune.config import TuneConfig

_DESCRIPTION = (
    "Search the sampler's settings: momentum, update interval, temperature, pacing, criteria, ... Trials share the "
    "data in the object store and start from shared burn-ins; Optuna chooses their settings, and each is judged on "
    "validation, never on test. At the end the best trial is trained against uniform sampling with several new seeds. "
    "It leaves best.yaml (for bss-ray train --config), result.json, report.html and the Optuna study in the search's "
    "folder. The same command resumes after a stop or a kill; a larger --trials extends the search. Without arguments: "
    "BSS-L on AV-Digits, in a few minutes on two cores."
)

# Settings that the search makes for each trial's run: its place and its output.
_OF_THE_SEARCH = (
    *("name", "storage_path", "ray_address", "log_format", "profile", "verbose"),
    *("max_failures", "max_preemptions", "wait_limit_s"),
)

# Settings that may differ between two commands of one search.
MAY_CHANGE = frozenset(
    {
        "trials",
        "compare_seeds",
        "max_concurrent",
        "cpus_per_trial",
        "gpus_per_trial",
        "loggers",
        "ray_address",
        "log_format",
        "verbose",
    }
)


def tune_parser(argv: Sequence[str]) -> ArgumentParser:
    """The parser of `bss-ray tune`.

    Args:
        argv: The arguments, which tell which scheduler's defaults apply.
    """
    from bss_ray.tune.config import TuneConfig

    parser = Parser(prog="bss-ray tune", description=_DESCRIPTION)
    parser.add_argument("--config", action="config", help="YAML file of settings; later options override it.")
    parser.add_class_arguments(with_types(TuneConfig), as_group=False, skip={"train"})
    scheduler = named_scheduler(argv, "train.")
    add_training_arguments(parser, scheduler, prefix="train.", skip=_OF_THE_SEARCH)
    return parser


def tune_command(argv: Sequence[str]) -> int:
    """`bss-ray tune`; returns the exit code."""
    parser = tune_parser(argv)
    settings = parser.parse_args(list(argv))
    from bss_ray.train.folder import RunFolder
    from bss_ray.train.run import TrainConfig
    from bss_ray.tune.config import TuneConfig
    from bss_ray.tune.space import find_space

    text = resolved(parser, settings)
    made = instantiate(parser, settings)
    config = make(TuneConfig, made, train=make(TrainConfig, made.train))
    space = find_space(config.space, yaml.safe_load(text)["train"])
    space.try_out()
    folder = RunFolder(config.storage_path, config.name, may_change=MAY_CHANGE)
    resumed = folder.claim(text)

    from bss_ray.report.console import open_display
    from bss_ray.report.search import SearchDisplay
    from bss_ray.tune.trials import TRIALS
    from bss_ray.tune.tuner import tune

    with open_display(config.log_format, config.name, lambda console: SearchDisplay(config, console)) as display:
        display.say(f"search {folder.path}{' (resumed)' if resumed else ''}: {config.space}, {config.train.data}")
        result = folder.result()
        if result is None or _wants_more(config, result):
            try:
                _start_ray(config, display)
                result = tune(config, space, folder, display.on_message)
            except BssRayError:
                if not (folder.path / TRIALS).exists():
                    folder.release()
                raise
            except KeyboardInterrupt:
                display.say("stopped. The same command resumes the search: it keeps finished trials")
                return STOPPED
            _write_report(config, folder.local, result, display)
        else:
            display.say("this search is complete. A larger --trials searches on; another --name starts a new one")
    display.show(result, folder.path)
    return 0


def _wants_more(config: TuneConfig, result: Result) -> bool:
    seeds = len((result["comparison"] or {}).get("seeds", []))
    return bool(sum(result["trials"].values()) < config.trials or seeds != config.compare_seeds)


def _start_ray(config: CommandConfig, display: Shown) -> None:
    # Ray Tune's own notes on trials and on its use are not for users of this command.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_SYNCER", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_RESULT_BUFFER_LENGTH", "1")
    start_ray(config, display)
    if not config.verbose:
        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _write_report(config: TuneConfig, folder: Path, result: Result, display: Shown) -> None:
    from bss_ray.report.study import write_study_report
    from bss_ray.tune.record import load_study

    try:
        write_study_report(load_study(config.storage, config.name, folder), folder, result["comparison"])
    except MissingDependencyError as error:
        display.say(f"no report.html: {error}")
