"""Search spaces are found by name, and fail before anything is started if they are going to fail at all."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml

from bss_ray.errors import ConfigError
from bss_ray.train.settings import overlay, training_config
from bss_ray.tune.space import SearchSpace, find_space
from tune_spaces import SPACES

BASE = overlay({}, {"scheduler.class_path": "Learning", "loop.epochs": 9})


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw checks all settings, which takes a tenth of a second."""
    monkeypatch.setattr("bss_ray.tune.space._DRAWS", 6)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes a module of the user's, `mine`, that is found on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str) -> None:
        (tmp_path / "mine.py").write_text(text)
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("mine", None)


def space(function: Any, known_good: list[dict[str, Any]] | None = None) -> SearchSpace:
    return SearchSpace("mine:space", function, known_good or [], BASE)


def lr(trial: optuna.Trial) -> dict[str, Any]:
    return {"loop.lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}


# ---- found --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_the_built_in_spaces_pass(name: str) -> None:
    found = find_space(name, training_base())
    assert found.name == name
    assert found.known_good
    found.try_out()


def training_base() -> dict[str, Any]:
    """All settings, as `bss-ray tune` hands them on."""
    tree: dict[str, Any] = yaml.safe_load(training_config({})[1])
    return tree


def test_a_space_of_the_users_own(module: Any) -> None:
    module(
        "from tune_spaces.learning import KNOWN_GOOD as _KNOWN, learning\n"
        "KNOWN_GOOD = [{**point, 'lr': 0.002} for point in _KNOWN]\n"
        "def space(trial):\n"
        "    return {**learning(trial), 'loop.lr': trial.suggest_float('lr', 1e-4, 1e-2, log=True)}\n"
    )
    found = find_space("mine:space", BASE)
    assert [point["lr"] for point in found.known_good] == [0.002] * 3
    found.try_out()


def test_known_points_are_optional(module: Any) -> None:
    module("def space(trial):\n    return {'seed': trial.suggest_int('seed', 0, 9)}\n")
    found = find_space("mine:space", BASE)
    assert found.known_good == []
    found.try_out()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("learnin", "unknown space 'learnin'; did you mean 'learning'? Choose from: criteria, full, heuristic"),
        ("", "unknown space ''; Choose from"),
        ("mine:spaec", "module mine has no 'spaec'; did you mean 'space'?"),
        ("mine:NUMBER", "space mine:NUMBER must be a function of a trial; it is 3"),
        ("no_such_module:space", "No module named 'no_such_module'. Write package.module:name"),
        ("mine:", "module mine has no ''"),
    ],
)
def test_names_of_no_space(name: str, said: str, module: Any) -> None:
    module("NUMBER = 3\ndef space(trial): ...\n")
    with pytest.raises(ConfigError) as raised:
        find_space(name, BASE)
    assert said in str(raised.value)


@pytest.mark.parametrize("known", ["{'seed': 3}", "3", "['seed']"])
def test_known_points_are_a_list_of_dicts(known: str, module: Any) -> None:
    module(f"KNOWN_GOOD = {known}\ndef space(trial):\n    return {{'seed': trial.suggest_int('seed', 0, 9)}}\n")
    with pytest.raises(ConfigError, match="must be a list of dicts"):
        find_space("mine:space", BASE)


# ---- tried out ----------------------------------------------------------------------------------


def fails(function: Any, known_good: list[dict[str, Any]] | None = None) -> str:
    with pytest.raises(ConfigError) as raised:
        space(function, known_good).try_out()
    return str(raised.value)


def test_an_impossible_setting_says_the_rule_and_the_values() -> None:
    def cold(trial: optuna.Trial) -> dict[str, Any]:
        kind = trial.suggest_categorical("kind", ["warm"])
        return {"scheduler.temperature": trial.suggest_float("t", -2.0, -1.0), "tail": {"warm": "keep"}[kind]}

    said = fails(cold)
    assert "space mine:space asks for a run that is impossible: temperature must be at least 0.01" in said
    assert "the trial's values: kind='warm', t=-1." in said


def test_a_setting_that_is_impossible_only_sometimes_is_found() -> None:
    def sum_with_momentum(trial: optuna.Trial) -> dict[str, Any]:
        return {
            "scoring.accumulate": trial.suggest_categorical("accumulate", ["ema", "sum"]),
            "scoring.momentum": trial.suggest_float("momentum", 0.1, 0.9),
        }

    said = fails(sum_with_momentum)
    assert "has no effect with accumulate='sum'" in said
    assert "the trial's values: accumulate='sum', momentum=0." in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scheduler.init_args.temperatur", "Did you mean 'temperature'?"),
        ("scheduler.temperatur", "Did you mean 'temperature'?"),
        ("loop.lrr", "Did you mean 'lr'?"),
        ("sed", "Did you mean 'seed'?"),
    ],
)
def test_an_unknown_setting_names_the_nearest(name: str, said: str) -> None:
    message = fails(lambda trial: {name: trial.suggest_float("x", 0.1, 0.9)})
    assert said in message
    assert "the trial's values: x=0." in message


def test_a_function_that_raises() -> None:
    def broken(trial: optuna.Trial) -> dict[str, Any]:
        trial.suggest_int("a", 3, 3)
        raise KeyError("nothing of that name")

    assert fails(broken) == ("space mine:space fails: KeyError: 'nothing of that name'; the trial's values: a=3")

    def impossible(trial: optuna.Trial) -> dict[str, Any]:
        from bss_ray.schedule import Learning

        return {"loop.lr": Learning(temperature=trial.suggest_float("t", -1, 0)).temperature}

    said = fails(impossible)
    assert "space mine:space fails: ScheduleError: temperature must be at least" in said
    assert "the trial's values: t=-" in said


def test_a_choice_that_changes_from_trial_to_trial() -> None:
    sizes = iter(range(1, 99))

    def growing(trial: optuna.Trial) -> dict[str, Any]:
        return {"batch_size": trial.suggest_categorical("size", list(range(1, next(sizes) + 1)))}

    assert "does not support dynamic value space" in fails(growing)


@pytest.mark.parametrize("returned", [None, 3, [("seed", 1)], {1: 2}])
def test_a_function_that_returns_no_settings(returned: Any) -> None:
    def wrong(trial: optuna.Trial) -> Any:
        trial.suggest_int("a", 0, 9)
        return returned

    said = fails(wrong)
    assert "must return a dict of dotted settings, {'scheduler.init_args.temperature': 0.25, ...}" in said
    assert said.endswith(f"; received {returned!r}")


def test_a_function_that_asks_for_nothing() -> None:
    assert "asks the trial for nothing" in fails(lambda trial: {"seed": 1})


def test_values_are_plain() -> None:
    def numpys(trial: optuna.Trial) -> dict[str, Any]:
        rate = np.exp(trial.suggest_float("log_lr", -9, -5))
        return {"loop.lr": rate, "batch_size": np.int64(32), "loop.optimizer": np.str_("sgd")}

    found = space(numpys)
    found.try_out()
    settings = found.settings(optuna.create_study().ask())
    assert [type(value) for value in settings.values()] == [float, int, str]

    said = fails(lambda trial: {"loop.lr": trial.suggest_float("lr", 0.1, 0.2), "data": Path("rows")})
    assert "must return numbers, words, booleans, null, lists or dicts of them: Object of type PosixPath" in said


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({"lr": 0.5}, "Fixed parameter lr with value 0.5 is out of range"),
        ({"lr": 0.001, "momentun": 0.5}, "has momentun=0.5, and the space does not ask for 'momentun' there"),
        ({"lr": "fast"}, "space mine:space fails: ValueError"),
    ],
)
def test_known_points_must_lie_inside(point: dict[str, Any], said: str) -> None:
    assert said in fails(lr, [{"lr": 0.001}, point])


def test_known_points_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bss_ray.tune.space._DRAWS", 0)
    drawn = []

    def watched(trial: optuna.Trial) -> dict[str, Any]:
        settings = lr(trial)
        drawn.append(settings["loop.lr"])
        return settings

    space(watched, [{"lr": 0.001}, {"lr": 0.004}]).try_out()
    assert drawn == [0.001, 0.004]
