"""What population-based training changes of the settings of a good trial."""

import copy
from typing import Any

import pytest

from bss_ray.tune.trials import Explore

TEMPERATURE, FRACTION, MOMENTUM = "scheduler.init_args.temperature", "scheduler.init_args.fraction", "scoring.momentum"
RANGES = {TEMPERATURE: (0.05, 2.0), FRACTION: (0.3, 1.0), MOMENTUM: (0.0, 0.9)}
SEED, DRAWS = 5, 400


def changed(explore: Explore, settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = explore({"trial": {"settings": settings, "number": 3}})["trial"]["settings"]
    return found


@pytest.mark.parametrize("place", [0, 1], ids=["lowest", "highest"])
def test_ranges_are_kept(place: int) -> None:
    explore = Explore(SEED)
    settings = {name: ends[place] for name, ends in RANGES.items()}
    for _ in range(DRAWS):
        settings = changed(explore, settings)
        for name, (low, high) in RANGES.items():
            assert low <= settings[name] <= high


def test_steps_and_draws_anew() -> None:
    explore = Explore(SEED)
    before = {TEMPERATURE: 0.5, FRACTION: 0.6, MOMENTUM: 0.5}
    steps = {TEMPERATURE: (0.4, 0.625), FRACTION: (0.5, 0.7), MOMENTUM: (0.4, 0.6)}
    found = [changed(explore, before) for _ in range(DRAWS)]
    for name, ends in steps.items():
        stepped = [row[name] for row in found if row[name] in ends]
        assert 0.65 < len(stepped) / DRAWS < 0.85  # three of four
        assert 0.4 < stepped.count(ends[0]) / len(stepped) < 0.6
        assert len({row[name] for row in found}) > DRAWS / 10


def test_momentum_can_leave_zero() -> None:
    explore = Explore(SEED)
    found = {changed(explore, {MOMENTUM: 0.0})[MOMENTUM] for _ in range(40)}
    assert {0.0, 0.1} < found


def test_what_a_trial_does_not_have_stays_away() -> None:
    others = {"scheduler.class_path": "Learning", "loop.lr": 0.1, TEMPERATURE: None}
    assert changed(Explore(SEED), others) == others


@pytest.mark.parametrize(
    "others",
    [{"scoring.accumulate": "sum"}, {"scheduler.init_args.update_interval": 0}],
    ids=["a sum refuses it", "scores are never updated"],
)
def test_momentum_stays_where_it_has_no_effect(others: dict[str, Any]) -> None:
    settings = {MOMENTUM: 0.0, **others}
    assert all(changed(Explore(seed), settings) == settings for seed in range(20))


def test_the_input_is_untouched() -> None:
    config = {"trial": {"settings": {TEMPERATURE: 0.5, MOMENTUM: 0.0}, "number": 3}}
    before = copy.deepcopy(config)
    explored = Explore(SEED)(config)
    assert config == before
    assert explored["trial"]["number"] == 3


def test_the_same_seed_changes_alike() -> None:
    def draws(seed: int) -> list[dict[str, Any]]:
        explore = Explore(seed)
        return [changed(explore, {TEMPERATURE: 0.5, FRACTION: 0.6}) for _ in range(10)]

    assert draws(1) == draws(1) != draws(2)
