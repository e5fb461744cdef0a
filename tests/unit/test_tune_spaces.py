"""Search spaces: every point they offer is a valid setting, and the known points lie inside."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optuna
import pytest
import torch

import tune_spaces
from bss_ray import balance_scores
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.normalise import Normalise
from bss_ray.names import import_name
from bss_ray.schedule import Heuristic, Learning, Scheduler
from bss_ray.scoring.config import Scoring
from bss_ray.train.run import TrainConfig
from bss_ray.train.settings import overlay, train_parser, training_config

SEED = 7
TRIALS = 200
ROWS = 1000

Space = Callable[[optuna.Trial], dict[str, Any]]
Point = dict[str, Any]
Drawn = list[tuple[dict[str, Any], Point]]

SPACES: dict[str, Space] = {name: import_name(path) for name, path in tune_spaces.SPACES.items()}
KNOWN: dict[str, list[Point]] = {
    name: importlib.import_module(path.partition(":")[0]).KNOWN_GOOD for name, path in tune_spaces.SPACES.items()
}
KINDS: dict[str, type[Scheduler]] = {"Learning": Learning, "Heuristic": Heuristic}

MEASURES = {"measurer.similarity", "measurer.information", "measurer.fused_weight", "measurer.unimodal_weight"}
CRITERIA = MEASURES | {"scoring.normalise", "scoring.accumulate", "scoring.momentum"}
# What each sets beside the scheduler.
OTHERS: dict[str, set[str]] = {
    "learning": {"scoring.momentum"},
    "heuristic": {"scoring.momentum"},
    "pacing": set(),
    "criteria": CRITERIA,
    "full": CRITERIA,
}
each_space = pytest.mark.parametrize("name", SPACES)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(verbosity)


def draw(space: Space, trials: int, enqueued: list[Point] | None = None) -> Drawn:
    """(settings, knobs) of trials of a space."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=SEED))
    for point in enqueued or []:
        study.enqueue_trial(point)
    drawn: Drawn = []
    for _ in range(trials):
        trial = study.ask()
        drawn.append((space(trial), trial.params))
    return drawn


def config_of(settings: dict[str, Any]) -> TrainConfig:
    """The configuration that the dotted settings describe, over all defaults."""
    parts: dict[str, Any] = {"measurer": Measurer(**_below(settings, "measurer."))}
    if "scheduler.class_path" in settings:
        parts["scheduler"] = KINDS[settings["scheduler.class_path"]](**_below(settings, "scheduler.init_args."))
    return TrainConfig(scoring=Scoring(**_below(settings, "scoring.")), **parts)


def _below(settings: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}


def command_line(settings: dict[str, Any]) -> list[str]:
    return [f"--{key}={'null' if value is None else value}" for key, value in settings.items()]


# ---- all spaces ---------------------------------------------------------------------------------


def test_the_registry_lists_all_modules() -> None:
    modules = {module.name for module in pkgutil.iter_modules(tune_spaces.__path__)}
    assert modules == set(tune_spaces.SPACES)
    for name, path in tune_spaces.SPACES.items():
        assert path == f"tune_spaces.{name}:{name}"
        assert f"\n    {name} " in str(tune_spaces.__doc__)


def test_importing_them_loads_nothing_heavy() -> None:
    modules = [path.partition(":")[0] for path in tune_spaces.SPACES.values()]
    script = (
        f"import sys, {', '.join(modules)}\n"
        "print([name for name in ('optuna', 'torch', 'ray', 'numpy', 'bss_ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@each_space
def test_every_setting_is_valid(name: str) -> None:
    for settings, _ in draw(SPACES[name], TRIALS):
        scheduler = config_of(settings).scheduler
        assert all(1 <= scheduler.epoch_size(epoch, ROWS) <= ROWS for epoch in range(scheduler.burn_in, 80))
        assert {key for key in settings if not key.startswith("scheduler.")} == OTHERS[name]
        assert ("scheduler.class_path" in settings) == (name != "criteria")


@each_space
def test_known_points_lie_inside(name: str) -> None:
    known = KNOWN[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna takes a fixed value outside its range with a warning
        drawn = draw(SPACES[name], len(known), enqueued=known)
    assert [knobs for _, knobs in drawn] == [pytest.approx(point) for point in known]
    assert len({repr(sorted(point.items())) for point in known}) == len(known)


@each_space
def test_the_same_seed_draws_the_same(name: str) -> None:
    assert draw(SPACES[name], 20) == draw(SPACES[name], 20)


@each_space
def test_each_knob_has_one_range(name: str) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=SEED))
    ranges: dict[str, optuna.distributions.BaseDistribution] = {}
    for _ in range(TRIALS):
        trial = study.ask()
        SPACES[name](trial)
        for knob, distribution in trial.distributions.items():
            assert ranges.setdefault(knob, distribution) == distribution, knob


@each_space
def test_tpe_has_nothing_to_complain_about(name: str, caplog: pytest.LogCaptureFixture) -> None:
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=SEED))
    for point in KNOWN[name]:
        study.enqueue_trial(point)
    values = random.Random(SEED)
    optuna.logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            for _ in range(30):  # the first 10 are random
                trial = study.ask()
                config_of(SPACES[name](trial))
                study.tell(trial, values.random())
    finally:
        optuna.logging.disable_propagation()
    assert caplog.records == []


@each_space
def test_the_command_line_takes_them(name: str) -> None:
    for settings, _ in draw(SPACES[name], len(KNOWN[name]) + 5, enqueued=KNOWN[name]):
        words = command_line(settings)
        parsed = train_parser(words).parse_args(words)
        for key, value in settings.items():
            if key != "scheduler.class_path":
                assert parsed[key] == value, key


@each_space
def test_they_go_over_base_settings(name: str) -> None:
    """What a space does not set stays; of another scheduler nothing does."""
    base = {"loop": {"epochs": 3}, "scheduler": {"class_path": "Uniform", "init_args": {"update_interval": 2}}}
    for settings, _ in draw(SPACES[name], 3):
        config, _ = training_config(overlay(base, settings))
        assert config.loop.epochs == 3
        expected = config_of(settings)
        assert (config.measurer, config.scoring) == (expected.measurer, expected.scoring)
        if name == "criteria":
            assert (type(config.scheduler).__name__, config.scheduler.update_interval) == ("Uniform", 2)
        else:
            assert config.scheduler == expected.scheduler


# ---- knobs that exclude each other: both sides come up, and a knob only where it has an effect ----


def check_learning(settings: dict[str, Any], knobs: Point) -> None:
    assert ("temperature" in knobs) == (knobs["weight"] == "exponential")
    assert (settings["scheduler.init_args.temperature"] is None) == (knobs["weight"] == "linear")
    assert (settings["scheduler.init_args.grow_epochs"] is None) == (not knobs.get("grows", False))
    assert ("grow_epochs" in knobs) == knobs.get("grows", False)
    assert ("grows" in knobs) == (knobs["fraction"] < 1)


def check_pacing(settings: dict[str, Any], knobs: Point) -> None:
    for knob, shape in (("power", "root"), ("steps", "step")):
        assert (knob in knobs) == (knobs["shape"] == shape) == (f"scheduler.init_args.{knob}" in settings)


def check_heuristic(settings: dict[str, Any], knobs: Point) -> None:
    check_pacing(settings, knobs)
    interval = settings["scheduler.init_args.update_interval"]
    assert ("update_interval" in knobs) == knobs["refresh"] == (interval > 0)


def check_memory(settings: dict[str, Any], knobs: Point) -> None:
    assert settings["scoring.accumulate"] == knobs["accumulate"]
    assert ("momentum" in knobs) == (knobs["accumulate"] == "ema")
    assert settings["scoring.momentum"] == knobs.get("momentum", 0.0)


def test_branches_of_learning() -> None:
    drawn = draw(SPACES["learning"], TRIALS)
    for knob in ("temperature", "grow_epochs", "grows"):
        assert {knob in knobs for _, knobs in drawn} == {True, False}
    for settings, knobs in drawn:
        check_learning(settings, knobs)
        assert settings["scoring.momentum"] == knobs["momentum"]


@pytest.mark.parametrize("name", ["pacing", "heuristic"])
def test_branches_of_heuristic(name: str) -> None:
    drawn = draw(SPACES[name], TRIALS)
    assert {knobs["shape"] for _, knobs in drawn} == {"root", "linear", "geometric", "step"}
    for settings, knobs in drawn:
        if name == "pacing":
            check_pacing(settings, knobs)
            assert knobs.keys() <= {"burn_in", "initial", "grow_epochs", "shape", "power", "steps"}
            assert _below(settings, "scheduler.init_args.") == knobs
        else:
            check_heuristic(settings, knobs)
            assert ("momentum" in knobs) == knobs["refresh"]
            assert settings["scoring.momentum"] == knobs.get("momentum", 0.0)


def test_branches_of_criteria() -> None:
    drawn = draw(SPACES["criteria"], TRIALS)
    choices = {"similarity": {"prediction", "feature"}, "information": {"loss", "gradient_norm"}}
    choices |= {"normalise": {"minmax", "rank"}, "accumulate": {"ema", "sum"}}
    for knob, expected in choices.items():
        assert {knobs[knob] for _, knobs in drawn} == expected
    for settings, knobs in drawn:
        check_memory(settings, knobs)
        assert settings["measurer.fused_weight"] == knobs["fused_share"]
        assert settings["measurer.fused_weight"] + settings["measurer.unimodal_weight"] == pytest.approx(1)
        assert not config_of(settings).measurer.needs_model  # a pass for each row: too dear


def test_branches_of_full() -> None:
    drawn = draw(SPACES["full"], TRIALS)
    assert {knobs["scheduler"] for _, knobs in drawn} == {"Learning", "Heuristic"}
    assert {"accumulate" in knobs for _, knobs in drawn if knobs["scheduler"] == "Heuristic"} == {True, False}
    shared = {"scheduler", "similarity", "information", "fused_share", "normalise", "accumulate", "momentum"}
    for settings, knobs in drawn:
        kind = knobs["scheduler"]
        assert settings["scheduler.class_path"] == kind
        own = _below(knobs, f"{kind.lower()}_")
        assert {f"{kind.lower()}_{knob}" for knob in own} == knobs.keys() - shared
        (check_learning if kind == "Learning" else check_heuristic)(settings, own)
        if kind == "Learning" or own["refresh"]:
            check_memory(settings, knobs)
        else:
            assert not {"accumulate", "momentum"} & knobs.keys()
            assert (settings["scoring.accumulate"], settings["scoring.momentum"]) == ("ema", 0.0)


# ---- known points -------------------------------------------------------------------------------


def known_configs(name: str) -> list[TrainConfig]:
    return [config_of(settings) for settings, _ in draw(SPACES[name], len(KNOWN[name]), enqueued=KNOWN[name])]


@pytest.mark.parametrize("name", ["learning", "full"])
def test_released_settings_of_learning(name: str) -> None:
    released, prototype, with_memory = known_configs(name)[:3]
    assert released == TrainConfig(scheduler=Learning())
    assert prototype == TrainConfig()
    assert with_memory == TrainConfig(scoring=Scoring(momentum=0.5))


@pytest.mark.parametrize("name", ["pacing", "heuristic", "full"])
def test_released_settings_of_heuristic(name: str) -> None:
    configs = [config for config in known_configs(name) if type(config.scheduler) is Heuristic]
    assert configs == [TrainConfig(scheduler=Heuristic(burn_in=0)), TrainConfig(scheduler=Heuristic())]


def test_released_settings_of_criteria() -> None:
    released, equal, summed = known_configs("criteria")
    assert released == TrainConfig()
    assert equal == TrainConfig(measurer=Measurer(fused_weight=0.5, unimodal_weight=0.5))
    assert summed == TrainConfig(scoring=Scoring(accumulate="sum"))
    assert known_configs("full")[-2:] == [equal, summed]


@pytest.mark.parametrize("information", ["loss", "gradient_norm"])
@pytest.mark.parametrize("normalise", ["minmax", "rank"])
def test_only_the_ratio_of_the_loss_weights_matters_to_scores(information: str, normalise: Normalise) -> None:
    """Why `criteria` searches the share of the fused loss, and no second weight."""
    numbers = torch.Generator().manual_seed(SEED)
    heads = ("audio", "image", "fused")
    outputs: dict[str, Any] = {head: torch.randn(40, 5, generator=numbers) for head in heads}
    outputs["features"] = {head: torch.randn(40, 8, generator=numbers) for head in heads}
    labels = torch.randint(5, (40,), generator=numbers)

    def scores(fused: float, unimodal: float) -> np.ndarray:
        measurer = Measurer(information=information, fused_weight=fused, unimodal_weight=unimodal)
        similarity, information_of_rows = (values.numpy() for values in measurer.measure(outputs, labels))
        return balance_scores(similarity, information_of_rows, normalise=normalise)

    np.testing.assert_allclose(scores(0.1, 0.9), scores(0.3, 2.7), atol=1e-5)
    assert np.abs(scores(0.1, 0.9) - scores(0.9, 0.1)).max() > 0.1
