"""A trial, as it runs in a process of Ray Tune: one configuration, trained with one seed after another.

Every epoch is reported with its checkpoint, in which `trial.json` keeps what came of the seeds before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.tune

from bss_ray.errors import CheckpointError
from bss_ray.settings import overlay, training_config
from bss_ray.train.checkpoint import SavedCheckpoint
from bss_ray.train.run import TrainConfig
from bss_ray.tune.burn_in import BurnIns, FirstScores, burn_in_key
from bss_ray.tune.objective import Objective
from bss_ray.tune.training import Beginning, OnEpoch, Row, train_once

_PROGRESS = "trial.json"


@dataclass(frozen=True)
class TrialSetup:
    """What all trials of a search share; the rows lie in the object store once.

    Attributes:
        base: settings of `bss-ray train` as a tree; a trial's own lie over it.
        splits: shards by split.
        objective: what is reported.
        seeds: training runs of a trial.
        scaling: ranks of a training run; one rank trains in the trial's own process.
        folder: of the search.
    """

    base: Mapping[str, Any]
    splits: dict[str, Any]
    objective: Objective
    seeds: int
    scaling: ray.train.ScalingConfig
    folder: Path


def run_trial(config: dict[str, Any], *, setup: TrialSetup) -> None:
    """Ray Tune's trainable.

    Args:
        config: `{"trial": {"settings": ..., "earlier": [folders of earlier attempts]}}`.
        setup: what all trials share.

    Reports, after each epoch, its metrics and `epochs_done` over all seeds, `objective` (the first metric so far) and
    `trial`: `values`, `seed_values` (seeds, metrics), `epoch` (the chosen one), `seconds`, `finished`.
    """
    spec = config["trial"]
    run, settings = training_config(overlay(setup.base, spec["settings"]))
    owner = ray.tune.get_context().get_trial_id()
    start = ray.tune.get_checkpoint() or _last_checkpoint(setup.folder, spec["earlier"])
    done = _read_progress(start)
    if start is not None and ray.tune.get_checkpoint() is None:
        # The driver may have been killed between this checkpoint and its report.
        _Reporter(setup, run, done)(SavedCheckpoint(start).manifest().history, None)

    burn_ins = BurnIns(setup.folder)
    for seed in range(len(done), setup.seeds):
        report = _Reporter(setup, run, done)
        one = replace(run, seed=run.seed + seed)
        begin = Beginning(start)
        key = burn_in_key(one, settings) if start is None else None
        on_epoch: OnEpoch = report
        if key is not None and (one.scheduler.burn_in > 0 or setup.scaling.num_workers == 1):
            begin, on_epoch = _share(burn_ins, f"{key}-{one.seed}", owner, one.scheduler.burn_in, report)
        history = train_once(one, setup.splits, setup.scaling, setup.folder, begin, on_epoch)
        done.append(setup.objective.values(history))
        start = None


class _Reporter:
    """Reports epochs of one seed to Ray Tune."""

    def __init__(self, setup: TrialSetup, run: TrainConfig, done: list[list[float]]) -> None:
        self._setup, self._run, self._done = setup, run, list(done)

    def __call__(self, history: list[Row], checkpoint: Path | None) -> None:
        objective = self._setup.objective
        seed_values = [*self._done, objective.values(history)]
        finished = len(seed_values) == self._setup.seeds and len(history) == self._run.loop.epochs
        # A bound over some of the seeds says little yet, and rungs compare what trials have come to.
        values = objective.combine(seed_values, "mean" if not finished else None)
        saved = None
        if checkpoint is not None:
            (checkpoint / _PROGRESS).write_text(json.dumps(self._done))
            saved = ray.tune.Checkpoint.from_directory(checkpoint)
        ray.tune.report(
            {
                **history[-1],
                "epochs_done": len(self._done) * self._run.loop.epochs + len(history),
                "objective": values[0],
                "trial": {
                    "values": values,
                    "seed_values": seed_values,
                    "epoch": objective.best_epoch(history),
                    "seconds": objective.seconds(history),
                    "finished": finished,
                },
            },
            checkpoint=saved,
        )


def _share(burn_ins: BurnIns, key: str, owner: str, epochs: int, report: _Reporter) -> tuple[Beginning, OnEpoch]:
    """Take what another trial's burn-in has left, whose epochs are reported as this trial's; or leave this one's."""
    folder = burn_ins.take(key, owner)
    if epochs == 0:
        if folder is None:
            return Beginning(keep_scores=partial(burn_ins.keep_scores, key)), report
        return Beginning(scores=FirstScores(folder)), report
    if folder is None:

        def keep(history: list[Row], checkpoint: Path | None) -> None:
            if len(history) == epochs and checkpoint is not None:
                burn_ins.keep(key, checkpoint)
            report(history, checkpoint)

        return Beginning(), keep
    checkpoint = ray.train.Checkpoint(str(folder))
    history = SavedCheckpoint(checkpoint).manifest().history
    for done in range(1, len(history) + 1):
        report(history[:done], None)
    return Beginning(checkpoint), report


def _last_checkpoint(folder: Path, earlier: list[str]) -> ray.train.Checkpoint | None:
    """The last whole checkpoint of earlier attempts: a killed one may have left a torn one."""
    for attempt in earlier:
        for path in sorted((folder / "trials" / attempt).glob("checkpoint_*"), reverse=True):
            checkpoint = ray.train.Checkpoint(str(path))
            try:
                saved = SavedCheckpoint(checkpoint)
                for name in saved.manifest().digests:
                    saved.state(name.removesuffix(".pt"))
                saved.scores(0, saved.manifest().rows)
                _read_progress(checkpoint)
            except (CheckpointError, OSError, ValueError):
                continue
            return checkpoint
    return None


def _read_progress(checkpoint: ray.train.Checkpoint | None) -> list[list[float]]:
    """Values of the seeds that were done."""
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        done: list[list[float]] = json.loads((Path(folder) / _PROGRESS).read_text())
    return done
