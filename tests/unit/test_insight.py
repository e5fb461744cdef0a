"""What is said about a search: planted effects are found, and others are not claimed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
import scipy.stats
from optuna.trial import TrialState, create_trial

from bss_ray.report.console import show
from bss_ray.report.insight import (
    best_configurations,
    compare_seeds,
    comparison_sentences,
    failures,
    knob_sentences,
    metrics_of,
    show_difference,
)
from bss_ray.tune.objective import Interval, t_quantile
from tune_spaces.learning import learning

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
optuna.logging.set_verbosity(optuna.logging.WARNING)

METRIC = "val_accuracy_fused"

Objective = Callable[[optuna.Trial, np.random.Generator], float | tuple[float, ...]]


def search(
    objective: Objective,
    *,
    seed: int = 0,
    trials: int = 40,
    metrics: tuple[str, ...] = (METRIC,),
    directions: tuple[str, ...] = ("maximize",),
    sampler: type[optuna.samplers.BaseSampler] = optuna.samplers.RandomSampler,
) -> optuna.Study:
    """A study of `trials` trials."""
    rng = np.random.default_rng(seed)
    study = optuna.create_study(directions=directions, sampler=sampler(seed=seed))  # type: ignore[call-arg]
    study.set_metric_names(list(metrics))
    study.optimize(lambda trial: objective(trial, rng), n_trials=trials)
    return study


def study_of(*trials: optuna.trial.FrozenTrial, directions: tuple[str, ...] = ("maximize",)) -> optuna.Study:
    study = optuna.create_study(directions=directions)
    study.set_metric_names([METRIC, "seconds"][: len(directions)])
    for trial in trials:
        study.add_trial(trial)
    return study


# ---- knobs -----------------------------------------------------------------------------------------


def planted(trial: optuna.Trial, rng: np.random.Generator) -> float:
    """`low` should be low, `inside` 1, `kind` good, `many` best at c; `nothing` does nothing; `rare` should be high."""
    value = 0.9 + 0.003 * rng.standard_normal()
    value -= 0.02 * trial.suggest_float("low", 0, 1)
    value -= 0.02 * abs(math.log10(trial.suggest_float("inside", 0.1, 10, log=True)))
    value += 0.012 if trial.suggest_categorical("kind", ["good", "bad"]) == "good" else 0.0
    value += 0.02 if trial.suggest_categorical("many", ["a", "b", "c"]) == "c" else 0.0
    trial.suggest_int("nothing", 1, 100)
    if trial.suggest_categorical("has", [False, True]):
        value += 0.004 * (trial.suggest_int("rare", 1, 10) - 5)
    return value


def test_planted_effects_are_found() -> None:
    sentences = knob_sentences(search(planted, seed=3, trials=200))
    assert list(sentences) == ["low", "inside", "kind", "many", "nothing", "has", "rare"]
    assert sentences["low"].startswith("lower is better (rank correlation -0.")
    assert "of 0..1 searched" in sentences["low"]
    assert sentences["inside"].startswith("the middle is better than the ends")
    size = re.match(r"good is better than bad by ([\d.]+) points \(\d+ and \d+ trials; p < 0.001\)", sentences["kind"])
    assert size is not None
    assert float(size[1]) == pytest.approx(1.2, abs=0.6)
    assert sentences["many"].startswith("c is the best and")
    assert sentences["nothing"].startswith("no direction to be seen (p = 0.")
    assert sentences["rare"].startswith("higher is better")


def test_they_are_found_by_the_direction_of_the_objective() -> None:
    def error(trial: optuna.Trial, rng: np.random.Generator) -> float:
        return trial.suggest_float("x", 0, 1) + 0.1 * rng.standard_normal()

    sentence = knob_sentences(search(error, metrics=("val_rmse_fused",), directions=("minimize",)))["x"]
    assert sentence.startswith("lower is better (rank correlation -0.")
    assert sentence.endswith("widen the range if it can be")


@pytest.mark.parametrize("sampler", [optuna.samplers.RandomSampler, optuna.samplers.TPESampler])
def test_no_effect_is_rarely_claimed(sampler: type[optuna.samplers.BaseSampler]) -> None:
    def noise(trial: optuna.Trial, rng: np.random.Generator) -> float:
        learning(trial)
        return float(rng.standard_normal())

    claimed = perhaps = said = 0
    for seed in range(20):
        sentences = list(knob_sentences(search(noise, seed=seed, trials=30, sampler=sampler)).values())
        claims = [sentence for sentence in sentences if "is better than" in sentence or " is better (" in sentence]
        doubtful = [sentence for sentence in claims if sentence.startswith("perhaps")]
        claimed += len(claims) > len(doubtful)
        perhaps += len(doubtful)
        said += len(sentences)
    # 5 % of 20 searches are 1: more than 4 come up three times in 1,000. Of two tests per knob 10 % are below 5 %.
    assert claimed <= 4
    assert perhaps / said < 0.15


def test_knobs_that_only_drift_with_the_search_are_not_claimed() -> None:
    """A sampler that gets better by one knob, and shifts another meanwhile, proves nothing about the other."""
    rng = np.random.default_rng(1)
    unit = optuna.distributions.FloatDistribution(-1, 2)
    trials = []
    for number in range(40):
        good, drift = number / 40 + 0.2 * rng.standard_normal(2)
        params = {"good": float(np.clip(good, -1, 2)), "drift": float(np.clip(drift, -1, 2))}
        trials.append(create_trial(value=params["good"], params=params, distributions=dict.fromkeys(params, unit)))
    sentences = knob_sentences(study_of(*trials))
    assert sentences["good"].startswith("higher is better")
    assert sentences["drift"].startswith("no direction")


def test_too_few_trials_say_nothing() -> None:
    def conditional(trial: optuna.Trial, rng: np.random.Generator) -> float:
        if trial.number < 5:
            trial.suggest_float("rare", 0, 1)
        return trial.suggest_float("x", 0, 1)

    sentences = knob_sentences(search(conditional, trials=8))
    assert sentences["rare"] == "only 5 trials have it, fewer than 8: too few to say anything"
    assert "higher is better" in sentences["x"]
    assert knob_sentences(search(conditional, trials=1))["x"].startswith("only 1 trial has it")
    assert knob_sentences(study_of()) == {}


def test_knobs_and_values_that_do_not_vary() -> None:
    def flat(trial: optuna.Trial, rng: np.random.Generator) -> float:
        trial.suggest_int("always", 3, 3)
        trial.suggest_categorical("kind", ["only"])
        return trial.suggest_float("x", 0, 1)

    sentences = knob_sentences(search(flat, trials=10))
    assert sentences["always"] == "all 10 trials have 3: nothing to compare"
    assert sentences["kind"] == "too few trials per choice to compare (only: 10)"

    def same(trial: optuna.Trial, rng: np.random.Generator) -> float:
        trial.suggest_float("x", 0, 1)
        return 0.5

    assert knob_sentences(search(same, trials=10))["x"] == "all 10 trials that have it are equally good"


def test_pruned_trials_count_at_the_last_epoch_that_both_have() -> None:
    """High values are pruned: among the finished ones alone nothing would be seen."""

    def objective(trial: optuna.Trial, rng: np.random.Generator) -> float:
        x = trial.suggest_float("x", 0, 1)
        speed = 1.0 if x < 0.5 else 0.5
        for epoch in range(1, 6):
            trial.report(speed * epoch + 0.1 * rng.standard_normal(), epoch)
            if x >= 0.5 and epoch == 2:
                raise optuna.TrialPruned
        # Less than what they reported, as where the objective is another mean: it is not compared with pruned ones.
        return 0.1 * float(rng.standard_normal())

    study = search(objective, seed=5, trials=30)
    pruned = len(study.get_trials(states=(TrialState.PRUNED,)))
    assert 10 < pruned < 20
    sentence = knob_sentences(study)["x"]
    assert sentence.startswith("lower is better")
    assert f"over 30 trials, {pruned} of them pruned" in sentence


def test_a_category_without_finished_trials_has_no_size() -> None:
    def objective(trial: optuna.Trial, rng: np.random.Generator) -> float:
        bad = trial.suggest_categorical("kind", ["good", "bad"]) == "bad"
        trial.report(rng.standard_normal() - 9 * bad, 1)
        if bad:
            raise optuna.TrialPruned
        return float(rng.standard_normal())

    assert knob_sentences(search(objective))["kind"].startswith("good is better than bad (")


def test_several_objectives_have_a_clause_each() -> None:
    def both(trial: optuna.Trial, rng: np.random.Generator) -> tuple[float, float]:
        x = trial.suggest_float("x", 0, 1)
        trial.suggest_float("nothing", 0, 1)
        return x + 0.1 * rng.standard_normal(), 100 * x + 10 * rng.standard_normal()

    study = search(both, metrics=(METRIC, "seconds"), directions=("maximize", "minimize"))
    first, second = knob_sentences(study)["x"].split("; seconds: ")
    assert first.startswith(f"{METRIC}: higher is better")
    assert second.startswith("lower is better")


def test_they_are_the_same_each_time() -> None:
    study = search(planted, seed=7, trials=30)
    assert knob_sentences(study) == knob_sentences(study)


# ---- the best --------------------------------------------------------------------------------------


def finished(value: float | list[float], **attributes: Any) -> optuna.trial.FrozenTrial:
    values = value if isinstance(value, list) else [value]
    return create_trial(values=values, user_attrs=attributes)


def test_best_configurations() -> None:
    study = study_of(
        finished(0.8, seed_values=[[0.7], [0.8], [0.9]], settings={"a.b": 1}),
        finished(0.9, seed_values=[[0.9]]),
        finished(0.85),
        create_trial(state=TrialState.PRUNED, intermediate_values={1: 0.99}),
        finished(math.inf),
    )
    found = best_configurations(study, count=3)
    assert [each.number for each in found] == [1, 2, 0]
    assert found[2].settings == {"a.b": 1}
    low, high = scipy.stats.t.interval(0.95, 2, loc=0.8, scale=0.1 / math.sqrt(3))
    interval = found[2].intervals[METRIC]
    assert (interval.mean, interval.seeds) == (pytest.approx(0.8), 3)
    assert interval.half_width == pytest.approx((high - low) / 2)
    assert [each.cell(METRIC) for each in found] == ["90.00%", "85.00%", "80.00% ± 24.84 (3 seeds)"]
    assert len(best_configurations(study, count=1)) == 1


def test_the_mean_is_shown_beside_another_objective_value() -> None:
    study = study_of(finished(0.55, seed_values=[[0.7], [0.8], [0.9]]))
    assert best_configurations(study)[0].cell(METRIC) == "55.00%: 80.00% ± 24.84 (3 seeds)"


def test_lowest_first_where_lower_is_better() -> None:
    study = study_of(finished(3.0), finished(1.0), finished(2.0), directions=("minimize",))
    assert [each.number for each in best_configurations(study)] == [1, 2, 0]


def test_the_pareto_front_is_best() -> None:
    values = [[0.9, 30.0], [0.8, 10.0], [0.85, 40.0], [0.95, 50.0]]
    study = study_of(
        *(finished(value, seed_values=[value, value]) for value in values), directions=("maximize", "minimize")
    )
    found = best_configurations(study, count=1)
    assert [each.number for each in found] == [3, 0, 1]
    assert found[0].values == {METRIC: 0.95, "seconds": 50.0}
    assert found[0].cell("seconds") == "50 ± 0 (2 seeds)"


def test_an_empty_study_has_no_best() -> None:
    assert best_configurations(study_of()) == []
    assert best_configurations(study_of(directions=("maximize", "minimize"))) == []
    assert metrics_of(optuna.create_study()) == {"objective 0": False}


def test_failures_by_cause() -> None:
    failed = [{"cause": "rare"}, {"cause": "often"}, {}, {"cause": "often"}]
    study = study_of(finished(1.0), *(create_trial(state=TrialState.FAIL, user_attrs=each) for each in failed))
    assert failures(study) == {"often": [2, 4], "rare": [1], "no cause was recorded": [3]}


# ---- seeds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30, 200])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_t_quantile(degrees: int, level: float) -> None:
    assert t_quantile(degrees, level) == pytest.approx(scipy.stats.t.ppf((1 + level) / 2, degrees), rel=1e-5)


def test_compare_seeds_is_the_paired_t_test() -> None:
    best, control = [0.9, 0.95, 0.93, 0.91], [0.89, 0.91, 0.93, 0.88]
    found = compare_seeds(best, control)
    low, high = scipy.stats.ttest_rel(best, control).confidence_interval(0.95)
    assert found.half_width is not None
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert found.excludes_zero == (low > 0 or high < 0)
    assert compare_seeds([0.9], [0.8]) == Interval(pytest.approx(0.1), None, 1)
    assert not compare_seeds([0.9], [0.8]).excludes_zero
    with pytest.raises(ValueError, match="argument 2"):
        compare_seeds([0.9], [0.8, 0.9])


def comparison(best: list[float], uniform: list[float], metric: str = METRIC) -> dict[str, Any]:
    test = metric.replace("val_", "test_")
    return {
        "metric": metric,
        "seeds": list(range(len(best))),
        "best": {"validation": {metric: best}, "test": {test: best}},
        "uniform": {"validation": {metric: uniform}, "test": {test: uniform}},
    }


@pytest.mark.parametrize(
    ("best", "uniform", "metric", "text"),
    [
        ([0.92, 0.93, 0.94], [0.9, 0.91, 0.921], METRIC, "better than uniform by 1.97 points [1.82, 2.11] (95 % int"),
        ([0.90, 0.91, 0.921], [0.92, 0.93, 0.94], METRIC, "worse than uniform by 1.97 points [1.82, 2.11] (95 % int"),
        ([0.92, 0.93, 0.94], [0.9, 0.95, 0.93], METRIC, "0.33 points better than uniform [-4.84, 5.50]: not disting"),
        ([0.92], [0.9], METRIC, "2.00 points better than uniform with one seed, too few to tell"),
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.25], "val_rmse_fused", "better than uniform by 1.017 [0.945, 1.088] (95 %"),
        ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], METRIC, "0.00 points better than uniform [0.00, 0.00]: not disting"),
    ],
)
def test_comparison_sentences(best: list[float], uniform: list[float], metric: str, text: str) -> None:
    first, second, third = comparison_sentences(comparison(best, uniform, metric))
    assert first.startswith(f"{metric}: {text}")
    assert second.startswith(f"test_{metric.removeprefix('val_')}: {text}")
    assert "flatters the best" in third


def test_a_comparison_of_what_there_is() -> None:
    assert comparison_sentences(None) == []
    found = comparison([0.9, 0.8], [0.9, 0.7])
    del found["uniform"]["test"]
    assert len(comparison_sentences(found)) == 1


def test_values_for_people() -> None:
    assert show(METRIC, 0.97314) == "97.31%"
    assert show("test_r2_fused", 0.97314) == "0.9731"
    assert show("seconds", 123.456) == "123.5"
    assert show_difference(METRIC, 0.012) == "1.20 points"
    assert show_difference("seconds", 0.5) == "0.5"
