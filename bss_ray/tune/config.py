"""Settings of `bss-ray tune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from bss_ray.errors import ConfigError, check_one_of
from bss_ray.runtime.logs import CommandConfig
from bss_ray.storage import hidden, is_uri
from bss_ray.train.run import TrainConfig

LOGGERS = ("mlflow", "wandb")

Algorithm = Literal["tpe", "random", "pbt"]
Aggregate = Literal["mean", "lower"]


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Asynchronous successive halving (ASHA): of the trials that reach a rung, the better trials continue.

    Args:
        enabled: Whether trials are stopped early; null stops them if there is one metric and the algorithm is not pbt.
        grace_epochs: Number of epochs until the first rung, over all seeds of the trial.
        reduction: Number R: the best 1/R of the trials continue from a rung, and the next rung is R times as far.

    Raises:
        ConfigError: a setting is out of its range.
    """

    enabled: bool | None = None
    grace_epochs: int = 4
    reduction: int = 3

    def __post_init__(self) -> None:
        for name, least in (("grace_epochs", 1), ("reduction", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"pruning.{name} must be at least {least}; received {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Population:
    """Population-based training: trials train at the same time, and regularly the worst trials continue from the
    checkpoints of the best with changed temperature, momentum and fraction.

    Args:
        interval: Number of epochs between two exchanges.
        quantile: Share of the trials that are replaced, in (0, 0.5]; as many are copied.

    Raises:
        ConfigError: a setting is out of its range.
    """

    interval: int = 3
    quantile: float = 0.25

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError(f"population.interval must be at least 1; received {self.interval}")
        if not 0 < self.quantile <= 0.5:
            raise ConfigError(f"population.quantile must lie in (0, 0.5]; received {self.quantile}")


@dataclass(frozen=True, kw_only=True)
class TuneConfig(CommandConfig):
    """Settings of `bss-ray tune`.

    Args:
        train: Settings of `bss-ray train` that all trials share.
        space: Search space: `learning`, `heuristic`, `pacing`, `criteria`, `full`, or your own `module:function`.
        trials: Number of trials of the whole search, finished trials of earlier commands included.
        metrics: Validation metrics to optimise, in the epoch that `train.choose_by` chooses; null takes
            `train.choose_by`. Several metrics give a Pareto front. In addition to the metrics of `bss-ray train` there
            are `seconds` of training, and `val_accuracy_weaker` (similarly for the other metrics), that of the weaker
            modality.
        algorithm: Search algorithm: `tpe`, `random`, or `pbt`, population-based training of `trials` trials.
        seeds: Number of training runs of each trial, with seeds `train.seed`, `train.seed` + 1, ...
        aggregate: Value of a trial of several seeds: their `mean`, or the `lower` bound of its 95 % interval (for an
            error the upper bound).
        pruning: When trials are stopped early.
        population: Settings of `pbt`.
        seed: Seed of the search.
        compare_seeds: Number of seeds of the final comparison of the best trial with uniform sampling; 0 makes no
            comparison.
        max_concurrent: Number of trials at a time; null takes as many as the cluster has room for.
        cpus_per_trial: CPUs of a trial of one worker.
        gpus_per_trial: Share of a GPU of a trial of one worker; null takes 1 if workers use GPUs.
        storage: Optuna storage: a URL, or a journal file; null takes `study.journal` in the folder of the search.
        loggers: Trackers in addition to Ray Tune's own CSV, JSON and TensorBoard: `mlflow`, `wandb`.
        name: Name of the search; a search with the same name and settings is resumed.
        storage_path: Folder of all runs and searches, on a file system that all nodes share; not a URI.

    Raises:
        ConfigError: A setting is unknown, out of its range, or contradicts another.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    space: str = "learning"
    trials: int = 16
    metrics: tuple[str, ...] | str | None = None
    algorithm: Algorithm = "tpe"
    seeds: int = 1
    aggregate: Aggregate = "mean"
    pruning: Pruning = field(default_factory=Pruning)
    population: Population = field(default_factory=Population)
    seed: int = 0
    compare_seeds: int = 3
    max_concurrent: int | None = None
    cpus_per_trial: float = 1.0
    gpus_per_trial: float | None = None
    storage: str | None = None
    loggers: tuple[str, ...] | str = ()
    name: str = "tune"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, choices in (
            ("algorithm", self.algorithm, get_args(Algorithm)),
            ("aggregate", self.aggregate, get_args(Aggregate)),
            *(("logger", logger, LOGGERS) for logger in self.trackers),
        ):
            check_one_of(name, value, choices)
        for name, least in (("trials", 1), ("seeds", 1), ("compare_seeds", 0), ("max_concurrent", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}; received {value}")
        for name in ("cpus_per_trial", "gpus_per_trial"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} cannot be negative; received {value}")
        if isinstance(self.train.num_workers, tuple):
            raise ConfigError(
                f"trials have a fixed number of ranks; received train.num_workers={list(self.train.num_workers)}"
            )
        if is_uri(self.storage_path):
            raise ConfigError(
                "storage_path of a search must be a folder that all nodes share, such as /shared/runs: trials lock, "
                f"rename and link files there, which an object store cannot do; received {hidden(self.storage_path)}. "
                "What a search finds trains anywhere: bss-ray train --config best.yaml --storage_path URI"
            )
        if self.metrics is not None and not self.objectives:
            raise ConfigError("metrics must name at least one metric, or be null")
        if self.aggregate == "lower" and self.seeds < 2:
            raise ConfigError(
                f"aggregate=lower is a bound over seeds and needs at least two; received seeds={self.seeds}"
            )
        if self.prunes and len(self.objectives) > 1:
            raise ConfigError(
                "pruning.enabled=true compares trials by one number, and there are several metrics: "
                f"{list(self.objectives)}. Leave pruning.enabled at null, or name one metric"
            )
        if self.algorithm == "pbt":
            self._check_population()

    def _check_population(self) -> None:
        if self.prunes:
            raise ConfigError("algorithm=pbt replaces trials instead of pruning them; leave pruning.enabled at null")
        if self.seeds > 1 or len(self.objectives) > 1:
            raise ConfigError(
                "algorithm=pbt compares trials in the middle of training, by one metric and with one seed; received "
                f"seeds={self.seeds}, metrics={list(self.objectives)}"
            )
        if self.trials < 2:
            raise ConfigError(f"algorithm=pbt needs a population of at least two trials; received trials={self.trials}")

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the metrics; empty if the metric is `train.choose_by`."""
        return _names(self.metrics)

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the loggers."""
        return _names(self.loggers)

    @property
    def prunes(self) -> bool:
        """Whether trials are stopped early."""
        if self.pruning.enabled is None:
            return len(self.objectives) <= 1 and self.algorithm != "pbt"
        return self.pruning.enabled


def _names(given: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())
