"""Search space of all sampling: which scheduler, its knobs, and the criteria."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tune_spaces import criteria, heuristic, learning

if TYPE_CHECKING:
    import optuna

# Both schedulers have a `burn_in`, with different ranges, and the best value for one need not suit the other.
_LEARNING, _HEURISTIC = "learning_", "heuristic_"


def full(trial: optuna.Trial) -> dict[str, Any]:
    """Settings of `bss-ray train`: scheduler and criteria.

    Knobs:

    * `scheduler`: `Learning` or `Heuristic`.
    * the knobs of `tune_spaces.learning.schedule`, named `learning_*`, or of `tune_spaces.heuristic.schedule`, named
      `heuristic_*`.
    * the knobs of `tune_spaces.criteria.measures`, shared by both schedulers.
    * the knobs of `tune_spaces.criteria.memory`, shared by both schedulers, if scores are updated at all, which a
      `Heuristic` without `refresh` does not do.

    A trial has up to 15 knobs. For a study of few trials use `learning`.

    Not searched are `Uniform`, the control, which has no knobs and is run after a study with as many seeds as the
    winner; and the optimiser, the model, the batch size and the number of epochs (`loop.*`, `model.*`, `batch_size`):
    a better learning rate would look like better sampling, and the control would have to be tuned as well.

    Args:
        trial: The trial to ask.

    Returns:
        Dotted settings: `scheduler.*`, `measurer.*`, `scoring.normalise`, `scoring.accumulate` and
        `scoring.momentum`.
    """
    if trial.suggest_categorical("scheduler", ["Learning", "Heuristic"]) == "Learning":
        settings = learning.schedule(trial, prefix=_LEARNING)
    else:
        settings = heuristic.schedule(trial, prefix=_HEURISTIC)
    settings |= criteria.measures(trial)
    if settings["scheduler.init_args.update_interval"] > 0:
        return settings | criteria.memory(trial)
    return settings | {"scoring.accumulate": "ema", "scoring.momentum": 0.0}


# ---- known points -------------------------------------------------------------------------------


def _point(scheduler: str, prefix: str, schedule: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """A point of a scheduler's space joined with a point of `criteria`; of two momenta the scheduler's is kept."""
    knobs = {"scheduler": scheduler, **measured}
    for name, value in schedule.items():
        knobs[name if name == "momentum" else f"{prefix}{name}"] = value
    if schedule.get("refresh") is False:
        del knobs["accumulate"], knobs["momentum"]  # `full` does not ask for them
    return knobs


_RELEASED, *_OTHERS = criteria.KNOWN_GOOD
_DEFAULT = {name: value for name, value in learning.KNOWN_GOOD[1].items() if name != "momentum"}

# All points of both schedulers with the criteria of the released code; then the setting of `bss-ray train` without
# a named scheduler with the other criteria.
KNOWN_GOOD: list[dict[str, Any]] = [
    *(_point("Learning", _LEARNING, point, _RELEASED) for point in learning.KNOWN_GOOD),
    *(_point("Heuristic", _HEURISTIC, point, _RELEASED) for point in heuristic.KNOWN_GOOD),
    *(_point("Learning", _LEARNING, _DEFAULT, measured) for measured in _OTHERS),
]
