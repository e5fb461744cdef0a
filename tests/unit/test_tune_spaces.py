"""Search spaces: every point they offer is a valid setting, and the known points lie inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
import pytest

from bss_ray.measure.score import Accumulation
from bss_ray.schedule import Heuristic, Learning, Scheduler
from tune_spaces import heuristic as heuristic_space
from tune_spaces import learning as learning_space

SEED = 7
TRIALS = 200
ROWS = 1000

Space = Callable[[optuna.Trial], dict[str, Any]]
Drawn = list[tuple[dict[str, Any], dict[str, Any]]]

SPACES: dict[str, tuple[Space, list[dict[str, Any]], type[Scheduler]]] = {
    "learning": (learning_space.learning, learning_space.KNOWN_GOOD, Learning),
    "heuristic": (heuristic_space.heuristic, heuristic_space.KNOWN_GOOD, Heuristic),
}
each_space = pytest.mark.parametrize("name", SPACES)


def draw(space: Space, trials: int, enqueued: list[dict[str, Any]] | None = None) -> Drawn:
    """(settings, knobs) of trials of a space."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=SEED))
    for point in enqueued or []:
        study.enqueue_trial(point)
    drawn: Drawn = []
    for _ in range(trials):
        trial = study.ask()
        drawn.append((space(trial), trial.params))
    return drawn


def scheduler_of(settings: dict[str, Any]) -> Scheduler:
    """The scheduler that the dotted settings describe."""
    prefix = "scheduler.init_args."
    kinds: dict[str, type[Scheduler]] = {"Learning": Learning, "Heuristic": Heuristic}
    arguments = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    return kinds[settings["scheduler.class_path"]](**arguments)


def command_line(settings: dict[str, Any]) -> list[str]:
    return [f"--{key}={'null' if value is None else value}" for key, value in settings.items()]


@each_space
def test_every_setting_is_valid(name: str) -> None:
    space, _, kind = SPACES[name]
    for settings, _ in draw(space, TRIALS):
        scheduler = scheduler_of(settings)
        assert type(scheduler) is kind
        assert all(1 <= scheduler.epoch_size(epoch, ROWS) <= ROWS for epoch in range(scheduler.burn_in, 80))
        Accumulation(momentum=settings["scoring.momentum"])
        assert {key for key in settings if not key.startswith("scheduler.")} == {"scoring.momentum"}


@each_space
def test_known_points_lie_inside(name: str, recwarn: pytest.WarningsRecorder) -> None:
    space, known, _ = SPACES[name]
    drawn = draw(space, len(known), enqueued=known)
    # Optuna takes a fixed value outside its range with a warning.
    assert [str(warning.message) for warning in recwarn if "out of range" in str(warning.message)] == []
    assert [knobs for _, knobs in drawn] == [pytest.approx(point) for point in known]


@each_space
def test_all_branches_occur(name: str) -> None:
    """Knobs that exclude each other: both sides come up, and a knob only where it has an effect."""
    drawn = draw(SPACES[name][0], TRIALS)
    if name == "learning":
        assert {"temperature" in knobs for _, knobs in drawn} == {True, False}
        assert {"grow_epochs" in knobs for _, knobs in drawn} == {True, False}
        for settings, knobs in drawn:
            assert ("temperature" in knobs) == (knobs["weight"] == "exponential")
            assert (settings["scheduler.init_args.temperature"] is None) == (knobs["weight"] == "linear")
            assert (settings["scheduler.init_args.grow_epochs"] is None) == (not knobs.get("grows", False))
            assert "grows" in knobs or knobs["fraction"] == 1
    else:
        assert {knobs["shape"] for _, knobs in drawn} == {"root", "linear", "geometric", "step"}
        for settings, knobs in drawn:
            assert ("power" in knobs) == (knobs["shape"] == "root")
            assert ("steps" in knobs) == (knobs["shape"] == "step")
            assert ("momentum" in knobs) == knobs["refresh"] == (settings["scheduler.init_args.update_interval"] > 0)


def test_released_settings() -> None:
    settings, _ = draw(learning_space.learning, 1, enqueued=learning_space.KNOWN_GOOD)[0]
    assert scheduler_of(settings) == Learning()
    released, burnt_in = (s for s, _ in draw(heuristic_space.heuristic, 2, enqueued=heuristic_space.KNOWN_GOOD))
    assert scheduler_of(released) == Heuristic(burn_in=0)
    assert scheduler_of(burnt_in) == Heuristic()


@each_space
def test_the_command_line_takes_them(name: str) -> None:
    from bss_ray.cli import train_parser

    space, known, _ = SPACES[name]
    for settings, _ in draw(space, len(known) + 5, enqueued=known):
        words = command_line(settings)
        parsed = train_parser(words).parse_args(words)
        for key, value in settings.items():
            if key != "scheduler.class_path":
                assert parsed[key] == value, key
