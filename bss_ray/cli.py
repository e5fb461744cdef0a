"""The command line: `bss-ray train` and, in `bss_ray.score.command`, `bss-ray score`.

Settings come from YAML files (`--config`), dotted options (`--scheduler.temperature 0.25`) and classes
by import path (`--model.class_path my.Model`); jsonargparse reads them from the dataclasses' own
types and docstrings.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import lazy_instance

from bss_ray.errors import BssRayError
from bss_ray.schedule.schedulers import Heuristic, Learning, Scheduler, Uniform

SCHEDULERS: dict[str, type[Scheduler]] = {kind.__name__: kind for kind in (Uniform, Heuristic, Learning)}

# The demo's own setting: what a prototype on AV-Digits found good (docs/method.md).
_DEMO_SCHEDULER = {"temperature": 0.25, "fraction": 0.7}

MODEL_HELP = (
    "Import path of a torch.nn.Module that maps a batch to {modality: logits, ..., 'fused': logits}; its arguments as "
    "--model.NAME VALUE. If its constructor takes `shapes` (modality: shape of a row) or `num_classes`, they are "
    "given."
)

STOPPED = 130  # what shells expect after ctrl-C


class Parser(ArgumentParser):
    """Errors in one line, with the nearest name for one that does not exist."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        print(f"bss-ray: {text}{self._nearest(text)}\nFor all options: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """Help without the list of all modules that torch knows, which would be three quarters of it."""
        known = re.compile(r",\s+known\s+subclasses:[^)]*\)")
        return known.sub(
            lambda found: ")" if "torch." in found.group() else found.group(), super().format_help(formatter)
        )

    def _nearest(self, text: str) -> str:
        unknown = re.search(r"Option '([\w.]+)' is not accepted|dot import path string: (\S+)|--([\w.]+)", text)
        if unknown is None:
            return ""
        option, scheduler, argument = unknown.groups()
        if scheduler:
            choices: Sequence[str] = list(SCHEDULERS)
        else:
            names = [action.dest for action in self._actions]
            choices = [*names]
            if "scheduler" in names:
                choices += [f"scheduler.{f.name}" for kind in SCHEDULERS.values() for f in fields(kind)]
            if option:
                choices = [name.rpartition(".")[2] for name in choices]
        close = difflib.get_close_matches(scheduler or option or argument, choices, n=1, cutoff=0.5)
        return f". Did you mean {close[0]!r}?" if close else f". Choose from: {', '.join(sorted(set(choices)))}"


def train_parser(argv: Sequence[str]) -> ArgumentParser:
    """The parser of `bss-ray train`.

    Args:
        argv: the arguments, to know which scheduler's defaults apply: those of one scheduler must not
            stay when another is chosen.
    """
    from torch import nn

    from bss_ray.train.run import TrainConfig

    set_parsing_settings(subclasses_enabled=[Scheduler])
    parser = Parser(
        prog="bss-ray train",
        description="Train a multi-modal model with balance-aware sampling. Without arguments: the embedded "
        "data set AV-Digits with 40 % of its training pairs mixed up.",
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; later options override it.")
    parser.add_class_arguments(TrainConfig, as_group=False, skip={"model"})
    # Built on the ranks, which alone know the shapes of the rows: parsed and checked here, not made.
    parser.add_subclass_arguments(
        nn.Module, "model", instantiate=False, skip={"shapes", "num_classes"}, required=False, help=MODEL_HELP
    )
    parser.set_defaults({"model": {"class_path": "bss_ray.models.LateFusion"}})
    kind, settings = _chosen_scheduler(argv)
    parser.set_defaults({"scheduler": lazy_instance(kind, **settings)})
    return parser


def _chosen_scheduler(argv: Sequence[str]) -> tuple[type[Scheduler], dict[str, Any]]:
    """Class and settings that `--scheduler.*` options start from."""
    name = _option(argv, "--scheduler") or _option(argv, "--scheduler.class_path")
    config = _option(argv, "--config")
    if name is None and config is not None and Path(config).is_file():
        chosen = (yaml.safe_load(Path(config).read_text()) or {}).get("scheduler") or {}
        name = chosen.get("class_path") if isinstance(chosen, dict) else chosen
    if name is None:
        return Learning, _DEMO_SCHEDULER
    # A user's own class is found by the parser itself; it starts from the base's defaults.
    return SCHEDULERS.get(str(name).rpartition(".")[2], Uniform), {}


def _option(argv: Sequence[str], name: str) -> str | None:
    """The last value of an option, as `--name value` or `--name=value`."""

    def values() -> Iterator[str]:
        for index, word in enumerate(argv):
            if word == name and index + 1 < len(argv):
                yield argv[index + 1]
            elif word.startswith(name + "="):
                yield word.partition("=")[2]

    return next(reversed(list(values())), None)


def train_command(argv: Sequence[str]) -> int:
    """`bss-ray train`; returns the exit code."""
    parser = train_parser(argv)
    settings = parser.parse_args(list(argv))
    resolved = _resolved(parser, settings)
    from bss_ray.train.folder import RunFolder  # after --help and wrong options: Ray takes seconds

    config = _instantiate(parser, settings)
    folder = RunFolder(config.storage_path, config.name)
    resumed = folder.claim(resolved)

    from bss_ray.report.console import Display, result_table
    from bss_ray.train.run import train

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


def _resolved(parser: ArgumentParser, settings: Namespace) -> str:
    """All settings as YAML."""
    return str(parser.dump(settings, skip_unset=False))


def _instantiate(parser: ArgumentParser, settings: Namespace) -> Any:
    from bss_ray.train.loop import ModelSpec
    from bss_ray.train.run import TrainConfig

    try:
        made = parser.instantiate(settings)
    except ValueError as error:
        # An optional setting's own error comes wrapped into one about its union type.
        raise error.__cause__ if isinstance(error.__cause__, BssRayError) else error from None
    init_args = made.model.get("init_args")
    model = ModelSpec(class_path=made.model.class_path, init_args=init_args.as_dict() if init_args else {})
    others = {f.name: made[f.name] for f in fields(TrainConfig) if f.name != "model"}
    return TrainConfig(model=model, **others)


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


COMMANDS = {"train": train_command, "score": score_command}


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

bss-ray COMMAND --help shows a command's options. Settings come from YAML (--config FILE) and dotted
options (--scheduler.temperature 0.25); --print_config prints all of them. A run that was stopped goes
on when the same command is given again."""


if __name__ == "__main__":
    raise SystemExit(main())
