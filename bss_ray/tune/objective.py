"""The value of a trial: from the metrics of its epochs to the numbers that the search compares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bss_ray.data.columns import Columns
from bss_ray.errors import ConfigError, nearest
from bss_ray.names import FUSED
from bss_ray.runtime.messages import Metrics
from bss_ray.train.metric_names import is_error, metric_names
from bss_ray.train.run import best_row, check_choice

SECONDS = "seconds"
_WEAKER = "weaker"
_PARTS = ("seconds_scoring", "seconds_planning", "seconds_training")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % t-interval, mean ± `half_width`; one seed has no interval."""

    mean: float
    half_width: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of values of independent seeds, which are assumed to be about normal."""
        array = np.asarray(values, dtype=np.float64)
        half = None
        if len(array) > 1:
            half = t_quantile(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
        return cls(float(array.mean()), half, len(array))

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign of the mean is certain at 95 %."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The value below which |t| of Student's t-distribution stays with probability `level`."""
    # With t = sqrt(degrees) * tan(angle) the density is cos(angle)^(degrees - 1) on a finite range.
    edges = np.linspace(0, np.pi / 2, 100_001)
    mass = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (degrees - 1))
    return float(math.sqrt(degrees) * np.tan(np.interp(level * mass[-1], mass, edges[1:])))


@dataclass(frozen=True)
class Objective:
    """What a search optimises.

    Attributes:
        metrics: Names of the metrics.
        choose_by: Validation metric that chooses the epoch.
        modalities: Modalities of the data.
        aggregate: Value of several seeds: their `mean`, or the bound of its 95 % interval on the worse side.
    """

    metrics: tuple[str, ...]
    choose_by: str
    modalities: tuple[str, ...]
    aggregate: str = "mean"

    @staticmethod
    def of(metrics: Sequence[str] | None, choose_by: str | None, columns: Columns, aggregate: str) -> Objective:
        """The objective for these settings.

        Raises:
            ConfigError: A metric does not exist; the error names the nearest.
        """
        chosen = check_choice(choose_by, columns)
        names = metric_names("val", columns.modalities, columns.task)
        weaker = {name.removesuffix(FUSED) + _WEAKER for name in names if name.endswith(f"_{FUSED}")}
        known = [*names, *sorted(weaker), SECONDS]
        wanted = tuple(metrics or (chosen,))
        for name in wanted:
            if name not in known:
                raise ConfigError(f"metrics: {name!r} is no validation metric; {nearest(name, known)}")
        if len(set(wanted)) < len(wanted):
            raise ConfigError(f"metrics must differ; received {list(wanted)}")
        return Objective(wanted, chosen, columns.modalities, aggregate)

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Directions of the metrics in Optuna's words."""
        return ["minimize" if self._lower_is_better(name) else "maximize" for name in self.metrics]

    @property
    def mode(self) -> Literal["min", "max"]:
        """Direction of the first metric in Ray Tune's words."""
        return "min" if self._lower_is_better(self.metrics[0]) else "max"

    def values(self, history: Sequence[Metrics]) -> list[float]:
        """The values of one training run so far: metrics of its best epoch, and seconds of all epochs."""
        best = best_row(history, self.choose_by)
        return [self.seconds(history) if name == SECONDS else self._value(name, best) for name in self.metrics]

    def best_epoch(self, history: Sequence[Metrics]) -> int:
        """The epoch that `choose_by` chooses."""
        return int(best_row(history, self.choose_by)["epoch"])

    def seconds(self, history: Sequence[Metrics]) -> float:
        """Seconds of training, planning and scoring of all epochs."""
        return float(sum(row[part] for row in history for part in _PARTS))

    def combine(self, seed_values: Sequence[Sequence[float]], aggregate: str | None = None) -> list[float]:
        """One number for each metric from the numbers of all seeds: (seeds, metrics) -> (metrics,).

        Args:
            seed_values: Values of each seed.
            aggregate: Aggregate that replaces the objective's own.
        """
        aggregate = aggregate or self.aggregate
        columns = np.asarray(seed_values, dtype=np.float64).T
        return [self._combined(name, column, aggregate) for name, column in zip(self.metrics, columns, strict=True)]

    def _combined(self, name: str, values: np.ndarray, aggregate: str) -> float:
        over_seeds = Interval.of(values.tolist())
        if aggregate == "mean" or over_seeds.half_width is None:
            return over_seeds.mean
        half = over_seeds.half_width
        return over_seeds.mean + half if self._lower_is_better(name) else over_seeds.mean - half

    def _value(self, name: str, row: Metrics) -> float:
        if not name.endswith(f"_{_WEAKER}"):
            return float(row[name])
        of_modalities = [float(row[name.removesuffix(_WEAKER) + modality]) for modality in self.modalities]
        # NumPy's: with Python's, the result for NaN and a number depends on their order.
        return float(np.max(of_modalities) if self._lower_is_better(name) else np.min(of_modalities))

    def _lower_is_better(self, name: str) -> bool:
        return name == SECONDS or is_error(name)
