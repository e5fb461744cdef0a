"""Search space of the criteria: how a row is measured, and how measures become its score."""

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

# The released code for CREMA-D, which is also this package's default; then with the equal weights of the released
# code for its other datasets; then with the mean of all updates, as in the paper's figure.
KNOWN_GOOD: list[dict[str, Any]] = [_RELEASED, {**_RELEASED, "fused_share": 0.5}, _SUM]


def criteria(trial: optuna.Trial) -> dict[str, Any]:
    """Settings of `bss-ray train` for the criteria; the scheduler is that of the base settings.

    The knobs are those of `measures` and of `memory`.

    The scheduler of the base settings must use scores and update them, like `Learning`, the default. With `Uniform`
    only `fused_share` has an effect (on the loss). With a `Heuristic` that never updates, the default, `accumulate`
    and `momentum` have no effect. `full` knows the scheduler and asks only for knobs with an effect.

    `fused_share` changes the training loss itself: compare trials by a metric such as accuracy, never by the loss.

    Args:
        trial: The trial to ask.

    Returns:
        Dotted settings: `measurer.*`, `scoring.normalise`, `scoring.accumulate` and `scoring.momentum`.
    """
    return {**measures(trial), **memory(trial)}


def measures(trial: optuna.Trial) -> dict[str, Any]:
    """How a row is measured at one update of the scores.

    Knobs, ranges and why:

    * `similarity`: `prediction` or `feature`, the two similarities of the paper's appendix.
    * `information`: `loss` or `gradient_norm` (of the heads, in closed form).
    * `fused_share` 0.05..0.95: `fused_weight`; `unimodal_weight` is 1 - `fused_share`. Only their ratio is
      searched. A common factor does not change the scores, because both normalisations remove it; in training it
      acts like the learning rate of `sgd`, and hardly changes adamw's steps (it changes `loop.clip_norm`'s effect).
      Not 0, which would not train the fused head, nor 1, which would not train the heads that `prediction` compares.
    * `normalise`: `minmax`, as in the paper, or `rank`, which one outlier cannot flatten.

    `feature` and `gradient_norm` need a model that returns the inputs of its heads (`outputs["features"]`), as
    the default model does; `feature` needs the same length for all modalities.

    Not searched are `full_gradient_norm`, whose forward and backward pass for each row would take most of a
    study's time, and which the engine `online` cannot compute (try it by hand if `gradient_norm` wins);
    `scoring.engine`, which changes the cost; and `measurer.task`, `measurer.loss_function` and
    `scoring.unpaired`, which depend on the data.

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
    """How scores remember earlier updates; without effect if there is only one update.

    Knobs, ranges and why:

    * `accumulate`: `ema`, a moving average, or `sum`, the mean of all updates (as in the paper's figure).
    * `momentum` (see the function), only for `ema`; `sum` has no momentum and refuses one.

    The engine `online` and `scoring.bad_rows=keep` refuse `sum`, because they do not update all rows alike: with
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

    Range 0..0.9: from 0.9 on a score remembers more than ten updates, which is longer than many runs. With 0, as in
    the released code, it remembers nothing.

    Args:
        trial: The trial to ask.

    Returns:
        `scoring.momentum`.
    """
    return trial.suggest_float("momentum", 0.0, 0.9)
