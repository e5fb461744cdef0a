"""`bss-ray report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser

from bss_ray.errors import ConfigError, StorageError
from bss_ray.storage import StoragePath
from bss_ray.train.settings import Parser

if TYPE_CHECKING:
    from rich.console import Console

_DESCRIPTION = (
    "Write report.html of a search (also while it is running), a training run or a scoring job, and print the most "
    "important results: for a search the best configurations with intervals, the comparison with uniform sampling, and "
    "what the trials say about each knob."
)


def report_parser() -> ArgumentParser:
    """The parser of `bss-ray report`."""
    parser = Parser(prog="bss-ray report", description=_DESCRIPTION)
    parser.add_argument(
        "folder", type=str, nargs="?", default="runs/tune", help="path or URI of the search, run or job."
    )
    return parser


def report_command(argv: Sequence[str]) -> int:
    """`bss-ray report`; returns the exit code."""
    folder = StoragePath.of(report_parser().parse_args(list(argv)).folder)
    config = _config(folder)
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if "space" in config:
        _search(folder, config, console)
    elif (folder / "metrics.csv").exists():
        from bss_ray.report.html import write_report

        write_report(folder)
    elif (folder / "summary.json").exists():
        from bss_ray.report.scores import print_summary, write_scores_report

        summary = json.loads((folder / "summary.json").read_text())
        write_scores_report(folder, summary)
        print_summary(console, summary, folder)
    else:
        raise StorageError(f"{folder} has nothing to report yet: no trial, epoch or score is finished")
    console.print(f"wrote {folder / 'report.html'}")
    return 0


def _search(folder: StoragePath, config: dict[str, Any], console: Console) -> None:
    from bss_ray.report.study import study_table, write_study_report
    from bss_ray.tune.record import load_study

    local = folder.local
    if local is None:
        raise ConfigError(f"{folder} is of a search, which is reported from the file system that it was made on")
    study = load_study(config["storage"], config["name"], local)
    result = folder / "result.json"
    comparison = json.loads(result.read_text())["comparison"] if result.exists() else None
    write_study_report(study, local, comparison)
    console.print(study_table(study, comparison, local))


def _config(folder: StoragePath) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.exists():
        runs = [run.name for run in folder.parent.glob() if (run / "config.yaml").exists()]
        there = f"; {folder.parent} has {', '.join(runs)}" if runs else ""
        raise ConfigError(f"{folder} is no folder of a search, run or job: it has no config.yaml{there}")
    return dict(yaml.safe_load(path.read_text()))
