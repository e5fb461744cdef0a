"""How and where rows are scored: the settings, and which engine fits the resources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from bss_ray.errors import ConfigError, check_one_of
from bss_ray.measure.forward import Forward
from bss_ray.measure.score import Accumulation, BadRows

Engine = Literal["auto", "actors", "workers", "online"]
ENGINES: tuple[str, ...] = get_args(Engine)


@dataclass(frozen=True, kw_only=True)
class ScoringPass(Forward):
    """How rows are forwarded and measured.

    Args:
        bad_rows: What happens to rows whose outputs are NaN or infinite: they are an `error`, or they are left out
            (`keep`): a training run keeps the score that they had, `bss-ray score` writes them without measures.

    Raises:
        ConfigError: a setting is unknown or out of its range.
    """

    bad_rows: BadRows = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("bad_rows", self.bad_rows, get_args(BadRows))


@dataclass(frozen=True, kw_only=True)
class Scoring(Accumulation, ScoringPass):
    """How and where rows are scored.

    Args:
        engine: Who measures rows. `actors`: scorer actors forward all rows, between epochs or, with `overlap`, during
            the next epoch; `workers`: the ranks forward the rows of their own nodes between epochs; `online`: the
            outputs of training are measured, without another forward pass; `auto`: `actors` if scorers have resources
            of their own, else `workers`, with a message.
        overlap: Whether epoch e+1 trains while `actors` score the model of epoch e; its scores are published after
            epoch e+1.
        sweep_every: Number k: with `online`, the ranks forward all rows at every k-th update; 0 never.
        num_holders: Number of actors that hold scores; the order of rows does not depend on it.
        num_scorers: Number of scorer actors of the engine `actors`, each with its own copy of the model.
        max_failed_updates: Number of updates of the scores in a row that may fail because scorers are lost; the run
            continues with the scores it has.
        restart_timeout_s: Seconds to wait for a lost scorer if there is no other scorer.
        cpus_per_holder: Logical CPUs of a holder, which also uses that number of threads, at least one. The default is
            0 because holders work while the ranks wait; give large datasets more (docs/scale.md).
        cpus_per_scorer: Logical CPUs of a scorer, which also uses that number of threads, at least one.
        gpus_per_scorer: Share of a GPU of a scorer; leave the rest of the GPU to the ranks.

    Raises:
        ConfigError: A setting is unknown, out of its range, or without effect.
    """

    engine: Engine = "auto"
    overlap: bool = False
    sweep_every: int = 0
    num_holders: int = 2
    num_scorers: int = 2
    max_failed_updates: int = 3
    restart_timeout_s: float = 60.0
    cpus_per_holder: float = 0.0
    cpus_per_scorer: float = 0.0
    gpus_per_scorer: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        ScoringPass.__post_init__(self)  # which the method of `Accumulation` does not call
        check_one_of("scoring engine", self.engine, ENGINES)
        for name, least in (("num_holders", 1), ("num_scorers", 1), ("sweep_every", 0), ("max_failed_updates", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"scoring.{name} must be at least {least}; received {getattr(self, name)}")
        for name in ("cpus_per_holder", "cpus_per_scorer", "gpus_per_scorer", "restart_timeout_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"scoring.{name} cannot be negative; received {getattr(self, name)}")
        self._check_effect()

    def _check_effect(self) -> None:
        """Refuse settings without an effect with the engine."""
        if self.overlap and self.engine not in ("actors", "auto"):
            raise ConfigError(f"scoring.overlap is for engine=actors; engine={self.engine} has no use for it")
        if self.channels_last and self.engine not in ("actors", "auto"):
            raise ConfigError(
                f"scoring.channels_last is for the replicas of engine=actors, and engine={self.engine} has none. "
                "Change the layout of the model itself"
            )
        if self.sweep_every and self.engine != "online":
            raise ConfigError(f"scoring.sweep_every is for engine=online; engine={self.engine} scores all rows anyway")
        if self.accumulate == "sum" and self.bad_rows == "keep":
            raise ConfigError(
                "accumulate='sum' is the mean of all updates of a row, and bad_rows='keep' leaves rows out of some. "
                "Use accumulate='ema' with a momentum, or bad_rows='error'"
            )
        if self.accumulate == "sum" and self.engine == "online":
            raise ConfigError(
                "accumulate='sum' is the mean of all updates of a row, and engine=online does not update all rows "
                "alike. Use accumulate='ema' with a momentum, or another engine"
            )


def choose_engine(scoring: Scoring, *, spare_cpus: float, spare_gpus: float, ranks_use_gpu: bool) -> tuple[Engine, str]:
    """The engine that `auto` stands for, and the reason.

    Args:
        scoring: Settings of scoring.
        spare_cpus: CPUs of the cluster that the ranks leave.
        spare_gpus: GPUs of the cluster that the ranks leave.
        ranks_use_gpu: Whether ranks train on GPUs.
    """
    if scoring.engine != "auto":
        return scoring.engine, "as set"
    if scoring.overlap:
        return "actors", "overlap=true trains and scores at the same time"
    if scoring.gpus_per_scorer > 0 or scoring.cpus_per_scorer > 0:
        return "actors", "scorers are given resources of their own"
    if ranks_use_gpu:
        if spare_gpus > 0:
            return "workers", (
                f"the ranks leave {spare_gpus:g} GPUs unused, but gpus_per_scorer is 0; set it for engine=actors"
            )
        return "workers", "the ranks hold all GPUs: they score their own rows, without a second copy of the model"
    if spare_cpus >= scoring.num_scorers:
        return "actors", f"the ranks leave {_count(spare_cpus, 'CPU')} for {_count(scoring.num_scorers, 'scorer')}"
    few = f"{_count(spare_cpus, 'CPU')}, too few for {_count(scoring.num_scorers, 'scorer')} as well"
    return "workers", f"the ranks leave {few}"


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"
