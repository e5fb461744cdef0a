"""The report on a search: whatever the study holds, the page is written and says what is missing."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console

from bss_ray.report.study import study_table, write_study_report
from tests.unit.test_insight import METRIC, comparison
from tune_spaces.learning import KNOWN_GOOD, learning

pytest.importorskip("plotly")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
optuna.logging.set_verbosity(optuna.logging.WARNING)


def objective(trial: optuna.Trial) -> tuple[float, float]:
    """Accuracy and seconds, with two seeds; every fifth trial is pruned, every eleventh fails."""
    rng = np.random.default_rng(trial.number)
    trial.set_user_attr("settings", learning(trial))
    values = 0.9 - 0.1 * trial.params["uniform_mix"] + 0.004 * rng.standard_normal(2)
    if trial.number % 11 == 10:
        trial.set_user_attr("cause", "the loss is NaN")
        raise RuntimeError("the loss is NaN")
    seconds = 100 * trial.params["fraction"]
    trial.set_user_attr("seconds", seconds)
    trial.set_user_attr("seed_values", [[value, seconds] for value in values])
    trial.set_user_attr("epoch", 3)
    return float(values.mean()), seconds


def one(trial: optuna.Trial) -> float:
    value = objective(trial)[0]
    for epoch in range(1, 4):
        trial.report(value * epoch / 3, epoch)
        if trial.number % 5 == 4 and epoch == 2:
            raise optuna.TrialPruned
    return value


Direction = Literal["minimize", "maximize"]


def empty(*directions: Direction, algorithm: str = "tpe") -> optuna.Study:
    study = optuna.create_study(directions=directions or ("maximize",), sampler=optuna.samplers.TPESampler(seed=0))
    study.set_metric_names([METRIC, "seconds", "third", "fourth"][: max(1, len(directions))])
    study.set_user_attr("space", "learning")
    study.set_user_attr("algorithm", algorithm)
    return study


@pytest.fixture(scope="module")
def searched() -> optuna.Study:
    """30 trials of the real space."""
    study = empty()
    for point in KNOWN_GOOD:
        study.enqueue_trial(point)
    study.optimize(one, n_trials=30, catch=(RuntimeError,))
    return study


def page_of(study: optuna.Study, folder: Path, against: dict[str, Any] | None = None) -> str:
    """The report without plotly itself; the table is made too."""
    text_of(study, folder, against)
    page = write_study_report(study, folder, against).read_text(encoding="utf-8")
    return re.sub(r"<script>/\*\*.*?</script>", "", page, flags=re.DOTALL)


def drawn(page: str, title: str) -> bool:
    """Whether the page has a figure of this title."""
    return f'"text":"{title}"' in page


def text_of(study: optuna.Study, folder: Path, against: dict[str, Any] | None = None) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(study_table(study, against, folder))
    return out.getvalue()


def test_a_search_of_the_real_space(searched: optuna.Study, tmp_path: Path) -> None:
    (tmp_path / "best.yaml").write_text("")
    against = comparison([0.92, 0.93, 0.94], [0.9, 0.91, 0.92])
    page = page_of(searched, tmp_path, against)
    assert "22 trials finished, 6 pruned, 2 failed" in page
    assert "Space: learning; algorithm: tpe." in page
    assert f"Best: {METRIC} {searched.best_value:.2%}, of trial {searched.best_trial.number}." in page
    assert "<a href='best.yaml'>" in page
    for title in ("Optimization history", "Importance of the knobs"):
        assert drawn(page, f"{title}: {METRIC}")
    for title in ("Parallel coordinates", "Values while training", f"{METRIC} by burn_in, fraction, grow_epochs"):
        assert drawn(page, title)
    for metric in (METRIC, "test_accuracy_fused"):
        assert drawn(page, f"{metric}: a line per seed")
        assert f"<li>{metric}: better than uniform by 2.00 points" in page
    assert "2.00 points ± 0.00" in page
    assert "left out" not in page
    assert "uniform_mix: lower is better (rank correlation -0." in page
    assert re.search(r"<td>\d\d\.\d\d% ± \d+\.\d\d \(2 seeds\)</td>", page)
    assert "trials 10, 21: the loss is NaN" in page


def test_the_page_needs_no_network(searched: optuna.Study, tmp_path: Path) -> None:
    page = write_study_report(searched, tmp_path).read_text(encoding="utf-8")
    assert page.count("* plotly.js v") == 1
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)


def test_the_table_on_the_terminal(searched: optuna.Study, tmp_path: Path) -> None:
    (tmp_path / "best.yaml").write_text("")
    text = text_of(searched, tmp_path, comparison([0.92, 0.93, 0.94], [0.93, 0.90, 0.92]))
    assert "22 trials finished, 6 pruned, 2 failed" in text
    assert re.search(rf"│ +{searched.best_trial.number} │ {searched.best_value:.2%} ± ", text)
    assert "[-" in text, "intervals are no markup"
    assert "not distinguishable from uniform with 3 seeds." in text
    assert "uniform_mix: lower is better" in text
    assert "trials 10, 21 failed: the loss is NaN" in text
    assert "best.yaml" in text
    assert "report.html" not in text, "what is not there is not named"


def test_without_a_control(searched: optuna.Study, tmp_path: Path) -> None:
    assert "whether the best beats uniform sampling is not known" in page_of(searched, tmp_path)


def test_several_objectives(tmp_path: Path) -> None:
    study = empty("maximize", "minimize")
    study.optimize(objective, n_trials=20, catch=(RuntimeError,))
    page = page_of(study, tmp_path)
    assert f"Objective: {METRIC} (the higher, the better) and seconds (the lower, the better)." in page
    assert f"the Pareto front has {len(study.best_trials)} trial" in page
    assert drawn(page, "Pareto front")
    for metric in (METRIC, "seconds"):
        assert drawn(page, f"Optimization history: {metric}")
        assert drawn(page, f"Importance of the knobs: {metric}")
    assert "left out" not in page
    assert "fraction: val_accuracy_fused: " in page


def test_importances_are_those_of_being_good(tmp_path: Path) -> None:
    """Optuna's evaluator takes low values for good ones: it would miss a knob that matters at the top only."""
    for direction, sign in (("maximize", 1), ("minimize", -1)):
        study = empty(direction)
        unit = optuna.distributions.FloatDistribution(0, 1)
        rng = np.random.default_rng(0)
        for _ in range(200):
            top, bottom = rng.random(2)
            value = sign * (1 + top if top > 0.75 else -1 - bottom if bottom > 0.75 else 0.1 * rng.random())
            params = {"top": top, "bottom": bottom}
            study.add_trial(create_trial(value=value, params=params, distributions=dict.fromkeys(params, unit)))
        page = page_of(study, tmp_path)
        order = re.search(r'"x":\[([\d.e-]+),([\d.e-]+)\],"y":\["(bottom|top)","(bottom|top)"\]', page)
        assert order is not None
        assert order[4] == "top"
        assert float(order[2]) > 0.9


def test_four_objectives_have_no_front_to_draw(tmp_path: Path) -> None:
    study = empty(*["maximize"] * 4)
    study.optimize(lambda trial: [trial.suggest_float("x", 0, 1)] * 4, n_trials=9)
    page = page_of(study, tmp_path)
    assert "<p>Pareto front: left out, " in page
    assert drawn(page, "Optimization history: fourth")


# ---- little to draw --------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", [("maximize",), ("maximize", "minimize")])
def test_an_empty_study(directions: tuple[str, ...], tmp_path: Path) -> None:
    page = page_of(empty(*directions), tmp_path)
    assert "0 trials finished" in page
    assert f"Optimization history: {METRIC}: left out, no trial finished." in page
    assert "Plotly" not in page
    assert page_of(optuna.create_study(), tmp_path)


@pytest.mark.parametrize("state", [TrialState.FAIL, TrialState.PRUNED])
@pytest.mark.parametrize("directions", [("maximize",), ("maximize", "minimize")])
def test_no_trial_finished(directions: tuple[str, ...], state: TrialState, tmp_path: Path) -> None:
    study = empty(*directions)
    for _ in range(10):
        trial = study.ask()
        learning(trial)
        if len(directions) == 1:
            trial.report(0.5, 1)
        study.tell(trial, state=state)
    page = page_of(study, tmp_path)
    assert "Best: no trial finished." in page
    assert f"Importance of the knobs: {METRIC}: left out, no trial finished." in page
    assert ("no cause was recorded" in page) == (state == TrialState.FAIL)


def test_one_trial(tmp_path: Path) -> None:
    study = empty()
    study.optimize(lambda trial: objective(trial)[0], n_trials=1)
    page = page_of(study, tmp_path)
    assert "1 trial finished;" in page
    assert drawn(page, f"Optimization history: {METRIC}")
    assert f"Importance of the knobs: {METRIC}: left out, fewer than 8 trials finished." in page
    assert "Values while training: left out, no trial has any." in page
    assert "burn_in: only 1 trial has it" in page


def test_trials_of_no_use(tmp_path: Path) -> None:
    """Knobs of one value, infinite objectives, trials that wait or run, and no knobs at all."""
    study = empty()
    study.optimize(lambda trial: float(trial.suggest_int("always", 1, 1)), n_trials=9)
    study.add_trial(create_trial(value=float("inf")))
    study.enqueue_trial({"always": 1})
    study.enqueue_trial({"always": 1})
    study.ask()
    page = page_of(study, tmp_path)
    assert "10 trials finished, 1 running, 1 waiting" in page
    assert "always: all 9 trials" in page
    assert f"Best: {METRIC} 100.00%" in page
    study = empty()
    study.optimize(lambda trial: 0.5, n_trials=2)
    assert "left out, the trials have no knobs." in page_of(study, tmp_path)


def test_what_optuna_cannot_draw_is_left_out(
    searched: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no <b>")

    monkeypatch.setattr(optuna.visualization, "plot_parallel_coordinate", broken)
    page = page_of(searched, tmp_path)
    assert "<p>Parallel coordinates: left out, no &lt;b&gt;</p>" in page
    assert drawn(page, "Values while training")


# ---- population based training, and text of users ---------------------------------------------------


def test_population_based_training(tmp_path: Path) -> None:
    study = empty(algorithm="pbt")
    temperature = "scheduler.init_args.temperature"
    for number in range(3):
        study.add_trial(
            create_trial(
                value=0.9 + 0.01 * number,
                params={"temperature": 0.25},
                distributions={"temperature": optuna.distributions.FloatDistribution(0.05, 2, log=True)},
                intermediate_values=dict.fromkeys(range(1, 11), 0.5),
                user_attrs={
                    "settings": {temperature: 0.2 if number else 0.25, "scoring.momentum": 0.5},
                    "changes": [[4, {temperature: 0.3 + number}], [8, {temperature: 0.2}]] if number else [],
                },
            )
        )
    page = page_of(study, tmp_path)
    assert drawn(page, "temperature over epochs")
    assert not drawn(page, "momentum over epochs")
    assert '"name":"trial 2 (best)","x":[0,4,8,10],"y":[0.25,2.3,0.2,0.2]' in page
    assert '"name":"trial 1","x":[0,4,8,10]' in page
    assert '"name":"trial 0"' not in page


def test_text_of_users_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    study = empty()
    study.set_user_attr("space", evil)
    study.set_metric_names([evil])
    for number in range(9):
        trial = study.ask()
        trial.suggest_categorical(f"<img src=x>{number % 2}", [evil, "[/b]"])
        trial.suggest_float(f"{evil}[bold]", 0, 1)
        study.tell(trial, number)
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"cause": f"{evil}\n[/b] line 2"}))
    folder = tmp_path / "<b>"
    folder.mkdir()
    page = page_of(study, folder, comparison([0.5, 0.6], [0.5, 0.6], metric=evil))
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "<b>" not in page
    assert "trial 9: &lt;script&gt;alert(1)&lt;/script&gt;" in page
    text = text_of(study, folder)
    assert f"trial 9 failed: {evil}" in text
    assert "[bold]" in text
    assert "line 2" not in text
