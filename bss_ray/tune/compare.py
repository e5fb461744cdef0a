"""The best trial against uniform sampling: both are trained with several seeds that the search has not used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train

from bss_ray.runtime.messages import ComparisonProgress, OnMessage
from bss_ray.runtime.wait import unwrap_ray_error
from bss_ray.storage import StoragePath
from bss_ray.train.checkpoint import SavedCheckpoint
from bss_ray.train.run import TrainConfig, best_row, test_model
from bss_ray.train.settings import overlay, training_config
from bss_ray.tune.config import TuneConfig
from bss_ray.tune.nested import free_nested
from bss_ray.tune.trial import Row, TrialSetup, WarmStart, train_once
from bss_ray.tune.trials import trial_resources

CONTROL = "uniform"


def compare(
    config: TuneConfig, best: Mapping[str, Any], setup: TrialSetup, concurrent: int, on_message: OnMessage
) -> dict[str, Any]:
    """Train the best settings and the control with new seeds; each run reads test rows once, in its chosen epoch.

    Runs that earlier commands have finished are kept.

    Args:
        config: Settings of the search.
        best: Settings of the best trial, as a tree.
        setup: What all trials share.
        concurrent: Number of runs at a time.
        on_message: Function that is called with messages about progress.

    Returns:
        `{"metric", "seeds", "best": {"validation": {name: [per seed]}, "test": {...}}, "uniform": {...}}`.
    """
    control = overlay(setup.base, {"scheduler.class_path": "Uniform"})
    first = config.train.seed + config.seeds  # the search has used the seeds before
    seeds = list(range(first, first + config.compare_seeds))
    runs = [(name, tree, seed) for seed in seeds for name, tree in (("best", best), (CONTROL, control))]
    each = trial_resources(config, setup.scaling)
    task = ray.remote(num_cpus=each["CPU"], num_gpus=each["GPU"], max_retries=1, name="bss_ray.compare_seed")(run_seed)
    shared = ray.put(setup)

    found: dict[tuple[str, int], dict[str, Any]] = {}
    waiting = []
    working: dict[ray.ObjectRef, tuple[str, int, Path]] = {}
    for name, tree, seed in runs:
        path = setup.folder / "compare" / f"{name}-{seed}-{_digest(tree)}.json"
        if path.exists():
            found[name, seed] = json.loads(path.read_text())
        else:
            waiting.append((name, tree, seed, path))
    while waiting or working:
        while waiting and len(working) < concurrent:
            name, tree, seed, path = waiting.pop(0)
            working[task.remote(tree, seed, shared)] = (name, seed, path)
        on_message(ComparisonProgress(len(found), len(runs)))
        (done,), _ = ray.wait(list(working))
        name, seed, path = working.pop(done)
        found[name, seed] = _result(done)
        path.parent.mkdir(exist_ok=True)
        StoragePath.of(path).write_text(json.dumps(found[name, seed]))
    on_message(ComparisonProgress(len(found), len(runs)))
    return {
        "metric": setup.objective.choose_by,
        "seeds": seeds,
        **{name: _by_metric([found[name, seed] for seed in seeds]) for name in ("best", CONTROL)},
    }


def _result(task: ray.ObjectRef) -> dict[str, Any]:
    """Result of a finished task; its error is raised without Ray's wrapper."""
    try:
        result: dict[str, Any] = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        free_nested()  # checkpoints that several ranks have left
        raise unwrap_ray_error(error) from error
    return result


def run_seed(tree: Mapping[str, Any], seed: int, setup: TrialSetup) -> dict[str, dict[str, float]]:
    """Train once, choose the epoch on validation, and test this epoch.

    Returns:
        `{"validation": {name: value}, "test": {name: value}}`; no test metrics if there are no test rows.
    """
    config: TrainConfig = training_config({**tree, "seed": seed})[0]
    choose_by, chosen = setup.objective.choose_by, _Chosen(setup.objective.choose_by)
    history = train_once(config, setup.splits, setup.scaling, setup.folder, WarmStart(), chosen)
    row = best_row(history, choose_by)
    test = {}
    if setup.splits.test is not None:
        test = test_model(config, chosen.state, setup.splits.test)
    return {"validation": {name: value for name, value in row.items() if name.startswith("val_")}, "test": test}


class _Chosen:
    """Keeps the weights of the best epoch so far."""

    def __init__(self, choose_by: str) -> None:
        self._choose_by = choose_by
        self.state: dict[str, Any] = {}

    def __call__(self, history: list[Row], checkpoint: Path) -> None:
        if best_row(history, self._choose_by) is history[-1]:
            self.state = SavedCheckpoint(ray.train.Checkpoint(str(checkpoint))).state("model")


def _by_metric(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    return {
        split: {name: [run[split][name] for run in runs] for name in runs[0][split]} for split in ("validation", "test")
    }


def _digest(tree: Mapping[str, object]) -> str:
    """A name of the settings of a run: a resumed search may find a better trial."""
    return hashlib.blake2b(json.dumps(tree, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
