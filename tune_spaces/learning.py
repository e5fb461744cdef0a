"""Search space of BSS-L: `bss_ray.Learning`, and the momentum of the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tune_spaces.criteria import momentum

if TYPE_CHECKING:
    import optuna

_RELEASED = {
    "burn_in": 1,
    "update_interval": 1,
    "momentum": 0.0,
    "weight": "linear",
    "uniform_mix": 0.0,
    "fraction": 1.0,
}
_PROTOTYPE = {**_RELEASED, "weight": "exponential", "temperature": 0.25, "fraction": 0.7, "grows": False}

# The released code (every row once per epoch, in the order drawn), then the two settings that this project's
# prototype on small audio-visual digits arrived at, all of them with a burn-in of one epoch.
KNOWN_GOOD: list[dict[str, Any]] = [_RELEASED, _PROTOTYPE, {**_PROTOTYPE, "momentum": 0.5}]


def learning(trial: optuna.Trial) -> dict[str, Any]:
    """Settings of `bss-ray train` with BSS-L.

    The knobs are those of `schedule`, and `momentum` (see `tune_spaces.criteria.momentum`).

    How balance is measured is not searched (see `criteria`). `scoring.accumulate` must be `ema` in the base
    settings, the default: `sum` has no momentum and refuses one.

    Args:
        trial: The trial to ask.

    Returns:
        Dotted settings: `scheduler.*` and `scoring.momentum`.
    """
    return {**schedule(trial), "scoring.momentum": momentum(trial)}


def schedule(trial: optuna.Trial, prefix: str = "") -> dict[str, Any]:
    """The scheduler alone.

    Knobs, ranges and why:

    * `burn_in` 1..5: 0 would score an untrained model.
    * `update_interval` 1..8, logarithmic: 1, 2 and 4 differ more than 6, 7 and 8.
    * `weight`: `linear` is the released code and has no temperature; `exponential` has one.
    * `temperature` 0.05..2, logarithmic. The weights of the scores 1 and -1 differ by a factor of
      exp(2 / temperature): 3 at 2, which is nearly uniform; e^40 at 0.05, which nearly takes the best rows only.
    * `uniform_mix` 0..0.5: for more than half uniform, a higher temperature does the same.
    * `fraction` 0.3..1 in steps of 0.05: finer steps are lost in the noise between seeds.
    * `grows`, `grow_epochs` 5..60, logarithmic: only if `fraction` < 1, because nothing can grow beyond all rows.

    Not searched are `replacement` (it lost 6 to 15 points in the prototype), and the shape of the growth (of less
    importance than `fraction` and `grow_epochs`).

    Args:
        trial: The trial to ask.
        prefix: Prefix of the knobs' names, for a space that uses these names for something else.

    Returns:
        Dotted settings: `scheduler.*`.
    """
    settings: dict[str, Any] = {
        "burn_in": trial.suggest_int(f"{prefix}burn_in", 1, 5),
        "update_interval": trial.suggest_int(f"{prefix}update_interval", 1, 8, log=True),
        "uniform_mix": trial.suggest_float(f"{prefix}uniform_mix", 0.0, 0.5),
        "fraction": trial.suggest_float(f"{prefix}fraction", 0.3, 1.0, step=0.05),
        "temperature": None,
        "grow_epochs": None,
    }
    if trial.suggest_categorical(f"{prefix}weight", ["linear", "exponential"]) == "exponential":
        settings["temperature"] = trial.suggest_float(f"{prefix}temperature", 0.05, 2.0, log=True)
    if settings["fraction"] < 1 and trial.suggest_categorical(f"{prefix}grows", [False, True]):
        settings["grow_epochs"] = trial.suggest_int(f"{prefix}grow_epochs", 5, 60, log=True)
    return {
        "scheduler.class_path": "Learning",
        **{f"scheduler.init_args.{name}": value for name, value in settings.items()},
    }
