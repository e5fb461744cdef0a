"""Search space of BSS-H's pace: how fast `bss_ray.Heuristic` goes from the best rows to all rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

_RELEASED = {"burn_in": 0, "initial": 0.1, "grow_epochs": 40, "shape": "root", "power": 2.0}

# The released code (scores of the untrained model), then the same with this package's default burn-in of
# one epoch.
KNOWN_GOOD: list[dict[str, Any]] = [_RELEASED, {**_RELEASED, "burn_in": 1}]


def pacing(trial: optuna.Trial, prefix: str = "") -> dict[str, Any]:
    """Settings of `bss-ray train` with BSS-H: the pace, and nothing else.

    Knobs, ranges and why:

    * `burn_in` 0..5: 0 is the released code, which scores before any training.
    * `initial` 0.05..0.6, logarithmic: it is a share, and from 0.6 on little is left to grow.
    * `grow_epochs` 5..60, logarithmic: a few epochs more matter at 5, not at 60. They count from the end of
      burn-in; beyond the length of a run they mean that the run never sees all rows.
    * `shape` of the growth: `root` is fast at first, `geometric` slow at first, `linear` between them, `step`
      linear in jumps.
    * `power` 1.5..4, only for `root`: 1 would be `linear`; with 4 and the released `initial` and `grow_epochs`
      the first epoch has 40 % of the rows (with 2, as released, 19 %).
    * `steps` 2..10, only for `step`: with one jump it would stay at `initial` until all rows come at once; with
      as many as `grow_epochs` it is `linear`.

    Not searched: `update_interval` (by default never, as released) and `scoring.momentum`, which has an effect
    only with it: `heuristic` has both. They stay as the base settings have them, like everything else.

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
