"""Search spaces: found by name, and checked before anything is started.

A space is a function `space(trial: optuna.Trial) -> dict` of dotted settings of `bss-ray train`, see `tune_spaces`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from bss_ray.errors import BssRayError, ConfigError, nearest
from bss_ray.names import import_name
from bss_ray.train.run import TrainConfig
from bss_ray.train.settings import overlay, training_config
from tune_spaces import SPACES

_DRAWS = 20

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class SearchSpace:
    """A search space and the settings that it changes.

    Attributes:
        name: Name as the user gave it.
        function: Function that asks a trial for its knobs and returns dotted settings.
        known_good: Points to try first, with the names of the space's knobs.
        base: Settings of `bss-ray train` as a tree, for everything that the space does not set.
    """

    name: str
    function: Callable[[optuna.Trial], dict[str, Any]]
    known_good: list[dict[str, Any]]
    base: Mapping[str, Any]

    def settings(self, trial: optuna.Trial) -> dict[str, Any]:
        """The dotted settings of a trial.

        Raises:
            ConfigError: The space fails or returns no settings; the error names the trial's values.
        """
        try:
            settings = self.function(trial)
        except Exception as error:  # from the user's own code
            raise ConfigError(
                f"space {self.name} fails: {type(error).__name__}: {error}; the trial's values: {_shown(trial.params)}"
            ) from error
        if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
            raise ConfigError(
                f"space {self.name} must return a dict of dotted settings, {{'scheduler.init_args.temperature': 0.25, "
                f"...}}; received {settings!r}"
            )
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}
        try:
            json.dumps(plain)  # in the form that the record keeps
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"space {self.name} must return numbers, words, booleans, null, lists or dicts of them: {error}; "
                f"received {settings!r}"
            ) from None
        return plain

    def config(self, settings: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[TrainConfig, str]:
        """The configuration of a training run with these settings, and all its settings as YAML.

        Args:
            settings: Dotted settings over `base`.
            params: Values of the trial, for the error.

        Raises:
            ConfigError: A setting is unknown or impossible; the error names the rule and the trial's values.
        """
        try:
            return training_config(overlay(self.base, settings))
        except BssRayError as error:
            raise ConfigError(
                f"space {self.name} asks for a run that is impossible: {error}; the trial's values: {_shown(params)}"
            ) from error

    def try_out(self) -> None:
        """Draw the known points and some random points, so that a faulty space fails before anything is started.

        Raises:
            ConfigError: See `settings` and `config`.
        """
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for point in self.known_good:
            study.enqueue_trial(point)
        for point in [*self.known_good, *[{}] * _DRAWS]:
            trial = study.ask()
            with warnings.catch_warnings():
                # Optuna accepts a known point outside its range.
                warnings.filterwarnings("error", message="Fixed parameter")
                settings = self.settings(trial)
            if not trial.params:
                raise ConfigError(f"space {self.name} asks the trial for nothing: there is nothing to search")
            for knob in point:
                if knob not in trial.params:  # which Optuna ignores
                    raise ConfigError(
                        f"a KNOWN_GOOD of space {self.name} has {knob}={point[knob]!r}, and the space does not ask for "
                        f"{knob!r} there; {nearest(knob, trial.params)}"
                    )
            self.config(settings, trial.params)


def find_space(name: str, base: Mapping[str, Any]) -> SearchSpace:
    """The space of this name.

    Args:
        name: Name of a space of `tune_spaces`, or `module:function`; points to try first are the module's `KNOWN_GOOD`.
        base: Settings that the space changes, as a tree.

    Raises:
        ConfigError: The space does not exist (the error names the nearest), or it is no function.
    """
    if name not in SPACES and ":" not in name:
        raise ConfigError(f"unknown space {name!r}; {nearest(name, SPACES)}; or your own as module:function")
    path = SPACES.get(name, name)
    function = import_name(path)
    if not callable(function):
        raise ConfigError(f"space {name} must be a function of a trial; it is {function!r}")
    known_good = getattr(sys.modules[path.partition(":")[0]], "KNOWN_GOOD", [])
    if not isinstance(known_good, (list, tuple)) or not all(isinstance(point, dict) for point in known_good):
        raise ConfigError(f"KNOWN_GOOD of space {name} must be a list of dicts, {{knob: value}}; it is {known_good!r}")
    return SearchSpace(name, function, list(known_good), base)


def _shown(params: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in params.items()) or "none"
