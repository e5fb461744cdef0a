"""A search space of your own: BSS-L, the learning rate, and the width of the model.

From the repository's folder: bss-ray tune --name mine --space examples.search_space:space --trials 20
"""

from typing import Any

import optuna

from tune_spaces.learning import KNOWN_GOOD as LEARNING_POINTS
from tune_spaces.learning import learning

# Points to try first: whole ones, with every knob that the space asks for there.
KNOWN_GOOD = [{**LEARNING_POINTS[1], "lr": 2e-3, "width": 64}]


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Dotted settings of `bss-ray train`; all others stay as the search has them (`--train.NAME VALUE`)."""
    return {
        **learning(trial),
        "loop.lr": trial.suggest_float("lr", 5e-4, 8e-3, log=True),
        "model.init_args.width": trial.suggest_categorical("width", [32, 64, 128]),
    }
