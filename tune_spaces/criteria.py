"""Search space of the criteria: what of a row is measured, and how measures become its score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

_RELEASED = {
    "similarity": "prediction",
    "information": "loss",
    "fused_share": 0.1,
    "normalise": "minmax",
    "accumulate": "ema",
    "momentum": 0.0,
}
_SUM = {name: value for name, value in _RELEASED.items() if name != "momentum"} | {"accumulate": "sum"}

# The released code for CREMA-D, which is also this package's default; then with the equal weights that it has
# for its other data sets; then with the paper's figure of the scores' memory.
KNOWN_GOOD: list[dict[str, Any]] = [_RELEASED, {**_RELEASED, "fused_share": 0.5}, _SUM]


def criteria(trial: optuna.Trial) -> dict[str, Any]:
    """Settings of `bss-ray train` for the criteria; the scheduler is that of the base settings.

    Knobs: those of `measures` and of `memory`.

    The base settings' scheduler must use scores and update them, like `Learning`, the default. Under `Uniform`
    only `fused_share` has an effect (on the loss); under a `Heuristic` that never updates, the default,
    `accumulate` and `momentum` have none. `full` knows the scheduler and asks accordingly.

    `fused_share` changes the training loss itself: compare trials by accuracy or the like, never by their loss.

    Args:
        trial: The trial to ask.

    Returns:
        Dotted settings: `measurer.*`, `scoring.normalise`, `scoring.accumulate` and `scoring.momentum`.
    """
    return {**measures(trial), **memory(trial)}


def measures(trial: optuna.Trial) -> dict[str, Any]:
    """How a row is measured at one update of the scores.

    Knobs, ranges and why:

    * `similarity`: `prediction` or `feature`, the two of the paper's appendix.
    * `information`: `loss` or `gradient_norm` (of the heads, in closed form).
    * `fused_share` 0.05..0.95: `fused_weight`; `unimodal_weight` is the rest to 1. Only their ratio is
      searched. A common factor leaves the scores as they are, since both normalisations take it out; in training
      it is a learning rate of `sgd` by another name, and adamw's steps hardly see it (`loop.clip_norm` does).
      Not 0, which would not train the fused head, nor 1, which would not train the heads that `prediction` compares.
    * `normalise`: `minmax`, the paper's, or `rank`, which one outlier cannot flatten.

    `feature` and `gradient_norm` need a model that returns the inputs of its heads (`outputs["features"]`), as
    the default model does, and `feature` those of the modalities in one length.

    Not searched: `full_gradient_norm`, a forward and a backward pass for each row, which would be most of a
    study's time, and which the engine `online` cannot make; try it by hand where `gradient_norm` wins.
    `scoring.engine`, which is a matter of cost. `measurer.task`, `measurer.loss_function` and
    `scoring.unpaired`, which are the data's.

    Args:
        trial: The trial to ask.

    Returns:
        Dotted settings: `measurer.*` and `scoring.normalise`.
    """
    share = trial.suggest_float("fused_share", 0.05, 0.95)
    return {
        "measurer.similarity": trial.suggest_categorical("similarity", ["prediction", "feature"]),
        "measurer.information": trial.suggest_categorical("information", ["loss", "gradient_norm"]),
        "measurer.fused_weight": share,
        "measurer.unimodal_weight": 1 - share,
        "scoring.normalise": trial.suggest_categorical("normalise", ["minmax", "rank"]),
    }


def memory(trial: optuna.Trial) -> dict[str, Any]:
    """What scores keep of earlier updates; without effect where there is only one.

    Knobs, ranges and why:

    * `accumulate`: `ema`, a moving average, or `sum`, the mean of all updates (the paper's figure).
    * `momentum` (see there), only for `ema`; `sum` has none and refuses one.

    The engine `online` and `scoring.bad_rows=keep` refuse `sum`, since they do not update all rows alike: under
    such base settings make a space of `measures` and `momentum`.

    Args:
        trial: The trial to ask.

    Returns:
        Dotted settings: `scoring.accumulate` and `scoring.momentum`.
    """
    accumulate = trial.suggest_categorical("accumulate", ["ema", "sum"])
    return {
        "scoring.accumulate": accumulate,
        "scoring.momentum": momentum(trial) if accumulate == "ema" else 0.0,
    }


def momentum(trial: optuna.Trial) -> float:
    """The knob `momentum` of the moving average of scores.

    0..0.9: from 0.9 on a score remembers more than ten updates, longer than many runs. 0, the released code, keeps
    nothing.

    Args:
        trial: The trial to ask.

    Returns:
        `scoring.momentum`.
    """
    return trial.suggest_float("momentum", 0.0, 0.9)
