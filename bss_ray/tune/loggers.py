"""Trackers of trials in addition to Ray Tune's own CSV, JSON and TensorBoard: MLflow and Weights & Biases.

Both are Ray's integrations. Their logs are in the search's folder, unless the trackers' own environment variables
say otherwise: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`; `WANDB_API_KEY` (or `wandb login`), `WANDB_MODE`,
`WANDB_DIR`, `WANDB_PROJECT`, `WANDB_RUN_GROUP`, and the others of W&B.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import ray.tune
from ray.tune.experiment import Trial

from bss_ray.errors import check_one_of, optional_import
from bss_ray.runtime.ray_internals import wandb_callback


def make_loggers(names: Sequence[str], *, study: str, folder: Path) -> list[ray.tune.Callback]:
    """Callbacks for `ray.tune.RunConfig` that log each trial as a run.

    Args:
        names: Names of the trackers: `mlflow`, `wandb`.
        study: Name of MLflow's experiment and of W&B's project.
        folder: Folder of the search. MLflow writes `mlflow.db` there, which `mlflow ui --backend-store-uri
            sqlite:///FOLDER/mlflow.db` shows; W&B writes the folder `wandb`, which without a key has everything of a
            run.

    Raises:
        ConfigError: A name is unknown.
        MissingDependencyError: A tracker is not installed.
    """
    makers: dict[str, Callable[[str, Path], ray.tune.Callback]] = {"mlflow": _mlflow, "wandb": _wandb}
    for name in names:
        check_one_of("logger", name, makers)
    return [makers[name](study, folder) for name in names]


def _mlflow(study: str, folder: Path) -> ray.tune.Callback:
    optional_import("mlflow", extra="mlflow", needed_for="the logger mlflow")
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    class MLflow(MLflowLoggerCallback):  # type: ignore[misc]  # Ray ships no types
        def setup(self, *args: object, **kwargs: object) -> None:
            with mock.patch.dict(os.environ):  # MLflow leaves the variable set for the next search
                super().setup(*args, **kwargs)

        def log_trial_start(self, trial: Trial) -> None:
            # Not again if a trial is resumed, perhaps with other settings: MLflow refuses to change parameters.
            if trial not in self._trial_runs:
                super().log_trial_start(trial)

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # MLflow announces that it makes tables
    place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').absolute()}"
    return MLflow(place, experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", study))


def _wandb(study: str, folder: Path) -> ray.tune.Callback:
    wandb = optional_import("wandb", extra="wandb", needed_for="the logger wandb")

    class WandB(wandb_callback(wandb.teardown)):  # type: ignore[misc]  # teardown waits until the run is written
        def setup(self, *args: object, **kwargs: object) -> None:
            with mock.patch.dict(os.environ, WANDB_MODE="offline"):  # so that Ray does not insist on a key
                super().setup(*args, **kwargs)

    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    place = Path(os.environ.get("WANDB_DIR", folder)).absolute()
    if mode == "offline":
        runs = place / "wandb" / "offline-run-*"
        logging.getLogger("bss_ray").warning(f"W&B is offline. To send its runs afterwards: wandb sync {runs}")
    return WandB(
        project=os.environ.get("WANDB_PROJECT", study),
        group=os.environ.get("WANDB_RUN_GROUP", study),
        dir=str(place),
        mode=mode,
        settings={"silent": True, "console": "off"},
    )
