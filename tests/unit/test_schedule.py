"""Pacing functions and schedulers, against formulas written out again here."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from bss_ray.errors import ConfigError, ScheduleError
from bss_ray.schedule import Heuristic, Learning, Scheduler, Uniform, pacing


class TestPacing:
    @pytest.mark.parametrize(("t", "share"), [(1, 0.186), (10, 0.507), (40, 1.0)])
    def test_released_code(self, t: int, share: float) -> None:
        assert pacing(t, initial=0.1, grow_epochs=40) == pytest.approx(share, abs=5e-4)

    @pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.7])
    @pytest.mark.parametrize("initial", [0.05, 0.4, 1.0])
    def test_root(self, initial: float, power: float) -> None:
        for t in range(1, 31):
            expected = min(1.0, ((1 - initial**power) * t / 20 + initial**power) ** (1 / power))
            got = pacing(t, initial=initial, grow_epochs=20, power=power)
            assert got == pytest.approx(expected, abs=1e-12)

    def test_linear(self) -> None:
        shares = [pacing(t, initial=0.2, grow_epochs=4, shape="linear") for t in range(1, 7)]
        assert shares == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0, 1.0])

    def test_linear_is_root_with_power_one(self) -> None:
        for t in range(1, 12):
            linear = pacing(t, initial=0.3, grow_epochs=9, shape="linear")
            assert linear == pytest.approx(pacing(t, initial=0.3, grow_epochs=9, power=1.0))

    def test_geometric_grows_by_a_constant_factor(self) -> None:
        # From 1/16 to 1 in four epochs: a factor of 2 each.
        shares = [pacing(t, initial=1 / 16, grow_epochs=4, shape="geometric") for t in range(1, 7)]
        assert shares == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1.0, 1.0, 1.0])

    def test_step_jumps(self) -> None:
        # 12 epochs and 3 jumps: one jump every 4 epochs, each of a third of the missing 0.7.
        shares = [pacing(t, initial=0.3, grow_epochs=12, shape="step", steps=3) for t in range(1, 14)]
        low, middle, high = 0.3, 0.3 + 0.7 / 3, 0.3 + 1.4 / 3
        assert shares == pytest.approx([low] * 3 + [middle] * 4 + [high] * 4 + [1.0] * 2)

    @pytest.mark.parametrize(("grow_epochs", "steps"), [(5, 5), (49, 49), (100, 100), (12, 3), (7, 5), (30, 10)])
    def test_step_jumps_on_time(self, grow_epochs: int, steps: int) -> None:
        # In whole numbers: t / T * steps in floating point is a hair below 1 for t = 1, T = steps = 49.
        for t in range(1, grow_epochs + 1):
            expected = 0.1 + 0.9 * (t * steps // grow_epochs) / steps
            assert pacing(t, initial=0.1, grow_epochs=grow_epochs, shape="step", steps=steps) == pytest.approx(expected)

    @pytest.mark.parametrize("shape", ["root", "linear", "geometric", "step"])
    def test_ends_at_exactly_one(self, shape: str) -> None:
        # A share of 1 - 2^-53 would lose a row: floor(0.9999999999999999 * 10) is 9.
        short = [
            (percent, steps)
            for percent in range(1, 101)
            for steps in (range(1, 20) if shape == "step" else (5,))
            if pacing(10, initial=percent / 100, grow_epochs=10, shape=shape, steps=steps) != 1.0  # type: ignore[arg-type]
        ]
        assert short == []

    @pytest.mark.parametrize("shape", ["root", "linear", "geometric", "step"])
    def test_never_shrinks_and_stays_in_range(self, shape: str) -> None:
        shares = [pacing(t, initial=0.07, grow_epochs=23, shape=shape) for t in range(1, 60)]  # type: ignore[arg-type]
        assert all(0.07 <= a <= b <= 1 for a, b in itertools.pairwise(shares))
        assert shares[-1] == 1

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"initial": 0.0}, ["initial", "(0, 1]", "0.0"]),
            ({"initial": 1.5}, ["initial", "1.5"]),
            ({"initial": float("nan")}, ["initial", "nan"]),
            ({"grow_epochs": 0}, ["grow_epochs", "0"]),
            ({"power": 0.0}, ["power", "0.0"]),
            ({"power": -2.0}, ["power", "-2.0"]),
            ({"power": float("inf")}, ["power", "inf"]),
            ({"power": float("nan")}, ["power", "nan"]),
            ({"shape": "lineer"}, ["'lineer'", "did you mean 'linear'", "geometric", "step", "root"]),
            ({"steps": 0}, ["steps", "0"]),
            ({"t": 0}, ["t=0"]),
            ({"t": -3}, ["t=-3"]),
        ],
    )
    def test_refuses(self, settings: dict[str, object], words: list[str]) -> None:
        arguments = {"t": 1, "initial": 0.1, "grow_epochs": 40, **settings}
        with pytest.raises(ScheduleError) as error:
            pacing(arguments.pop("t"), **arguments)  # type: ignore[arg-type]
        for word in words:
            assert word in str(error.value)
        assert isinstance(error.value, ConfigError)
        assert isinstance(error.value, ValueError)


class TestWeights:
    score = np.array([-1.0, -0.4, 0.0, 0.25, 1.0])

    def test_linear_weight_is_the_released_code(self) -> None:
        np.testing.assert_allclose(Learning().weights(self.score), [0.01, 0.61, 1.01, 1.26, 2.01], atol=1e-6)

    @pytest.mark.parametrize("temperature", [0.01, 0.25, 1.0, 8.0])
    def test_temperature(self, temperature: float) -> None:
        expected = [math.exp(score / temperature) for score in self.score]
        np.testing.assert_allclose(Learning(temperature=temperature).weights(self.score), expected, rtol=1e-6)

    @pytest.mark.parametrize("scheduler", [Uniform(), Heuristic()])
    def test_uniform_within_the_subset(self, scheduler: Scheduler) -> None:
        assert scheduler.weights(self.score).tolist() == [1.0] * 5

    @pytest.mark.parametrize("scheduler", [Uniform(), Heuristic(), Learning(), Learning(temperature=0.01)])
    def test_finite_and_positive_over_the_whole_range(self, scheduler: Scheduler) -> None:
        weights = scheduler.weights(np.linspace(-1, 1, 1001))
        assert weights.dtype == np.float64
        assert np.isfinite(weights).all()
        assert (weights > 0).all()

    @pytest.mark.parametrize("scheduler", [Learning(), Learning(temperature=0.3)])
    def test_higher_score_higher_weight(self, scheduler: Scheduler) -> None:
        assert (np.diff(scheduler.weights(np.linspace(-1, 1, 101))) > 0).all()


class TestSizes:
    def test_uniform_takes_all_rows(self) -> None:
        assert Uniform().epoch_size(7, 123) == Uniform().subset_size(7, 123) == 123

    @pytest.mark.parametrize("burn_in", [0, 1, 3])
    def test_heuristic_floors_the_share(self, burn_in: int) -> None:
        scheduler = Heuristic(burn_in=burn_in)
        for t in range(1, 50):
            expected = math.floor(1000 * min(1.0, math.sqrt(0.99 * t / 40 + 0.01)))
            epoch = burn_in + t - 1
            assert scheduler.subset_size(epoch, 1000) == scheduler.epoch_size(epoch, 1000) == expected

    def test_heuristic_takes_at_least_one_row(self) -> None:
        assert Heuristic(initial=0.001).epoch_size(1, 3) == 1

    def test_heuristic_ends_with_all_rows(self) -> None:
        for shape in ("root", "linear", "geometric", "step"):
            for initial in (0.01, 0.1, 0.3, 0.77):
                scheduler = Heuristic(burn_in=0, initial=initial, grow_epochs=6, shape=shape, steps=3)
                assert scheduler.subset_size(5, 10) == 10, (shape, initial)

    @pytest.mark.parametrize(("fraction", "size"), [(1.0, 101), (0.7, 71), (0.25, 25), (0.5, 50), (0.001, 1)])
    def test_learning_rounds_its_fraction(self, fraction: float, size: int) -> None:
        scheduler = Learning(fraction=fraction)
        assert scheduler.epoch_size(4, 101) == size
        assert scheduler.subset_size(4, 101) == 101

    def test_learning_with_pacing(self) -> None:
        scheduler = Learning(burn_in=2, fraction=0.5, grow_epochs=4)
        shares = [math.sqrt(0.75 * t / 4 + 0.25) for t in (1, 2, 3, 4)] + [1.0]
        # t = 1 is the first epoch after burn-in, epoch 2.
        assert [scheduler.epoch_size(epoch, 1000) for epoch in range(2, 7)] == [round(s * 1000) for s in shares]


class TestScoresDue:
    """After which epochs (-1: before the first) new scores are wanted."""

    @pytest.mark.parametrize(
        ("scheduler", "due"),
        [
            (Uniform(), []),
            (Uniform(update_interval=2), [1, 3, 5]),
            (Heuristic(), [0]),
            (Heuristic(burn_in=3), [2]),
            (Heuristic(burn_in=0), [-1]),
            (Heuristic(burn_in=1, update_interval=2), [0, 2, 4, 6]),
            (Learning(), [0, 1, 2, 3, 4, 5, 6]),
            (Learning(burn_in=0), [-1, 0, 1, 2, 3, 4, 5, 6]),
            (Learning(burn_in=2, update_interval=3), [1, 4]),
            (Learning(burn_in=2, update_interval=0), [1]),
        ],
    )
    def test_due(self, scheduler: Scheduler, due: list[int]) -> None:
        assert [epoch for epoch in range(-1, 7) if scheduler.scores_due_after(epoch)] == due

    def test_burn_in_counts_from_zero(self) -> None:
        assert [Learning(burn_in=2).is_burn_in(epoch) for epoch in range(4)] == [True, True, False, False]
        assert not Learning(burn_in=0).is_burn_in(0)

    def test_scores_are_there_for_the_first_epoch_that_needs_them(self) -> None:
        for scheduler in (Heuristic(burn_in=2), Learning(burn_in=2), Learning(burn_in=0)):
            first = next(epoch for epoch in range(9) if not scheduler.is_burn_in(epoch))
            assert scheduler.scores_due_after(first - 1)


class TestSettings:
    @pytest.mark.parametrize(
        ("kind", "settings", "words"),
        [
            (Uniform, {"burn_in": -1}, ["burn_in", "-1"]),
            (Uniform, {"update_interval": -2}, ["update_interval", "-2", "never"]),
            (Heuristic, {"burn_in": -4}, ["burn_in", "-4"]),
            (Heuristic, {"update_interval": -1}, ["update_interval", "-1"]),
            (Heuristic, {"initial": 0}, ["initial", "0"]),
            (Heuristic, {"initial": 1.01}, ["initial", "1.01"]),
            (Heuristic, {"grow_epochs": -40}, ["grow_epochs", "-40"]),
            (Heuristic, {"power": -1}, ["power", "-1"]),
            (Heuristic, {"shape": "rot"}, ["'rot'", "did you mean 'root'"]),
            (Heuristic, {"steps": 0}, ["steps", "0"]),
            (Learning, {"burn_in": -1}, ["burn_in", "-1"]),
            (Learning, {"update_interval": -7}, ["update_interval", "-7"]),
            (Learning, {"temperature": 0.0}, ["temperature", "0.0", "Heuristic"]),
            (Learning, {"temperature": 0.0099}, ["temperature", "0.01", "0.0099"]),
            (Learning, {"temperature": -0.5}, ["temperature", "-0.5"]),
            (Learning, {"temperature": math.inf}, ["temperature", "inf"]),
            (Learning, {"temperature": math.nan}, ["temperature", "nan"]),
            (Learning, {"uniform_mix": -0.1}, ["uniform_mix", "-0.1"]),
            (Learning, {"uniform_mix": 1.1}, ["uniform_mix", "1.1"]),
            (Learning, {"uniform_mix": math.nan}, ["uniform_mix", "nan"]),
            (Learning, {"fraction": 0.0}, ["0.0", "(0, 1]"]),
            (Learning, {"fraction": 2.5}, ["2.5"]),
            (Learning, {"grow_epochs": 0}, ["grow_epochs", "0"]),
            (Learning, {"power": 0}, ["power", "0"]),
            (Learning, {"shape": "stepp"}, ["'stepp'", "did you mean 'step'"]),
            (Learning, {"steps": -1}, ["steps", "-1"]),
        ],
    )
    def test_refuses(self, kind: type[Scheduler], settings: dict[str, object], words: list[str]) -> None:
        with pytest.raises(ScheduleError) as error:
            kind(**settings)  # type: ignore[arg-type]
        for word in words:
            assert word in str(error.value)

    def test_message_names_the_setting_the_user_gave(self) -> None:
        # Learning has no `initial`: a user who set `fraction` must read `fraction`.
        with pytest.raises(ScheduleError, match="fraction"):
            Learning(fraction=2.5)

    def test_schedulers_are_frozen_values(self) -> None:
        # They travel to every holder and name a run's configuration: equal settings, equal values.
        assert Learning(temperature=0.5) == Learning(temperature=0.5)
        with pytest.raises(AttributeError):
            Learning().temperature = 0.5  # type: ignore[misc]

    def test_replacement_and_mix_belong_to_learning_alone(self) -> None:
        with pytest.raises(TypeError):
            Heuristic(replacement=True)  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            Uniform(uniform_mix=0.1)  # type: ignore[call-arg]


def test_floor_of_the_share_matches_exact_arithmetic() -> None:
    """floor(lambda N) in exact rational arithmetic, where lambda is rational (linear shape)."""
    initial, epochs = Fraction(1, 4), 8  # binary fractions, so that the setting itself is exact
    scheduler = Heuristic(burn_in=0, initial=float(initial), grow_epochs=epochs, shape="linear")
    for t in range(1, epochs + 1):
        share = (1 - initial) * Fraction(t, epochs) + initial
        for rows in (10, 96, 1000, 1797):
            assert scheduler.subset_size(t - 1, rows) == max(1, math.floor(share * rows))
