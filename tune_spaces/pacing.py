"""Search space of the pacing of BSS-H: how fast `bss_ray.Heuristic` grows from the best rows to all rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

_RELEASED = {"burn_in": 0, "initial": 0.1, "grow_epochs": 40, "shape": "root", "power": 2.0}

# The released code (scores of the untrained model), then the same with this package's default of one epoch of
# burn-in.
KNOWN_GOOD: list[dict[str, Any]] = [_RELEASED, {**_RELEASED, "burn_in": 1}]


def pacing(trial: optuna.Trial, prefix: str = "") -> dict[str, Any]:
    """Settings of `bss-ray train` with BSS-H: the pacing, and nothing else.

    Knobs, ranges and why:

    * `burn_in` 0..5: 0 is the released code, which scores before any training.
    * `initial` 0.05..0.6, logarithmic: from a share of 0.6 on little is left to grow.
    * `grow_epochs` 5..60, logarithmic: a few more epochs matter at 5, not at 60. They count from the end of
      burn-in; if they exceed the length of a run, the run never presents all rows.
    * `shape` of the growth: `root` is fast at first, `geometric` slow at first, `linear` between them, `step`
      linear in jumps.
    * `power` 1.5..4, only for `root`: 1 would be `linear`. With 4 and the released `initial` and `grow_epochs`
      the first epoch has 40 % of the rows (19 % with 2, as in the released code).
    * `steps` 2..10, only for `step`: with one jump the share would stay at `initial` and then jump to all rows; with
      as many jumps as `grow_epochs` it would be `linear`.

    Not searched are `update_interval` (by default no update, as in the released code) and `scoring.momentum`, which
    has an effect only with updates: `heuristic` has both. They stay as in the base settings.

    Args:
        trial: The trial to ask.
        prefix: Prefix of the knobs' names, for a space that uses these names for something else.

    Returns:
        Dotted settings: `scheduler.*`.
    """
    settings: dict[str, Any] = {
        "burn_in": trial.suggest_int(f"{prefix}burn_in", 0, 5),
        "initial": trial.suggest_float(f"{prefix}initial", 0.05, 0.6, log=True),
        "grow_epochs": trial.suggest_int(f"{prefix}grow_epochs", 5, 60, log=True),
        "shape": trial.suggest_categorical(f"{prefix}shape", ["root", "linear", "geometric", "step"]),
    }
    if settings["shape"] == "root":
        settings["power"] = trial.suggest_float(f"{prefix}power", 1.5, 4.0)
    if settings["shape"] == "step":
        settings["steps"] = trial.suggest_int(f"{prefix}steps", 2, 10)
    return {
        "scheduler.class_path": "Heuristic",
        **{f"scheduler.init_args.{name}": value for name, value in settings.items()},
    }
