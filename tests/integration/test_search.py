"""A search with real Ray Tune trials: what becomes of them, what they share, and what is left behind."""

import json
from pathlib import Path

import pytest
import ray
import ray.train
import yaml
from optuna.trial import FrozenTrial, TrialState
from ray._private.state import actors

from bss_ray.errors import ConfigError, ResourceError, SearchError
from bss_ray.runtime.messages import Message, TrialChanged
from bss_ray.train.run import TrainConfig, load_shards
from bss_ray.train.settings import instantiate, make, overlay, train_parser, training_config
from bss_ray.tune.config import Population, Pruning, TuneConfig
from bss_ray.tune.record import load_study
from bss_ray.tune.trial import WarmStart, train_once
from bss_ray.tune.trials import max_concurrent_trials
from bss_ray.tune.tuner import alone
from tests.commands import run_here
from tests.searches import (
    EPOCHS,
    base,
    by_command,
    hopeless,
    learning_rates,
    search,
    temperatures,
    troubles,
    without_burn_in,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]


def trials_of(folder: Path, name: str = "tune") -> list[FrozenTrial]:
    return load_study(None, name, folder / name).trials


def living() -> set[str]:
    """Actors of searches and placement groups that are there."""
    groups = {f"group {key}" for key, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"}
    return groups | {key for key, actor in actors().items() if actor["State"] != "DEAD" and not actor["IsDetached"]}


def test_failed_trials_are_failed_with_their_cause_and_the_search_goes_on(tmp_path: Path) -> None:
    before = living()
    told: list[Message] = []
    result = search(tmp_path, troubles, told.append, trials=5)
    trials = trials_of(tmp_path)
    complete, fail = TrialState.COMPLETE, TrialState.FAIL
    assert [trial.state for trial in trials] == [complete, fail, fail, fail, complete]
    causes = [trial.user_attrs["cause"] for trial in trials[1:4]]
    assert causes[0] == "RuntimeError: boom: the model has had enough"
    assert "nan" in causes[1]
    assert causes[2] == "its process died: it was killed, or it crashed"
    assert result["trials"] == {"complete": 2, "pruned": 0, "fail": 3}
    # A trial that fails is told with its cause; one that runs with its epochs.
    changes = [message for message in told if isinstance(message, TrialChanged)]
    assert [change.cause for change in changes if change.state == "fail"] == causes
    assert {change.epoch for change in changes if change.number == 4} == {None, 1, 2, 3, 4}
    assert living() <= before, "a search leaves nothing behind"


def test_a_search_whose_trials_all_fail_ends_with_the_first_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bss_ray.tune.record.HOPELESS", 2)
    with pytest.raises(SearchError, match=r"none of 2 trials ran to its end.*trial 0: RuntimeError: boom"):
        search(tmp_path, hopeless, trials=30)
    assert len(trials_of(tmp_path)) == 2, "more of them would not mend it"


def test_a_pruned_trial_is_recorded_as_pruned(tmp_path: Path) -> None:
    pruning = Pruning(enabled=True, grace_epochs=2, reduction=2)
    result = search(tmp_path, learning_rates, trials=2, pruning=pruning)
    good, bad = trials_of(tmp_path)
    assert good.state == TrialState.COMPLETE
    assert list(good.intermediate_values) == [1, 2, 3, 4]
    assert bad.state == TrialState.PRUNED
    assert list(bad.intermediate_values) == [1, 2], "stopped at the first rung"
    assert result["trials"] == {"complete": 1, "pruned": 1, "fail": 0}
    assert [best["trial"] for best in result["best"]] == [0]


@pytest.fixture(scope="module")
def command(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A search over knobs that act after burn-in only, two trials at a time, and a comparison; what it has printed."""
    folder = tmp_path_factory.mktemp("shared")
    return folder, run_here(*by_command(folder, trials=2, max_concurrent=2, compare_seeds=2))


@pytest.fixture(scope="module")
def shared(command: tuple[Path, str]) -> Path:
    return command[0]


def test_what_the_command_prints_and_writes(command: tuple[Path, str]) -> None:
    folder, out = command
    assert "\x1b" not in out, "no cursor tricks off a terminal"
    for name in ("best.yaml", "result.json", "report.html"):
        assert (folder / "tune" / name).exists(), name
        assert str(folder / "tune" / name) in out, name
    result = json.loads((folder / "tune" / "result.json").read_text())
    assert result["trials"] == {"complete": 2, "pruned": 0, "fail": 0}
    same = by_command(folder, trials=2, max_concurrent=2, compare_seeds=2)
    assert "this search is complete" in run_here(*same)
    assert "train.seed: 0 there, 7 now" in run_here(*same, "--train.seed=7", code=1)


def assert_as_trained_alone(folder: Path) -> None:
    """Trials came to the same as without the others, to the bit."""
    splits = load_shards(training_config(base())[0], lambda message: None)
    for trial in trials_of(folder):
        config: TrainConfig = training_config(overlay(base(), trial.user_attrs["settings"]))[0]
        one = ray.train.ScalingConfig(num_workers=1)
        history = train_once(config, splits, one, folder, WarmStart(), lambda history, checkpoint: None)
        values = [row["val_accuracy_fused"] for row in history]
        so_far = [max(values[: epoch + 1]) for epoch in range(EPOCHS)]
        assert list(trial.intermediate_values.values()) == so_far


def test_one_burn_in_serves_all_and_changes_nothing(shared: Path) -> None:
    assert len(list((shared / "tune" / "burn_in").glob("*/done/manifest.json"))) == 1
    assert_as_trained_alone(shared)


def test_the_untrained_model_is_scored_once_for_all(tmp_path: Path) -> None:
    search(tmp_path, without_burn_in, trials=2)
    assert len(list((tmp_path / "tune" / "burn_in").glob("*/done/scores-*"))) == 1
    assert_as_trained_alone(tmp_path)


def test_the_best_settings_are_taken_by_train_as_they_are(shared: Path) -> None:
    folder = shared / "tune"
    best, tree = load_study(None, "tune", folder).best_trial, yaml.safe_load((folder / "best.yaml").read_text())
    config, _ = training_config(tree)
    assert (config.num_workers, config.scoring.engine, config.name) == (1, "workers", "tune-best")
    for name, value in best.user_attrs["settings"].items():
        at = tree
        for part in name.split("."):
            at = at[part]
        assert at == value or str(at).endswith(f".{value}"), name
    words = ["--config", str(folder / "best.yaml")]
    parser = train_parser(words)
    assert make(TrainConfig, instantiate(parser, parser.parse_args(words))) == config


def test_the_best_is_compared_with_uniform_sampling_over_new_seeds(shared: Path) -> None:
    result = json.loads((shared / "tune" / "result.json").read_text())
    comparison = result["comparison"]
    assert comparison["seeds"] == [1, 2], "the search has had 0"
    for side in ("best", "uniform"):
        assert len(comparison[side]["validation"]["val_accuracy_fused"]) == 2
        assert len(comparison[side]["test"]["test_accuracy_fused"]) == 2
    assert comparison["best"] != comparison["uniform"]


def test_a_larger_number_of_trials_searches_on(shared: Path) -> None:
    before = [(trial.number, trial.values, trial.datetime_complete) for trial in trials_of(shared)]
    result = search(shared, temperatures, trials=3)
    assert sum(result["trials"].values()) == 3
    assert [(t.number, t.values, t.datetime_complete) for t in trials_of(shared)[:2]] == before


def test_another_space_or_other_data_is_refused(shared: Path) -> None:
    with pytest.raises(ConfigError, match=r"space: 'tests.searches:temperatures' there, 'tests.searches:troubles' now"):
        search(shared, troubles, trials=4)
    with pytest.raises(ConfigError, match=r"metrics: \['val_accuracy_fused'\] there"):
        search(shared, temperatures, trials=4, metrics=("val_f1_fused",))


@pytest.mark.slow
def test_population_based_training_changes_settings_on_the_way(tmp_path: Path) -> None:
    # Each takes most of the CPUs, so that they train in turns: else the first could be done before others have started.
    search(
        tmp_path,
        temperatures,
        trials=3,
        max_concurrent=None,
        cpus_per_trial=4,
        algorithm="pbt",
        population=Population(interval=1, quantile=0.5),
        pruning=Pruning(),
    )
    trials = trials_of(tmp_path)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    changes = [change for trial in trials for change in trial.user_attrs.get("changes", [])]
    assert changes, "the worst goes on from the best's checkpoint"
    for epoch, settings in changes:
        assert 1 < epoch <= EPOCHS
        assert 0.05 <= settings.get("scheduler.init_args.temperature", 1) <= 2
    assert all(max(trial.intermediate_values) == EPOCHS for trial in trials)


def test_several_seeds_and_metrics(tmp_path: Path) -> None:
    metrics = ("val_accuracy_fused", "val_accuracy_weaker")
    result = search(tmp_path, temperatures, trials=1, metrics=metrics, seeds=2)
    (trial,) = trials_of(tmp_path)
    seeds = trial.user_attrs["seed_values"]
    assert len(seeds) == 2
    assert trial.values == pytest.approx([sum(column) / 2 for column in zip(*seeds, strict=True)])
    assert trial.values[1] <= trial.values[0]
    assert result["metrics"] == list(metrics)
    assert len(list((tmp_path / "tune" / "burn_in").glob("*/done"))) == 2, "one for each seed"


def test_two_commands_cannot_search_together(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(ConfigError, match="being searched by another command"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_resources_that_can_never_be_met() -> None:
    config = TuneConfig(cpus_per_trial=1000)
    with pytest.raises(ResourceError, match=r"no room for a trial: the run needs 1000 CPU.*cpus_per_trial"):
        max_concurrent_trials(config, ray.train.ScalingConfig(num_workers=1))
    with pytest.raises(ResourceError, match="needs 100 CPU"):
        max_concurrent_trials(TuneConfig(), ray.train.ScalingConfig(num_workers=100))
    with pytest.raises(ConfigError, match="pbt trains its 16 trials side by side, and there is room for 3"):
        max_concurrent_trials(TuneConfig(algorithm="pbt"), ray.train.ScalingConfig(num_workers=2))
    assert max_concurrent_trials(TuneConfig(), ray.train.ScalingConfig(num_workers=1)) == 6
    assert max_concurrent_trials(TuneConfig(), ray.train.ScalingConfig(num_workers=4)) == 1, (
        "two would wait for each other"
    )
