"""The command line: `bss-ray train` and, in `bss_ray.score.command`, `bss-ray score`.

Settings come from YAML files (`--config`), dotted options (`--scheduler.temperature 0.25`) and classes
by import path (`--model.class_path my.Model`), see `bss_ray.settings`.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bss_ray.errors import BssRayError
from bss_ray.settings import instantiate, make, resolved, train_parser

STOPPED = 130  # what shells expect after ctrl-C


def train_command(argv: Sequence[str]) -> int:
    """`bss-ray train`; returns the exit code."""
    parser = train_parser(argv)
    settings = parser.parse_args(list(argv))
    from bss_ray.train.folder import RunFolder  # after --help and wrong options: Ray takes seconds
    from bss_ray.train.run import TrainConfig, train

    config = make(TrainConfig, instantiate(parser, settings))
    folder = RunFolder(config.storage_path, config.name)
    resumed = folder.claim(resolved(parser, settings))

    from bss_ray.report.console import Display, result_table

    with Display() as display:
        display.say(
            f"run {folder.path}{' (goes on)' if resumed else ''}: {type(config.scheduler).__name__}, {config.data}"
        )
        result = folder.result()
        if result is None:
            try:
                start_ray(config, display)
                result = train(config, folder, display.on_message)
                _write_report(folder.path, display)
            except BssRayError:
                folder.release()
                raise
            except (KeyboardInterrupt, SystemExit):
                # Ray Train turns ctrl-C into SystemExit(0) once its controller has stopped.
                display.say("stopped. The same command goes on from the last checkpoint")
                return STOPPED
        else:
            display.say("this run is complete. Choose another --name for a new one")
    display.console.print(result_table(result, folder.path))
    return 0


def _write_report(folder: Path, display: Any) -> None:
    from bss_ray.errors import MissingDependencyError
    from bss_ray.report.html import write_report

    try:
        write_report(folder)
    except MissingDependencyError as error:
        display.say(f"no report.html: {error}")


def start_ray(config: Any, display: Any) -> None:
    """Connect to the cluster that is named, or start Ray here, quietly."""
    # Reports are barriers that take one poll of the controller; epochs here can be a second long.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # The project's modules in the current folder must be found by all processes.
    paths = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    if not config.verbose:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray.data

    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    display.status(f"connecting to Ray at {address}" if address else "starting Ray on this machine")
    level = logging.INFO if config.verbose else logging.ERROR
    ray.init(
        address=address or "local",
        log_to_driver=config.verbose,
        logging_level=level,
        **({} if address else {"include_dashboard": False}),
    )
    ray.data.DataContext.get_current().enable_progress_bars = config.verbose
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(level)


def score_command(argv: Sequence[str]) -> int:
    """`bss-ray score`; returns the exit code."""
    from bss_ray.score import command  # which needs this module's parser

    return command.score_command(argv)


def tune_command(argv: Sequence[str]) -> int:
    """`bss-ray tune`; returns the exit code."""
    from bss_ray.tune import command  # likewise

    return command.tune_command(argv)


COMMANDS = {"train": train_command, "score": score_command, "tune": tune_command}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `bss-ray`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        from bss_ray import __version__

        print(f"bss-ray {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Choose from: {', '.join(COMMANDS)}"
        print(f"bss-ray: unknown command {words[0]!r}. {hint}", file=sys.stderr)
        return 2
    sys.path.insert(0, os.getcwd())
    try:
        return COMMANDS[words[0]]([_underscored(word) for word in words[1:]])
    except BssRayError as error:
        print(f"bss-ray: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED


def _underscored(word: str) -> str:
    """`--initial-scores=FILE` is `--initial_scores=FILE`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


_USAGE = """usage: bss-ray COMMAND [options]

  train    train a multi-modal model with balance-aware sampling; without options, a demo
  score    score the rows of any data set with a model and its weights; without options, the demo's
  tune     search the sampler's settings, and compare the best with uniform sampling; without options, a demo

bss-ray COMMAND --help shows a command's options. Settings come from YAML (--config FILE) and dotted
options (--scheduler.temperature 0.25); --print_config prints all of them. A run that was stopped goes
on when the same command is given again."""


if __name__ == "__main__":
    raise SystemExit(main())
