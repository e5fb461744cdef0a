"""From raw measures to balance scores: normalise over all rows, combine, average over updates.

Pure functions of arrays. `balance_scores` does it for one process that holds all rows; scorers call
the same parts with bounds that were reduced over all holders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from bss_ray.errors import ConfigError, WeightError, first_ids, nearest

Accumulate = Literal["ema", "sum"]
ACCUMULATE: tuple[str, ...] = get_args(Accumulate)


@dataclass(frozen=True)
class Bounds:
    """Smallest and largest value of one measure over all rows (of all holders)."""

    low: float
    high: float

    @staticmethod
    def of(values: np.ndarray) -> Bounds:
        """Bounds of (n,) values; of no values, bounds that any others replace."""
        if len(values) == 0:
            return Bounds(math.inf, -math.inf)
        return Bounds(float(values.min()), float(values.max()))

    @staticmethod
    def union(parts: list[Bounds]) -> Bounds:
        """Bounds over all parts. Exact, whatever the parts' number and order."""
        lows, highs = (part.low for part in parts), (part.high for part in parts)
        return Bounds(min(lows, default=math.inf), max(highs, default=-math.inf))


def normalise(values: np.ndarray, bounds: Bounds) -> np.ndarray:
    """Min-max normalisation to [0, 1] in float64; a constant column becomes 0 (BSS, Norm).

    Args:
        values: (n,) measures.
        bounds: over *all* training rows, not only these.
    """
    span = bounds.high - bounds.low
    if not span > 0:
        return np.zeros(len(values))
    return np.asarray((values.astype(np.float64) - bounds.low) / span)


def current_scores(
    similarity: np.ndarray, information: np.ndarray, similarity_bounds: Bounds, information_bounds: Bounds
) -> np.ndarray:
    """Norm(similarity) - Norm(information): (n,) float64 in [-1, 1], high = balanced."""
    current: np.ndarray = normalise(similarity, similarity_bounds) - normalise(information, information_bounds)
    return current


def accumulate_scores(
    previous: np.ndarray, current: np.ndarray, *, momentum: float, accumulate: Accumulate, updates: int
) -> np.ndarray:
    """Scores after one more update.

    Args:
        previous: (n,) scores so far.
        current: (n,) scores of this update alone.
        momentum: mu of `ema`: mu * previous + (1 - mu) * current.
        accumulate: `ema`, or `sum`: the sum of all updates over their number (the paper's figure).
        updates: how many updates `previous` holds, at least 1.
    """
    previous = previous.astype(np.float64)  # kept as float32
    if accumulate == "sum":
        return np.asarray((previous * updates + current) / (updates + 1))
    return np.asarray(momentum * previous + (1 - momentum) * current)


def check_accumulation(momentum: float, accumulate: str) -> None:
    """Refuse a momentum or a way to accumulate that does not exist.

    Raises:
        ConfigError: names the setting, its range and the value.
    """
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum must lie in [0, 1), 0 keeps no memory; received {momentum}")
    if accumulate not in ACCUMULATE:
        raise ConfigError(f"unknown accumulate {accumulate!r}; {nearest(accumulate, ACCUMULATE)}")
    if accumulate == "sum" and momentum:
        raise ConfigError(
            f"momentum={momentum} has no effect with accumulate='sum'; leave it 0 or use accumulate='ema'"
        )


def balance_scores(
    similarity: np.ndarray,
    information: np.ndarray,
    previous: np.ndarray | None = None,
    momentum: float = 0.0,
    *,
    accumulate: Accumulate = "ema",
    updates: int = 1,
) -> np.ndarray:
    """Balance scores of all rows of a data set (BSS, "balance score").

    Args:
        similarity: (N,) how much the modalities agree on each row; see `Measurer`.
        information: (N,) how much each row has left to teach, e.g. its loss.
        previous: (N,) scores before this update; None at the first.
        momentum: mu in [0, 1) of the moving average; 0 is the released code.
        accumulate: `ema` or `sum`, see `accumulate_scores`.
        updates: number of updates in `previous`; only `sum` uses it.

    Returns:
        (N,) float32 in [-1, 1], high = balanced: the bits that holders of scores keep, too.

    Raises:
        WeightError: lengths differ, or a measure is NaN or infinite.
        ConfigError: impossible momentum or accumulate.
    """
    check_accumulation(momentum, accumulate)
    similarity, information = np.asarray(similarity), np.asarray(information)
    lengths = {"similarity": len(similarity), "information": len(information)}
    if previous is not None:
        lengths["previous"] = len(previous)
    if len(set(lengths.values())) > 1:
        raise WeightError(f"all columns need one value a row; received lengths {lengths}")
    for name, values in (("similarity", similarity), ("information", information)):
        if not np.isfinite(values).all():
            raise WeightError(f"{name} must be finite; NaN or infinite in {first_ids(~np.isfinite(values))}")
    current = current_scores(similarity, information, Bounds.of(similarity), Bounds.of(information))
    if previous is not None:
        previous = np.asarray(previous)
        current = accumulate_scores(previous, current, momentum=momentum, accumulate=accumulate, updates=updates)
    return current.astype(np.float32)
