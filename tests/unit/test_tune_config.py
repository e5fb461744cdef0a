"""The rules of a search's settings, and how many trials a cluster has room for."""

from dataclasses import replace
from typing import Any

import pytest
import ray
import ray.train

from bss_ray.errors import ConfigError, ResourceError
from bss_ray.scoring.config import Scoring
from bss_ray.train.run import TrainConfig
from bss_ray.tune.config import Population, Pruning, TuneConfig
from bss_ray.tune.trial import scoring_here
from bss_ray.tune.trials import max_concurrent_trials, trial_resources


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": "tpee"}, "unknown algorithm 'tpee'; did you mean 'tpe'?"),
        ({"aggregate": "mena"}, "unknown aggregate 'mena'; did you mean 'mean'?"),
        ({"loggers": ("mlfow",)}, "unknown logger 'mlfow'; did you mean 'mlflow'?"),
        ({"trials": 0}, "trials must be at least 1; received 0"),
        ({"seeds": 0}, "seeds must be at least 1; received 0"),
        ({"compare_seeds": -1}, "compare_seeds must be at least 0; received -1"),
        ({"max_concurrent": 0}, "max_concurrent must be at least 1; received 0"),
        ({"cpus_per_trial": -1.0}, "cpus_per_trial cannot be negative; received -1.0"),
        ({"gpus_per_trial": -0.5}, "gpus_per_trial cannot be negative; received -0.5"),
        ({"metrics": ()}, "metrics must name at least one metric, or be null"),
        ({"aggregate": "lower"}, "needs at least two; received seeds=1"),
        (
            {"metrics": ("a", "b"), "pruning": Pruning(enabled=True)},
            "Leave pruning.enabled at null, or name one metric",
        ),
        ({"algorithm": "pbt", "pruning": Pruning(enabled=True)}, "leave pruning.enabled at null"),
        ({"algorithm": "pbt", "seeds": 2}, "with one seed; received seeds=2, metrics=[]"),
        (
            {"algorithm": "pbt", "metrics": ("a", "b")},
            "by one metric and with one seed; received seeds=1, metrics=['a', 'b']",
        ),
        ({"algorithm": "pbt", "trials": 1}, "at least two trials; received trials=1"),
    ],
    ids=str,
)
def test_rules_of_a_search(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        TuneConfig(**settings)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (Pruning, {"grace_epochs": 0}, "pruning.grace_epochs must be at least 1; received 0"),
        (Pruning, {"reduction": 1}, "pruning.reduction must be at least 2; received 1"),
        (Population, {"interval": 0}, "population.interval must be at least 1; received 0"),
        (Population, {"quantile": 0.0}, "population.quantile must lie in (0, 0.5]; received 0.0"),
        (Population, {"quantile": 0.6}, "population.quantile must lie in (0, 0.5]; received 0.6"),
    ],
)
def test_rules_of_its_parts(kind: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        kind(**settings)
    assert said in str(raised.value)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    Pruning(grace_epochs=1, reduction=2)
    Population(interval=1, quantile=0.5)
    TuneConfig(trials=1, compare_seeds=0, max_concurrent=1, cpus_per_trial=0, gpus_per_trial=0)
    TuneConfig(algorithm="pbt", trials=2, metrics=("a",))
    TuneConfig(aggregate="lower", seeds=2, loggers=("mlflow", "wandb"))


@pytest.mark.parametrize(
    ("settings", "prunes"),
    [
        ({}, True),
        ({"metrics": ("a",)}, True),
        ({"metrics": ("a", "b")}, False),
        ({"algorithm": "random"}, True),
        ({"algorithm": "pbt"}, False),
        ({"pruning": Pruning(enabled=False)}, False),
        ({"pruning": Pruning(enabled=True)}, True),
    ],
    ids=str,
)
def test_pruning_is_where_trials_can_be_compared(settings: dict[str, Any], prunes: bool) -> None:
    assert TuneConfig(**settings).prunes is prunes


# ---- concurrent trials ----------------------------------------------------------------------------------------


class Cluster:
    """What Ray says that there is; no Ray runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def has(self, *nodes: dict[str, float], dead: dict[str, float] | None = None) -> None:
        table = [
            {"NodeID": str(index), "Alive": True, "Resources": {"memory": 1e9, **node}}
            for index, node in enumerate(nodes)
        ]
        total: dict[str, float] = {}
        for node in table:
            for name, amount in node["Resources"].items():  # type: ignore[attr-defined]
                total[name] = total.get(name, 0.0) + amount
        self._patch.setattr(ray, "nodes", lambda: [*table, {"Alive": False, "Resources": dead or {}}])
        self._patch.setattr(ray, "cluster_resources", lambda: total)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def scaling(workers: int = 1, gpu: bool = False) -> ray.train.ScalingConfig:
    return ray.train.ScalingConfig(num_workers=workers, use_gpu=gpu)


def config(scoring: Scoring | None = None, **settings: Any) -> TuneConfig:
    return replace(TuneConfig(**settings), train=TrainConfig(scoring=scoring or Scoring()))


@pytest.mark.parametrize(
    ("settings", "concurrent"),
    [
        ({}, 6),
        ({"max_concurrent": 4}, 4),
        ({"max_concurrent": 40}, 6),
        ({"cpus_per_trial": 0.5}, 12),
        ({"cpus_per_trial": 2}, 2),  # of 3 CPUs on each node
        ({"cpus_per_trial": 0}, 64),
    ],
    ids=str,
)
def test_trials_that_fit_on_the_nodes(cluster: Cluster, settings: dict[str, Any], concurrent: int) -> None:
    cluster.has({"CPU": 3}, {"CPU": 3}, dead={"CPU": 100})
    assert max_concurrent_trials(config(**settings), scaling()) == concurrent


@pytest.mark.parametrize(("share", "concurrent"), [(None, 2), (0.5, 4), (0.3, 6), (1.0, 2)])
def test_trials_that_share_gpus(cluster: Cluster, share: float | None, concurrent: int) -> None:
    cluster.has({"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}, {"CPU": 8})
    assert max_concurrent_trials(config(gpus_per_trial=share), scaling(gpu=True)) == concurrent


@pytest.mark.parametrize(("workers", "gpu", "concurrent"), [(2, False, 3), (3, False, 2), (6, False, 1), (2, True, 1)])
def test_trials_of_several_ranks(cluster: Cluster, workers: int, gpu: bool, concurrent: int) -> None:
    cluster.has({"CPU": 3, "GPU": 1}, {"CPU": 3, "GPU": 1})
    assert max_concurrent_trials(config(), scaling(workers, gpu)) == concurrent
    assert trial_resources(config(), scaling(workers, gpu))["CPU"] == 0, "its ranks train"


def test_what_scoring_takes_beside_a_trial_is_counted(cluster: Cluster) -> None:
    cluster.has({"CPU": 6})
    actors = Scoring(engine="actors", num_scorers=2, cpus_per_scorer=1.0)
    assert max_concurrent_trials(config(actors), scaling()) == 2
    assert max_concurrent_trials(config(), scaling()) == 6


@pytest.mark.parametrize(
    "scoring", [Scoring(overlap=True), Scoring(engine="online", sweep_every=3), Scoring(engine="actors")], ids=str
)
def test_trials_with_any_engine(cluster: Cluster, scoring: Scoring) -> None:
    cluster.has({"CPU": 4})
    assert max_concurrent_trials(config(scoring), scaling()) == 4


def test_a_trial_that_fits_nowhere(cluster: Cluster) -> None:
    cluster.has({"CPU": 2}, {"CPU": 3})
    with pytest.raises(
        ResourceError, match=r"room for a trial: each of the trials needs 4 CPU on one .*cpus_per_trial"
    ):
        max_concurrent_trials(config(cpus_per_trial=4), scaling())
    with pytest.raises(ResourceError, match=r"6 CPU.*the cluster has 5"):
        max_concurrent_trials(config(), scaling(6))
    with pytest.raises(ResourceError, match=r"1 GPU.*the cluster has 0"):
        max_concurrent_trials(config(), scaling(gpu=True))
    hungry = Scoring(engine="actors", num_scorers=2, cpus_per_scorer=2.0)
    cluster.has({"CPU": 2}, {"CPU": 2})
    with pytest.raises(ResourceError, match=r"5 CPU.*scorers"):
        max_concurrent_trials(config(hungry), scaling())


def test_a_population_trains_side_by_side(cluster: Cluster) -> None:
    cluster.has({"CPU": 4})
    population = config(algorithm="pbt", trials=8)
    assert max_concurrent_trials(population, scaling()) == 4, "its trials take turns"
    with pytest.raises(ConfigError, match="trains its 8 trials side by side, and there is room for 3"):
        max_concurrent_trials(replace(population, max_concurrent=3), scaling())
    with pytest.raises(ConfigError, match="there is room for 2"):
        max_concurrent_trials(population, scaling(2))
    assert max_concurrent_trials(replace(population, trials=2), scaling(2)) == 2


def test_resources_of_a_trial() -> None:
    assert trial_resources(config(), scaling()) == {"CPU": 1.0, "GPU": 0.0}
    assert trial_resources(config(cpus_per_trial=0.5), scaling(gpu=True)) == {"CPU": 0.5, "GPU": 1.0}
    assert trial_resources(config(gpus_per_trial=0.25), scaling(gpu=True)) == {"CPU": 1.0, "GPU": 0.25}


def test_one_metric_or_logger_needs_no_list() -> None:
    config = TuneConfig(metrics="val_f1_fused", loggers="mlflow")
    assert (config.objectives, config.trackers) == (("val_f1_fused",), ("mlflow",))
    assert TuneConfig().objectives == TuneConfig().trackers == ()
    with pytest.raises(ConfigError, match="did you mean 'mlflow'"):
        TuneConfig(loggers="mlfow")


def test_a_rank_in_the_trials_process_scores_its_own_rows_unless_scoring_overlaps() -> None:
    assert scoring_here(TrainConfig()).scoring.engine == "workers"
    overlapped = TrainConfig(scoring=Scoring(overlap=True))
    assert scoring_here(overlapped) == overlapped, "the engine workers would be refused"
    asked = TrainConfig(scoring=Scoring(engine="online"))
    assert scoring_here(asked) == asked
