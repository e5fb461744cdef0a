"""A trial in a process of Ray Tune: one configuration, trained with one seed after another.

Every epoch is reported with its checkpoint, in which `trial.json` has the results of earlier seeds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.tune
import yaml

from bss_ray.errors import CheckpointError
from bss_ray.runtime.messages import Message
from bss_ray.runtime.ranks import OneRank, RankGroup
from bss_ray.sample.score_files import ScoreFile, read_scores, write_scores
from bss_ray.sample.state import ScoreBlock
from bss_ray.schedule.schedulers import Heuristic, Learning, Uniform
from bss_ray.train.checkpoint import SavedCheckpoint
from bss_ray.train.ray_backend import RayTrainBackend
from bss_ray.train.run import Splits, TrainConfig, make_trainer
from bss_ray.train.settings import overlay, training_config
from bss_ray.tune.nested import fit_nested
from bss_ray.tune.objective import Objective

# Settings that do not change what is computed.
_PLACED = (
    *("name", "storage_path", "ray_address", "log_format", "profile", "verbose", "store", "placement"),
    *("num_workers", "use_gpu", "max_failures", "max_preemptions", "wait_limit_s"),
)
# It is unknown when the settings of a user's own scheduler take effect.
_KNOWN = (Uniform, Learning, Heuristic)
_FILES = "files.json"
_POLL_S = 0.1


def burn_in_key(config: TrainConfig, settings: str) -> str | None:
    """A name for all settings with an effect before the end of burn-in; None if there is no burn-in to share.

    Args:
        config: Settings of the run.
        settings: All settings of the run as YAML.
    """
    scheduler = config.scheduler
    if config.initial_scores is not None or config.initial_checkpoint is not None or type(scheduler) not in _KNOWN:
        return None
    if scheduler.burn_in >= config.loop.epochs or (scheduler.burn_in == 0 and not scheduler.uses_scores):
        return None
    tree: dict[str, Any] = yaml.safe_load(settings)
    for name in (*_PLACED, "choose_by"):
        tree.pop(name, None)
    tree["scheduler"] = {"burn_in": scheduler.burn_in, "scores": scheduler.uses_scores}
    del tree["scoring"]["momentum"]  # the first scores have no earlier scores
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=8).hexdigest()


class FirstScores:
    """Scores of the untrained model, with which runs begin.

    Args:
        folder: Folder in which `BurnIns.keep_scores` has left the scores.
    """

    VERSION = 1  # the first result that exists

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def scores(self, start: int, stop: int) -> list[ScoreBlock]:
        """Scores that overlap rows [start, stop)."""
        files = [ScoreFile(**file) for file in json.loads((self._folder / _FILES).read_text())]
        read = lambda name: (self._folder / name).read_bytes()  # noqa: E731
        return read_scores(files, read, version=self.VERSION, start=start, stop=stop)


class BurnIns:
    """The finished burn-ins of a search, in a folder that all trials share.

    Args:
        folder: Folder of the search.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "burn_in"

    def take(self, key: str, owner: str) -> Path | None:
        """The result of a burn-in; waits while another trial makes it.

        Args:
            key: Key of the burn-in.
            owner: The trial that asks.

        Returns:
            The folder of the burn-in; None if `owner` must make it, and `keep` it.
        """
        place = self._folder / key
        place.mkdir(parents=True, exist_ok=True)
        while not (place / "done").exists():
            try:
                (place / "claim").symlink_to(owner)  # a link is made together with its content or not at all
                return None
            except FileExistsError:
                time.sleep(_POLL_S)  # the trial that makes it holds its resources, and its claim ends with it
        return place / "done"

    def keep(self, key: str, checkpoint: Path) -> None:
        """Keep the checkpoint of a burn-in that has just ended."""
        self._keep(key, lambda folder: shutil.copytree(checkpoint, folder, dirs_exist_ok=True))

    def keep_scores(self, key: str, scores: list[ScoreBlock]) -> None:
        """Keep the scores of the untrained model."""

        def write(folder: Path) -> None:
            files = write_scores(folder, 0, FirstScores.VERSION, scores)
            (folder / _FILES).write_text(json.dumps([asdict(file) for file in files]))

        self._keep(key, write)

    def _keep(self, key: str, write: Callable[[Path], object]) -> None:
        """Write a file completely or not at all."""
        place = self._folder / key
        if (place / "done").exists():
            return
        temporary = place / f"coming-{uuid.uuid4().hex}"
        temporary.mkdir(parents=True)
        write(temporary)
        try:
            os.rename(temporary, place / "done")
        except OSError:  # another trial was faster
            shutil.rmtree(temporary)

    def release(self, owner: str | None = None) -> None:
        """Remove the claims of a trial that has ended; None removes all claims when no trial runs."""
        for claim in (place / "claim" for place in self._folder.glob("*")):
            try:
                if owner is None or os.readlink(claim) == owner:
                    claim.unlink()
            except FileNotFoundError:
                continue  # there is none, or its owner has removed it
        if owner is None:
            for rest in self._folder.glob("*/coming-*"):
                shutil.rmtree(rest)


Row = dict[str, Any]
# Called after each epoch with the metrics of all epochs so far, and the folder of the checkpoint.
OnEpoch = Callable[[list[Row], Path], None]

NESTED = "nested"


@dataclass(frozen=True)
class WarmStart:
    """Checkpoint or scores with which a run begins.

    Attributes:
        checkpoint: Checkpoint to resume from.
        scores: Scores of the untrained model, if there is no burn-in.
        keep_scores: Function that is called with these scores if they do not exist yet; only for a run in this process.
    """

    checkpoint: ray.train.Checkpoint | None = None
    scores: FirstScores | None = None
    keep_scores: Callable[[list[ScoreBlock]], None] | None = None


def train_once(
    config: TrainConfig,
    splits: Splits,
    scaling: ray.train.ScalingConfig,
    folder: Path,
    begin: WarmStart,
    on_epoch: OnEpoch,
) -> list[Row]:
    """Train one configuration with one seed.

    Args:
        config: Settings of the run.
        splits: Shards of the splits.
        scaling: Number of ranks; one rank trains in this process.
        folder: Folder in which several ranks leave their checkpoints in the meantime.
        begin: Checkpoint or scores with which the run begins.
        on_epoch: Function that is called after each epoch; an exception in it ends the run.

    Returns:
        Metrics of all epochs.
    """
    start = begin.checkpoint
    history: list[Row] = [] if start is None else SavedCheckpoint(start).manifest().history

    def after(checkpoint: ray.train.Checkpoint) -> None:
        history[:] = SavedCheckpoint(checkpoint).manifest().history
        on_epoch(history, Path(checkpoint.path))

    if scaling.num_workers == 1:
        make_trainer(
            scoring_here(config),
            lambda: splits,
            replace(scaling, num_workers=0),
            backend=_InTrial(begin, after),
            initial_scores=begin.scores,
            on_message=_quiet,
        ).fit()
        return history
    # A unique name: a run of the same name would resume from its own checkpoints.
    nested = folder / NESTED / uuid.uuid4().hex
    try:
        fit_nested(
            lambda callbacks: make_trainer(
                config,
                lambda: splits,
                scaling,
                run_config=ray.train.RunConfig(
                    name=nested.name,
                    storage_path=str(nested.parent),
                    callbacks=callbacks,
                    checkpoint_config=ray.train.CheckpointConfig(num_to_keep=3),
                ),
                backend=RayTrainBackend(start),
                initial_scores=begin.scores,
                on_message=_quiet,
            ),
            lambda _row, path: after(ray.train.Checkpoint(path)) if path else None,
        )
    finally:
        shutil.rmtree(nested, ignore_errors=True)
    return history


def scoring_here(config: TrainConfig) -> TrainConfig:
    """The configuration of a run of one rank in a trial's process: the rank scores its own rows."""
    if config.scoring.engine != "auto" or config.scoring.overlap:
        return config
    return replace(config, scoring=replace(config.scoring, engine="workers"))


class _InTrial(RayTrainBackend):
    """Backend of a run in a trial's own process, in which Ray Train's functions raise errors because of Ray Tune."""

    def __init__(self, begin: WarmStart, after: Callable[[ray.train.Checkpoint], None]) -> None:
        super().__init__()
        self._begin, self._after = begin, after

    def ranks(self) -> RankGroup:
        return OneRank()

    def checkpoint(self) -> ray.train.Checkpoint | None:
        return self._begin.checkpoint

    def report(self, row: Mapping[str, Any], folder: Path | None) -> None:
        if "batch" not in row:  # else it is a checkpoint in the middle of an epoch
            assert folder is not None, "one rank writes all files"
            self._after(ray.train.Checkpoint.from_directory(folder))

    def scored_first(self, scores: Callable[[], list[ScoreBlock]]) -> None:
        if self._begin.keep_scores is not None:
            self._begin.keep_scores(scores())

    def preempted(self) -> bool:
        return False


def _quiet(message: Message) -> None:
    """Ignore the messages of a trial's run, because there are many trials."""


_PROGRESS = "trial.json"


@dataclass(frozen=True)
class TrialSetup:
    """What all trials of a search share; the rows are in the object store once.

    Attributes:
        base: Settings of `bss-ray train` as a tree, which the settings of a trial override.
        splits: Shards of the splits.
        objective: What is reported.
        seeds: Number of training runs of a trial.
        scaling: Number of ranks of a training run; one rank trains in the trial's own process.
        folder: Folder of the search.
    """

    base: Mapping[str, Any]
    splits: Splits
    objective: Objective
    seeds: int
    scaling: ray.train.ScalingConfig
    folder: Path


def run_trial(config: dict[str, Any], *, setup: TrialSetup) -> None:
    """Ray Tune's trainable.

    Args:
        config: `{"trial": {"settings": ..., "earlier": [folders of earlier attempts]}}`.
        setup: What all trials share.

    Reports, after each epoch, its metrics and `epochs_done` over all seeds, `objective` (the first metric so far) and
    `trial`: `values`, `seed_values` (seeds, metrics), `epoch` (the chosen one), `seconds`, `finished`.
    """
    spec = config["trial"]
    run, settings = training_config(overlay(setup.base, spec["settings"]))
    owner = ray.tune.get_context().get_trial_id()
    start = ray.tune.get_checkpoint() or _last_checkpoint(setup.folder, spec["earlier"])
    done = _read_progress(start)
    if start is not None and ray.tune.get_checkpoint() is None:
        # The driver may have been killed between the checkpoint and its report.
        _Reporter(setup, run, done)(SavedCheckpoint(start).manifest().history, None)

    burn_ins = BurnIns(setup.folder)
    for seed in range(len(done), setup.seeds):
        report = _Reporter(setup, run, done)
        one = replace(run, seed=run.seed + seed)
        begin = WarmStart(start)
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
        # A bound over some of the seeds says little, and rungs compare current values.
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


def _share(burn_ins: BurnIns, key: str, owner: str, epochs: int, report: _Reporter) -> tuple[WarmStart, OnEpoch]:
    """Use another trial's burn-in, whose epochs are reported as this trial's; or keep this trial's for others."""
    folder = burn_ins.take(key, owner)
    if epochs == 0:
        if folder is None:
            return WarmStart(keep_scores=partial(burn_ins.keep_scores, key)), report
        return WarmStart(scores=FirstScores(folder)), report
    if folder is None:

        def keep(history: list[Row], checkpoint: Path | None) -> None:
            if len(history) == epochs and checkpoint is not None:
                burn_ins.keep(key, checkpoint)
            report(history, checkpoint)

        return WarmStart(), keep
    checkpoint = ray.train.Checkpoint(str(folder))
    history = SavedCheckpoint(checkpoint).manifest().history
    for done in range(1, len(history) + 1):
        report(history[:done], None)
    return WarmStart(checkpoint), report


def _last_checkpoint(folder: Path, earlier: list[str]) -> ray.train.Checkpoint | None:
    """The last complete checkpoint of earlier attempts; a killed attempt may have left an incomplete checkpoint."""
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
    """Values of the finished seeds."""
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        done: list[list[float]] = json.loads((Path(folder) / _PROGRESS).read_text())
    return done
