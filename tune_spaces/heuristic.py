"""Search space of BSS-H: `bss_ray.Heuristic`, and the memory of the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

_RELEASED = {"burn_in": 0, "initial": 0.1, "grow_epochs": 40, "shape": "root", "power": 2.0, "refresh": False}

# The released code (scores of the untrained model, kept for the whole run), then the same with this
# package's default burn-in of one epoch.
KNOWN_GOOD: list[dict[str, Any]] = [_RELEASED, {**_RELEASED, "burn_in": 1}]


def heuristic(trial: optuna.Trial) -> dict[str, Any]:
    """Settings of `bss-ray train` with BSS-H.

    Knobs, ranges and why:

    * `burn_in` 0..5: 0 is the released code, which scores before any training.
    * `initial` 0.05..0.6, logarithmic: it is a share, and from 0.6 on little is left to grow.
    * `grow_epochs` 5..60, logarithmic: beyond the length of a run it means that the run never sees all rows.
    * `shape` of the growth; `power` 1.5..4 only for `root` (1 would be `linear`), `steps` 2..10 only for `step`.
    * `refresh`: False keeps the scores of the end of burn-in, as released; True makes new ones every
      `update_interval` epochs, 1..8, and only then has `momentum` 0..0.9 an effect.

    Args:
        trial: the trial to ask.

    Returns:
        Dotted settings: `scheduler.*` and `scoring.momentum`.
    """
    settings: dict[str, Any] = {
        "burn_in": trial.suggest_int("burn_in", 0, 5),
        "initial": trial.suggest_float("initial", 0.05, 0.6, log=True),
        "grow_epochs": trial.suggest_int("grow_epochs", 5, 60, log=True),
        "shape": trial.suggest_categorical("shape", ["root", "linear", "geometric", "step"]),
        "update_interval": 0,
    }
    if settings["shape"] == "root":
        settings["power"] = trial.suggest_float("power", 1.5, 4.0)
    if settings["shape"] == "step":
        settings["steps"] = trial.suggest_int("steps", 2, 10)
    momentum = 0.0
    if trial.suggest_categorical("refresh", [False, True]):
        settings["update_interval"] = trial.suggest_int("update_interval", 1, 8, log=True)
        momentum = trial.suggest_float("momentum", 0.0, 0.9)
    return {
        "scheduler.class_path": "Heuristic",
        **{f"scheduler.init_args.{name}": value for name, value in settings.items()},
        "scoring.momentum": momentum,
    }
