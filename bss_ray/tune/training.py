"""One training run of a search: one configuration with one seed, in the calling process or on several ranks."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train

from bss_ray.sample.state import PartState
from bss_ray.train.checkpoint import SavedCheckpoint
from bss_ray.train.ranks import Ranks
from bss_ray.train.run import TrainConfig, make_trainer
from bss_ray.train.session import Session, TrainSession
from bss_ray.tune.burn_in import FirstScores
from bss_ray.tune.nested import fit_nested

Row = dict[str, Any]
# Called after each epoch with the metrics of all epochs so far, and the folder of the checkpoint.
OnEpoch = Callable[[list[Row], Path], None]

NESTED = "nested"


@dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    Attributes:
        checkpoint: to go on from.
        scores: of the untrained model, where there is no burn-in.
        keep_scores: called with them where there are none yet; of a run in this process.
    """

    checkpoint: ray.train.Checkpoint | None = None
    scores: FirstScores | None = None
    keep_scores: Callable[[list[PartState]], None] | None = None


def train_once(
    config: TrainConfig,
    splits: dict[str, Any],
    scaling: ray.train.ScalingConfig,
    folder: Path,
    begin: Beginning,
    on_epoch: OnEpoch,
) -> list[Row]:
    """Train one configuration with one seed.

    Args:
        config: what is trained.
        splits: shards by split.
        scaling: ranks; one rank trains in this process.
        folder: where several ranks leave their checkpoints in the meantime.
        begin: what the run begins with.
        on_epoch: called after each epoch; what it raises ends the run.

    Returns:
        Metrics of all epochs.
    """
    start = begin.checkpoint
    history: list[Row] = [] if start is None else SavedCheckpoint(start).manifest().history
    placed: dict[str, Any] = {"on_message": _quiet}
    if begin.scores is not None:
        placed["initial_scores"] = begin.scores

    def after(checkpoint: ray.train.Checkpoint) -> None:
        history[:] = SavedCheckpoint(checkpoint).manifest().history
        on_epoch(history, Path(checkpoint.path))

    if scaling.num_workers == 1:
        here = replace(scaling, num_workers=0)
        session = _InTrial(begin, after)
        make_trainer(scoring_here(config), splits, scaling_config=here, session=session, **placed).fit()
        return history
    # A name of its own: a run of the same name would go on from its own checkpoints.
    nested = folder / NESTED / uuid.uuid4().hex
    try:
        fit_nested(
            lambda callbacks: make_trainer(
                config,
                splits,
                scaling_config=scaling,
                run_config=ray.train.RunConfig(
                    name=nested.name,
                    storage_path=str(nested.parent),
                    callbacks=callbacks,
                    checkpoint_config=ray.train.CheckpointConfig(num_to_keep=3),
                ),
                session=TrainSession(start),
                **placed,
            ),
            lambda _row, path: after(ray.train.Checkpoint(path)) if path else None,
        )
    finally:
        shutil.rmtree(nested, ignore_errors=True)
    return history


def scoring_here(config: TrainConfig) -> TrainConfig:
    """The run of one rank as it is trained in a trial's process: the rank scores its own rows."""
    if config.scoring.engine != "auto" or config.scoring.overlap:
        return config
    return replace(config, scoring=replace(config.scoring, engine="workers"))


class _InTrial(Session):
    """Of a run in a trial's own process, where Ray Train's functions refuse to work for Ray Tune's sake."""

    def __init__(self, begin: Beginning, after: Callable[[ray.train.Checkpoint], None]) -> None:
        self._begin, self._after = begin, after

    def ranks(self) -> Ranks:
        return Ranks(rank=0, count=1)

    def checkpoint(self) -> ray.train.Checkpoint | None:
        return self._begin.checkpoint

    def report(self, row: Mapping[str, Any], checkpoint: ray.train.Checkpoint | None) -> None:
        if "batch" not in row:  # else it is a checkpoint in the middle of an epoch
            assert checkpoint is not None, "one rank writes all files"
            self._after(checkpoint)

    def scored_first(self, scores: Callable[[], list[PartState]]) -> None:
        if self._begin.keep_scores is not None:
            self._begin.keep_scores(scores())

    def preempted(self) -> bool:
        return False


def _quiet(message: dict[str, Any]) -> None:
    """A trial's own messages are for nobody: there are many trials."""
