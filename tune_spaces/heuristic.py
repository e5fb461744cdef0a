"""Search space of BSS-H: `bss_ray.Heuristic`, and the momentum of the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tune_spaces import pacing
from tune_spaces.criteria import momentum

if TYPE_CHECKING:
    import optuna

# The points of the pacing, with scores that are kept for the whole run, as in the released code.
KNOWN_GOOD: list[dict[str, Any]] = [{**point, "refresh": False} for point in pacing.KNOWN_GOOD]


def heuristic(trial: optuna.Trial) -> dict[str, Any]:
    """Settings of `bss-ray train` with BSS-H.

    The knobs are those of `schedule`, and `momentum` (see `tune_spaces.criteria.momentum`) only if scores are
    updated; it has no effect on the first scores.

    How balance is measured is not searched (see `criteria`). `scoring.accumulate` must be `ema` in the base
    settings, the default: `sum` has no momentum and refuses one.

    Args:
        trial: The trial to ask.

    Returns:
        Dotted settings: `scheduler.*` and `scoring.momentum`.
    """
    settings = schedule(trial)
    refreshed = settings["scheduler.init_args.update_interval"] > 0
    return {**settings, "scoring.momentum": momentum(trial) if refreshed else 0.0}


def schedule(trial: optuna.Trial, prefix: str = "") -> dict[str, Any]:
    """The scheduler alone.

    Knobs, ranges and why:

    * the knobs of `tune_spaces.pacing.pacing`;
    * `refresh`: False keeps the scores from the end of burn-in, as in the released code; True makes new scores every
      `update_interval` epochs;
    * `update_interval` 1..8, logarithmic, only with `refresh`: 1, 2 and 4 differ more than 6, 7 and 8.

    Args:
        trial: The trial to ask.
        prefix: Prefix of the knobs' names, for a space that uses these names for something else.

    Returns:
        Dotted settings: `scheduler.*`.
    """
    settings = pacing.pacing(trial, prefix)
    interval = 0
    if trial.suggest_categorical(f"{prefix}refresh", [False, True]):
        interval = trial.suggest_int(f"{prefix}update_interval", 1, 8, log=True)
    return {**settings, "scheduler.init_args.update_interval": interval}
