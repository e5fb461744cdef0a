"""Small searches for tests: data, a model that gets into trouble on request, and spaces."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import ray.data
import torch
import yaml
from torch import Tensor

from bss_ray.runtime.messages import OnMessage
from bss_ray.train.folder import RunFolder
from bss_ray.train.run import TrainConfig
from bss_ray.train.settings import training_config
from bss_ray.tune.config import Pruning, TuneConfig
from bss_ray.tune.space import find_space
from bss_ray.tune.tuner import tune
from tests.runs import TwoHeads, make_columns, make_dataset

EPOCHS = 4
TRAINING: dict[str, Any] = {
    "data": "tests.searches:data",
    "columns": {"modalities": ["a", "b"], "label": "label"},
    "model": {"class_path": "tests.searches.Troubled"},
    "loop": {"epochs": EPOCHS, "lr": 0.02},
    "batch_size": 16,
}


def data(split: str) -> ray.data.Dataset:
    """`module:function` data: 160, 60 and 60 rows of the same distribution."""
    columns = make_columns(280)
    rows = {"train": slice(0, 160), "validation": slice(160, 220), "test": slice(220, 280)}[split]
    return make_dataset({name: values[rows] for name, values in columns.items()})


class Troubled(TwoHeads):
    """Linear heads that get into trouble in their tenth step."""

    def __init__(self, trouble: str = "none") -> None:
        super().__init__(dropout=0.0)
        self.trouble, self.steps = trouble, 0

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = super().forward(batch)
        self.steps += self.training
        if self.steps < 10 or self.trouble == "none":
            return outputs
        if self.trouble == "nan":
            return {name: values * torch.nan for name, values in outputs.items()}
        if self.trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("boom: the model has had enough")


KNOWN_GOOD: list[dict[str, Any]] = []


def troubles(trial: optuna.Trial) -> dict[str, Any]:
    """Every kind of trouble in turn."""
    kinds = ["none", "error", "nan", "killed"]
    trial.suggest_int("any", 0, 9)
    return {"model.init_args.trouble": kinds[trial.number % 4]}


def hopeless(trial: optuna.Trial) -> dict[str, Any]:
    """Nothing but trouble."""
    trial.suggest_int("any", 0, 9)
    return {"model.init_args.trouble": "error"}


def learning_rates(trial: optuna.Trial) -> dict[str, Any]:
    """A good one first, then bad ones."""
    trial.suggest_int("any", 0, 9)
    return {"loop.lr": 0.05 if trial.number == 0 else 1e-7}


def temperatures(trial: optuna.Trial) -> dict[str, Any]:
    """A knob that acts after burn-in only."""
    return {
        "scheduler.class_path": "Learning",
        "scheduler.init_args.burn_in": 2,
        "scheduler.init_args.fraction": trial.suggest_float("fraction", 0.5, 0.9),
        "scheduler.init_args.temperature": trial.suggest_float("temperature", 0.1, 1.0, log=True),
        "scoring.momentum": trial.suggest_float("momentum", 0.0, 0.9),
    }


def without_burn_in(trial: optuna.Trial) -> dict[str, Any]:
    """The first epoch is drawn from scores of the untrained model."""
    return {**temperatures(trial), "scheduler.init_args.burn_in": 0}


def base(**settings: Any) -> dict[str, Any]:
    """Settings that all trials share, as a tree."""
    return dict(yaml.safe_load(training_config({**TRAINING, **settings})[1]))


def by_command(folder: Path, trials: int, epochs: int = EPOCHS, model: str = "Troubled", **settings: Any) -> list[str]:
    """Words of `bss-ray tune`, a search over `temperatures` in `folder`."""
    train = {**TRAINING, "loop": {"epochs": epochs, "lr": 0.02}, "model": {"class_path": f"tests.searches.{model}"}}
    tree = {"space": "tests.searches:temperatures", "trials": trials, "pruning": {"enabled": False}, "train": train}
    (folder / "search.yaml").write_text(yaml.safe_dump({**tree, **settings}))
    return ["tune", "--config", str(folder / "search.yaml"), "--storage_path", str(folder)]


def search(
    folder: Path,
    space: Callable[[optuna.Trial], dict[str, Any]],
    on_message: OnMessage = lambda message: None,
    **settings: Any,
) -> dict[str, Any]:
    """Run a small search, one trial at a time unless it is said otherwise; returns the content of its `result.json`."""
    tree = base()
    train: TrainConfig = training_config(tree)[0]
    config = TuneConfig(
        **{
            "train": train,
            "space": f"tests.searches:{space.__name__}",
            "compare_seeds": 0,
            "max_concurrent": 1,
            "pruning": Pruning(enabled=False),
            **settings,
        }
    )
    return tune(config, find_space(config.space, tree), RunFolder(str(folder), config.name), on_message)


class Slow(TwoHeads):
    """Linear heads whose epochs last long enough to be killed in the middle of one."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.training:
            time.sleep(0.05)
        return super().forward(batch)
