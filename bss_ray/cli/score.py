"""`bss-ray score`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from bss_ray.cli import STOPPED, start_ray
from bss_ray.errors import BssRayError, MissingDependencyError
from bss_ray.runtime.logs import CommandConfig
from bss_ray.storage import StoragePath
from bss_ray.train.settings import Parser, add_model_arguments, instantiate, make, with_types

if TYPE_CHECKING:
    from bss_ray.report.console import Result, Shown

_DESCRIPTION = (
    "Score all rows of a dataset with a model and its weights: how balanced is each row between its modalities? Tasks "
    "read the rows and a pool of actors measures them. Measures go to files, part by part, so that the same command "
    "resumes after a stop. A second pass normalises them over all rows. It leaves scores.parquet, summary.json and "
    "report.html in the job's folder; `bss-ray train --initial_scores` takes the scores. Without arguments: the "
    "training rows of the run `demo`, with the weights of its chosen epoch."
)


def score_parser() -> ArgumentParser:
    """The parser of `bss-ray score`."""
    from bss_ray.score.config import ScoreConfig

    parser = Parser(prog="bss-ray score", description=_DESCRIPTION)
    parser.add_argument("--config", action="config", help="YAML file of settings; later options override it.")
    parser.add_class_arguments(with_types(ScoreConfig), as_group=False, skip={"model"})
    add_model_arguments(parser)
    return parser


def score_command(argv: Sequence[str]) -> int:
    """`bss-ray score`; returns the exit code."""
    parser = score_parser()
    settings = parser.parse_args(list(argv))
    from bss_ray.report.console import open_display
    from bss_ray.report.scores import ScoreDisplay
    from bss_ray.score.config import MAY_CHANGE, ScoreConfig, resolve
    from bss_ray.score.job import SUMMARY_FILE, forget_beginning, score
    from bss_ray.train.folder import RunFolder
    from bss_ray.train.initial import read_weights

    config = make(ScoreConfig, instantiate(parser, settings))
    job = resolve(config, read_weights(config.checkpoint, config.storage_path))
    folder = RunFolder(config.storage_path, config.name, may_change=MAY_CHANGE, result_file=SUMMARY_FILE)
    resumed = folder.claim(job.to_yaml())
    with open_display(config.log_format, config.name, ScoreDisplay) as display:
        display.say(f"job {folder.path}{' (resumed)' if resumed else ''}: {job.config.split} rows of {job.data}")
        display.say(f"weights: {job.weights.source}")
        summary = folder.result()
        if summary is None:
            try:
                _start_ray(config, display)
                summary = score(job, folder, display.on_message)
                _write_report(folder.path, summary, display)
            except BssRayError:
                forget_beginning(folder.path)
                raise
            except KeyboardInterrupt:
                display.say("stopped. The same command resumes the job; measured rows are not measured again")
                return STOPPED
        else:
            display.say("this job is complete. Choose another --name for a new one")
    display.show(summary, folder.path)
    return 0


def _start_ray(config: CommandConfig, display: Shown) -> None:
    if config.verbose:
        start_ray(config, display)
        return
    # Ray's core writes a line of level error for every pool of actors, and a line that it will not write more.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _without_stderr():
        start_ray(config, display)
    # Errors of rows and model are raised here; Ray Data would print them with its own traceback first.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard what the C++ code of this process writes to the stream; exceptions pass."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _write_report(folder: StoragePath, summary: Result, display: Shown) -> None:
    from bss_ray.report.scores import write_scores_report

    try:
        write_scores_report(folder, summary)
    except MissingDependencyError as error:
        display.say(f"no report.html: {error}")
