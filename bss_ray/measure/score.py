"""From raw measures to balance scores: normalise over all rows, combine, average over updates.

Pure functions of arrays. `balance_scores` is for one process that holds all rows; several holders call the
same functions with norms that were joined over all holders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from bss_ray.errors import ConfigError, WeightError, check_one_of, first_ids
from bss_ray.measure.normalise import NORMALISATIONS, NORMALISE, Norm, Normalise

Accumulate = Literal["ema", "sum"]
ACCUMULATE: tuple[str, ...] = get_args(Accumulate)

# Value that replaces the normalised similarity of a row with fewer than two modalities.
Unpaired = Literal["neutral", "lowest", "error"]
UNPAIRED: dict[str, float] = {"neutral": 0.5, "lowest": 0.0}

# What happens to rows whose outputs are NaN or infinite.
BadRows = Literal["error", "keep"]


@dataclass(frozen=True, kw_only=True)
class ScoreRule:
    """How the measures of all rows become scores.

    Args:
        normalise: Normalisation of each measure over all rows: `minmax` (the paper's), or `rank`, which one outlier
            cannot flatten.
        unpaired: What happens to rows with fewer than two modalities, which have no similarity: they count as
            `neutral` (a normalised similarity of 1/2) or as `lowest` (0), or are refused (`error`).

    Raises:
        ConfigError: A setting is unknown.
    """

    normalise: Normalise = "minmax"
    unpaired: Unpaired = "neutral"

    def __post_init__(self) -> None:
        check_one_of("normalise", self.normalise, NORMALISE)
        check_one_of("unpaired", self.unpaired, get_args(Unpaired))


@dataclass(frozen=True, kw_only=True)
class Accumulation(ScoreRule):
    """How measures become scores, update after update.

    Args:
        momentum: Factor mu in [0, 1) of the score's moving average; 0 is the released code.
        accumulate: Kind of average over the updates: `ema`, or `sum`, the mean of all updates (the paper's figure).

    Raises:
        ConfigError: A setting is unknown, out of its range, or without effect.
    """

    momentum: float = 0.0
    accumulate: Accumulate = "ema"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must lie in [0, 1), 0 keeps no memory; received {self.momentum}")
        check_one_of("accumulate", self.accumulate, ACCUMULATE)
        if self.accumulate == "sum" and self.momentum:
            raise ConfigError(
                f"momentum={self.momentum} has no effect with accumulate='sum'; leave it 0 or use accumulate='ema'"
            )


def current_scores(
    similarity: np.ndarray, information: np.ndarray, norms: tuple[Norm, Norm], unpaired: Unpaired = "error"
) -> np.ndarray:
    """Norm(similarity) - Norm(information): (n,) float64 in [-1, 1], high = balanced.

    Args:
        similarity: (n,) similarities; NaN for rows with fewer than two modalities.
        information: (n,) informations.
        norms: Norms of similarity and information, over *all* rows, not only these.
        unpaired: How rows without a similarity count: as `neutral` (1/2) or `lowest` (0); `error` says that there are
            none.
    """
    agreement = norms[0].apply(similarity)
    if unpaired in UNPAIRED:
        agreement[np.isnan(agreement)] = UNPAIRED[unpaired]
    current: np.ndarray = agreement - norms[1].apply(information)
    return current


def accumulate_scores(
    previous: np.ndarray, current: np.ndarray, accumulation: Accumulation, *, updates: int
) -> np.ndarray:
    """Scores after one more update.

    Args:
        previous: (n,) scores so far.
        current: (n,) scores of this update alone.
        accumulation: How both are combined: `ema` is mu * previous + (1 - mu) * current, `sum` the sum of all updates
            over their number (the paper's figure).
        updates: Number of updates in `previous`, at least 1.
    """
    previous = previous.astype(np.float64)  # holders keep float32
    if accumulation.accumulate == "sum":
        return np.asarray((previous * updates + current) / (updates + 1))
    return np.asarray(accumulation.momentum * previous + (1 - accumulation.momentum) * current)


def balance_scores(
    similarity: np.ndarray,
    information: np.ndarray,
    previous: np.ndarray | None = None,
    momentum: float = 0.0,
    *,
    accumulate: Accumulate = "ema",
    updates: int = 1,
    normalise: Normalise = "minmax",
    unpaired: Unpaired = "error",
) -> np.ndarray:
    """Balance scores of all rows of a dataset (BSS, "balance score").

    Args:
        similarity: (N,) agreement of the modalities of each row; see `Measurer`. NaN: fewer than two modalities.
        information: (N,) how much each row can still teach, e.g. its loss.
        previous: (N,) scores before this update; None for the first update.
        momentum: Weight mu in [0, 1) of the old score in the moving average; 0 is the released code.
        accumulate: `ema` or `sum`, see `accumulate_scores`.
        updates: Number of updates in `previous`; only `sum` uses it.
        normalise: `minmax` (the paper's), or `rank`, which one outlier cannot flatten.
        unpaired: How rows without a similarity count: refused (`error`), `neutral` or `lowest`; see `current_scores`.

    Returns:
        (N,) float32 in [-1, 1], high = balanced: the same bits that holders keep.

    Raises:
        WeightError: Lengths differ, or a measure is NaN or infinite.
        ConfigError: `momentum`, `accumulate`, `normalise` or `unpaired` is impossible.
    """
    rule = Accumulation(momentum=momentum, accumulate=accumulate, normalise=normalise, unpaired=unpaired)
    similarity, information = np.asarray(similarity), np.asarray(information)
    lengths = {"similarity": len(similarity), "information": len(information)}
    if previous is not None:
        lengths["previous"] = len(previous)
    if len(set(lengths.values())) > 1:
        raise WeightError(f"all columns need one value a row; received lengths {lengths}")
    for name, values in (("similarity", similarity), ("information", information)):
        bad = ~np.isfinite(values)
        if name == "similarity" and unpaired != "error":
            bad &= ~np.isnan(values)
        if bad.any():
            raise WeightError(f"{name} must be finite; NaN or infinite in {first_ids(bad)}")
    kind = NORMALISATIONS[normalise]
    current = current_scores(similarity, information, (kind.of(similarity), kind.of(information)), unpaired)
    if previous is not None:
        previous = np.asarray(previous)
        current = accumulate_scores(previous, current, rule, updates=updates)
    return current.astype(np.float32)
