"""A whole search of `bss-ray tune`: data, trials, the comparison with uniform sampling, and files."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import ray.train
import ray.tune
import yaml
from ray.tune.experiment import Trial

from bss_ray.errors import ConfigError, SearchError, check_one_of, optional_import
from bss_ray.runtime.messages import Notice, OnMessage
from bss_ray.runtime.ray_internals import wandb_callback
from bss_ray.storage.probe import check_storage
from bss_ray.train.folder import RunFolder
from bss_ray.train.run import columns_of, load_shards, train_scaling
from bss_ray.tune.compare import compare
from bss_ray.tune.config import TuneConfig
from bss_ray.tune.nested import FreeNested
from bss_ray.tune.objective import Objective
from bss_ray.tune.record import SearchRecord, open_storage
from bss_ray.tune.space import SearchSpace
from bss_ray.tune.trial import NESTED, TrialSetup, run_trial, scoring_here
from bss_ray.tune.trials import max_concurrent_trials, run_trials, trial_resources


def make_loggers(names: Sequence[str], *, study: str, folder: Path) -> list[ray.tune.Callback]:
    """Callbacks for `ray.tune.RunConfig` that log each trial as a run, with MLflow and Weights & Biases.

    Both are Ray's integrations. Their logs are in the search's folder, unless the trackers' own environment variables
    say otherwise: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`; `WANDB_API_KEY` (or `wandb login`), `WANDB_MODE`,
    `WANDB_DIR`, `WANDB_PROJECT`, `WANDB_RUN_GROUP`, and the others of W&B.

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


BEST = "best.yaml"


def tune(config: TuneConfig, space: SearchSpace, folder: RunFolder, on_message: OnMessage) -> dict[str, Any]:
    """Search, compare the best trial with uniform sampling, and write the folder of the search.

    Ray must be running. A stopped search is resumed.

    Args:
        config: All settings.
        space: Search space, over the settings that all trials share.
        folder: Folder that is claimed for this configuration.
        on_message: Function that is called with each `Status`, `Notice`, `ShardsProgress`, `TrialChanged` and
            `ComparisonProgress`.

    Returns:
        The content of `result.json`.

    Raises:
        SearchError: No trial is complete.
        Interrupted: Ctrl-C was pressed; the same command resumes the search.
        BssRayError: A setting, the data, the storage or the resources are wrong.
    """
    with alone(folder.local):
        storage = open_storage(config.storage, folder.local)
        objective = Objective.of(config.objectives, config.train.choose_by, columns_of(config.train), config.aggregate)
        scaling = train_scaling(config.train) if config.train.num_workers is not None else _one_worker(config)
        concurrent = max_concurrent_trials(config, scaling)
        check_storage(folder.path)
        splits = load_shards(config.train, on_message)
        if splits.validation is None:
            raise ConfigError("a search needs validation rows to choose by: --train.validation FILE")
        data = {"train": splits.train.fingerprint, "validation": splits.validation.fingerprint}
        record = SearchRecord(storage, config, space, objective, data)
        setup = TrialSetup(space.base, splits, objective, config.seeds, scaling, folder.local)
        if record.unfinished:
            _run(config, record, setup, concurrent, on_message)
        if not record.complete:
            raise SearchError(
                f"none of {len(record.finished)} trials ran to its end. The first cause: {record.first_cause}"
            )
        best = _write_best(record, space, scaling, folder)
        result = {**_summary(record), "comparison": None}
        if config.compare_seeds:
            folder.write_result(result)  # the search is kept even if the comparison fails
            result["comparison"] = compare(config, best, setup, concurrent, on_message)
        folder.write_result(result)
        return result


def _run(config: TuneConfig, record: SearchRecord, setup: TrialSetup, concurrent: int, on_message: OnMessage) -> None:
    """Run the trials that are missing."""
    ranks = setup.scaling.num_workers
    at_a_time = f"{concurrent} trials" if concurrent > 1 else "one trial"
    where = "in its own process" if ranks == 1 else f"with {ranks} ranks"
    on_message(Notice(f"{at_a_time} at a time, each {where}"))
    callbacks = make_loggers(config.trackers, study=config.name, folder=setup.folder)
    if ranks > 1:
        callbacks.append(FreeNested())
    run_trials(
        config,
        record,
        ray.tune.with_parameters(run_trial, setup=setup),
        setup.folder,
        each=trial_resources(config, setup.scaling),
        concurrent=concurrent,
        reuse=ranks == 1,
        callbacks=callbacks,
        on_message=on_message,
    )
    shutil.rmtree(setup.folder / NESTED, ignore_errors=True)  # remains of stopped trials


# ---- before -----------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a second driver of the same search. The lock ends with this process, however it ends."""
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{folder} is being searched by another command at this moment. Wait for it, or choose another --name"
            ) from error
        yield


def _one_worker(config: TuneConfig) -> ray.train.ScalingConfig:
    """Ranks of a trial; one by default, because more trials at a time are better than more workers in each trial."""
    return train_scaling(replace(config.train, num_workers=1))


# ---- after ------------------------------------------------------------------------------------


def _summary(record: SearchRecord) -> dict[str, Any]:
    states = [trial.state.name.lower() for trial in record.finished]
    return {
        "metrics": record.metrics,
        "trials": {state: states.count(state) for state in ("complete", "pruned", "fail")},
        "best": [
            {"trial": trial.number, "values": trial.values, "settings": trial.user_attrs["settings"]}
            for trial in record.study.best_trials
        ],
    }


def _write_best(
    record: SearchRecord, space: SearchSpace, scaling: ray.train.ScalingConfig, folder: RunFolder
) -> dict[str, Any]:
    """Write `best.yaml` and return its settings as a tree."""
    best = record.study.best_trials[0]
    ran = {"num_workers": scaling.num_workers, "use_gpu": scaling.use_gpu}
    settings = {**best.user_attrs["settings"], **ran}
    if scaling.num_workers == 1 and "scoring.engine" not in settings:
        # With the epochs that the trial has trained.
        settings["scoring.engine"] = scoring_here(space.config(settings, best.params)[0]).scoring.engine
    text = space.config(settings, best.params)[1]
    tree = {**yaml.safe_load(text), "name": f"{folder.path.name}-best"}
    values = ", ".join(f"{name} {value:.6g}" for name, value in zip(record.metrics, best.values, strict=True))
    head = [
        f"# Trial {best.number} of the search {folder.path.name}: {values} on validation.",
        "# bss-ray train --config THIS",
    ]
    if best.user_attrs.get("changes"):
        head.append("# Population-based training changed its settings on the way; these are the last ones.")
    folder.write_text(BEST, "\n".join([*head, yaml.safe_dump(tree, sort_keys=False)]))
    return tree
