"""From YAML files, dotted options and search spaces to settings, for all commands.

jsonargparse reads them from the dataclasses' own types and docstrings; classes are named by import path
(`--model.class_path my.Model`).
"""

from __future__ import annotations

import argparse
import copy
import difflib
import functools
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import lazy_instance

from bss_ray.errors import BssRayError, ConfigError
from bss_ray.names import PLACES
from bss_ray.schedule.schedulers import Heuristic, Learning, Scheduler, Uniform
from bss_ray.storage import absolute

if TYPE_CHECKING:
    from bss_ray.train.run import TrainConfig

SCHEDULERS: dict[str, type[Scheduler]] = {kind.__name__: kind for kind in (Uniform, Heuristic, Learning)}

# The demo's setting, which a prototype on AV-Digits found good (docs/method.md).
_DEMO_SCHEDULER = {"temperature": 0.25, "fraction": 0.7}

_T = TypeVar("_T")


class Parser(ArgumentParser):
    """A parser whose errors are one line, with the nearest name for a setting that does not exist."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **settings: Any) -> Any:  # type: ignore[override]
        """`--verbose` alone is `--verbose true`; paths become absolute, as other processes work in other folders."""
        for action in self._actions:
            if action.option_strings and str(getattr(action, "_typehint", None)) == "<class 'bool'>":
                action.nargs, action.const = "?", True
        found = super().parse_args(args, *more, **settings)
        from bss_ray.data.sources import absolute_source  # after --help: Ray Data takes a second

        for name, value in vars(found.as_flat()).items():
            if isinstance(value, str) and name.removeprefix("train.") in PLACES:
                found[name] = absolute_source(value) if name.endswith("data") else absolute(value)
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        print(f"bss-ray: {text}{self._nearest(text)}\nFor all options: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """Help without the list of all modules of torch, which would be three quarters of the text."""
        known = re.compile(r",\s+known\s+subclasses:[^)]*\)")
        return known.sub(
            lambda found: ")" if "torch." in found.group() else found.group(), super().format_help(formatter)
        )

    def _nearest(self, text: str) -> str:
        unknown = re.search(
            r"[Oo]ption '([\w.]+)'(?: is not accepted|$)|dot import path string: (\S+)|--([\w.]+)", text
        )
        if unknown is None or "Did you mean" in text:
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


class TreeParser(Parser):
    """A parser of settings that do not come from a command line: errors are exceptions."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        raise ConfigError(f"{text}{self._nearest(text)}") from ex


def train_parser(argv: Sequence[str]) -> ArgumentParser:
    """The parser of `bss-ray train`.

    Args:
        argv: The arguments, which tell which scheduler's defaults apply: those of one scheduler must not stay when
            another is chosen.
    """
    parser = Parser(
        prog="bss-ray train",
        description="Train a multi-modal model with balance-aware sampling. Without arguments: the embedded "
        "dataset AV-Digits with 40 % of its training pairs wrong.",
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; later options override it.")
    add_training_arguments(parser, named_scheduler(argv))
    return parser


def add_training_arguments(
    parser: ArgumentParser, scheduler: str | None, *, prefix: str = "", skip: Collection[str] = ()
) -> None:
    """Add the settings of a training run.

    Args:
        parser: Parser that gets the arguments.
        scheduler: Class whose defaults apply to settings that are not given; None takes the demo's defaults.
        prefix: Prefix of the settings; `train.` adds them as a group.
        skip: Settings that are left out.
    """
    from bss_ray.train.run import TrainConfig

    set_parsing_settings(subclasses_enabled=[Scheduler])
    parser.add_class_arguments(
        with_types(TrainConfig),
        prefix.removesuffix(".") or None,
        as_group=False,
        instantiate=False,
        skip={"model", *skip},
    )
    model = add_model_arguments(parser, prefix)
    parser.set_defaults({model: {"class_path": "bss_ray.models.LateFusion"}})
    kind, settings = (Learning, _DEMO_SCHEDULER) if scheduler is None else (_scheduler_class(scheduler), {})
    parser.set_defaults({f"{prefix}scheduler": lazy_instance(kind, **settings)})


def add_model_arguments(parser: ArgumentParser, prefix: str = "") -> str:
    """Add a model's class and arguments; returns the name of the setting."""
    from torch import nn

    name = f"{prefix}model"
    text = (
        "Import path of a torch.nn.Module that maps a batch to {modality: logits, ..., 'fused': logits}; its arguments "
        f"as --{name}.NAME VALUE. If its constructor takes `shapes` (modality: shape of a row) or `num_classes`, they "
        "are given."
    )
    # Parsed and checked here, but built where the shapes of the rows are known.
    parser.add_subclass_arguments(
        nn.Module, name, instantiate=False, skip={"shapes", "num_classes"}, required=False, help=text
    )
    return name


def with_types(kind: type[_T]) -> type[_T]:
    """The dataclass, with types that jsonargparse understands.

    It looks up the names of inherited types in the module of the class itself, which need not import them.
    """
    kind.__init__.__annotations__.update(get_type_hints(kind))
    return kind


def _scheduler_class(name: str) -> type[Scheduler]:
    # The parser itself finds a user's own class, which starts from the defaults of the base class.
    return SCHEDULERS.get(name.rpartition(".")[2], Uniform)


def named_scheduler(argv: Sequence[str], prefix: str = "") -> str | None:
    """The scheduler that the options or a `--config` file name."""
    option = f"--{prefix}scheduler"
    name = _option(argv, option) or _option(argv, f"{option}.class_path")
    config = _option(argv, "--config")
    if name is None and config is not None and Path(config).is_file():
        tree = yaml.safe_load(Path(config).read_text()) or {}
        chosen = _at(tree, f"{prefix}scheduler") or {}
        name = chosen.get("class_path") if isinstance(chosen, dict) else chosen
    return None if name is None else str(name)


def _option(argv: Sequence[str], name: str) -> str | None:
    """The last value of an option, as `--name value` or `--name=value`."""

    def values() -> Iterator[str]:
        for index, word in enumerate(argv):
            if word == name and index + 1 < len(argv):
                yield argv[index + 1]
            elif word.startswith(name + "="):
                yield word.partition("=")[2]

    return next(reversed(list(values())), None)


def resolved(parser: ArgumentParser, settings: Namespace) -> str:
    """All settings as YAML."""
    return str(parser.dump(settings, skip_unset=False))


def instantiate(parser: ArgumentParser, settings: Namespace) -> Namespace:
    """The settings with their classes instantiated; `make` turns them into a dataclass.

    Raises:
        BssRayError: A setting is out of its range.
    """
    try:
        made: Namespace = parser.instantiate(settings)
        return made
    except ValueError as error:
        # The error of an optional setting is wrapped into an error about its union type.
        raise error.__cause__ if isinstance(error.__cause__, BssRayError) else error from None


def make(kind: type[_T], made: Namespace, **others: Any) -> _T:
    """An instance of the dataclass `kind` from instantiated settings; models become a `ModelSpec`.

    Args:
        kind: The dataclass.
        made: Result of `instantiate`, or a group of it.
        **others: Fields that are given otherwise.
    """
    from bss_ray.train.loop import ModelSpec

    values = {one.name: made[one.name] for one in fields(kind) if one.name in made}  # type: ignore[arg-type]
    if (model := values.get("model")) is not None:
        init_args = model.get("init_args")
        values["model"] = ModelSpec(class_path=model.class_path, init_args=init_args.as_dict() if init_args else {})
    return kind(**{**values, **others})


# ---- settings as a tree -----------------------------------------------------------------------


# Settings that are classes by import path, with their own arguments.
_CLASSES = ("scheduler", "model")


def overlay(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of settings with some changed.

    Args:
        tree: Nested settings.
        settings: Dotted settings, `{"scheduler.init_args.temperature": 0.25, ...}`. Another scheduler, and likewise
            another model, starts from its own defaults: no settings of the previous one stay.
    """
    changed = copy.deepcopy(dict(tree))
    # Classes first, because another class removes the settings of the previous class.
    for name, value in sorted(settings.items(), key=lambda item: not item[0].endswith(".class_path")):
        *groups, last = name.split(".")
        if len(groups) == 1 and groups[0] in _CLASSES and last not in ("class_path", "init_args"):
            groups.append("init_args")  # as on the command line: --scheduler.temperature
        inner = changed
        for group in groups:
            if not isinstance(inner.get(group), dict):
                inner[group] = {}
            inner = inner[group]
        if last == "class_path" and not _same_class(str(inner.get(last)), str(value)):
            inner.clear()
        inner[last] = value
    return changed


def _same_class(one: str, other: str) -> bool:
    """Whether two names mean the same class: classes of this project may be named without their module."""
    short = "." not in one or "." not in other
    return one.rpartition(".")[2] == other.rpartition(".")[2] if short else one == other


def training_config(tree: Mapping[str, Any]) -> tuple[TrainConfig, str]:
    """The settings of a training run from a tree of them.

    Returns:
        The settings, and all of them as YAML for `bss-ray train --config`.

    Raises:
        BssRayError: A setting is unknown (the error has the nearest name) or out of its range.
    """
    from bss_ray.train.run import TrainConfig

    scheduler = _at(tree, "scheduler.class_path")
    parser = _tree_parser(None if scheduler is None else str(scheduler))
    try:
        settings = parser.parse_object(dict(tree))
    except TypeError as error:
        raise ConfigError(f"settings are nested by group, such as {{'loop': {{'epochs': 3}}}}: {error}") from error
    return make(TrainConfig, instantiate(parser, settings)), resolved(parser, settings)


@functools.cache  # making a parser takes most of the time
def _tree_parser(scheduler: str | None) -> TreeParser:
    parser = TreeParser(prog="bss-ray train")
    add_training_arguments(parser, scheduler)
    return parser


def _at(tree: Any, name: str) -> Any:
    """The setting of a dotted name in a tree; None if it does not exist."""
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
